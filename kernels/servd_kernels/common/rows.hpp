// Owns: activations made ready for the tiles of codes.hpp: padded, widened, rounded to int8 or e4m3, summed.
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

SERVD_INLINE void store_any(void* p, int dtype, int64_t i, vf v, int64_t n) {
    auto put = [=](auto* out) __attribute__((always_inline)) {
        if (n == W) store(out + i, v);
        else store_n(out + i, v, n);
    };
    switch (dtype) {
        case kFloat32: return put(static_cast<float*>(p));
        case kBFloat16: return put(static_cast<bf16*>(p));
        default: return put(static_cast<f16*>(p));
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

// W codes to `out`, in the order in which integer_dot meets them in a word of BITS-bit codes.
template <int BITS>
SERVD_INLINE void store_codes(RowCode* out, vi codes) {
#if defined(__AVX512VNNI__)
    const __m128i order = BITS == 4 ? _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)
                                    : _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    _mm_storeu_si128((__m128i*)out, _mm_shuffle_epi8(_mm512_cvtepi32_epi8((__m512i)codes), order));
#else
    vh narrow = __builtin_convertvector(codes, vh);
    memcpy(out, &narrow, sizeof narrow);
#endif
}

SERVD_INLINE int32_t sum_integers(vi v) {
    int32_t total = 0;
    for (int i = 0; i < W; ++i) total += v[i];
    return total;
}

// x[0..n) rounded to int8 by its absmax / 127; the sum of the codes. `out` has room for n rounded up to W.
template <int BITS, class T>
SERVD_INLINE int32_t quantize_segment(const T* x, int64_t n, RowCode* out, float* scale) {
    *scale = largest_magnitude(x, n) / 127.f;
    vf inverse = broadcast(1.f / *scale);
    vi total{};
    for (int64_t i = 0; i < n; i += W) {
        vi codes = round_to_integer(clamp(load_n(x + i, lesser(int64_t(W), n - i)) * inverse, 127.f));
        total += codes;
        store_codes<BITS>(out + i, codes);
    }
    return sum_integers(total);
}

template <int BITS>
SERVD_INLINE int32_t take_segment(const int8_t* x, int64_t n, RowCode* out) {
    vi total{};
    for (int64_t i = 0; i < n; i += W) {
        vi codes{};
        for (int64_t j = 0; j < lesser(int64_t(W), n - i); ++j) codes[j] = x[i + j];
        total += codes;
        store_codes<BITS>(out + i, codes);
    }
    return sum_integers(total);
}

// Rows of int8 codes, with a scale and the sum of the codes for each segment of columns.
struct IntegerRows {
    int64_t segment, segments, stride;
    Scratch<RowCode> codes;
    Scratch<float> scales;
    Scratch<int32_t> sums;
    IntegerRows(int64_t m, int64_t k, int64_t segment)
        : segment(segment), segments(quotient_up(k, segment)), stride(round_up(k, 64)), codes(m * stride),
          scales(m * segments), sums(m * segments) {}

    // x [m, k] of `dtype`; with kCodes, `given` holds its scales.
    template <int BITS>
    void fill(const void* x, int dtype, int64_t x_stride, const float* given, int64_t m, int64_t k) {
        parallel(m, m * k, [=](int64_t row) {
            RowCode* out = codes.data + row * stride;
            memset(out + k / W * W, 0, (stride - k / W * W) * sizeof(RowCode));
            for (int64_t s = 0; s < segments; ++s) {
                int64_t first = s * segment, n = lesser(segment, k - first), cell = row * segments + s;
                if (dtype == kCodes) {
                    scales.data[cell] = given[cell];
                    sums.data[cell] = take_segment<BITS>(
                        static_cast<const int8_t*>(x) + row * x_stride + first, n, out + first);
                } else {
                    sums.data[cell] = with_dtype(dtype, [&](auto tag) {
                        using T = typename decltype(tag)::type;
                        return quantize_segment<BITS>(static_cast<const T*>(x) + row * x_stride + first, n,
                                                      out + first, &scales.data[cell]);
                    });
                }
            }
        });
    }
};

}  // namespace SERVD_ISA
