// Owns: the register tile of attention: rows of A times columns of B, for float32, pairs of bfloat16 and pairs
// of int16, each with 32-bit words as its operands.
// Does not know: whether it forms scores or adds values.
#pragma once
#include "../common/kernel.hpp"
#include "../common/tile.hpp"

namespace SERVD_ISA {
namespace {

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// Six rows by four vectors are 24 sums: with the four of B they fit 32 registers; six by two fit 16.
constexpr int kDotRows = 6, kDotVectors = W == 16 ? 4 : 2;

SERVD_INLINE vf load_floats(const uint32_t* p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

struct FloatDot {
    using Sum = vf;
    SERVD_INLINE vf load(const uint32_t* p) { return load_floats(p); }
    SERVD_INLINE vf spread(const uint32_t* p) {
        float value;
        memcpy(&value, p, sizeof value);
        return broadcast(value);
    }
    SERVD_INLINE vf step(vf sum, vf a, vf b) { return fma(a, b, sum); }
    SERVD_INLINE vf finish(vf sum) { return sum; }
};

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
// In assembly: GCC 12 copies and spills the sums of the intrinsics.
struct BFloat16Dot {
    using Sum = vf;
    SERVD_INLINE vi load(const uint32_t* p) { return (vi)_mm512_loadu_si512(p); }
    SERVD_INLINE vi spread(const uint32_t* p) { return (vi)_mm512_set1_epi32(int32_t(*p)); }
    SERVD_INLINE vf step(vf sum, vi a, vi b) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        return sum;
    }
    SERVD_INLINE vf finish(vf sum) { return sum; }
};

struct Int16Dot {
    using Sum = vi;
    SERVD_INLINE vi load(const uint32_t* p) { return (vi)_mm512_loadu_si512(p); }
    SERVD_INLINE vi spread(const uint32_t* p) { return (vi)_mm512_set1_epi32(int32_t(*p)); }
    SERVD_INLINE vi step(vi sum, vi a, vi b) {
        asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        return sum;
    }
    SERVD_INLINE vf finish(vi sum) { return __builtin_convertvector(sum, vf); }
};
#else
using BFloat16Dot = FloatDot;  // never chosen
using Int16Dot = FloatDot;
#endif

// The operands of one product. Row r of A has its step i at a[r * a_stride + i]; vector n of B at
// b[n] + i * b_stride. out = (keep[r] * out or nothing) + factor[r] * (A B).
struct Product {
    const uint32_t* a;
    int64_t a_stride;
    const uint32_t *b[kDotVectors], *ahead[kDotVectors];  // ahead: where the next product's B lies in memory
    int64_t b_stride, steps;
    const float *factor, *keep;
    float* out;
    int64_t out_stride;
};

template <class Dot, int ROWS, int VECTORS, bool AHEAD>
__attribute__((noinline)) void multiply_block(const Product& product) {
    typename Dot::Sum sum[ROWS][VECTORS] = {};
    const uint32_t *a = product.a, *b[VECTORS];
    for (int n = 0; n < VECTORS; ++n) b[n] = product.b[n];
    int64_t a_stride = product.a_stride, b_stride = product.b_stride;
    for (int64_t i = 0; i < product.steps; ++i) {
        decltype(Dot::load(a)) column[VECTORS];
#pragma GCC unroll 4
        for (int n = 0; n < VECTORS; ++n) {
            column[n] = Dot::load(b[n] + i * b_stride);
            if (AHEAD) __builtin_prefetch(product.ahead[n] + i * b_stride);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            auto value = Dot::spread(a + r * a_stride + i);
#pragma GCC unroll 4
            for (int n = 0; n < VECTORS; ++n) sum[r][n] = Dot::step(sum[r][n], value, column[n]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        float* out = product.out + r * product.out_stride;
#pragma GCC unroll 4
        for (int n = 0; n < VECTORS; ++n) {
            vf value = Dot::finish(sum[r][n]) * product.factor[r];
            if (product.keep) value = fma(load(out + n * W), broadcast(product.keep[r]), value);
            store(out + n * W, value);
        }
    }
}

template <class Dot, bool AHEAD = false>
void multiply(const Product& product, int rows, int vectors) {
    with_count<kDotRows>(rows, [&](auto height) {
        constexpr int kHeight = decltype(height)::value;
        if (vectors == kDotVectors) multiply_block<Dot, kHeight, kDotVectors, AHEAD>(product);
        else if (kDotVectors == 4 && vectors == 2) multiply_block<Dot, kHeight, 2, false>(product);
        else multiply_block<Dot, kHeight, 1, false>(product);
    });
}

// The fewest vectors that a product can have and that hold `count`.
SERVD_INLINE int fitting_vectors(int64_t count) {
    return count <= 1 ? 1 : count <= 2 || kDotVectors == 2 ? 2 : kDotVectors;
}

// How many of `left` vectors the next product takes.
SERVD_INLINE int next_vectors(int64_t left) {
    return left >= kDotVectors ? kDotVectors : left >= 2 ? 2 : 1;
}

}  // namespace
}  // namespace SERVD_ISA
