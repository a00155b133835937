// Owns: a row of floats to 8-bit codes with one scale, as quantize_rows of activation/__init__.py defines it.
// Does not know: where the row comes from.
#pragma once
#include "simd.hpp"

namespace SERVD_ISA {

enum RowCode { kNoCode = 0, kInt8 = 1, kE4M3 = 2 };

// The largest size seen. Compared as integers, where NaN is above infinity, so that it is not lost.
struct AbsMax {
    vi bits = {};
    SERVD_MEMBER void add(vf v) {
        vi size = (vi)v & 0x7fffffff;
        bits = size > bits ? size : bits;
    }
    float value() const {
        int32_t most = 0;
        for (int i = 0; i < W; ++i) most = greater(most, bits[i]);
        float out;
        memcpy(&out, &most, 4);
        return out;
    }
};

// Each in -127..127, to nearest even.
SERVD_INLINE vi round_to_int8(vf x) {
    const vf magic = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    return (vi)(x + magic) - (vi)magic;
}

// Each in [-448, 448], to fp8 e4m3 (OCP: no infinity), to nearest even.
SERVD_INLINE vi round_to_e4m3(vf x) {
    vi bits = (vi)x, rest = bits & 0x7fffffff;
    vi normal = ((rest + 0x7ffff + (rest >> 20 & 1)) >> 20) - (120 << 3);
    // Below 2^-6 the adder rounds to multiples of 2^-9: 2^14 has that unit in its last place.
    vi subnormal = (vi)((vf)rest + 16384.f) - 0x46800000;
    return (rest < 0x3c800000 ? subnormal : normal) | (bits >> 24 & 0x80);
}

SERVD_INLINE void store_bytes(uint8_t* out, vi codes, int64_t n) {
#if defined(__AVX512F__)
    _mm_mask_storeu_epi8(out, first_n(n), _mm512_cvtepi32_epi8((__m512i)codes));
#else
    for (int i = 0; i < n; ++i) out[i] = uint8_t(codes[i]);
#endif
}

// Codes of values * (limit / most); returns the scale, most / limit. What comes out as NaN (0 or infinity for `most`)
// has code 0.
template <class Round>
SERVD_INLINE float store_rounded(const float* values, float most, float limit, uint8_t* out, int64_t count,
                                 Round round) {
    vf inverse = broadcast(limit / most);
    for (int64_t i = 0; i < count; i += W) {
        vf ratio = load(values + i) * inverse;
        ratio = ratio == ratio ? ratio : vf{};
        ratio = ratio > limit ? broadcast(limit) : ratio < -limit ? broadcast(-limit) : ratio;
        store_bytes(out + i, round(ratio), lesser(int64_t(W), count - i));
    }
    return most / limit;
}

// `values` may be read up to the next multiple of W.
SERVD_INLINE float store_codes(int code, const float* values, const AbsMax& most, uint8_t* out, int64_t count) {
    if (code == kInt8)
        return store_rounded(values, most.value(), 127.f, out, count, [](vf x) { return round_to_int8(x); });
    return store_rounded(values, most.value(), 448.f, out, count, [](vf x) { return round_to_e4m3(x); });
}

}  // namespace SERVD_ISA
