// Owns: what the norms share: a row with the residual add fused, its walk by vectors, and the walk over rows.
// Does not know: the statistics, nor what the rows are (a hidden state, or one head for QK-norm).
#pragma once
#include "kernel.hpp"

namespace SERVD_ISA {

// Rows are [outer, inner], strides in elements. residual and new_residual may be null; out and new_residual are
// contiguous.
struct NormCall {
    const void* x;
    int64_t outer_stride, inner_stride;
    const void* residual;
    int64_t residual_outer_stride, residual_inner_stride;
    void *out, *new_residual;
    int64_t outer, inner;
};

template <class T>
SERVD_INLINE vf load_part(const T* p, int64_t n) { return n >= W ? load(p) : load_n(p, n); }

template <class T>
SERVD_INLINE void store_part(T* p, vf v, int64_t n) {
    if (n >= W) store(p, v);
    else store_n(p, v, n);
}

// use(i, n) for every vector of a row: it begins at i and has n elements, W but in the last.
template <class F>
SERVD_INLINE void walk_row(int64_t hidden, F use) {
    int64_t i = 0;
    for (; i + W <= hidden; i += W) use(i, int64_t(W));
    if (i < hidden) use(i, hidden - i);
}

// The sum over a row of step(i, n, sum), which adds to the lanes: in four chains, one for every fourth vector, so that
// an addition need not wait for the one before.
template <class F>
SERVD_INLINE float sum_row(int64_t hidden, F step) {
    constexpr int kChains = 4;
    vf sums[kChains] = {};
    int64_t i = 0;
    for (; i + kChains * W <= hidden; i += kChains * W)
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) sums[c] = step(i + c * W, int64_t(W), sums[c]);
    for (; i < hidden; i += W) sums[0] = step(i, hidden - i, sums[0]);
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
struct NormRow {
    const T* x;
    const T* residual;  // or null
    T* new_residual;
    T* out;
    const T* next;  // where the row after it most likely begins

    // n values at i, in the pass that reads them first. The statistics are those of the rounded sum: it is what the
    // next layer will read.
    SERVD_MEMBER vf first(int64_t i, int64_t n) const {
        if (!residual) return load_part(x + i, n);
        store_part(new_residual + i, load_part(x + i, n) + load_part(residual + i, n), n);
        return load_part(new_residual + i, n);
    }

    // In the last pass, which reads no memory: the next row arrives while this one is computed.
    SERVD_MEMBER void prefetch(int64_t i) const { __builtin_prefetch(next + i); }

    const T* values() const { return residual ? new_residual : x; }  // for the passes after it
};

// normalise(NormRow<T>) for every row, on all threads where that pays.
template <class T, class F>
void for_norm_rows(const NormCall& call, int64_t hidden, F normalise) {
    parallel(call.outer, call.outer * call.inner * hidden, [&](int64_t i) {
        for (int64_t j = 0; j < call.inner; ++j) {
            int64_t row = (i * call.inner + j) * hidden;
            const T* x = static_cast<const T*>(call.x) + i * call.outer_stride + j * call.inner_stride;
            int64_t to_next = j + 1 < call.inner ? call.inner_stride : call.outer_stride - j * call.inner_stride;
            NormRow<T> values = {x, nullptr, nullptr, static_cast<T*>(call.out) + row, x + to_next};
            if (call.residual) {
                values.residual = static_cast<const T*>(call.residual) + i * call.residual_outer_stride +
                                  j * call.residual_inner_stride;
                values.new_residual = static_cast<T*>(call.new_residual) + row;
            }
            normalise(values);
        }
    });
}

}  // namespace SERVD_ISA
