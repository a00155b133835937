// Owns: the choice of each token's experts and their weights.
// Does not know: the experts (moe). The paper: Shazeer et al., "Outrageously Large Neural Networks".
#include "../common/kernel.hpp"

namespace SERVD_ISA {
namespace {

constexpr int64_t kTokens = 16;  // of one unit

struct Scores {
    float *logits, *values;  // [padded experts]
    int32_t* keys;           // in the order of the choice, as integers
    int64_t experts;

    int64_t padded() const { return (experts + W - 1) / W * W; }
};

// Integers in the order of floats; NaN is above all, and the two zeros are one.
SERVD_INLINE vi key_of(vf value) {
    vi bits = (vi)(value + 0.f);
    vi key = bits ^ ((bits >> 31) & 0x7fffffff);
    return value == value ? key : vi{} + 0x7fffffff;
}

SERVD_INLINE void softmax(const Scores& scores) {
    vf most = load(scores.logits), sum = {};
    for (int64_t i = W; i < scores.padded(); i += W) most = vmax(most, load(scores.logits + i));
    float highest = max_lanes(most);
    for (int64_t i = 0; i < scores.padded(); i += W) {
        vf value = vexp(load(scores.logits + i) - highest);
        sum += value;
        store(scores.values + i, value);
    }
    float total = sum_lanes(sum);
    for (int64_t i = 0; i < scores.padded(); i += W) store(scores.values + i, load(scores.values + i) / total);
}

SERVD_INLINE void sigmoid(const Scores& scores) {
    for (int64_t i = 0; i < scores.padded(); i += W)
        store(scores.values + i, 1.f / (vexp(-load(scores.logits + i)) + 1.f));
}

// The expert of the greatest key, the first of several; its key is then below all others.
SERVD_INLINE int64_t take_best(const Scores& scores) {
    vi most = vi{} + INT32_MIN;
    for (int64_t i = 0; i < scores.padded(); i += W) {
        vi some;
        memcpy(&some, scores.keys + i, sizeof some);
        most = some > most ? some : most;
    }
    int32_t best = max_lanes(most);
    int64_t expert = 0;
    while (scores.keys[expert] != best) ++expert;
    scores.keys[expert] = INT32_MIN;
    return expert;
}

template <class T>
void route_token(const T* logits, const float* bias, const Scores& scores, int64_t top_k, bool is_sigmoid,
                 bool renormalizes, float* weights, int32_t* ids) {
    for (int64_t i = 0; i < scores.experts; i += W) {
        int64_t n = lesser(int64_t(W), scores.experts - i);
        vf value = load_n(logits + i, n);
        for (int64_t lane = n; lane < W; ++lane) value[lane] = -__builtin_inff();
        store(scores.logits + i, value);
    }
    if (is_sigmoid) sigmoid(scores);
    else softmax(scores);
    for (int64_t i = 0; i < scores.experts; i += W) {
        int64_t n = lesser(int64_t(W), scores.experts - i);
        vi key = key_of(bias ? load(scores.values + i) + load_n(bias + i, n) : load(scores.logits + i));
        for (int64_t lane = n; lane < W; ++lane) key[lane] = INT32_MIN;
        memcpy(scores.keys + i, &key, sizeof key);
    }
    float sum = 0;
    for (int64_t slot = 0; slot < top_k; ++slot) {
        int64_t expert = take_best(scores);
        ids[slot] = int32_t(expert);
        weights[slot] = scores.values[expert];
        sum += weights[slot];
    }
    if (!renormalizes) return;
    sum = sum < 1e-20f ? 1e-20f : sum;
    for (int64_t slot = 0; slot < top_k; ++slot) weights[slot] /= sum;
}

}  // namespace
}  // namespace SERVD_ISA

// logits [tokens, experts] with a row stride; bias [experts] or null; weights and ids [tokens, top_k].
SERVD_EXPORT(route)(const void* logits, int64_t row_stride, const float* bias, float* weights, int32_t* ids,
                    int64_t tokens, int64_t experts, int64_t top_k, int is_sigmoid, int renormalizes, int dtype) {
    using namespace SERVD_ISA;
    return with_dtype(dtype, [=](auto tag) {
        using T = typename decltype(tag)::type;
        const T* rows = static_cast<const T*>(logits);
        int64_t units = (tokens + kTokens - 1) / kTokens;
        parallel(units, tokens * experts * top_k / W, [=](int64_t unit) {
            int64_t padded = (experts + W - 1) / W * W;
            Scratch<float> values(2 * padded);
            Scratch<int32_t> keys(padded);
            Scores scores = {values.data, values.data + padded, keys.data, experts};
            for (int64_t token = unit * kTokens; token < lesser((unit + 1) * kTokens, tokens); ++token)
                route_token(rows + token * row_stride, bias, scores, top_k, is_sigmoid != 0, renormalizes != 0,
                            weights + token * top_k, ids + token * top_k);
        });
        return 0;
    });
}
SERVD_RECORDABLE(route)
