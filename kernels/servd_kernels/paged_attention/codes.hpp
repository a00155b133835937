// Owns: the decoding of stored numbers: one code to float32, words and rows of codes to vectors, their scales.
// Does not know: blocks' places or what is computed with the numbers. The formats: kv_format.py.
#pragma once
#include "../common/tile.hpp"
#include "call.hpp"

namespace SERVD_ISA {
namespace {

// float16 in the low half of each lane.
SERVD_INLINE vf decode_half(vu x) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)x));
#else
    uint16_t halves[W];
    for (int i = 0; i < W; ++i) halves[i] = uint16_t(x[i]);
    return load(reinterpret_cast<const f16*>(halves));
#endif
}

constexpr int dims_of_word(int64_t code) {
    return code == kCodeFloat32 ? 1 : code == kCodeBFloat16 || code == kCodeFloat16 ? 2 : code == kCodeInt4 ? 8 : 4;
}

// Dimension i of the words of W tokens, without scale.
template <int64_t CODE>
SERVD_INLINE vf decode_word(vu x, int i) {
    switch (CODE) {
        case kCodeFloat32: return (vf)x;
        case kCodeBFloat16: return (vf)(i ? x & 0xffff0000u : x << 16);
        case kCodeFloat16: return decode_half(x >> (16 * i));
        case kCodeFp8: return decode_e4m3(x >> (8 * i) & 0xff);
        case kCodeInt8: return __builtin_convertvector((vi)(x << (24 - 8 * i)) >> 24, vf);
        default: return __builtin_convertvector((vi)(x >> (4 * i) & 15), vf);
    }
}

SERVD_INLINE vu load_bytes(const char* p) { return SERVD_ISA::load_bytes(reinterpret_cast<const uint8_t*>(p)); }

// W nibbles from W / 2 bytes, the low one of a byte first.
SERVD_INLINE vu load_nibbles(const char* p) {
    uint32_t words[2] = {};
    memcpy(words, p, W / 2);
    vu lane, x = vu{} + words[0];
    for (int i = 0; i < W; ++i) lane[i] = uint32_t(i);
    if (W == 16) x = lane >= 8 ? vu{} + words[1] : x;
    return x >> ((lane & 7) * 4) & 15;
}

// W dimensions of one token's row from d on, without scale.
template <int64_t CODE>
SERVD_INLINE vf decode_row(const char* row, int64_t d) {
    switch (CODE) {
        case kCodeFloat32: return load(reinterpret_cast<const float*>(row) + d);
        case kCodeBFloat16: return load(reinterpret_cast<const bf16*>(row) + d);
        case kCodeFloat16: return load(reinterpret_cast<const f16*>(row) + d);
        case kCodeFp8: return decode_e4m3(load_bytes(row + d));
        case kCodeInt8: return __builtin_convertvector((vi)(load_bytes(row + d) << 24) >> 24, vf);
        default: return __builtin_convertvector((vi)load_nibbles(row + d / 2), vf);
    }
}

// f(Count<code>{}).
template <class F>
SERVD_INLINE void with_code(int64_t code, F&& f) {
    switch (code) {
        case kCodeFloat32: return f(Count<kCodeFloat32>{});
        case kCodeBFloat16: return f(Count<kCodeBFloat16>{});
        case kCodeFloat16: return f(Count<kCodeFloat16>{});
        case kCodeFp8: return f(Count<kCodeFp8>{});
        case kCodeInt8: return f(Count<kCodeInt8>{});
        default: return f(Count<kCodeInt4>{});
    }
}

// `yes` in the lanes whose bit is set, `no` in the others.
SERVD_INLINE vf select(uint64_t bits, vf yes, vf no) {
#if defined(__AVX512F__)
    return _mm512_mask_mov_ps(no, __mmask16(bits), yes);
#else
    vi lane;
    for (int i = 0; i < W; ++i) lane[i] = 1 << i;
    return (lane & int32_t(bits)) != 0 ? yes : no;
#endif
}

// Where the first parameter of token t lies; the next ones follow a block's size apart.
SERVD_INLINE const f16* params_of(const Call& call, const Unit& unit, const Side& side, int64_t t) {
    return reinterpret_cast<const f16*>(head_of(call, unit, t) + side.params_offset) + call.offset_of(t);
}

SERVD_INLINE void store_params(const f16* source, uint64_t seen, float* out) {
    for (int v = 0; v < kRun; v += W) {
        vf value = load(source + v);
        store(out + v, select(seen >> v, value + value * 0.f, vf{}));
    }
}

// Asks memory for a later tile's parameters.
inline void prefetch_params(const Call& call, const Place& next, const Side& side) {
    int64_t size = call.format->block_size, bytes = side.num_groups * side.num_params * size * 2;
    for (int64_t t = next.t - call.offset_of(next.t); t < next.t + kTokens; t += size) {
        if (!(bits_between(t, t + size, next.t) & next.seen)) continue;
        auto* source = reinterpret_cast<const char*>(params_of(call, next.unit, side, t));
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(source + i);
    }
}

// Scales and minima of a tile, out [parameter][kTokens]; zero for tokens that are not seen. Infinity becomes NaN:
// a group that held infinity decodes to NaN as a whole.
inline void load_params(const Call& call, const Place& place, const Side& side, float* out) {
    const Unit& unit = place.unit;
    int64_t t = place.t;
    uint64_t seen = place.seen;
    int64_t size = call.format->block_size, count = side.num_groups * side.num_params;
    for (int run = 0; run < kRuns; ++run, t += kRun, out += kRun, seen >>= kRun) {
        if (size % kRun == 0 && (seen & 0xffff)) {
            auto* source = params_of(call, unit, side, t);
            for (int64_t p = 0; p < count; ++p) store_params(source + p * size, seen, out + p * kTokens);
            continue;
        }
        for (int64_t p = 0; p < count; ++p) {
            f16 halves[kRun] = {};
            for (int i = 0; i < kRun; ++i)
                if (seen >> i & 1) halves[i] = params_of(call, unit, side, t + i)[p * size];
            store_params(halves, seen, out + p * kTokens);
        }
    }
}

}  // namespace
}  // namespace SERVD_ISA
