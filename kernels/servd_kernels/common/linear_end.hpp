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

// `rows` rows of a panel from first_row on, W * VECTORS columns wide or what out has of them. products and gates
// [rows][W * VECTORS]; gates may be null where there is no gate.
template <int VECTORS>
SERVD_INLINE void finish_rows(const LinearEnd& end, int64_t first_row, int64_t rows, int64_t column,
                              const float* products, const float* gates) {
    constexpr int64_t kWidth = W * VECTORS;
    bool only_rounds = end.only_rounds(), is_whole = column + kWidth <= end.n;
    with_dtype(end.out_dtype, [&](auto tag) SERVD_MEMBER {
        using O = typename decltype(tag)::type;
        for (int64_t row = 0; row < rows; ++row) {
            O* out = static_cast<O*>(end.out) + (first_row + row) * end.n + column;
            if (only_rounds && is_whole) {
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) store(out + v * W, load(products + row * kWidth + v * W));
                continue;
            }
            for (int64_t at = 0; at < lesser(kWidth, end.n - column); at += W) {
                int64_t n = lesser(int64_t(W), end.n - column - at);
                vf gate = gates ? load(gates + row * kWidth + at) : vf{};
                vf value = load(products + row * kWidth + at);
                value = follow(end, first_row + row, column + at, n, value, gate);
                if (n == W) store(out + at, value);
                else store_n(out + at, value, n);
            }
        }
        return 0;
    });
}

// The lines of `rows` rows of out from first_row on, fetched for writing while the product is computed.
SERVD_INLINE void prepare_rows(const LinearEnd& end, int64_t first_row, int64_t rows, int64_t column, int64_t width) {
    int64_t size = end.out_dtype == kFloat32 ? 4 : 2, bytes = lesser(width, end.n - column) * size;
    const char* out = static_cast<const char*>(end.out) + (first_row * end.n + column) * size;
    for (int64_t row = 0; row < rows; ++row, out += end.n * size)
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(out + at, 1);
}

}  // namespace SERVD_ISA
