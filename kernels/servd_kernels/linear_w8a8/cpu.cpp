// Owns: x @ weight.T in int8: exact sums over a row or over groups of columns, then the scales in float32.
// Does not know: where the codes come from. (Dettmers et al. 2022, "LLM.int8()".)
#include "../common/coded_linear.hpp"
#include "../common/integer_rows.hpp"

namespace SERVD_ISA {
namespace {

constexpr int64_t kMaxDepth = 4096;  // of one walk down a panel: 4096 codes of 48 columns are 192 KB

constexpr int kCentre = 128;     // what stored codes are too large by

struct Panel {
    const uint32_t *words, *next;  // and where the next panel begins
    int64_t first_row, rows;
};

template <class F>
SERVD_INLINE void for_cells(int64_t rows, F&& f) {
    for (int64_t row = 0; row < rows; ++row)
        for (int v = 0; v < kTileVectors; ++v) f(row, row * kTileVectors + v, v);
}

// A scale for each row: the sums stay integers, in memory between pieces of k.
void whole_rows(const IntegerRows& x, const Panel& panel, vf* totals) {
    vi* sums = reinterpret_cast<vi*>(totals);
    int64_t depth = round_up(x.k, 4), tiles = quotient_up(panel.rows, kTileRows);
    if (depth == 0) memset(static_cast<void*>(totals), 0, panel.rows * kTileVectors * sizeof(vf));
    for (int64_t first = 0; first < depth; first += kMaxDepth) {
        const uint32_t* piece = panel.words + first / 4 * kCodePanel;
        const uint32_t* next = lesser(piece + kMaxDepth / 4 * kCodePanel, panel.next);
        for_tiles(panel.rows, [&](int64_t row, auto count) {
            int64_t at = panel.first_row + row;
            multiply_integers<8, decltype(count)::value>(
                x.codes.data + at * x.stride + first, x.stride, piece, lesser(kMaxDepth, depth - first),
                prefetch_of(piece, next, quotient_up(row, kTileRows), tiles), first == 0, kCentre, x.sums.data + at, 1,
                sums + row * kTileVectors);
        });
    }
    for_cells(panel.rows, [&](int64_t row, int64_t cell, int) {
        totals[cell] = __builtin_convertvector(sums[cell], vf) * x.scales.data[panel.first_row + row];
    });
}

// A scale for each row and group of columns.
void grouped_rows(const IntegerRows& x, const Panel& panel, vf* totals) {
    vi dots[kTileRows * kTileVectors];
    int64_t depth = round_up(x.k, 4);
    memset(static_cast<void*>(totals), 0, panel.rows * kTileVectors * sizeof(vf));
    for (int64_t s = 0; s < x.segments; ++s) {
        int64_t first = s * x.segment;
        const uint32_t* piece = panel.words + first / 4 * kCodePanel;
        for_tiles(panel.rows, [&](int64_t row, auto count) {
            int64_t at = panel.first_row + row, cell = at * x.segments + s;
            Prefetch prefetch = prefetch_of(piece, piece, 0, 1);
            if (row) prefetch.burst = 0;
            multiply_integers<8, decltype(count)::value>(
                x.codes.data + at * x.stride + first, x.stride, piece, lesser(x.segment, depth - first), prefetch,
                true, kCentre, x.sums.data + cell, x.segments, dots);
            for_cells(decltype(count)::value, [&](int64_t r, int64_t tile_cell, int) {
                vf scale = broadcast(x.scales.data[cell + r * x.segments]);
                vf& total = totals[row * kTileVectors + tile_cell];
                total = fma(__builtin_convertvector(dots[tile_cell], vf), scale, total);
            });
        });
    }
}

void unit(const CodedCall& call, const IntegerRows& x, int64_t panel, int64_t first_row) {
    vf totals[kUnitRows * kTileVectors], gates[kUnitRows * kTileVectors];
    int64_t rows = lesser(kUnitRows, call.m - first_row), parts = call.end.is_gated ? 2 : 1;
    const float* scales = static_cast<const float*>(call.scales) + panel * parts * kCodePanel;
    auto multiply = [&](int64_t part, vf* out) {
        const uint32_t* words = call.words + (panel * parts + part) * quotient_up(call.k, 4) * kCodePanel;
        Panel job = {words, words + quotient_up(call.k, 4) * kCodePanel, first_row, rows};
        if (x.segments == 1) whole_rows(x, job, out);
        else grouped_rows(x, job, out);
    };
    if (call.end.is_gated) multiply(0, gates);
    multiply(parts - 1, totals);
    finish_rows<kTileVectors>(
        call.end, first_row, rows, panel * kCodePanel,
        [&](int64_t row, int v) {
            return totals[row * kTileVectors + v] * load(scales + (parts - 1) * kCodePanel + v * W);
        },
        [&](int64_t row, int v) { return gates[row * kTileVectors + v] * load(scales + v * W); });
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
    rows.fill<8>({x, x_dtype, x_stride, static_cast<const float*>(x_scales), rotation});
    for_units(m, n, k, [&call, &rows](int64_t panel, int64_t first_row) { unit(call, rows, panel, first_row); });
    return 0;
}
