// Owns: a row's online softmax (FlashAttention-2, Dao 2023): options, mask, weights, and the merge of two states.
// Does not know: keys or values: only scores and sums.
#pragma once
#include "values.hpp"

namespace SERVD_ISA {
namespace {

// The softmax state of a unit's rows: running maximum, sum of weights, and weighted sums of values.
struct State {
    float *top, *sum;  // [rows]
    float* sums;       // [rows][sums_width]

    static int64_t size(int rows, int64_t width) { return rows * (width + 2); }

    static State at(float* memory, int rows, int64_t width) {
        return {memory + rows * width, memory + rows * width + rows, memory};
    }

    static State empty(float* memory, int rows, int64_t width) {
        State state = at(memory, rows, width);
        for (int r = 0; r < rows; ++r) state.top[r] = -__builtin_inff();
        memset(state.sum, 0, rows * sizeof(float));
        memset(state.sums, 0, rows * width * sizeof(float));
        return state;
    }
};

// A row's bias by distance and its cap; scores [kTokens] of the tile at t, the query at `position`.
inline void apply_options(const Call& call, int64_t head, int64_t position, int64_t t, float* scores) {
    vf distance;
    for (int i = 0; i < W; ++i) distance[i] = float(t + i - position);
    for (int v = 0; v < kTokens; v += W, distance += float(W)) {
        vf score = load(scores + v);
        if (call.alibi_slopes) score += distance * call.alibi_slopes[head];
        if (call.softcap > 0) score = vtanh(score / call.softcap) * call.softcap;
        store(scores + v, score);
    }
}

// Hides what a row does not see of its scores [kTokens]; returns the highest of the others.
SERVD_INLINE float hide(float* scores, uint64_t seen) {
    const vf none = broadcast(-__builtin_inff());
    vf highest = none;
    if (seen == ~uint64_t(0)) {
        for (int v = 0; v < kTokens; v += W) highest = vmax(highest, load(scores + v));
        return max_lanes(highest);
    }
    for (int v = 0; v < kTokens; v += W) {
        vf score = select(seen >> v, load(scores + v), none);
        store(scores + v, score);
        highest = vmax(highest, score);
    }
    return max_lanes(highest);
}

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
// Stores bfloat16, and returns what was stored: the sum of weights is of what is multiplied.
SERVD_INLINE vf store_rounded(uint32_t* out, vf weight) {
    __m256i halves = (__m256i)_mm512_cvtneps_pbh(weight);
    _mm256_store_si256((__m256i*)out, halves);
    return widen((vh)halves);
}
#else
SERVD_INLINE vf store_rounded(uint32_t*, vf weight) { return weight; }
#endif

// e^x for x <= 0 within 4 units in the last place; 1 at 0.
SERVD_INLINE vf softmax_exp(vf x) {
    const vf magic = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
#if defined(__AVX512F__)
    x = _mm512_max_ps(broadcast(-110.f), x);  // in this order NaN stays NaN; e^-110 is 0
#endif
    vf shifted = fma(x, broadcast(1.44269504088896341f), magic);
    vf n = shifted - magic;
    vf r = fma(n, broadcast(-0.693359375f), x);
    r = fma(n, broadcast(2.12194440e-4f), r);
    vf y = fma(broadcast(8.3125206490e-3f), r, broadcast(4.1890157589e-2f));
    y = fma(y, r, broadcast(1.6667114647e-1f));
    y = fma(y, r, broadcast(4.9999231488e-1f));
    y = fma(y, r * r, r + 1.f);
#if defined(__AVX512F__)
    return _mm512_scalef_ps(y, n);
#else
    vi power = ((vi)shifted - (vi)magic + 127) << 23;  // 2^n, n in [-126, 0]
    return x < -87.3f ? vf{} : y * (vf)power;
#endif
}

// One row's scores to weights under its maximum; returns their sum in lanes.
template <bool ROUNDED>
SERVD_INLINE vf weigh(float* scores, float top, uint32_t* pairs) {
    constexpr int kVectors = W == 4 ? 2 : 4;
    vf sum[kVectors] = {};
    for (int v = 0; v < kTokens; v += kVectors * W) {
        vf weight[kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) weight[i] = softmax_exp(load(scores + v + i * W) - top);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
            if (ROUNDED) weight[i] = store_rounded(pairs + (v + i * W) / 2, weight[i]);
            else store(scores + v + i * W, weight[i]);
            sum[i] += weight[i];
        }
    }
    if (kVectors == 4) return (sum[0] + sum[1]) + (sum[2 % kVectors] + sum[3 % kVectors]);
    return sum[0] + sum[1];
}

// Turns scores of kDotRows rows at most into weights relative to each row's new maximum, zero where not seen, and
// adds them to its sum, kept in lanes [W]. keep: the factors for what the rows held before. ROUNDED: weights are
// written as pairs; otherwise they replace the scores.
template <bool ROUNDED>
void soften(float* scores, const uint64_t* seen, int rows, float* top, float* lanes, float* keep, Weights& weights) {
    alignas(64) float change[16] = {};
    for (int r = 0; r < rows; ++r) {
        if (!seen[r]) continue;
        float highest = hide(scores + r * kTokens, seen[r]);
        highest = top[r] > highest ? top[r] : highest;
        change[r] = top[r] - highest;
        top[r] = highest;
    }
    for (int r = 0; r < rows; r += W) store(change + r, vexp(load(change + r)));
    memcpy(keep, change, rows * sizeof(float));
    for (int r = 0; r < rows; ++r) {
        float* p = scores + r * kTokens;
        uint32_t* pairs = weights.words[0][r];
        if (!seen[r]) {
            memset(p, 0, kTokens * sizeof(float));
            memset(pairs, 0, kTokens * sizeof(uint16_t));
            continue;
        }
        store(lanes + r * W, fma(load(lanes + r * W), broadcast(keep[r]), weigh<ROUNDED>(p, top[r], pairs)));
    }
}

// Adds a later state of one row to its total.
inline void merge_row(float* top, float* sum, float* sums, float other_top, float other_sum, const float* other_sums,
                      int64_t width) {
    if (other_sum == 0.f) return;  // the row sees no key there
    float new_top = *top > other_top ? *top : other_top;
    float keep = vexp(broadcast(*top - new_top))[0], add = vexp(broadcast(other_top - new_top))[0];
    *top = new_top;
    *sum = *sum * keep + other_sum * add;
    for (int64_t d = 0; d < width; d += W) {
        vf other = other_sums ? load(other_sums + d) : vf{};
        store(sums + d, fma(other, broadcast(add), load(sums + d) * keep));
    }
}

inline void merge(const State& total, const State& span, int rows, int64_t width) {
    for (int r = 0; r < rows; ++r)
        merge_row(total.top + r, total.sum + r, total.sums + r * width, span.top[r], span.sum[r],
                  span.sums + r * width, width);
}

}  // namespace
}  // namespace SERVD_ISA
