// Owns: activations as int8 codes for the integer tiles of codes.hpp: rotated, rounded, summed.
// Does not know: weights. Each row is prepared from that row alone.
#pragma once
#include <cmath>

#include "rows.hpp"

namespace SERVD_ISA {

constexpr int64_t kMaxRotation = 256;

// v times the Hadamard matrix of N * W columns, not normalized: butterflies in ascending strides, as
// weight_quant.rotate has them.
template <int S>
SERVD_INLINE vf butterfly(vf v) {
    vf sign;
    for (int i = 0; i < W; ++i) sign[i] = i & S ? -1.f : 1.f;
    v = fma(v, sign, swap_lanes<S>(v));
    if constexpr (2 * S < W) return butterfly<2 * S>(v);
    else return v;
}

template <int N>
SERVD_INLINE void rotate_vectors(vf* v) {
    if constexpr (N == 1) {
        v[0] = butterfly<1>(v[0]);
    } else {
        rotate_vectors<N / 2>(v);
        rotate_vectors<N / 2>(v + N / 2);
#pragma GCC unroll 32
        for (int i = 0; i < N / 2; ++i) {
            vf a = v[i], b = v[i + N / 2];
            v[i] = a + b;
            v[i + N / 2] = a - b;
        }
    }
}

// Blocks of SIZE columns times the normalized Hadamard matrix.
template <int SIZE, class T>
void rotate_blocks(const T* x, int64_t k, float* out) {
    constexpr int N = SIZE / W;
    const vf norm = broadcast(float(1 / std::sqrt(double(SIZE))));
    for (int64_t i = 0; i < k; i += SIZE) {
        vf v[N];
#pragma GCC unroll 64
        for (int j = 0; j < N; ++j) v[j] = load(x + i + j * W);
        rotate_vectors<N>(v);
#pragma GCC unroll 64
        for (int j = 0; j < N; ++j) store(out + i + j * W, v[j] * norm);
    }
}

// x [k] rotated in blocks of `size` columns: 16 to kMaxRotation, a power of two that divides k.
template <int SIZE = 16, class T>
SERVD_INLINE void rotate_row(const T* x, int64_t k, int64_t size, float* out) {
    if constexpr (SIZE <= kMaxRotation) {
        if (size == SIZE) rotate_blocks<SIZE>(x, k, out);
        else rotate_row<2 * SIZE>(x, k, size, out);
    }
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

// What the rows of a call are made from.
struct RowSource {
    const void* x;  // [m, k], of `dtype`, or int8 codes (kCodes) with their scales in `given`
    int dtype;
    int64_t stride;       // of x, in elements
    const float* given;   // [m, segments]
    int64_t rotation;     // columns of a rotated block of x; 0: none is
};

// Rows of int8 codes, with a scale and the sum of the codes for each segment of columns.
struct IntegerRows {
    int64_t m, k, segment, segments, stride;
    Scratch<RowCode> codes;
    Scratch<float> scales;
    Scratch<int32_t> sums;
    IntegerRows(int64_t m, int64_t k, int64_t segment)
        : m(m), k(k), segment(segment), segments(quotient_up(k, segment)), stride(round_up(k, 64)), codes(m * stride),
          scales(m * segments), sums(m * segments) {}

    template <int BITS>
    void fill(const RowSource& source) {
        parallel(m, m * k, [&](int64_t row) {
            memset(codes.data + row * stride + k / W * W, 0, (stride - k / W * W) * sizeof(RowCode));
            if (source.dtype == kCodes) return take_row<BITS>(source, row);
            with_dtype(source.dtype, [&](auto tag) {
                using T = typename decltype(tag)::type;
                const T* x = static_cast<const T*>(source.x) + row * source.stride;
                if (source.rotation) {
                    Scratch<float> rotated(k);
                    rotate_row(x, k, source.rotation, rotated.data);
                    quantize_row<BITS>(static_cast<const float*>(rotated.data), row);
                } else {
                    quantize_row<BITS>(x, row);
                }
                return 0;
            });
        });
    }

private:
    template <int BITS, class T>
    void quantize_row(const T* x, int64_t row) {
        for (int64_t s = 0; s < segments; ++s) {
            int64_t first = s * segment, cell = row * segments + s;
            sums.data[cell] = quantize_segment<BITS>(x + first, lesser(segment, k - first),
                                                     codes.data + row * stride + first, &scales.data[cell]);
        }
    }

    template <int BITS>
    void take_row(const RowSource& source, int64_t row) {
        const int8_t* x = static_cast<const int8_t*>(source.x) + row * source.stride;
        for (int64_t s = 0; s < segments; ++s) {
            int64_t first = s * segment, cell = row * segments + s;
            scales.data[cell] = source.given[cell];
            sums.data[cell] = take_segment<BITS>(x + first, lesser(segment, k - first),
                                                 codes.data + row * stride + first);
        }
    }
};

}  // namespace SERVD_ISA
