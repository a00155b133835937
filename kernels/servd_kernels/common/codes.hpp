// Owns: how weight codes of 4 and 8 bits lie in memory, what numbers they stand for, and their register tiles.
// Does not know: scales, nor where activations come from (code_layout.py packs; rows.hpp prepares activations).
//
// A packed weight is panels of kCodePanel output columns, each [k / kDepth][kCodePanel] words of 32 bits: a word holds
// kDepth = 32 / bits neighbours of one column. The even ones fill its low half in ascending order, the odd ones its
// high half, so that one shift brings the neighbours 2t and 2t + 1 to the foot of both halves: a pair for vdpbf16ps.
#pragma once
#include "kernel.hpp"
#include "tile.hpp"

namespace SERVD_ISA {

constexpr int kCodePanel = kTileVectors * W;

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

SERVD_INLINE vu load_words(const uint32_t* p) {
    vu v;
    memcpy(&v, p, sizeof v);
    return v;
}

// The code k of each word.
template <int BITS>
SERVD_INLINE vu code_of(vu words, int k) {
    constexpr int kHalf = 16 / BITS;
    return (words >> unsigned((k % 2 * kHalf + k / 2) * BITS)) & ((1u << BITS) - 1);
}

// --- codes: number(words, k) as float; pair(words, t) the numbers 2t and 2t + 1 as bfloat16, exactly -------------

struct Int4 {  // 0..15 for -8..7
    static constexpr int kBits = 4, kDepth = 8;
    static constexpr float kCentre = 8;
    SERVD_INLINE vf number(vu words, int k) {
        return __builtin_convertvector((vi)code_of<4>(words, k), vf) - kCentre;
    }
#if defined(__AVX512BF16__)
    SERVD_INLINE __m512bh pair(vu words, int t) {
        // Twice the same 16 numbers: vpermw looks at 5 bits of an index, and the fifth belongs to the next code.
        const __m512i numbers = _mm512_broadcast_i64x4(_mm256_setr_epi16(
            short(0xc100), short(0xc0e0), short(0xc0c0), short(0xc0a0), short(0xc080), short(0xc040), short(0xc000),
            short(0xbf80), 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
        return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)words, 4 * t), numbers);
    }
#endif
};

struct Int8 {  // 0..255 for -128..127
    static constexpr int kBits = 8, kDepth = 4;
    static constexpr float kCentre = 128;
    SERVD_INLINE vf number(vu words, int k) {
        // 2^23 + code, as bits: cheaper than a conversion, and as exact.
        return (vf)(code_of<8>(words, k) | 0x4b000000u) - (8388608.f + kCentre);
    }
#if defined(__AVX512BF16__)
    SERVD_INLINE __m512bh pair(vu words, int t) {
        vu low = (vu)number(words, 2 * t), high = (vu)number(words, 2 * t + 1);
        return (__m512bh)((low >> 16) | high);  // 8 bits of mantissa: the low halves are zero
    }
#endif
};

struct Fp8 {  // e4m3
    static constexpr int kBits = 8, kDepth = 4;
    static constexpr float kCentre = 0;
    SERVD_INLINE vf from_code(vu code) {
        vu magnitude = code & 0x7f;
        vu normal = (magnitude << 20) + (120u << 23);
        vu subnormal = (vu)(__builtin_convertvector((vi)magnitude, vf) * 0x1p-9f);
        vu bits = magnitude < 8 ? subnormal : normal;
        bits = magnitude == 0x7f ? vu{} + 0x7fc00000u : bits;
        return (vf)(bits | (code & 0x80) << 24);
    }
    SERVD_INLINE vf number(vu words, int k) { return from_code(code_of<8>(words, k)); }
#if defined(__AVX512BF16__)
    SERVD_INLINE __m512bh pair(vu words, int t) {
        __m512i code = t ? _mm512_srli_epi16((__m512i)words, 8) : (__m512i)words;
        __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
        __m512i bits = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(0x3c00));
        // Subnormals, multiples of 2^-9, by table. NaN comes out as 480, the next number: fixed below.
        const __m512i subnormals =
            _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
        __mmask32 is_small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
        bits = _mm512_mask_permutexvar_epi16(bits, is_small, magnitude, subnormals);
        __mmask32 is_nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
        bits = _mm512_mask_mov_epi16(bits, is_nan, _mm512_set1_epi16(0x7fc0));
        __m512i sign = _mm512_slli_epi16(code, 8);
        return (__m512bh)_mm512_ternarylogic_epi64(bits, sign, _mm512_set1_epi16(short(0x8000)), 0xf8);  // a | b & c
    }
#endif
};

// --- prefetch ----------------------------------------------------------------------------------------------------

constexpr int64_t kPrefetchRun = 8;  // chunks between two bursts
constexpr int64_t kPrefetchAhead = 8192;
constexpr int64_t kRunLines = kPrefetchRun * kCodePanel * 4 / 64;  // cache lines that a run of chunks covers

// A stretch of memory brought to the second-level cache while a tile is computed: `burst` lines a run.
struct Prefetch {
    const char* from;
    int64_t burst;

    SERVD_MEMBER void fetch() {
        for (const char* end = from + burst * 64; from < end; from += 64) __builtin_prefetch(from, 0, 2);
    }
};

