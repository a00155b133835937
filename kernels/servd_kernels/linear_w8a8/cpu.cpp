// Owns: x @ weight.T in int8: exact sums over a row or over groups of columns, then the scales in float32.
// Does not know: where the codes come from. (Dettmers et al. 2022, "LLM.int8()".)
#include "../common/coded_linear.hpp"

namespace SERVD_ISA {
namespace {

constexpr int64_t kMaxDepth = 4096;  // of one walk down a panel: 4096 codes of 48 columns are 192 KB

// What one unit holds for one tile between the pieces of k that a long row is cut into.
union Carry {
    vi sum;
    vf total;
};

template <int ROWS>
SERVD_INLINE void finish_tile(const CodedCall& call, const float* scales, int64_t row, int64_t panel,
                              const vf (&totals)[ROWS][kTileVectors]) {
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < kTileVectors; ++v)
            finish(call, row + r, panel * kCodePanel + v * W, totals[r][v] * load(scales + v * W));
}

// Weights are stored as code + 128: the sum that starts at -128 times the sum of x's codes ends as if they were not.
template <int ROWS>
SERVD_INLINE void tile(const CodedCall& call, const IntegerRows& x, const uint32_t* words, int64_t row, int64_t panel,
                       int64_t begin, int64_t end, const char* ahead, Carry* carry) {
    vi acc[ROWS][kTileVectors];
    vf totals[ROWS][kTileVectors];
    int64_t segments = x.segments;
    for (int64_t s = begin / x.segment; s < quotient_up(end, x.segment); ++s) {
        int64_t first = greater(begin, s * x.segment), last = lesser(end, (s + 1) * x.segment);
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < kTileVectors; ++v)
                acc[r][v] = first == s * x.segment ? vi{} - 128 * x.sums.data[(row + r) * segments + s]
                                                   : carry[r * kTileVectors + v].sum;
        multiply_integers<8, ROWS>(x.codes.data + row * x.stride + first, x.stride, words + first / 4 * kCodePanel,
                                   last - first, ahead + first / 4 * 64, acc);
        bool is_whole = last == lesser((s + 1) * x.segment, round_up(call.k, 4));
        for (int r = 0; r < ROWS; ++r) {
            vf scale = broadcast(x.scales.data[(row + r) * segments + s]);
            for (int v = 0; v < kTileVectors; ++v) {
                Carry& kept = carry[r * kTileVectors + v];
                if (is_whole) kept.total = fma(__builtin_convertvector(acc[r][v], vf), scale, s ? kept.total : vf{});
                else kept.sum = acc[r][v];
                totals[r][v] = kept.total;
            }
        }
    }
    if (end < call.k) return;
    finish_tile<ROWS>(call, static_cast<const float*>(call.scales) + panel * kCodePanel, row, panel, totals);
}

void unit(const CodedCall& call, const IntegerRows& x, int64_t panel, int64_t first_row) {
    Carry carry[kUnitRows * kTileVectors];
    int64_t rows = lesser(kUnitRows, call.m - first_row), depth = round_up(call.k, 4);
    int64_t panel_words = depth / 4 * kCodePanel, panels = quotient_up(call.n, kCodePanel);
    const uint32_t* words = call.words + panel * panel_words;
    // The next panel comes from memory while this one's later tiles run: each fetches a third of it.
    const char* next = reinterpret_cast<const char*>(words + (panel + 1 < panels ? panel_words : 0));
    for (int64_t begin = 0; begin < depth; begin += kMaxDepth) {
        int64_t end = lesser(depth, begin + kMaxDepth);
        for_tiles(rows, [&](int64_t row, auto count) __attribute__((always_inline)) {
            const char* ahead = next + (row / kTileRows) % kTileVectors * (depth / 4 * 64);
            tile<decltype(count)::value>(call, x, words, first_row + row, panel, begin, end, ahead,
                                         carry + row * kTileVectors);
        });
    }
}

}  // namespace
}  // namespace SERVD_ISA

// x [m, k] with a row stride in elements, of a DType, or int8 codes (kCodes) with x_scales [m, segments]; words hold
// code + 128; scales float [panels][columns of a panel]; out [m, n] contiguous; bias [n] or null. `group`: columns of
// x that share a scale, 32 to 256, or k.
SERVD_EXPORT(linear_w8a8)(const void* x, int64_t x_stride, const void* x_scales, const void* words, const void* scales,
                          const void* bias, void* out, int64_t m, int64_t n, int64_t k, int64_t group, int x_dtype,
                          int bias_dtype, int out_dtype) {
    using namespace SERVD_ISA;
    CodedCall call = {static_cast<const uint32_t*>(words), scales, nullptr, nullptr, bias, out, m, n, k, k,
                      kFloat32, bias_dtype, out_dtype, nullptr, nullptr};
    IntegerRows rows(m, k, group);
    rows.fill<8>(x, x_dtype, x_stride, static_cast<const float*>(x_scales), m, k);
    for_units(m, n, k, [&call, &rows](int64_t panel, int64_t first_row) { unit(call, rows, panel, first_row); });
    return 0;
}
