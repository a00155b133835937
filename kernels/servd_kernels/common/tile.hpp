// Owns: the register tile C[rows][columns] += A[rows][k] * B[k][columns] that linear and attention share.
// Does not know: where A and B come from. Each element sums over k in ascending order, one fused step each.
#pragma once
#include "simd.hpp"

namespace SERVD_ISA {

// Tile height and width in vectors, sized to the register file: 32 registers, or 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8, kTileVectors = 3;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif

// The rows of A under a tile: row r begins at (*this)[r]. Every fourth row is a base of its own, which the compiler
// must not compute from the first: eight offsets would not fit into the registers, and would be reloaded each step.
template <int ROWS, class T>
struct TileRows {
    static constexpr int kBases = (ROWS + 3) / 4;
    const T* bases[kBases];
    int64_t stride;

    SERVD_MEMBER TileRows(const T* first, int64_t row_stride) : stride(row_stride) {
#pragma GCC unroll 4
        for (int b = 0; b < kBases; ++b) {
            bases[b] = first + 4 * b * row_stride;
            asm("" : "+r"(bases[b]));
        }
    }
    SERVD_MEMBER const T* operator[](int r) const { return bases[r / 4] + r % 4 * stride; }
};

// Element (i, r) of A lies at a[r * row_stride + i]; row i of B at b + i * b_stride.
template <int ROWS, int VECTORS, class T>
SERVD_INLINE void multiply_tile(const float* a, int64_t row_stride, const T* b, int64_t b_stride, int64_t k,
                                vf (&acc)[ROWS][VECTORS]) {
    TileRows<ROWS, float> rows(a, row_stride);
    for (int64_t i = 0; i < k; ++i) {
        vf column[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) column[v] = load(b + i * b_stride + v * W);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            vf value = broadcast(rows[r][i]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) acc[r][v] = fma(value, column[v], acc[r][v]);
        }
    }
}

template <int N>
struct Count { static constexpr int value = N; };

// f(Count<n>{}), n in 1..MAX: turns a count into a compile-time one.
template <int MAX, class F>
SERVD_INLINE void with_count(int n, F&& f) {
    if constexpr (MAX == 1) {
        f(Count<1>{});
    } else {
        if (n == MAX) f(Count<MAX>{});
        else with_count<MAX - 1>(n, static_cast<F&&>(f));
    }
}

}  // namespace SERVD_ISA
