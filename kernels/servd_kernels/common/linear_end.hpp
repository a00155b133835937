// Owns: what follows the product of a coded linear: bias, activation, gate, residual and the one rounding.
// Does not know: codes or scales.
#pragma once
#include "activation.hpp"
#include "rows.hpp"

namespace SERVD_ISA {

// out [m, n] = activation(product + bias) + residual; or with a gate, whose bias comes first in bias [2 * n],
// activation(gate + bias) * (product + bias) + residual.
struct LinearEnd {
    const void *bias, *residual;  // or null
    void* out;                    // contiguous
    int64_t n, residual_stride;   // in elements
    int bias_dtype, residual_dtype, out_dtype, activation, is_gated;

    bool only_rounds() const { return !bias && !residual && !is_gated && activation == kNoActivation; }
};

// n [0, W] columns of a row.
SERVD_INLINE vf follow(const LinearEnd& end, int64_t row, int64_t column, int64_t n, vf value, vf gate) {
    if (end.bias) {
        if (end.is_gated) gate += load_any(end.bias, end.bias_dtype, column, n);
        value += load_any(end.bias, end.bias_dtype, end.is_gated ? end.n + column : column, n);
    }
    if (end.is_gated) value *= activated(end.activation, gate);
    else value = activated(end.activation, value);
    if (end.residual) value += load_any(end.residual, end.residual_dtype, row * end.residual_stride + column, n);
    return value;
}

// Rows first_row.. and W * VECTORS columns, those that out has: value(row, v) and gate(row, v) are the products,
// `row` counted from first_row.
template <int VECTORS, class Value, class Gate>
SERVD_INLINE void finish_rows(const LinearEnd& end, int64_t first_row, int64_t rows, int64_t column, Value value,
                              Gate gate) {
    bool only_rounds = end.only_rounds();
    with_dtype(end.out_dtype, [&](auto tag) SERVD_MEMBER {
        using O = typename decltype(tag)::type;
        for (int64_t row = 0; row < rows; ++row) {
            O* out = static_cast<O*>(end.out) + (first_row + row) * end.n + column;
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                int64_t n = lesser(int64_t(W), end.n - column - v * W);
                if (n <= 0) break;
                vf total = value(row, v);
                if (!only_rounds) {
                    vf other = end.is_gated ? gate(row, v) : vf{};
                    total = follow(end, first_row + row, column + v * W, n, total, other);
                }
                if (n == W) store(out + v * W, total);
                else store_n(out + v * W, total, n);
            }
        }
        return 0;
    });
}

}  // namespace SERVD_ISA
