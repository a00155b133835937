// Owns: the product of rows of int8 codes with panels of weight codes, in segments of columns: the walk over tiles.
// Does not know: which op it serves.
#pragma once
#include "coded_linear.hpp"
#include "integer_rows.hpp"

namespace SERVD_ISA {

constexpr int64_t kPieceSegments = 64;  // of one walk down a panel: their scales lie in the first-level cache

// A piece of a panel's scales and offsets for multiply_segments: floats, one for each segment of x and column.
struct SegmentScales {
    alignas(64) float scales[kPieceSegments * kCodePanel], offsets[kPieceSegments * kCodePanel];
};

// totals [rows][kCodePanel] = the rows of x times a panel; scales_of(first, count, scales) gives the panel's scales of
// some segments; done(row, height) for each tile that is whole.
template <int BITS, bool HAS_SCALES, bool HAS_OFFSETS, class ScalesOf, class Done>
void multiply_segmented_panel(const IntegerRows& x, const uint32_t* words, int64_t first_row, int64_t rows,
                              float* totals, ScalesOf scales_of, Done done) {
    constexpr int kDepth = 32 / BITS;
    SegmentScales scales;
    int64_t depth = round_up(x.k, kDepth);
    memset(totals, 0, rows * kCodePanel * sizeof(float));
    for (int64_t s = 0; s < x.segments; s += kPieceSegments) {
        int64_t count = lesser(kPieceSegments, x.segments - s), first = s * x.segment;
        scales_of(s, count, scales);
        for_tiles(rows, [&](int64_t row, auto height) {
            constexpr int ROWS = decltype(height)::value;
            int64_t at = first_row + row, cell = s * x.m + at;
            SegmentedTile tile = {x.codes.data + at * x.stride + first, x.stride,
                                  lesser(count * x.segment, depth - first), x.segment, x.m, x.scales.data + cell,
                                  x.starts.data + cell, x.sums.data + cell, words + first / kDepth * kCodePanel,
                                  scales.scales, scales.offsets};
            Prefetch prefetch = prefetch_of(tile.words, tile.words, 0, 1);
            int64_t run = lesser(x.segment / kDepth, kPrefetchRun);  // words of a column between two bursts
            prefetch.burst = row ? 0 : run * kCodePanel * 4 / 64;
            multiply_segments<BITS, HAS_SCALES, HAS_OFFSETS, ROWS>(tile, prefetch, totals + row * kCodePanel);
            if (s + count == x.segments) done(row, ROWS);
        });
    }
}

}  // namespace SERVD_ISA
