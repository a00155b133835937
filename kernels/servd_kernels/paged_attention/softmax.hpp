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

// Turns scores into weights relative to the row's new maximum, zero where not seen; returns the factor for what
// the row held before. is_rounded: the weights become bfloat16, so that their sum is of what is multiplied.
inline float soften(float* scores, uint64_t seen, bool is_rounded, float& top, float& sum) {
    constexpr int kVectors = kTokens / W;
    const vf none = broadcast(-__builtin_inff());
    vf weights[kVectors], highest = none, total = {};
    for (int v = 0; v < kVectors; ++v) {
        weights[v] = select(seen >> (v * W), load(scores + v * W), none);
        highest = vmax(highest, weights[v]);
    }
    float new_top = max_lanes(highest);
    new_top = top > new_top ? top : new_top;
    for (int v = 0; v < kVectors; ++v) {
        weights[v] = vexp(weights[v] - new_top);
        if (is_rounded) weights[v] = (vf)(((vu)weights[v] + 0x8000) & 0xffff0000u);
        store(scores + v * W, weights[v]);
        total += weights[v];
    }
    float keep = top == new_top ? 1.f : vexp(broadcast(top - new_top))[0];
    top = new_top;
    sum = sum * keep + sum_lanes(total);
    return keep;
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
