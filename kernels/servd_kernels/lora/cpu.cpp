// Owns: y += scaling * (x A^T) B^T for rows of different adapters.
// Does not know: which projections a call stacks. The papers: Hu et al., "LoRA"; Chen et al., "Punica" (SGMV).
//
// Rows are sorted by adapter, so that an adapter's matrices are read once for each block of its rows. A sum runs over
// W (or 2 W) columns of x side by side, then over the lanes, then over the ranks in ascending order: no tile matters.
#include "../common/dense_panels.hpp"
#include "../common/groups.hpp"

namespace SERVD_ISA {
namespace {

constexpr int64_t kRanks = 16;     // of a unit that shrinks
constexpr int64_t kColumns = 128;  // of a unit that expands
constexpr int kRows = 4;           // of a tile

template <class T>
struct Adapters {
    T* y;
    const T *x, *a, *b;  // a [adapters][slices][max_rank][k], b [adapters][n][max_rank]
    const int32_t* ranks;
    const float* scalings;
    const int64_t* slice_ends;  // [slices], of the n columns
    int64_t y_stride, x_stride, k, n, max_rank, slices;
    const Groups& groups;
    float* shrunk;  // [rows in order][slices][max_rank]

    int64_t rank(int64_t adapter) const { return greater(lesser(int64_t(ranks[adapter]), max_rank), 0); }
    float* shrunk_row(int64_t place, int64_t slice) const { return shrunk + (place * slices + slice) * max_rank; }
};

// Columns of x that one step takes, and the step.
template <class T>
struct Step {
    static constexpr int64_t kWidth = W;
    static SERVD_MEMBER vf take(const T* p, int64_t n) { return n == W ? load(p) : load_n(p, n); }
    static SERVD_MEMBER vf add(vf a, vf b, vf acc) { return fma(a, b, acc); }
};

#if defined(__AVX512BF16__)
template <>
struct Step<bf16> {
    static constexpr int64_t kWidth = 2 * W;
    static SERVD_MEMBER __m512bh take(const bf16* p, int64_t n) {
        return (__m512bh)_mm512_maskz_loadu_epi16(n == kWidth ? ~0u : (1u << n) - 1, p);
    }
    static SERVD_MEMBER vf add(__m512bh a, __m512bh b, vf acc) { return _mm512_dpbf16_ps(acc, a, b); }
};
#endif

// out[r][j] = x[r] . a[j]
template <int ROWS, int RANKS, class T>
SERVD_INLINE void shrink_tile(const T* const (&x)[ROWS], const T* a, int64_t k, float* const (&out)[ROWS]) {
    vf acc[ROWS][RANKS] = {};
    for (int64_t i = 0; i < k; i += Step<T>::kWidth) {
        int64_t n = lesser(int64_t(Step<T>::kWidth), k - i);
        decltype(Step<T>::take(a, n)) row[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) row[r] = Step<T>::take(x[r] + i, n);
#pragma GCC unroll 4
        for (int j = 0; j < RANKS; ++j) {
            auto column = Step<T>::take(a + j * k + i, n);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) acc[r][j] = Step<T>::add(row[r], column, acc[r][j]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < RANKS; ++j) out[r][j] = sum_lanes(acc[r][j]);
}

template <class T>
void shrink(const Adapters<T>& call, int64_t adapter, int64_t panel, int64_t first, int64_t rows) {
    int64_t chunks = (call.max_rank + kRanks - 1) / kRanks, slice = panel / chunks, from = panel % chunks * kRanks;
    int64_t until = lesser(from + kRanks, call.rank(adapter)), start = call.groups.first(adapter) + first;
    const T* a = call.a + (adapter * call.slices + slice) * call.max_rank * call.k;
    for (int64_t row = 0; row < rows; row += kRows) {
        with_count<kRows>(int(lesser(int64_t(kRows), rows - row)), [&](auto count) {
            constexpr int kHeight = decltype(count)::value;
            const T* x[kHeight];
            float* out[kHeight];
            int64_t j = from;
            for (int r = 0; r < kHeight; ++r) {
                x[r] = call.x + call.groups.order.data[start + row + r] * call.x_stride;
                out[r] = call.shrunk_row(start + row + r, slice) + j;
            }
            auto advance = [&](int64_t by) {
                j += by;
                for (float*& place : out) place += by;
            };
            for (; j + 4 <= until; advance(4)) shrink_tile<kHeight, 4>(x, a + j * call.k, call.k, out);
            for (; j < until; advance(1)) shrink_tile<kHeight, 1>(x, a + j * call.k, call.k, out);
        });
    }
}

// The transpose of W vectors: log2(W) times, the first half and the second are merged element by element.
SERVD_INLINE void transpose(vf (&rows)[W]) {
    vi low, high;
    for (int i = 0; i < W; ++i) {
        low[i] = i / 2 + i % 2 * W;
        high[i] = low[i] + W / 2;
    }
#pragma GCC unroll 4
    for (int step = 1; step < W; step *= 2) {
        vf merged[W];
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; ++i) {
            merged[2 * i] = __builtin_shuffle(rows[i], rows[i + W / 2], low);
            merged[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + W / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) rows[i] = merged[i];
    }
}

// The first n columns from `column` on, of `rows` rows: one column of y is one lane.
template <class T>
void expand_block(const Adapters<T>& call, int64_t adapter, int64_t slice, int64_t column, int64_t n, int64_t start,
                  int64_t rows) {
    alignas(64) float sums[kRowBlock * W] = {};
    int64_t rank = call.rank(adapter);
    const T* b = call.b + (adapter * call.n + column) * call.max_rank;
    for (int64_t j = 0; j < rank; j += W) {
        int64_t ranks = lesser(int64_t(W), rank - j);
        vf by_rank[W] = {};
        for (int64_t c = 0; c < n; ++c) {
            const T* some = b + c * call.max_rank + j;
            by_rank[c] = ranks == W ? load(some) : load_n(some, ranks);
        }
        transpose(by_rank);
        for (int64_t row = 0; row < rows; ++row) {
            const float* shrunk = call.shrunk_row(start + row, slice) + j;
            vf total = load(sums + row * W);
            for (int64_t i = 0; i < ranks; ++i) total = fma(broadcast(shrunk[i]), by_rank[i], total);
            store(sums + row * W, total);
        }
    }
    vf scaling = broadcast(call.scalings[adapter]);
    for (int64_t row = 0; row < rows; ++row) {
        T* y = call.y + call.groups.order.data[start + row] * call.y_stride + column;
        vf total = fma(scaling, load(sums + row * W), n == W ? load(y) : load_n(y, n));
        if (n == W) store(y, total);
        else store_n(y, total, n);
    }
}

template <class T>
void expand(const Adapters<T>& call, int64_t adapter, int64_t panel, int64_t first, int64_t rows) {
    if (call.rank(adapter) == 0) return;
    // The panels of a slice end with it: a vector of columns has one row of what was shrunk.
    int64_t begin = 0, slice = 0;
    for (; slice < call.slices; begin = call.slice_ends[slice++]) {
        int64_t panels = (call.slice_ends[slice] - begin + kColumns - 1) / kColumns;
        if (panel < panels) break;
        panel -= panels;
    }
    begin += panel * kColumns;
    int64_t end = lesser(begin + kColumns, call.slice_ends[slice]);
    for (int64_t column = begin; column < end; column += W)
        expand_block(call, adapter, slice, column, lesser(int64_t(W), end - column),
                     call.groups.first(adapter) + first, rows);
}

template <class T>
void compute(const Adapters<T>& call) {
    int64_t chunks = call.slices * ((call.max_rank + kRanks - 1) / kRanks), panels = 0, begin = 0;
    for (int64_t slice = 0; slice < call.slices; begin = call.slice_ends[slice++])
        panels += (call.slice_ends[slice] - begin + kColumns - 1) / kColumns;
    int64_t work = call.groups.rows() * call.max_rank;
    for_group_blocks(call.groups, chunks, kRowBlock, work * call.slices * call.k / 8,
                     [&](int64_t adapter, int64_t panel, int64_t first, int64_t rows) {
                         shrink(call, adapter, panel, first, rows);
                     });
    for_group_blocks(call.groups, panels, kRowBlock, work * call.n / 8,
                     [&](int64_t adapter, int64_t panel, int64_t first, int64_t rows) {
                         expand(call, adapter, panel, first, rows);
                     });
}

}  // namespace
}  // namespace SERVD_ISA

// y [rows, n] and x [rows, k] with row strides; ids [rows]; a, b, slice_ends as in Adapters, contiguous.
SERVD_EXPORT(lora)(void* y, int64_t y_stride, const void* x, int64_t x_stride, const int32_t* ids, const void* a,
                   const void* b, const int32_t* ranks, const float* scalings, const int64_t* slice_ends, int64_t rows,
                   int64_t k, int64_t n, int64_t adapters, int64_t max_rank, int64_t slices, int dtype) {
    using namespace SERVD_ISA;
    return with_dtype(dtype, [=](auto tag) {
        using T = typename decltype(tag)::type;
        Groups groups(ids, rows, adapters);
        Scratch<float> shrunk(groups.rows() * slices * max_rank);
        compute(Adapters<T>{static_cast<T*>(y), static_cast<const T*>(x), static_cast<const T*>(a),
                            static_cast<const T*>(b), ranks, scalings, slice_ends, y_stride, x_stride, k, n, max_rank,
                            slices, groups, shrunk.data});
        return 0;
    });
}
