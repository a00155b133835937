// Owns: the register tiles of unsigned weight codes by int8 activations: exact sums over a row, or group by group.
// Does not know: where activations come from (integer_rows.hpp), nor what follows the product.
#pragma once
#include "codes.hpp"

namespace SERVD_ISA {

#if defined(__AVX512VNNI__)
using RowCode = int8_t;  // in the order that store_codes of integer_rows.hpp gives
constexpr int kIntegerStep = 4;
#else
using RowCode = int16_t;
constexpr int kIntegerStep = 2;
#endif

// The codes of a word that step `step` multiplies: four bytes, or two halves.
template <int BITS>
SERVD_INLINE vu integer_part(vu words, int step) {
    constexpr uint32_t kByte = BITS == 4 ? 0x0f : 0xff;
    constexpr uint32_t kMask = kIntegerStep == 4 ? kByte * 0x01010101u : kByte * 0x00010001u;
    return (words >> unsigned(step * BITS)) & kMask;
}

SERVD_INLINE vi integer_dot(vi sum, vu weights, const RowCode* x) {
    int32_t codes;
    memcpy(&codes, x, 4);
#if defined(__AVX512VNNI__)
    // Not the intrinsic: GCC 12 copies and spills the accumulators around it, which takes 2.4 times as long.
    __m512i value = _mm512_set1_epi32(codes);
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(value));
    return sum;
#elif defined(__AVX2__)
    return sum + (vi)_mm256_madd_epi16((__m256i)weights, _mm256_set1_epi32(codes));
#else
    return sum + (vi)(weights & 0xffff) * x[0] + (vi)(weights >> 16) * x[1];
#endif
}

template <int ROWS>
using Dots = vi[ROWS][kTileVectors];

// dots += the codes of one word of each column times columns i.. of the rows.
template <int BITS, int ROWS>
SERVD_INLINE void multiply_words(const TileRows<ROWS, RowCode>& rows, int64_t i, const uint32_t* words,
                                 Dots<ROWS>& dots) {
    vu word[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) word[v] = load_words(words + v * W);
#pragma GCC unroll 4
    for (int step = 0; step < 32 / BITS / kIntegerStep; ++step) {
        vu part[kTileVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) part[v] = integer_part<BITS>(word[v], step);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const RowCode* value = rows[r] + i + step * kIntegerStep;
#pragma GCC unroll 4
            for (int v = 0; v < kTileVectors; ++v) dots[r][v] = integer_dot(dots[r][v], part[v], value);
        }
    }
}

// W times the number at p. As bits: a sum with a vector of zeros would have to be computed, for -0's sake.
SERVD_INLINE vi spread(const int32_t* p) { return vi{} + *p; }
SERVD_INLINE vf spread(const float* p) {
    int32_t bits;
    memcpy(&bits, p, 4);
    return (vf)(vi{} + bits);
}

// sums [ROWS][kTileVectors] = x [ROWS, depth] times words of 8-bit codes, added to `starts` of each row, or to sums
// where that is null. A function of its own: inlined, its loop would share registers with what surrounds it, and spill.
template <int ROWS>
__attribute__((noinline)) void multiply_whole(const RowCode* x, int64_t x_stride, const uint32_t* words, int64_t depth,
                                              Prefetch prefetch, const int32_t* starts, vi* sums) {
    TileRows<ROWS, RowCode> rows(x, x_stride);
    Dots<ROWS> dots;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) dots[r][v] = starts ? spread(starts + r) : sums[r * kTileVectors + v];
    for (int64_t i = 0; i < depth;) {
        prefetch.fetch();
        for (int64_t end = lesser(depth, i + kPrefetchRun * 4); i < end; i += 4, words += kCodePanel)
            multiply_words<8, ROWS>(rows, i, words, dots);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) sums[r * kTileVectors + v] = dots[r][v];
}

// Rows of activations and a panel of weights, cut into segments of columns. What is [segments][m] is at the tile's
// first row: then the rows of a segment lie side by side.
struct SegmentedTile {
    const RowCode* x;
    int64_t x_stride, depth, segment, m;
    const float* x_scales;  // [segments][m]
    const int32_t* starts;  // [segments][m]: what the dots begin at
    const float* x_sums;    // [segments][m]: of x in the segment
    const uint32_t* words;
    const float* scales;    // [segments][kCodePanel], of the weight
    const float* offsets;   // [segments][kCodePanel], of the weight: what a code of 0 stands for
};

// totals [ROWS][kCodePanel] += dot * scale * x_scale + x_sum * offset for each segment, in ascending order. The dots
// are exact integers; where there are offsets they begin at 0, not at `starts`.
template <int BITS, bool HAS_SCALES, bool HAS_OFFSETS, int ROWS>
__attribute__((noinline)) void multiply_segments(const SegmentedTile& tile, Prefetch prefetch, float* totals) {
    constexpr int kDepth = 32 / BITS;
    TileRows<ROWS, RowCode> rows(tile.x, tile.x_stride);
    const uint32_t* words = tile.words;
    const float *x_scales = tile.x_scales, *x_sums = tile.x_sums, *scales = tile.scales, *offsets = tile.offsets;
    const int32_t* starts = tile.starts;
    int64_t m = tile.m, depth = tile.depth, segment = tile.segment;
    for (int64_t i = 0; i < depth;) {
        Dots<ROWS> dots;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < kTileVectors; ++v) dots[r][v] = HAS_OFFSETS ? vi{} : spread(starts + r);
        for (int64_t end = lesser(i + segment, depth); i < end;) {
            prefetch.fetch();
            for (int64_t pause = lesser(end, i + kPrefetchRun * kDepth); i < pause; i += kDepth, words += kCodePanel)
                multiply_words<BITS, ROWS>(rows, i, words, dots);
        }
        asm volatile("" ::: "memory");  // scales loaded before the loop would push dots out of the registers
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
            vf scale, offset;
            if (HAS_SCALES) scale = load(scales + v * W);
            if (HAS_OFFSETS) offset = load(offsets + v * W);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                float* place = totals + r * kCodePanel + v * W;
                vf dot = __builtin_convertvector(dots[r][v], vf);
                if (HAS_SCALES) dot *= scale;
                vf total = fma(dot, spread(x_scales + r), load(place));
                if (HAS_OFFSETS) total = fma(offset, spread(x_sums + r), total);
                store(place, total);
            }
        }
        starts += m, x_scales += m, x_sums += m;
        if (HAS_SCALES) scales += kCodePanel;
        if (HAS_OFFSETS) offsets += kCodePanel;
    }
}

}  // namespace SERVD_ISA
