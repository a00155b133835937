// Owns: activations as int8 codes for integer_tiles.hpp: rotated, rounded, summed.
// Does not know: weights. Each row is prepared from that row alone.
#pragma once
#include <cmath>

#include "integer_tiles.hpp"
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
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    int32_t total = 0;
    for (int i = 0; i < W; ++i) total += v[i];
    return total;
#endif
}

// The largest magnitude of x[0..n). As bits, where infinity and NaN are above all others and so are not lost.
template <class T>
SERVD_INLINE float largest_size(const T* x, int64_t n) {
    vi most{};
    auto add = [&](vf v) SERVD_MEMBER {
        vi size = (vi)v & 0x7fffffff;
#if defined(__AVX512F__)
        most = (vi)_mm512_max_epi32((__m512i)size, (__m512i)most);
#else
        most = size > most ? size : most;
#endif
    };
    int64_t i = 0;
    for (; i + W <= n; i += W) add(load(x + i));
    if (i < n) add(load_n(x + i, n - i));
#if defined(__AVX512F__)
    int32_t bits = _mm512_reduce_max_epi32((__m512i)most);
#else
    int32_t bits = max_lanes(most);
#endif
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

// To the nearest integer, ties to even, for |v| < 2^22.
SERVD_INLINE vi nearest_integer(vf v) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtps_epi32(v);
#else
    return round_to_integer(v);
#endif
}

#if defined(__AVX512VNNI__)
// store_codes for 64 codes at once, which it adds to the total: packed in fewer steps than 16 by 16.
template <int BITS, class T>
SERVD_INLINE void quantize_64(const T* x, vf inverse, RowCode* out, vi& total) {
    const __m512i places = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i order = _mm512_broadcast_i32x4(
        BITS == 4 ? _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)
                  : _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
    __m512i quarter[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) quarter[i] = (__m512i)nearest_integer(load(x + i * W) * inverse);
    __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(quarter[0], quarter[1]),
                                       _mm512_packs_epi32(quarter[2], quarter[3]));
    bytes = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(places, bytes), order);
    _mm512_storeu_si512(out, bytes);
    total = (vi)_mm512_dpbusd_epi32((__m512i)total, _mm512_set1_epi8(1), bytes);
}
#endif

// x[0..n) rounded to int8 by its absmax / 127; the sum of the codes. `out` has room for n rounded up to W.
template <int BITS, class T>
SERVD_INLINE int32_t quantize_segment(const T* x, int64_t n, RowCode* out, float* scale) {
    *scale = largest_size(x, n) / 127.f;
    vf inverse = broadcast(1.f / *scale);
    vi total{};
    int64_t i = 0;
    // Where the inverse is finite no ratio leaves -127..127 by more than a rounding.
    if (*scale >= 0x1p-120f && *scale <= 0x1p120f) {
#if defined(__AVX512VNNI__)
        for (; i + 64 <= n; i += 64) quantize_64<BITS>(x + i, inverse, out + i, total);
#endif
        for (; i + W <= n; i += W) {
            vi codes = nearest_integer(load(x + i) * inverse);
            total += codes;
            store_codes<BITS>(out + i, codes);
        }
    }
    for (; i < n; i += W) {
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

// Rows of int8 codes, and for each segment of columns what multiply_segments takes. Weight codes are `centre` too
// large: sums of products that start at -centre times the sum of a row's codes come out right.
struct IntegerRows {
    int64_t m, k, segment, segments, stride;
    Scratch<RowCode> codes;    // [m][stride], zeros after k
    Scratch<float> scales;     // [segments][m]
    Scratch<int32_t> starts;   // [segments][m]
    Scratch<float> sums;       // [segments][m]: scale * sum of codes
    IntegerRows(int64_t m, int64_t k, int64_t segment)
        : m(m), k(k), segment(segment), segments(greater(quotient_up(k, segment), 1)), stride(round_up(k, 64)),
          codes(m * stride), scales(m * segments), starts(m * segments), sums(m * segments) {}

    template <int BITS>
    void fill(const RowSource& source, int centre) {
        constexpr int64_t kRows = 16;  // of one unit of work
        int64_t step = source.rotation || segment < 64 ? 1 : 4;  // elements that take as long as an elementary step
        parallel(quotient_up(m, kRows), m * k / step, [&](int64_t unit) {
            Scratch<float> rotated(source.rotation ? k : 0);
            for (int64_t row = unit * kRows; row < lesser(m, (unit + 1) * kRows); ++row)
                fill_row<BITS>(source, centre, row, rotated.data);
        });
    }

private:
    template <int BITS>
    void fill_row(const RowSource& source, int centre, int64_t row, float* rotated) {
        memset(codes.data + row * stride + k / W * W, 0, (stride - k / W * W) * sizeof(RowCode));
        if (source.dtype == kCodes) {
            const int8_t* x = static_cast<const int8_t*>(source.x) + row * source.stride;
            for_segments(centre, row, [&](int64_t s, int64_t first, int64_t n, RowCode* out, float* scale) {
                *scale = source.given[row * segments + s];
                return take_segment<BITS>(x + first, n, out);
            });
            return;
        }
        with_dtype(source.dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            const T* x = static_cast<const T*>(source.x) + row * source.stride;
            if (source.rotation) rotate_row(x, k, source.rotation, rotated);
            if (source.rotation) quantize_row<BITS>(static_cast<const float*>(rotated), centre, row);
            else quantize_row<BITS>(x, centre, row);
            return 0;
        });
    }

    template <int BITS, class T>
    void quantize_row(const T* x, int centre, int64_t row) {
        for_segments(centre, row, [&](int64_t, int64_t first, int64_t n, RowCode* out, float* scale) SERVD_MEMBER {
            return quantize_segment<BITS>(x + first, n, out, scale);
        });
    }

    // f(segment, first column, columns, codes, scale) writes both and returns the sum of the codes.
    template <class F>
    SERVD_MEMBER void for_segments(int centre, int64_t row, F f) {
        for (int64_t s = 0; s < segments; ++s) {
            int64_t first = s * segment, cell = s * m + row;
            int32_t sum = f(s, first, lesser(segment, k - first), codes.data + row * stride + first,
                            &scales.data[cell]);
            starts.data[cell] = -centre * sum;
            sums.data[cell] = scales.data[cell] * float(sum);
        }
    }
};

}  // namespace SERVD_ISA