// What tile `tile` of `tiles` brings in while all of them meet `words`, which reach to `next`, in turn. The first
// reads them from memory, and runs ahead of itself; the others share the words that follow.
SERVD_INLINE Prefetch prefetch_of(const uint32_t* words, const uint32_t* next, int64_t tile, int64_t tiles) {
    if (tile == 0) return {reinterpret_cast<const char*>(words) + kPrefetchAhead, kRunLines};
    int64_t share = ((next - words) * 4 / 64 / (tiles - 1) + 1) * 64;
    return {reinterpret_cast<const char*>(next) + (tile - 1) * share, kRunLines / (tiles - 1) + 1};
}

// --- floating-point tiles: sums in ascending k, one fused step for each number, or for each pair -----------------

// What a tile multiplies: pairs of bfloat16, or floats.
template <class X> struct Unit;

template <> struct Unit<float> {
    using Weights = vf;
    static constexpr int kStep = 1;
    template <class Code>
    SERVD_INLINE Weights decode(vu words, int step) { return Code::number(words, step); }
    SERVD_INLINE Weights load_weights(const float* p) { return load(p); }
    SERVD_INLINE void store_weights(float* p, Weights w) { store(p, w); }
    SERVD_INLINE Weights spread(const float* x) { return broadcast(*x); }
    SERVD_INLINE vf multiply(Weights w, Weights x, vf sum) { return fma(w, x, sum); }
};

#if defined(__AVX512BF16__)
template <> struct Unit<bf16> {
    using Weights = __m512bh;
    static constexpr int kStep = 2;
    template <class Code>
    SERVD_INLINE Weights decode(vu words, int step) { return Code::pair(words, step); }
    SERVD_INLINE Weights load_weights(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    SERVD_INLINE void store_weights(bf16* p, Weights w) { _mm512_storeu_si512(p, (__m512i)w); }
    SERVD_INLINE Weights spread(const bf16* x) {
        int bits;
        memcpy(&bits, x, 4);
        return (__m512bh)_mm512_set1_epi32(bits);
    }
    SERVD_INLINE vf multiply(Weights w, Weights x, vf sum) { return _mm512_dpbf16_ps(sum, w, x); }
};
#endif

// `words` of depth / kDepth chunks, decoded: [depth / kStep][kCodePanel][kStep].
template <class Code, class X>
SERVD_INLINE void decode_panel(const uint32_t* words, int64_t depth, X* out) {
    using U = Unit<X>;
    for (int64_t chunk = 0; chunk < depth / Code::kDepth; ++chunk) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
            const uint32_t* place = words + chunk * kCodePanel + v * W;
            __builtin_prefetch(reinterpret_cast<const char*>(place) + kPrefetchAhead, 0, 2);
            vu word = load_words(place);
#pragma GCC unroll 8
            for (int step = 0; step < Code::kDepth / U::kStep; ++step) {
                U::store_weights(out + ((chunk * (Code::kDepth / U::kStep) + step) * kCodePanel + v * W) * U::kStep,
                                 U::template decode<Code>(word, step));
            }
        }
    }
}

template <class X, int ROWS>
SERVD_INLINE void multiply_step(const TileRows<ROWS, X>& rows, int64_t i, const typename Unit<X>::Weights* weights,
                                vf (&acc)[ROWS][kTileVectors]) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        auto value = Unit<X>::spread(rows[r] + i);
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) acc[r][v] = Unit<X>::multiply(weights[v], value, acc[r][v]);
    }
}

// acc += x [ROWS, depth] times the decoded panel.
template <class X, int ROWS>
SERVD_INLINE void multiply_decoded(const X* x, int64_t x_stride, const X* panel, int64_t depth,
                                   vf (&acc)[ROWS][kTileVectors]) {
    using U = Unit<X>;
    TileRows<ROWS, X> rows(x, x_stride);
    for (int64_t i = 0; i < depth; i += U::kStep) {
        typename U::Weights weights[kTileVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v)
            weights[v] = U::load_weights(panel + i * kCodePanel + v * W * U::kStep);
        multiply_step<X, ROWS>(rows, i, weights, acc);
    }
}

// The same sums, in the same order, decoding in registers: for few rows.
template <class Code, class X, int ROWS>
SERVD_INLINE void multiply_coded(const X* x, int64_t x_stride, const uint32_t* words, int64_t depth,
                                 vf (&acc)[ROWS][kTileVectors]) {
    using U = Unit<X>;
    TileRows<ROWS, X> rows(x, x_stride);
    for (int64_t i = 0; i < depth; i += Code::kDepth, words += kCodePanel) {
        vu word[kTileVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
            word[v] = load_words(words + v * W);
            __builtin_prefetch(reinterpret_cast<const char*>(words + v * W) + kPrefetchAhead, 0, 2);
        }
#pragma GCC unroll 8
        for (int step = 0; step < Code::kDepth / U::kStep; ++step) {
            typename U::Weights weights[kTileVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kTileVectors; ++v) weights[v] = U::template decode<Code>(word[v], step);
            multiply_step<X, ROWS>(rows, i + step * U::kStep, weights, acc);
        }
    }
}

}  // namespace SERVD_ISA
