// Owns: activations made ready for the tiles of codes.hpp: padded, widened, rounded to e4m3, summed.
// Does not know: weights. Each row is prepared from that row alone.
#pragma once
#include "codes.hpp"

namespace SERVD_ISA {

// Sums over longer runs than this are cut there, so that a decoded piece of a panel stays in the first-level cache.
constexpr int64_t kMaxSegment = 256;

constexpr int kFp8 = 3;  // after DType: x is e4m3 codes
constexpr int kCodes = 4;  // x is int8 codes

SERVD_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
SERVD_INLINE int64_t quotient_up(int64_t n, int64_t step) { return (n + step - 1) / step; }

// n [0, W] numbers at p + i of a matrix of any dtype.
SERVD_INLINE vf load_any(const void* p, int dtype, int64_t i, int64_t n) {
    switch (dtype) {
        case kFloat32: return load_n(static_cast<const float*>(p) + i, n);
        case kBFloat16: return load_n(static_cast<const bf16*>(p) + i, n);
        default: return load_n(static_cast<const f16*>(p) + i, n);
    }
}

SERVD_INLINE vf load_bytes(const uint8_t* p) {
    typedef uint8_t vb __attribute__((vector_size(W)));
    vb bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, vi), vf);
}

SERVD_INLINE vf magnitude(vf v) { return (vf)((vu)v & 0x7fffffffu); }

// The largest magnitude of x[0..n); NaN if any is NaN or infinite.
template <class T>
SERVD_INLINE float largest_magnitude(const T* x, int64_t n) {
    vf most{}, poison{};
    for (int64_t i = 0; i < n; i += W) {
        vf v = load_n(x + i, lesser(int64_t(W), n - i));
        most = vmax(most, magnitude(v));
        poison += v * 0.f;
    }
    return max_lanes(most) + sum_lanes(poison);
}

template <class T>
SERVD_INLINE float sum_of(const T* x, int64_t n) {
    vf total{};
    for (int64_t i = 0; i < n; i += W) total += load_n(x + i, lesser(int64_t(W), n - i));
    return sum_lanes(total);
}

SERVD_INLINE vf clamp(vf v, float limit) {
    v = v == v ? v : vf{};
    v = v > limit ? broadcast(limit) : v;
    return v < -limit ? broadcast(-limit) : v;
}

// To the nearest integer, ties to even, for |v| < 2^22.
SERVD_INLINE vi round_to_integer(vf v) {
    const vf magic = broadcast(12582912.f);  // 1.5 * 2^23
    return (vi)(v + magic) - (vi)magic;
}

// To the nearest e4m3 number, ties to even, for |v| <= 448.
SERVD_INLINE vf round_to_fp8(vf v) {
    vu bits = (vu)v;
    vf normal = (vf)((bits + 0x7ffff + ((bits >> 20) & 1)) & 0xfff00000u);
    const vf magic = broadcast(24576.f);  // 1.5 * 2^14: a unit in its last place is 2^-9
    return magnitude(v) < 0x1p-6f ? (v + magic) - magic : normal;
}

}  // namespace SERVD_ISA
