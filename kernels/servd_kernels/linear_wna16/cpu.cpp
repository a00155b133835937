// Owns: x @ weight.T over codes of 4 or 8 bits scaled by groups, x as it comes or rounded to int8 first.
// Does not know: where the codes come from. (Frantar et al. 2022, "GPTQ"; Lin et al. 2023, "AWQ".)
#include "../common/coded_linear.hpp"
#include "../common/integer_rows.hpp"

namespace SERVD_ISA {
namespace {

// weight * x over a segment = scale * (codes . x) + offset * (sum of x), both sums exact integers.
SERVD_INLINE void add_segment(const IntegerRows& x, int64_t row, int64_t segment, const Scales& scales, const vi* dots,
                              float* totals) {
    int64_t cell = row * x.segments + segment;
    vf scale = broadcast(x.scales.data[cell]), sum = scale * float(x.sums.data[cell]);
    for (int v = 0; v < kTileVectors; ++v) {
        vf dot = __builtin_convertvector(dots[v], vf) * scales.scale[v];
        vf total = fma(dot, scale, load(totals + v * W));
        store(totals + v * W, fma(scales.offset[v], sum, total));
    }
}

// totals [rows][kCodePanel] = x times a panel of the weight.
template <int BITS>
void multiply_integer_panel(const CodedCall& call, const IntegerRows& x, int64_t panel, int64_t first_row,
                            int64_t rows, float* totals) {
    vi dots[kTileRows * kTileVectors];
    constexpr int kDepth = 32 / BITS;
    int64_t depth = round_up(call.k, kDepth);
    const uint32_t* words = call.words + panel * (depth / kDepth) * kCodePanel;
    memset(totals, 0, rows * kCodePanel * sizeof(float));
    for (int64_t s = 0; s < x.segments; ++s) {
        int64_t first = s * x.segment, length = lesser(x.segment, depth - first);
        const uint32_t* piece = words + first / kDepth * kCodePanel;
        Scales scales = load_scales(call, panel, first / call.group, 0, 1 << (BITS - 1));
        for_tiles(rows, [&](int64_t row, auto count) {
            constexpr int ROWS = decltype(count)::value;
            Prefetch prefetch = prefetch_of(piece, piece, 0, 1);
            if (row) prefetch.burst = 0;
            multiply_integers<BITS, ROWS>(x.codes.data + (first_row + row) * x.stride + first, x.stride, piece, length,
                                          prefetch, true, 0, x.sums.data, 0, dots);
            for (int r = 0; r < ROWS; ++r)
                add_segment(x, first_row + row + r, s, scales, dots + r * kTileVectors,
                            totals + (row + r) * kCodePanel);
        });
    }
}

template <int BITS>
void integer_unit(const CodedCall& call, const IntegerRows& x, int64_t panel, int64_t first_row) {
    alignas(64) float totals[kUnitRows * kCodePanel], gates[kUnitRows * kCodePanel];
    int64_t rows = lesser(kUnitRows, call.m - first_row), parts = call.end.is_gated ? 2 : 1;
    if (call.end.is_gated) multiply_integer_panel<BITS>(call, x, panel * parts, first_row, rows, gates);
    multiply_integer_panel<BITS>(call, x, panel * parts + parts - 1, first_row, rows, totals);
    auto at = [](const float* sums, int64_t row, int v) { return load(sums + row * kCodePanel + v * W); };
    finish_rows<kTileVectors>(
        call.end, first_row, rows, panel * kCodePanel, [&](int64_t row, int v) { return at(totals, row, v); },
        [&](int64_t row, int v) { return at(gates, row, v); });
}

template <int BITS>
void integer_linear(const CodedCall& call, const RowSource& source) {
    IntegerRows rows(call.m, call.k, call.segment());
    rows.fill<BITS>(source);
    for_units(call.m, call.end.n, call.k, [&call, &rows](int64_t panel, int64_t first_row) {
        integer_unit<BITS>(call, rows, panel, first_row);
    });
}

template <class Code>
int run(const CodedCall& call, const void* x, int x_dtype, int64_t x_stride, bool is_integer) {
    if (is_integer) {
        integer_linear<Code::kBits>(call, {x, x_dtype, x_stride, nullptr, 0});
        return 0;
    }
    return with_dtype(x_dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        coded_linear_of<Code>(call, static_cast<const T*>(x), x_stride);
        return 0;
    });
}

}  // namespace
}  // namespace SERVD_ISA

// Columns of a panel: code_layout.py packs by it.
SERVD_EXPORT(code_panel)() { return SERVD_ISA::kCodePanel; }

// x [m, k] with a row stride in elements; zeros or minima, or neither. A group is 16, 32, 64, 128, or a multiple of
// 256, or it holds all k. The rest: LinearEnd.
SERVD_EXPORT(linear_wna16)(const void* x, int64_t x_stride, int x_dtype, const void* words, const void* scales,
                           int scale_dtype, const void* zeros, const void* minima, int64_t m, int64_t k,
                           int64_t group, int bits, int is_integer, const void* bias, const void* residual,
                           int64_t residual_stride, void* out, int64_t n, int bias_dtype, int residual_dtype,
                           int out_dtype, int activation, int is_gated) {
    using namespace SERVD_ISA;
    LinearEnd end = {bias, residual, out, n, residual_stride, bias_dtype, residual_dtype, out_dtype, activation,
                     is_gated};
    CodedCall call = {static_cast<const uint32_t*>(words), scales, static_cast<const uint8_t*>(zeros), minima, m, k,
                      group, scale_dtype, end, nullptr, nullptr};
    return bits == 4 ? run<Int4>(call, x, x_dtype, x_stride, is_integer)
                     : run<Int8>(call, x, x_dtype, x_stride, is_integer);
}
