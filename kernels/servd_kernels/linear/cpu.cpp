// Owns: x @ weight.T + bias over a packed weight, with one fixed order of summation for each output element.
// Does not know: which layer it serves. The paper: Goto & van de Geijn, "Anatomy of High-Performance
// Matrix Multiplication".
//
// A packed weight is panels of kPanel output columns, each [K][kPanel]; the last panel is padded with zeros.
// Where the processor multiplies pairs of bfloat16 the layout is [K/2][kPanel][2], K padded to even.
// A gated weight is a gate matrix above an up matrix of as many rows: their panels alternate.
//
// A unit of work is one panel (or a gate and its up) and a block of rows. Its sums wait in memory, in float32,
// between two blocks of K: that rounds nothing, so blocking changes no bit.
#include "../common/activation.hpp"
#include "../common/kernel.hpp"
#include "../common/tile.hpp"

namespace SERVD_ISA {
namespace {

constexpr int kPanel = kTileVectors * W;
constexpr int64_t kRowBlock = 64;      // rows of one unit
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

template <class T>
void unpack_row(const T* panel, int64_t column, int64_t k, T* row) {
    constexpr int64_t kGroup = IsPaired<T>::value ? 2 : 1;
    int64_t i = 0;
    for (; i + kGroup <= k; i += kGroup)
        memcpy(row + i, panel + i * kPanel + column * kGroup, kGroup * sizeof(T));
    if (i < k) row[i] = panel[i * kPanel + column * kGroup];
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
// first reads it from memory, and runs ahead of itself; the others share the same block of the next panel.
SERVD_INLINE Prefetch prefetch_of(const void* block, int64_t bytes, int64_t to_next, int64_t depth, int64_t tile,
                                  int64_t tiles) {
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

template <class T, class O>
struct Call {
    const T *packed, *bias, *residual;
    O* out;
    int64_t m, n, k, residual_stride;  // n: columns of out
    int activation;
    bool is_gated;
};

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
                prefetch_of(block, bytes, panel_bytes, count, tiles_of(first_row + row), tiles_of(m));
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

enum Activation { kNoActivation = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3 };

SERVD_INLINE vf activated(int activation, vf x) {
    switch (activation) {
        case kSilu: return silu(x);
        case kGelu: return gelu_erf(x);
        case kGeluTanh: return gelu_tanh(x);
        default: return x;
    }
}

// Bias, activation, gate and residual of rows x kPanel sums; then the one rounding.
template <class T, class O>
void finish(const Call<T, O>& call, const float* gates, const float* sums, int64_t first_row, int64_t rows,
            int64_t column) {
    for (int64_t row = 0; row < rows; ++row) {
        const T* residual = call.residual ? call.residual + (first_row + row) * call.residual_stride + column : nullptr;
        O* out = call.out + (first_row + row) * call.n + column;
        for (int64_t at = 0; at < lesser(int64_t(kPanel), call.n - column); at += W) {
            int64_t n = lesser(int64_t(W), call.n - column - at);
            auto some = [n](const T* p) __attribute__((always_inline)) { return n == W ? load(p) : load_n(p, n); };
            vf value = load(sums + row * kPanel + at);
            if (call.is_gated) {
                vf gate = load(gates + row * kPanel + at);
                if (call.bias) {
                    gate += some(call.bias + column + at);
                    value += some(call.bias + call.n + column + at);
                }
                value *= activated(call.activation, gate);
            } else {
                if (call.bias) value += some(call.bias + column + at);
                value = activated(call.activation, value);
            }
            if (residual) value += some(residual + at);
            if (n == W) store(out + at, value);
            else store_n(out + at, value, n);
        }
    }
}

// The common end: whole vectors, and nothing but a rounding.
template <class O>
void round_rows(const float* sums, int64_t rows, O* out, int64_t out_stride) {
    for (int64_t row = 0; row < rows; ++row)
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) store(out + row * out_stride + v * W, load(sums + row * kPanel + v * W));
}

// The lines of `rows` rows of out, fetched for writing. With a row stride of many pages they share a set of the
// first-level cache: a few rows at a time stay there until they are written, and their wait is over by then.
template <class O>
void prepare_rows(O* out, int64_t out_stride, int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t at = 0; at < columns; at += kLine / int64_t(sizeof(O)))
            __builtin_prefetch(out + row * out_stride + at, 1);
}

template <class T, class O, class X>
void compute_unit(const Call<T, O>& call, const X* x, int64_t x_stride, int64_t column_block, int64_t row_block) {
    alignas(64) float sums[kRowBlock * kPanel], gates[kRowBlock * kPanel];
    int64_t first = row_block * kRowBlock, rows = lesser(kRowBlock, call.m - first);
    int64_t column = column_block * kPanel, columns = lesser(int64_t(kPanel), call.n - column);
    int64_t size = packed_depth<T>(call.k) * kPanel;
    const T* panel = call.packed + column_block * (call.is_gated ? 2 : 1) * size;
    bool only_rounds = !call.is_gated && !call.bias && !call.residual && call.activation == kNoActivation;
    O* out = call.out + first * call.n + column;
    x += first * x_stride;
    if (call.is_gated) {
        multiply_panel(x, x_stride, first, rows, call.m, panel, call.k, gates, [](int64_t, int64_t) {});
        panel += size;
    }
    prepare_rows(out, call.n, lesser(int64_t(kTileRows), rows), columns);
    multiply_panel(x, x_stride, first, rows, call.m, panel, call.k, sums, [&](int64_t row, int64_t height) {
        if (only_rounds && columns == kPanel) round_rows(sums + row * kPanel, height, out + row * call.n, call.n);
        else finish(call, gates + row * kPanel, sums + row * kPanel, first + row, height, column);
        int64_t next = row + height;
        prepare_rows(out + next * call.n, call.n, lesser(int64_t(kTileRows), rows - next), columns);
    });
}

template <class T, class O, class X>
void compute(const Call<T, O>& call, const X* x, int64_t x_stride) {
    int64_t panels = (call.n + kPanel - 1) / kPanel, blocks = (call.m + kRowBlock - 1) / kRowBlock;
    parallel(panels * blocks, call.m * call.n * call.k / 8, [&call, x, x_stride, blocks](int64_t unit) {
        compute_unit(call, x, x_stride, unit / blocks, unit % blocks);
    });
}

template <class T>
void widen_rows(const T* x, int64_t row_stride, int64_t m, int64_t k, float* out) {
    parallel(m, m * k, [=](int64_t row) {
        for (int64_t i = 0; i < k; i += W) {
            int64_t n = lesser(int64_t(W), k - i);
            if (n == W) store(out + row * k + i, load(x + row * row_stride + i));
            else store_n(out + row * k + i, load_n(x + row * row_stride + i, n), n);
        }
    });
}

}  // namespace
}  // namespace SERVD_ISA

