// Owns: x @ weight.T in int8: exact sums over a row or over groups of columns, then the scales in float32.
// Does not know: where the codes come from. (Dettmers et al. 2022, "LLM.int8()".)
#include "../common/integer_linear.hpp"

namespace SERVD_ISA {
namespace {

constexpr int64_t kMaxDepth = 4096;  // of one walk down a panel: 4096 codes of 48 columns are 192 KB
constexpr int kCentre = 128;         // what stored codes are too large by

// totals [rows][kCodePanel] times a scale of each row (or null) and of each column.
SERVD_INLINE void scale_rows(float* totals, int64_t rows, const float* row_scales, const float* scales) {
    for (int64_t row = 0; row < rows; ++row)
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v, totals += W) {
            vf total = load(totals);
            if (row_scales) total = __builtin_convertvector((vi)total, vf) * row_scales[row];
            store(totals, total * load(scales + v * W));
        }
}

// A scale for each row: the sums stay integers, in the memory of totals between pieces of k.
template <class Done>
void multiply_whole_panel(const IntegerRows& x, const uint32_t* words, int64_t first_row, int64_t rows, float* totals,
                          Done done) {
    int64_t depth = round_up(x.k, 4), tiles = quotient_up(rows, kTileRows);
    const uint32_t* end = words + depth / 4 * kCodePanel;
    for (int64_t first = 0; first < greater(depth, 1); first += kMaxDepth) {
        const uint32_t* piece = words + first / 4 * kCodePanel;
        const uint32_t* next = lesser(piece + kMaxDepth / 4 * kCodePanel, end);
        for_tiles(rows, [&](int64_t row, auto count) {
            constexpr int ROWS = decltype(count)::value;
            int64_t at = first_row + row;
            Prefetch prefetch = prefetch_of(piece, next, quotient_up(row, kTileRows), tiles);
            if (x.m <= 2) prefetch.burst = 0;  // so few that the processor's own prefetch keeps up
            multiply_whole<ROWS>(x.codes.data + at * x.stride + first, x.stride, piece, lesser(kMaxDepth, depth - first),
                                 prefetch, first ? nullptr : x.starts.data + at,
                                 reinterpret_cast<vi*>(totals + row * kCodePanel));
            if (first + kMaxDepth >= depth) done(row, ROWS);
        });
    }
}

void unit(const CodedCall& call, const IntegerRows& x, int64_t panel, int64_t first_row) {
    panel_unit(call.end, call.m, panel, first_row,
               [&](int64_t weight_panel, int64_t first, int64_t rows, float* totals, auto done) {
        const uint32_t* words = call.words + weight_panel * quotient_up(call.k, 4) * kCodePanel;
        const float* scales = static_cast<const float*>(call.scales) + weight_panel * kCodePanel;
        bool is_whole = x.segments == 1;
        auto no_scales = [](int64_t, int64_t, SegmentScales&) {};
        auto scaled = [&](int64_t row, int64_t height) {
            scale_rows(totals + row * kCodePanel, height, is_whole ? x.scales.data + first + row : nullptr, scales);
            done(row, height);
        };
        if (is_whole) multiply_whole_panel(x, words, first, rows, totals, scaled);
        else multiply_segmented_panel<8, false, false>(x, words, first, rows, totals, no_scales, scaled);
    });
}

}  // namespace
}  // namespace SERVD_ISA

// x [m, k] with a row stride in elements, of a DType, or int8 codes (kCodes) with x_scales [m, segments]; words hold
// code + 128; scales float [panels][columns of a panel]. `group`: columns of x that share a scale, 32 to 256, or k.
// `rotation`: columns of a rotated block of x, or 0. The rest: LinearEnd.
SERVD_EXPORT(linear_w8a8)(const void* x, int64_t x_stride, int x_dtype, const void* x_scales, const void* words,
                          const void* scales, int64_t m, int64_t k, int64_t group, int64_t rotation, const void* bias,
                          const void* residual, int64_t residual_stride, void* out, int64_t n, int bias_dtype,
                          int residual_dtype, int out_dtype, int activation, int is_gated) {
    using namespace SERVD_ISA;
    LinearEnd end = {bias, residual, out, n, residual_stride, bias_dtype, residual_dtype, out_dtype, activation,
                     is_gated};
    CodedCall call = {static_cast<const uint32_t*>(words), scales, nullptr, nullptr, m, k, k, kFloat32, end, nullptr,
                      nullptr};
    IntegerRows rows(m, k, group);
    rows.fill<8>({x, x_dtype, x_stride, static_cast<const float*>(x_scales), rotation}, kCentre);
    for_units(m, end, k, [&call, &rows](int64_t panel, int64_t first_row) { unit(call, rows, panel, first_row); });
    return 0;
}
SERVD_RECORDABLE(linear_w8a8)
