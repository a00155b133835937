// Owns: x @ weight.T over codes of 4 or 8 bits scaled by groups, x as it comes or rounded to int8 first.
// Does not know: where the codes come from. (Frantar et al. 2022, "GPTQ"; Lin et al. 2023, "AWQ".)
#include "../common/integer_linear.hpp"

namespace SERVD_ISA {
namespace {

// weight = code * scale + offset in segments first.. of a panel, of which there are `count`. Where zero points are the
// middle there are no offsets.
template <class S>
SERVD_INLINE void load_segments(const CodedCall& call, int64_t panel, int64_t first, int64_t count,
                                SegmentScales& out) {
    int64_t ratio = quotient_up(call.group, call.segment()), groups = quotient_up(call.k, call.group);
    for (int64_t s = 0; s < count; ++s) {
        int64_t from = (panel * groups + (first + s) / ratio) * kCodePanel, to = s * kCodePanel;
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v, from += W, to += W) {
            vf scale = load(static_cast<const S*>(call.scales) + from);
            store(out.scales + to, scale);
            if (call.minima) store(out.offsets + to, load(static_cast<const S*>(call.minima) + from));
            else if (call.zeros) store(out.offsets + to, -load_bytes(call.zeros + from) * scale);
        }
    }
}

template <int BITS>
void integer_unit(const CodedCall& call, const IntegerRows& x, int64_t panel, int64_t first_row) {
    panel_unit(call.end, call.m, panel, first_row,
               [&](int64_t weight_panel, int64_t first, int64_t rows, float* totals, auto done) {
        const uint32_t* words = call.words + weight_panel * quotient_up(call.k, 32 / BITS) * kCodePanel;
        auto scales_of = [&](int64_t segment, int64_t count, SegmentScales& out) {
            with_dtype(call.scale_dtype, [&](auto tag) {
                load_segments<typename decltype(tag)::type>(call, weight_panel, segment, count, out);
                return 0;
            });
        };
        if (call.has_offsets())
            multiply_segmented_panel<BITS, true, true>(x, words, first, rows, totals, scales_of, done);
        else multiply_segmented_panel<BITS, true, false>(x, words, first, rows, totals, scales_of, done);
    });
}

template <int BITS>
void integer_linear(const CodedCall& call, const RowSource& source) {
    IntegerRows rows(call.m, call.k, call.segment());
    rows.fill<BITS>(source, 1 << (BITS - 1));
    for_units(call.m, call.end, call.k, [&call, &rows](int64_t panel, int64_t first_row) {
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
SERVD_RECORDABLE(linear_wna16)
