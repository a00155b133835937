// Owns: x @ weight.T + bias over a packed weight, with one fixed order of summation for each output element.
// Does not know: which layer it serves. The paper: Goto & van de Geijn, "Anatomy of High-Performance
// Matrix Multiplication" (the whole of K stays in one panel here: a panel fits the second-level cache).
//
// A packed weight is panels of kPanel output columns, each [K][kPanel]; the last panel is padded with zeros.
// Where the processor multiplies pairs of bfloat16 the layout is [K/2][kPanel][2], K padded to even.
#include "../common/kernel.hpp"
#include "../common/tile.hpp"

namespace SERVD_ISA {
namespace {

constexpr int kPanel = kTileVectors * W;
constexpr int64_t kRowBlock = 64;  // rows of one unit: 64 rows of x and a panel share the L2 cache

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
    auto step = [&](int64_t i, bool both) __attribute__((always_inline)) {
        __m512bh column[kTileVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v)
            column[v] = (__m512bh)_mm512_loadu_si512(panel + i * kPanel + v * W * 2);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            __m512bh value = pair_of(x + r * row_stride + i, both);
#pragma GCC unroll 4
            for (int v = 0; v < kTileVectors; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], column[v], value);
        }
    };
    int64_t i = 0;
    for (; i + 2 <= k; i += 2) step(i, true);
    if (i < k) step(i, false);
}
#endif

// X is T where pairs are multiplied, float otherwise.
template <int ROWS, class T, class X, class O>
void compute_tile(const X* x, int64_t x_stride, const T* panel, const T* bias, O* out, int64_t out_stride,
                  int64_t columns, int64_t k) {
    vf acc[ROWS][kTileVectors] = {};
#if defined(__AVX512BF16__)
    if constexpr (IsPaired<T>::value) multiply_pairs<ROWS>(x, x_stride, panel, k, acc);
    else
#endif
        multiply_tile<ROWS, kTileVectors>(x, x_stride, panel, kPanel, k, acc);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
            int64_t n = lesser(int64_t(W), columns - v * W);
            if (n <= 0) continue;
            vf sum = acc[r][v];
            if (bias) sum += load_n(bias + v * W, n);
            if (n == W) store(out + r * out_stride + v * W, sum);
            else store_n(out + r * out_stride + v * W, sum, n);
        }
    }
}

template <class T, class O>
struct Call {
    const T *packed, *bias;
    O* out;
    int64_t m, n, k;
};

template <class T, class O, class X>
void compute_unit(const Call<T, O>& call, const X* x, int64_t x_stride, int64_t panel, int64_t row_block) {
    int64_t first_column = panel * kPanel;
    int64_t row = row_block * kRowBlock, end = lesser(row + kRowBlock, call.m);
    // Tiles of even height: 9 rows as 5 + 4, not 8 + 1, since a tile's cost hardly falls with its height.
    for (int64_t tiles = (end - row + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
        int rows = int((end - row + tiles - 1) / tiles);
        with_count<kTileRows>(rows, [&](auto count) {
            compute_tile<decltype(count)::value>(
                x + row * x_stride, x_stride, call.packed + panel * packed_depth<T>(call.k) * kPanel,
                call.bias ? call.bias + first_column : nullptr, call.out + row * call.n + first_column,
                call.n, call.n - first_column, call.k);
        });
        row += rows;
    }
}

template <class T, class O, class X>
void compute(const Call<T, O>& call, const X* x, int64_t x_stride) {
    int64_t panels = (call.n + kPanel - 1) / kPanel, blocks = (call.m + kRowBlock - 1) / kRowBlock;
    parallel(panels * blocks, call.m * call.n * call.k / 8, [&call, x, x_stride, blocks](int64_t unit) {
        compute_unit(call, x, x_stride, unit / blocks, unit % blocks);
    });
}

template <class T>
void widen(const T* x, int64_t row_stride, int64_t m, int64_t k, float* out) {
    for (int64_t row = 0; row < m; ++row) {
        for (int64_t i = 0; i < k; i += W) {
            int64_t n = lesser(int64_t(W), k - i);
            store_n(out + row * k + i, load_n(x + row * row_stride + i, n), n);
        }
    }
}

}  // namespace
}  // namespace SERVD_ISA

// The number of elements of a packed [n, k] weight.
extern "C" __attribute__((visibility("default"))) int64_t SERVD_JOIN(servd_, SERVD_ISA, linear_packed_size)(
    int64_t n, int64_t k, int dtype) {
    using namespace SERVD_ISA;
    int64_t depth = dtype == kBFloat16 ? packed_depth<bf16>(k) : k;
    return (n + kPanel - 1) / kPanel * kPanel * depth;
}

SERVD_EXPORT(linear_pack)(const void* weight, int64_t row_stride, void* packed, int64_t n, int64_t k,
                          int dtype) {
    using namespace SERVD_ISA;
    return with_dtype(dtype, [=](auto tag) {
        using T = typename decltype(tag)::type;
        parallel((n + kPanel - 1) / kPanel, n * k, [=](int64_t panel) {
            int64_t first = panel * kPanel;
            pack_panel(static_cast<const T*>(weight) + first * row_stride, row_stride,
                       lesser(int64_t(kPanel), n - first), k,
                       static_cast<T*>(packed) + first * packed_depth<T>(k));
        });
        return 0;
    });
}

// Rows ids[0..count) of the packed [n, k] weight, as they were. Returns 1 for an id outside; then nothing was
// written.
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

// x [m, k] with a row stride in elements; out [m, n] contiguous, of x's type or float; bias [n] or null.
SERVD_EXPORT(linear)(const void* x, int64_t x_stride, const void* packed, const void* bias, void* out,
                     int64_t m, int64_t n, int64_t k, int dtype, int out_dtype) {
    using namespace SERVD_ISA;
    return with_dtype(dtype, [=](auto tag) {
        using T = typename decltype(tag)::type;
        const T* rows = static_cast<const T*>(x);
        auto run = [=](auto* typed_out) {
            using O = std::remove_pointer_t<decltype(typed_out)>;
            Call<T, O> call = {static_cast<const T*>(packed), static_cast<const T*>(bias), typed_out, m, n, k};
            if constexpr (sizeof(T) == 4 || IsPaired<T>::value) {
                compute(call, rows, x_stride);
            } else {
                Scratch<float> wide(m * k);
                widen(rows, x_stride, m, k, wide.data);
                compute(call, static_cast<const float*>(wide.data), k);
            }
        };
        if (out_dtype == dtype) run(static_cast<T*>(out));
        else run(static_cast<float*>(out));
        return 0;
    });
}
