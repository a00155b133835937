// Owns: x @ weight.T + bias over a packed weight, with one fixed order of summation for each output element.
// Does not know: which layer it serves, nor the packed layout (dense_panels.hpp).
//
// A unit of work is one panel (or a gate and its up) and a block of rows.
#include "../common/activation.hpp"
#include "../common/dense_panels.hpp"

namespace SERVD_ISA {
namespace {

template <class T>
void unpack_row(const T* panel, int64_t column, int64_t k, T* row) {
    constexpr int64_t kGroup = IsPaired<T>::value ? 2 : 1;
    int64_t i = 0;
    for (; i + kGroup <= k; i += kGroup)
        memcpy(row + i, panel + i * kPanel + column * kGroup, kGroup * sizeof(T));
    if (i < k) row[i] = panel[i * kPanel + column * kGroup];
}

template <class T, class O>
struct Call {
    const T *packed, *bias, *residual;
    O* out;
    int64_t m, n, k, residual_stride;  // n: columns of out
    int activation;
    bool is_gated;
};

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
    parallel(m, m * k, [=](int64_t row) { widen_row(x + row * row_stride, k, out + row * k); });
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
SERVD_RECORDABLE(linear_rows)

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
SERVD_RECORDABLE(linear)
