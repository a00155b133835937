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

// Sums over a row: lane by lane in two chains, the second for every other vector, which hides half of an add's wait.
template <class F>
SERVD_INLINE float sum_row(int64_t hidden, F step) {
    vf even = {}, odd = {};
    int64_t i = 0;
    for (; i + 2 * W <= hidden; i += 2 * W) {
        even = step(i, int64_t(W), even);
        odd = step(i + W, int64_t(W), odd);
    }
    if (i < hidden) even = step(i, hidden - i, even);
    if (i + W < hidden) odd = step(i + W, hidden - i - W, odd);
    return sum_lanes(even + odd);
}

template <class T>
struct NormRow {
    const T* x;
    const T* residual;  // or null
    T* new_residual;
    T* out;

    // n values at i, in the pass that reads them first. The statistics are those of the rounded sum: it is what the
    // next layer will read.
    __attribute__((always_inline)) vf first(int64_t i, int64_t n) const {
        if (!residual) return load_part(x + i, n);
        store_part(new_residual + i, load_part(x + i, n) + load_part(residual + i, n), n);
        return load_part(new_residual + i, n);
    }

    const T* values() const { return residual ? new_residual : x; }  // for the passes after it
};

// normalise(NormRow<T>) for every row, on all threads where that pays.
template <class T, class F>
void for_norm_rows(const NormCall& call, int64_t hidden, F normalise) {
    parallel(call.outer, call.outer * call.inner * hidden, [&](int64_t i) {
        for (int64_t j = 0; j < call.inner; ++j) {
            int64_t row = (i * call.inner + j) * hidden;
            NormRow<T> values = {static_cast<const T*>(call.x) + i * call.outer_stride + j * call.inner_stride,
                                 nullptr, nullptr, static_cast<T*>(call.out) + row};
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
