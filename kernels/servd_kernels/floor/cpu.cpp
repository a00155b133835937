// Owns: loops that show what the processor can do at most: multiply-adds in registers, streams from memory.
// Does not know: any op, nor time (floor/__init__.py holds the clock).
#include "../common/kernel.hpp"

namespace SERVD_ISA {
namespace {

// Chains of dependent steps: more than latency * units of any processor, and the tile that a GEMM would hold.
constexpr int kChains = sizeof(vf) == 64 ? 24 : 12;
constexpr int64_t kSteps = 1 << 14;       // in one unit
constexpr int64_t kChunk = 512 << 10;     // bytes of one unit of a stream

enum Unit { kFmaFloat, kFmaBFloat16, kFmaInt8 };

// The compiler must take `v` for an unknown value, as if it had changed.
template <class V>
SERVD_INLINE void obscure(V& v) {
#if defined(__x86_64__)
    asm volatile("" : "+v"(v));
#else
    asm volatile("" : "+w"(v));
#endif
}

// The instruction of a unit: the type of its registers, its multiply-adds, and one step of a chain.
template <int UNIT>
struct Instruction {
    using Register = vf;
    static constexpr int kWidth = W;
    static SERVD_MEMBER vf step(vf a, vf b, vf sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
template <>
struct Instruction<kFmaBFloat16> {
    using Register = __m512;
    static constexpr int kWidth = 32;
    static SERVD_MEMBER __m512 step(__m512 a, __m512 b, __m512 sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
};
#endif
#if defined(__AVX512VNNI__)
template <>
struct Instruction<kFmaInt8> {
    using Register = __m512i;
    static constexpr int kWidth = 64;
    static SERVD_MEMBER __m512i step(__m512i a, __m512i b, __m512i sum) {
        // GCC 12 copies and spills the sums of _mm512_dpbusd_epi32: 2.4 times as slow.
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        return sum;
    }
};
#elif defined(__AVX2__)
template <>
struct Instruction<kFmaInt8> {
    using Register = __m256i;
    static constexpr int kWidth = 32;
    static SERVD_MEMBER __m256i step(__m256i a, __m256i b, __m256i sum) {
        __m256i pairs = _mm256_maddubs_epi16(a, b);
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
};
#endif

template <int UNIT>
void multiply_add(int64_t units) {
    servd::parallel_for(units, [](void*, int64_t) {
        using Register = typename Instruction<UNIT>::Register;
        Register a = {}, b = {}, sums[kChains] = {};
        obscure(a);
#pragma GCC unroll 24
        for (int chain = 0; chain < kChains; ++chain) obscure(sums[chain]);  // known to be equal, one would do for all
        for (int64_t i = 0; i < kSteps; ++i) {
            obscure(b);
#pragma GCC unroll 24
            for (int chain = 0; chain < kChains; ++chain)
                sums[chain] = Instruction<UNIT>::step(a, b, sums[chain]);
        }
#pragma GCC unroll 24
        for (int chain = 0; chain < kChains; ++chain) obscure(sums[chain]);
    }, nullptr);
}

template <class F>
void for_chunks(int64_t bytes, F f) {
    parallel((bytes + kChunk - 1) / kChunk, bytes, [=](int64_t unit) {
        f(unit * kChunk, lesser(kChunk, bytes - unit * kChunk));
    });
}

constexpr int kLines = 8;            // vectors of one step of a stream
constexpr int64_t kAhead = 8 << 10;  // bytes of prefetch: a core keeps more reads in flight than its own prefetcher

void read_chunk(const char* from, int64_t bytes) {
    constexpr int64_t kStep = kLines * sizeof(vf);
    for (int64_t i = 0; i + kStep <= bytes; i += kStep) {
        for (int64_t line = 0; line < kStep; line += 64) __builtin_prefetch(from + i + kAhead + line, 0, 2);
#pragma GCC unroll 8
        for (int line = 0; line < kLines; ++line) {
            vf value = load((const float*)(from + i) + line * W);
            obscure(value);
        }
    }
}

SERVD_INLINE void stream(char* to, vf value) {
#if defined(__AVX512F__)
    _mm512_stream_ps((float*)to, value);
#elif defined(__AVX2__)
    _mm256_stream_ps((float*)to, value);
#elif defined(__SSE2__)
    _mm_stream_ps((float*)to, value);
#else
    store((float*)to, value);
#endif
}

void copy_chunk(const char* from, char* to, int64_t bytes) {
    constexpr int64_t kStep = kLines * sizeof(vf);
    for (int64_t i = 0; i + kStep <= bytes; i += kStep) {
#pragma GCC unroll 8
        for (int line = 0; line < kLines; ++line) {
            int64_t at = i + line * int64_t(sizeof(vf));
            stream(to + at, load((const float*)(from + at)));
        }
    }
}

}  // namespace
}  // namespace SERVD_ISA

// Runs `units` pieces of floor_operations(unit) operations each on all threads.
SERVD_EXPORT(floor_multiply_add)(int unit, int64_t units) {
    using namespace SERVD_ISA;
    if (unit == kFmaFloat) multiply_add<kFmaFloat>(units);
    else if (unit == kFmaBFloat16) multiply_add<kFmaBFloat16>(units);
    else multiply_add<kFmaInt8>(units);
    return 0;
}

// Operations of one piece of floor_multiply_add: a multiplication and an addition are two.
extern "C" __attribute__((visibility("default"))) int64_t SERVD_JOIN(servd_, SERVD_ISA, floor_operations)(int unit) {
    using namespace SERVD_ISA;
    int width = unit == kFmaFloat      ? Instruction<kFmaFloat>::kWidth
                : unit == kFmaBFloat16 ? Instruction<kFmaBFloat16>::kWidth
                                       : Instruction<kFmaInt8>::kWidth;
    return 2 * kSteps * kChains * width;
}

// Reads `bytes` bytes on all threads.
SERVD_EXPORT(floor_read)(const char* from, int64_t bytes) {
    using namespace SERVD_ISA;
    for_chunks(bytes, [=](int64_t at, int64_t count) { read_chunk(from + at, count); });
    return 0;
}

// Copies `bytes` bytes on all threads past the cache; `to` is aligned to 64 bytes.
SERVD_EXPORT(floor_copy)(const char* from, char* to, int64_t bytes) {
    using namespace SERVD_ISA;
    for_chunks(bytes, [=](int64_t at, int64_t count) { copy_chunk(from + at, to + at, count); });
    return 0;
}
