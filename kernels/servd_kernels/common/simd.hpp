// Owns: one vector type of W floats for each instruction set, with loads, stores, exp and reductions.
// Does not know: any op. Everything sits in namespace SERVD_ISA, so that the copies never mix at link time.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define SERVD_JOIN2(a, b, c) a##b##_##c
#define SERVD_JOIN(a, b, c) SERVD_JOIN2(a, b, c)
// servd_<isa>_<name>: the symbol that native.py looks up.
#define SERVD_EXPORT(name) \
    extern "C" __attribute__((visibility("default"))) int SERVD_JOIN(servd_, SERVD_ISA, name)
#define SERVD_INLINE static inline __attribute__((always_inline))
#define SERVD_MEMBER __attribute__((always_inline))  // a function inside a class, or a lambda

namespace SERVD_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint8_t vb __attribute__((vector_size(W)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

enum DType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

template <class A, class B>
SERVD_INLINE A lesser(A a, B b) { return a < A(b) ? a : A(b); }
template <class A, class B>
SERVD_INLINE A greater(A a, B b) { return a > A(b) ? a : A(b); }

SERVD_INLINE vf broadcast(float value) { return vf{} + value; }

// a * b + c. The build forbids the compiler to contract, so that the rounding is the same wherever a
// kernel was inlined or unrolled: a fused step is always this function.
SERVD_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

SERVD_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// --- loads: any dtype to float32 ---------------------------------------------------------------------

SERVD_INLINE float half_to_float(uint16_t bits) {
    uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff, out;
    if (rest >= 0x7c00) {
        out = 0x7f800000 | (rest & 0x3ff) << 13;  // infinity, NaN
    } else if (rest >= 0x400) {
        out = (rest << 13) + 0x38000000;
    } else {
        float value = float(rest) * 5.9604644775390625e-8f;  // subnormal: multiples of 2^-24
        memcpy(&out, &value, 4);
    }
    out |= sign;
    float value;
    memcpy(&value, &out, 4);
    return value;
}

SERVD_INLINE vf load(const float* p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

SERVD_INLINE vf widen(vh bits) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);  // GCC 12 would split it in two
#else
    return (vf)(__builtin_convertvector(bits, vu) << 16);
#endif
}

SERVD_INLINE vf load(const bf16* p) {
    vh bits;
    memcpy(&bits, p, sizeof bits);
    return widen(bits);
}

SERVD_INLINE vf load(const f16* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vf v;
    for (int i = 0; i < W; ++i) v[i] = half_to_float(p[i].bits);
    return v;
#endif
}

// The first n elements (0 <= n <= W), zeros after them; never touches memory beyond.
template <class T>
SERVD_INLINE vf load_n(const T* p, int64_t n) {
    T full[W] = {};
    memcpy(full, p, n * sizeof(T));
    return load(full);
}

#if defined(__AVX512F__)
SERVD_INLINE __mmask16 first_n(int64_t n) { return __mmask16((1u << n) - 1); }
template <>
inline __attribute__((always_inline)) vf load_n<float>(const float* p, int64_t n) {
    return _mm512_maskz_loadu_ps(first_n(n), p);
}
template <>
inline __attribute__((always_inline)) vf load_n<bf16>(const bf16* p, int64_t n) {
    return widen((vh)_mm256_maskz_loadu_epi16(first_n(n), p));
}
template <>
inline __attribute__((always_inline)) vf load_n<f16>(const f16* p, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_n(n), p));
}
#endif

// --- stores: float32 to any dtype, to nearest even ----------------------------------------------------

SERVD_INLINE uint16_t float_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to 65536 or more
    if (rest < 0x38800000) {                                 // below 2^-14: let the adder round to 2^-24
        float magnitude;
        memcpy(&magnitude, &rest, 4);
        magnitude += 0.5f;
        memcpy(&rest, &magnitude, 4);
        return uint16_t(sign | (rest - 0x3f000000));
    }
    rest += 0xfff + (rest >> 13 & 1);
    return uint16_t(sign | (rest - 0x38000000) >> 13);
}

SERVD_INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

SERVD_INLINE void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
    if (__builtin_expect(_mm512_fpclass_ps_mask(v, 0x20) == 0, 1)) {  // no subnormals: the instruction flushes them
        _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
        return;
    }
