// Owns: the packed layout of a dense weight, and the product of rows with one of its panels.
// Does not know: what follows a product (linear, moe). The paper: Goto & van de Geijn, "Anatomy of High-Performance
// Matrix Multiplication".
//
// A packed weight is panels of kPanel output columns, each [K][kPanel]; the last panel is padded with zeros.
// Where the processor multiplies pairs of bfloat16 the layout is [K/2][kPanel][2], K padded to even.
// A gated weight is a gate matrix above an up matrix of as many rows: their panels alternate.
//
// Sums wait in memory, in float32, between two blocks of K: that rounds nothing, so blocking changes no bit.
#pragma once
#include "kernel.hpp"
#include "tile.hpp"

namespace SERVD_ISA {

constexpr int kPanel = kTileVectors * W;
constexpr int64_t kRowBlock = 64;      // rows of one unit of work
constexpr int64_t kDepthBlock = 1024;  // of K at most: a panel's block, the next one's and the rows share the L2
constexpr int64_t kLine = 64;          // bytes of a cache line

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

template <class T> struct IsPaired { static constexpr bool value = false; };
template <> struct IsPaired<bf16> { static constexpr bool value = kPairs; };

template <class T>
int64_t packed_depth(int64_t k) { return IsPaired<T>::value ? (k + 1) / 2 * 2 : k; }

template <class T>
void pack_panel(const T* weight, int64_t row_stride, int64_t columns, int64_t k, T* panel) {
    int64_t depth = packed_depth<T>(k), group = IsPaired<T>::value ? 2 : 1;
    memset(panel, 0, depth * kPanel * sizeof(T));
    for (int64_t c = 0; c < columns; ++c)
        for (int64_t i = 0; i < k; ++i)
            panel[(i / group * kPanel + c) * group + i % group] = weight[c * row_stride + i];
}

#if defined(__AVX512BF16__)
SERVD_INLINE __m512bh pair_of(const bf16* x, bool both) {
    uint32_t bits = 0;
    memcpy(&bits, x, both ? 4 : 2);
    return (__m512bh)_mm512_set1_epi32(int(bits));
}

template <int ROWS>
SERVD_INLINE void multiply_pairs(const bf16* x, int64_t row_stride, const bf16* panel, int64_t k,
                                 vf (&acc)[ROWS][kTileVectors]) {
    TileRows<ROWS, bf16> rows(x, row_stride);
    auto step = [&](int64_t i, bool both) __attribute__((always_inline)) {
        __m512bh column[kTileVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v)
            column[v] = (__m512bh)_mm512_loadu_si512(panel + i * kPanel + v * W * 2);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            __m512bh value = pair_of(rows[r] + i, both);
#pragma GCC unroll 4
            for (int v = 0; v < kTileVectors; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], column[v], value);
        }
    };
    int64_t i = 0;
    for (; i + 2 <= k; i += 2) step(i, true);
    if (i < k) step(i, false);
}
#endif

// A stretch of memory brought to the L2 cache while a tile is computed: `burst` lines each `run` steps of K.
struct Prefetch {
    const char* from;
    int64_t lines, burst, run;

    SERVD_MEMBER void fetch() {
        int64_t count = lesser(burst, lines);
        lines -= count;
        for (; count > 0; --count, from += kLine) __builtin_prefetch(from, 0, 2);
    }
};

// What tile `tile` of `tiles` brings in while they all meet `block` ([depth][kPanel], `bytes` long) in turn. The
// first reads it from memory, and runs ahead of itself; the others share the same block of the next panel. A row or
// two compute so little that the processor's own prefetch keeps up, and asking would only cost them.
SERVD_INLINE Prefetch prefetch_of(const void* block, int64_t bytes, int64_t to_next, int64_t depth, int64_t tile,
                                  int64_t tiles, int64_t rows) {
    if (rows <= 2) return {nullptr, 0, 0, depth};
    constexpr int64_t kAhead = 8192, kFirstRun = 4, kRun = 8;
    const char* from = static_cast<const char*>(block);
    int64_t all = bytes / kLine;
    if (tile == 0) return {from + kAhead, all, all * kFirstRun / depth + 1, kFirstRun};
    int64_t lines = all / (tiles - 1) + 1;
    return {from + to_next + (tile - 1) * lines * kLine, lines, lines * kRun / depth + 1, kRun};
}