// The number of elements of a packed [n, k] weight; of one with a gate, [2 * n, k], it is twice this.
extern "C" __attribute__((visibility("default"))) int64_t SERVD_JOIN(servd_, SERVD_ISA, linear_packed_size)(
    int64_t n, int64_t k, int dtype) {
    using namespace SERVD_ISA;
    int64_t depth = dtype == kBFloat16 ? packed_depth<bf16>(k) : k;
    return (n + kPanel - 1) / kPanel * kPanel * depth;
}

// Packs weight [n, k] into every `step`-th panel from panel `first` on.
SERVD_EXPORT(linear_pack)(const void* weight, int64_t row_stride, void* packed, int64_t n, int64_t k,
                          int64_t first, int64_t step, int dtype) {
    using namespace SERVD_ISA;
    return with_dtype(dtype, [=](auto tag) {
        using T = typename decltype(tag)::type;
        parallel((n + kPanel - 1) / kPanel, n * k, [=](int64_t panel) {
            int64_t column = panel * kPanel;
            pack_panel(static_cast<const T*>(weight) + column * row_stride, row_stride,
                       lesser(int64_t(kPanel), n - column), k,
                       static_cast<T*>(packed) + (first + panel * step) * kPanel * packed_depth<T>(k));
        });
        return 0;
    });
}

// Rows ids[0..count) of the packed [n, k] weight (without a gate), as they were. Returns 1 for an id outside; then
// nothing was written.
SERVD_EXPORT(linear_rows)(const void* packed, const int64_t* ids, void* out, int64_t count, int64_t n, int64_t k,
                          int dtype) {
    using namespace SERVD_ISA;
    for (int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= n) return 1;
    return with_dtype(dtype, [=](auto tag) {
        using T = typename decltype(tag)::type;
        parallel(count, count * k, [=](int64_t i) {
            int64_t column = ids[i] % kPanel, first = ids[i] - column;
            unpack_row(static_cast<const T*>(packed) + first * packed_depth<T>(k), column, k,
                       static_cast<T*>(out) + i * k);
        });
        return 0;
    });
}

// x [m, k] with a row stride in elements; out [m, n] contiguous, of x's type or float; bias [n] ([2 * n] with a
// gate) or null; residual [m, n] with a row stride, or null: out = activation(x W^T + bias) + residual, or with a
// gate activation(x G^T + bias of G) * (x U^T + bias of U) + residual.
SERVD_EXPORT(linear)(const void* x, int64_t x_stride, const void* packed, const void* bias, const void* residual,
                     int64_t residual_stride, void* out, int64_t m, int64_t n, int64_t k, int activation,
                     int is_gated, int dtype, int out_dtype) {
    using namespace SERVD_ISA;
    return with_dtype(dtype, [=](auto tag) {
        using T = typename decltype(tag)::type;
        const T* rows = static_cast<const T*>(x);
        auto run = [=](auto* typed_out) {
            using O = std::remove_pointer_t<decltype(typed_out)>;
            prefer_huge_pages(typed_out, m * n * sizeof(O));
            Call<T, O> call = {static_cast<const T*>(packed),
                               static_cast<const T*>(bias),
                               static_cast<const T*>(residual),
                               typed_out, m, n, k, residual_stride, activation, is_gated != 0};
            if constexpr (sizeof(T) == 4 || IsPaired<T>::value) {
                compute(call, rows, x_stride);
            } else {
                Scratch<float> wide(m * k);
                widen_rows(rows, x_stride, m, k, wide.data);
                compute(call, static_cast<const float*>(wide.data), k);
            }
        };
        if (out_dtype == dtype) run(static_cast<T*>(out));
        else run(static_cast<float*>(out));
        return 0;
    });
}