#endif
    vu u = (vu)v;
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vu quiet_nan = (u >> 16) | 0x40;
    vh h = __builtin_convertvector((v == v) ? rounded : quiet_nan, vh);
    memcpy(p, &h, sizeof h);
}

SERVD_INLINE void store(f16* p, vf v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < W; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

template <class T>
SERVD_INLINE void store_n(T* p, vf v, int64_t n) {
    T full[W];
    store(full, v);
    memcpy(p, full, n * sizeof(T));
}

// --- functions ----------------------------------------------------------------------------------------

// Lane i gets lane i ^ S; S is a power of two below W.
template <int S>
SERVD_INLINE vf swap_lanes(vf v) {
#if defined(__AVX512F__)
    if constexpr (S == 1) return _mm512_permute_ps(v, 0xB1);
    else if constexpr (S == 2) return _mm512_permute_ps(v, 0x4E);
    else if constexpr (S == 4) return _mm512_shuffle_f32x4(v, v, 0xB1);
    else return _mm512_shuffle_f32x4(v, v, 0x4E);
#elif defined(__AVX2__)
    if constexpr (S == 1) return _mm256_permute_ps(v, 0xB1);
    else if constexpr (S == 2) return _mm256_permute_ps(v, 0x4E);
    else return _mm256_permute2f128_ps(v, v, 1);
#else
    vf out;
    for (int i = 0; i < W; ++i) out[i] = v[i ^ S];
    return out;
#endif
}

SERVD_INLINE int32_t max_lanes(vi v) {
    int32_t lanes[W], most;
    memcpy(lanes, &v, sizeof lanes);
    most = lanes[0];
    for (int i = 1; i < W; ++i) most = greater(most, lanes[i]);
    return most;
}

SERVD_INLINE float sum_lanes(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#else
    float lanes[W];
    memcpy(lanes, &v, sizeof lanes);
    for (int step = W / 2; step; step /= 2)
        for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
    return lanes[0];
#endif
}

SERVD_INLINE float max_lanes(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(v);
#else
    float lanes[W];
    memcpy(lanes, &v, sizeof lanes);
    for (int step = W / 2; step; step /= 2)
        for (int i = 0; i < step; ++i) lanes[i] = lanes[i] > lanes[i + step] ? lanes[i] : lanes[i + step];
    return lanes[0];
#endif
}

// e^x within 2 units in the last place, for x up to 88.3 and as if 88.3 above; exactly 0 below -87.3, where
// the result leaves the normal range.
SERVD_INLINE vf vexp(vf x) {
    const vf magic = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    vf clamped = x > 88.3f ? broadcast(88.3f) : x;
    vf shifted = fma(clamped, broadcast(1.44269504088896341f), magic);
    vf n = shifted - magic;
    vf r = fma(n, broadcast(-0.693359375f), clamped);
    r = fma(n, broadcast(2.12194440e-4f), r);
    vf y = broadcast(1.9875691500e-4f);
    y = fma(y, r, broadcast(1.3981999507e-3f));
    y = fma(y, r, broadcast(8.3334519073e-3f));
    y = fma(y, r, broadcast(4.1665795894e-2f));
    y = fma(y, r, broadcast(1.6666665459e-1f));
    y = fma(y, r, broadcast(5.0000001201e-1f));
    y = fma(y, r * r, r + 1.f);
    vi power = ((vi)shifted - (vi)magic + 127) << 23;  // 2^n, n in [-126, 127]
    return x < -87.3f ? vf{} : y * (vf)power;
}

// tanh within 3 units in the last place: an odd polynomial near zero, where 1 - 2 / (e^2x + 1) would cancel.
SERVD_INLINE vf vtanh(vf x) {
    vf size = (vf)((vi)x & 0x7fffffff), square = x * x;
    vf far = 1.f - 2.f / (vexp(size + size) + 1.f);
    far = (vf)((vi)far | ((vi)x & (vi)(vu{} + 0x80000000u)));
    vf y = broadcast(-5.70498872745e-3f);
    y = fma(y, square, broadcast(2.06390887954e-2f));
    y = fma(y, square, broadcast(-5.37397155531e-2f));
    y = fma(y, square, broadcast(1.33314422036e-1f));
    y = fma(y, square, broadcast(-3.33332819422e-1f));
    return size < 0.625f ? fma(y * square, x, x) : far;
}

}  // namespace SERVD_ISA
