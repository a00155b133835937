// Owns: rotary embedding of q and k, and the write of k and v into their pages, in one pass over the tokens.
// Does not know: how slots were assigned, or how a row is encoded (kv_side.hpp).
#include "../common/kernel.hpp"
#include "../common/kv_side.hpp"

namespace SERVD_ISA {
namespace {

// The angles of one token. Interleaved, they are spread over the pairs: cosines twice, sines as minus and plus.
struct Angles {
    const float *cosine, *sine;
    alignas(64) float spread[2][kMaxKvHeadDim];

    Angles(const float* cos_sin, int64_t half, bool interleaved) : cosine(cos_sin), sine(cos_sin + half) {
        if (!interleaved) return;
        for (int64_t i = 0; i < half; ++i) {
            spread[0][2 * i] = spread[0][2 * i + 1] = cosine[i];
            spread[1][2 * i] = -sine[i];
            spread[1][2 * i + 1] = sine[i];
        }
        cosine = spread[0];
        sine = spread[1];
    }
    Angles(const Angles&) = delete;
};

// x may equal out.
template <class T>
void rotate_half_split(const T* x, T* out, const Angles& angles, int64_t half) {
    int64_t i = 0;
    for (; i + W <= half; i += W) {
        vf c = load(angles.cosine + i), s = load(angles.sine + i), first = load(x + i), second = load(x + half + i);
        store(out + i, first * c - second * s);
        store(out + half + i, second * c + first * s);
    }
    if (i == half) return;
    int64_t n = half - i;
    vf c = load_n(angles.cosine + i, n), s = load_n(angles.sine + i, n);
    vf first = load_n(x + i, n), second = load_n(x + half + i, n);
    store_n(out + i, first * c - second * s, n);
    store_n(out + half + i, second * c + first * s, n);
}

template <class T>
void rotate_interleaved(const T* x, T* out, const Angles& angles, int64_t rotary_dim) {
    for (int64_t i = 0; i < rotary_dim; i += W) {
        int64_t n = lesser(int64_t(W), rotary_dim - i);
        vf c = load_n(angles.cosine + i, n), s = load_n(angles.sine + i, n), v = load_n(x + i, n);
        vf turned = v * c + swap_lanes<1>(v) * s;
        if (n == W) store(out + i, turned);
        else store_n(out + i, turned, n);
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
    const KVLayout& layout;
    bool interleaved;
    const int32_t* key_order;  // [kv_heads, head_dim] or null

    const int32_t* order_of(int64_t kv_head) const {
        return key_order ? key_order + kv_head * layout.head_dim : nullptr;
    }
};

// x may equal out; dimensions from rotary_dim on are left to the caller.
template <class T>
void rotate(const Call& call, const Angles& angles, const T* x, T* out) {
    if (call.interleaved) rotate_interleaved(x, out, angles, call.rotary_dim);
    else rotate_half_split(x, out, angles, call.rotary_dim / 2);
}

// Queries are turned like rotated keys, so that their dot products stay the same.
template <class T>
void transform_query(T* q, const int32_t* order, int64_t head_dim) {
    alignas(64) float values[kMaxKvHeadDim + W];
    convert_row(q, values, head_dim);
    if (order) reorder(values, order, head_dim);
    hadamard(values, head_dim);
    convert_row(values, q, head_dim);
}

template <class T>
void process_token(const Call& call, int64_t token) {
    const KVLayout& layout = call.layout;
    Angles angles(call.cos_sin + call.positions[token] * call.rotary_dim, call.rotary_dim / 2, call.interleaved);
    for (int64_t h = 0; h < call.q.count; ++h) {
        T* q = call.q.at<T>(token, h);
        rotate(call, angles, q, q);
        if (layout.k.is_rotated) transform_query(q, call.order_of(h * call.k.count / call.q.count), layout.head_dim);
    }
    int64_t slot = call.slots[token];
    if (slot < 0) return;
    int64_t offset = slot % layout.block_size, rest = layout.head_dim - call.rotary_dim;
    alignas(64) T turned[kMaxKvHeadDim];
    KVRow row;
    for (int64_t h = 0; h < call.k.count; ++h) {
        uint8_t* head = layout.head(call.cache, slot, h);
        const T* k = call.k.at<T>(token, h);
        rotate(call, angles, k, turned);
        memcpy(turned + call.rotary_dim, k + call.rotary_dim, rest * sizeof(T));
        encode_row(layout.k, turned, call.order_of(h), layout.head_dim, row);
        place_row(layout, layout.k, row, head, offset);
        encode_row(layout.v, call.v.at<T>(token, h), nullptr, layout.head_dim, row);
        place_row(layout, layout.v, row, head, offset);
    }
}

}  // namespace
}  // namespace SERVD_ISA

// Rotates q in place and writes rotated k, and v, to the cache; strides in elements. layout: KVLayout. Returns 1 for
// a position outside cos_sin, 2 for a slot outside the cache; then nothing was written.
SERVD_EXPORT(rope_and_cache)(void* q, int64_t q_token_stride, int64_t q_head_stride, int64_t q_heads, void* k,
                             int64_t k_token_stride, int64_t k_head_stride, void* v, int64_t v_token_stride,
                             int64_t v_head_stride, const int64_t* positions, const float* cos_sin,
                             int64_t max_position, int64_t rotary_dim, const int64_t* slots, void* cache,
                             const void* layout, int64_t num_blocks, int64_t num_tokens, int interleaved,
                             const int32_t* key_order, int dtype) {
    using namespace SERVD_ISA;
    const KVLayout& kv = *static_cast<const KVLayout*>(layout);
    for (int64_t t = 0; t < num_tokens; ++t) {
        if (positions[t] < 0 || positions[t] >= max_position) return 1;
        if (slots[t] < -1 || slots[t] >= num_blocks * kv.block_size) return 2;
    }
    Call call = {{q, q_heads, q_token_stride, q_head_stride},
                 {k, kv.kv_heads, k_token_stride, k_head_stride},
                 {v, kv.kv_heads, v_token_stride, v_head_stride},
                 positions, cos_sin, rotary_dim, slots, cache, kv, interleaved != 0, key_order};
    return with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        parallel(num_tokens, num_tokens * (q_heads + 2 * kv.kv_heads) * kv.head_dim,
                 [&call](int64_t token) { process_token<T>(call, token); });
        return 0;
    });
}
SERVD_RECORDABLE(rope_and_cache)
