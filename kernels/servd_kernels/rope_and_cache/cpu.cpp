// Owns: rotary embedding of q and k, and the write of k and v into their pages, in one pass over the tokens.
// Does not know: how slots were assigned.
#include "../common/kernel.hpp"

namespace SERVD_ISA {
namespace {

// x may equal out. Dimensions from rotary_dim on pass through.
template <class T>
void rotate_half_split(const T* x, T* out, const float* cosine, const float* sine, int64_t half) {
    for (int64_t i = 0; i < half; i += W) {
        int64_t n = lesser(int64_t(W), half - i);
        vf c = load_n(cosine + i, n), s = load_n(sine + i, n);
        vf first = load_n(x + i, n), second = load_n(x + half + i, n);
        store_n(out + i, first * c - second * s, n);
        store_n(out + half + i, second * c + first * s, n);
    }
}

template <class T>
void rotate_interleaved(const T* x, T* out, const float* cosine, const float* sine, int64_t half) {
    // Plain float pairs, W at a time, so that conversion and rounding are those of the vector code.
    for (int64_t i = 0; i < half; i += W / 2) {
        int64_t n = lesser(int64_t(W / 2), half - i);
        float pairs[W], turned[W];
        store(pairs, load_n(x + 2 * i, 2 * n));
        for (int64_t j = 0; j < W / 2; ++j) {
            float c = j < n ? cosine[i + j] : 0.f, s = j < n ? sine[i + j] : 0.f;
            turned[2 * j] = pairs[2 * j] * c - pairs[2 * j + 1] * s;
            turned[2 * j + 1] = pairs[2 * j + 1] * c + pairs[2 * j] * s;
        }
        store_n(out + 2 * i, load(turned), 2 * n);
    }
}

struct Heads {
    void* data;
    int64_t count, token_stride, head_stride;
    template <class T>
    T* at(int64_t token, int64_t head) const {
        return static_cast<T*>(data) + token * token_stride + head * head_stride;
    }
};

struct Call {
    Heads q, k, v;
    const int64_t* positions;
    const float* cos_sin;  // [max_pos, rotary_dim]
    int64_t rotary_dim;
    const int64_t* slots;
    void* cache;
    int64_t block_stride, kv_stride, head_stride, token_stride, block_size, head_dim;
    bool interleaved;
};

template <class T>
void process_token(const Call& call, int64_t token) {
    int64_t half = call.rotary_dim / 2, rest = call.head_dim - call.rotary_dim;
    const float* cosine = call.cos_sin + call.positions[token] * call.rotary_dim;
    auto rotate = [&](const T* x, T* out) {
        if (call.interleaved) rotate_interleaved(x, out, cosine, cosine + half, half);
        else rotate_half_split(x, out, cosine, cosine + half, half);
    };
    for (int64_t h = 0; h < call.q.count; ++h) {
        T* q = call.q.at<T>(token, h);
        rotate(q, q);
    }
    int64_t slot = call.slots[token];
    if (slot < 0) return;
    T* page = static_cast<T*>(call.cache) + slot / call.block_size * call.block_stride +
              slot % call.block_size * call.token_stride;
    for (int64_t h = 0; h < call.k.count; ++h) {
        T* key = page + h * call.head_stride;
        const T* k = call.k.at<T>(token, h);
        rotate(k, key);
        memcpy(key + call.rotary_dim, k + call.rotary_dim, rest * sizeof(T));
        memcpy(key + call.kv_stride, call.v.at<T>(token, h), call.head_dim * sizeof(T));
    }
}

}  // namespace
}  // namespace SERVD_ISA

// Rotates q in place and writes rotated k, and v, to the cache; strides in elements. Returns 1 for a position
// outside cos_sin, 2 for a slot outside the cache; then nothing was written.
SERVD_EXPORT(rope_and_cache)(void* q, int64_t q_token_stride, int64_t q_head_stride, int64_t q_heads, void* k,
                             int64_t k_token_stride, int64_t k_head_stride, void* v, int64_t v_token_stride,
                             int64_t v_head_stride, int64_t kv_heads, const int64_t* positions,
                             const float* cos_sin, int64_t max_position, int64_t rotary_dim,
                             const int64_t* slots, void* cache, int64_t block_stride, int64_t kv_stride,
                             int64_t head_stride, int64_t token_stride, int64_t num_blocks,
                             int64_t block_size, int64_t num_tokens, int64_t head_dim, int interleaved,
                             int dtype) {
    using namespace SERVD_ISA;
    for (int64_t t = 0; t < num_tokens; ++t) {
        if (positions[t] < 0 || positions[t] >= max_position) return 1;
        if (slots[t] < -1 || slots[t] >= num_blocks * block_size) return 2;
    }
    Call call = {{q, q_heads, q_token_stride, q_head_stride},
                 {k, kv_heads, k_token_stride, k_head_stride},
                 {v, kv_heads, v_token_stride, v_head_stride},
                 positions, cos_sin, rotary_dim, slots, cache, block_stride, kv_stride, head_stride,
                 token_stride, block_size, head_dim, interleaved != 0};
    return with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        parallel(num_tokens, num_tokens * (q_heads + 2 * kv_heads) * head_dim,
                 [&call](int64_t token) { process_token<T>(call, token); });
        return 0;
    });
}