// sums[ROWS][kPanel] (+)= x[ROWS][depth] * panel[depth][kPanel]. X is T where pairs are multiplied, else float.
template <int ROWS, class T, class X>
void multiply_block(const X* x, int64_t x_stride, const T* panel, int64_t depth, bool is_first, Prefetch prefetch,
                    float* sums) {
    vf acc[ROWS][kTileVectors] = {};
    if (!is_first) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < kTileVectors; ++v) acc[r][v] = load(sums + r * kPanel + v * W);
    }
    for (int64_t i = 0; i < depth; i += prefetch.run) {
        int64_t run = lesser(prefetch.run, depth - i);
        prefetch.fetch();
#if defined(__AVX512BF16__)
        if constexpr (IsPaired<T>::value) multiply_pairs<ROWS>(x + i, x_stride, panel + i * kPanel, run, acc);
        else
#endif
            multiply_tile<ROWS, kTileVectors>(x + i, x_stride, panel + i * kPanel, kPanel, run, acc);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) store(sums + r * kPanel + v * W, acc[r][v]);
}

SERVD_INLINE int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// Blocks of K as even as can be; each but the last a multiple of 8, which pairs and prefetch runs divide.
SERVD_INLINE int64_t depth_of_blocks(int64_t k) {
    int64_t blocks = greater((k + kDepthBlock - 1) / kDepthBlock, 1);
    return greater((k + blocks - 1) / blocks + 7, 8) / 8 * 8;
}

// sums[rows][kPanel] = x * panel, for rows first_row.. of the call's m; done(row, height) for each tile that is whole.
template <class T, class X, class F>
void multiply_panel(const X* x, int64_t x_stride, int64_t first_row, int64_t rows, int64_t m, const T* panel,
                    int64_t k, float* sums, F done) {
    int64_t block_depth = depth_of_blocks(k), panel_bytes = packed_depth<T>(k) * kPanel * sizeof(T);
    for (int64_t depth = 0; depth < k; depth += block_depth) {
        int64_t count = lesser(block_depth, k - depth), bytes = packed_depth<T>(count) * kPanel * sizeof(T), row = 0;
        const T* block = panel + depth * kPanel;
        // Tiles of even height: 9 rows as 5 + 4, not 8 + 1, since a tile's cost hardly falls with its height.
        for (int64_t tiles = tiles_of(rows); tiles > 0; --tiles) {
            int height = int((rows - row + tiles - 1) / tiles);
            Prefetch prefetch =
                prefetch_of(block, bytes, panel_bytes, count, tiles_of(first_row + row), tiles_of(m), m);
            with_count<kTileRows>(height, [&](auto constant) {
                multiply_block<decltype(constant)::value>(x + row * x_stride + depth, x_stride, block, count,
                                                          depth == 0, prefetch, sums + row * kPanel);
            });
            if (depth + count == k) done(row, height);
            row += height;
        }
    }
    if (k > 0) return;
    memset(sums, 0, rows * kPanel * sizeof(float));
    done(0, rows);
}

// One row of k elements as float32: what multiply_panel takes where no pairs are multiplied.
template <class T>
SERVD_INLINE void widen_row(const T* x, int64_t k, float* out) {
    for (int64_t i = 0; i < k; i += W) {
        int64_t n = lesser(int64_t(W), k - i);
        if (n == W) store(out + i, load(x + i));
        else store_n(out + i, load_n(x + i, n), n);
    }
}

}  // namespace SERVD_ISA
