// Owns: the way of weights and values to sums: the tile of values, a row's weights as its arithmetic takes them.
// Does not know: keys, or where the weights come from.
#pragma once
#include "keys.hpp"

namespace SERVD_ISA {
namespace {

constexpr int kPairGroup = 32;  // dimensions that share an int4 value's parameters where pairs are used

SERVD_INLINE Arithmetic value_arithmetic(const Call& call) {
    const Side& side = call.format->v;
    if (side.code == kCodeInt4 && call.format->head_dim != side.num_groups * kPairGroup) return kFloats;
    return arithmetic_of(call, side.code);
}

// Columns of a row's sums: the head, and where int4 values are added as pairs, one minimum for each group.
SERVD_INLINE bool has_minima(const Call& call) {
    return call.format->v.code == kCodeInt4 && value_arithmetic(call) != kFloats;
}
SERVD_INLINE int64_t sums_width(const Call& call) {
    return padded_width(call.format->head_dim) + (has_minima(call) ? 16 : 0);
}

// Whether the softmax itself leaves a row's weights as bfloat16: where no scale comes in between.
SERVD_INLINE bool are_softened_pairs(const Call& call) {
    return value_arithmetic(call) == kBFloat16Pairs && call.format->v.num_params == 0;
}

// A tile of values: float32 [kTokens][width], or pairs of tokens [kTokens / 2][width]. Tokens that no row sees are
// zero. int4 pairs hold, for each group, its even dimensions and then its odd ones.
struct Values {
    alignas(64) uint32_t words[kTokens * kMaxHeadDim];
    alignas(64) float params[2 * kMaxGroups * kTokens];
    uint64_t nonfinite;  // tokens with an infinity or NaN among their numbers
    bool is_searched;    // for them
};

alignas(64) const char kZeroRow[kMaxHeadDim * 4] = {};

// Tokens of float32 rows to out [kTokens][width], scales applied.
template <int64_t CODE>
void decode_values(const Side& side, const char* const* rows, const char* const* ahead, int64_t dim,
                   const float* params, float* out) {
    int64_t width = padded_width(dim), group = side.num_params ? dim / side.num_groups : dim;
    constexpr int64_t kBits = 32 / dims_of_word(CODE);
    for (int t = 0; t < kTokens; ++t, out += width) {
        for (int64_t d = 0; d < width; d += W) {
            char part[W * 4 + 8] = {};
            const char* row = rows[t];
            int64_t offset = d;
            __builtin_prefetch(ahead[t] + d * kBits / 8);
            if (d + W > dim) {  // a row's end
                memcpy(part, row + d * kBits / 8, greater((dim - d) * kBits / 8, 0));
                row = part;
                offset = 0;
            }
            vf value = decode_row<CODE>(row, offset);
            if (side.num_params) {
                const float* p = params + d / group * side.num_params * kTokens + t;
                vf scale = broadcast(p[0]), minimum = CODE == kCodeInt4 ? broadcast(p[kTokens]) : vf{};
                for (int i = 0; group % W && i < W; ++i) {  // a vector that holds several groups
                    p = params + lesser(d + i, dim - 1) / group * side.num_params * kTokens + t;
                    scale[i] = p[0];
                    if (CODE == kCodeInt4) minimum[i] = p[kTokens];
                }
                value = CODE == kCodeInt4 ? value * scale + minimum : value * scale;
            }
            store(out + d, value);
        }
    }
}

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
// 32 codes of a row from d on, as 16-bit numbers; `count` of them exist.
template <int64_t CODE>
SERVD_INLINE __m512i load_wide(const char* row, int64_t d, int64_t count) {
    __mmask32 mask = count >= 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1;
    if constexpr (CODE == kCodeBFloat16) return _mm512_maskz_loadu_epi16(mask, row + 2 * d);
    __m256i bytes = _mm256_maskz_loadu_epi8(mask, row + d);
    if constexpr (CODE == kCodeInt8) return _mm512_cvtepi8_epi16(bytes);
    __m512i x = _mm512_cvtepu8_epi16(bytes);
    __m512i sign = _mm512_and_si512(_mm512_slli_epi16(x, 8), _mm512_set1_epi16(short(0x8000)));
    return e4m3_to_bfloat16(_mm512_and_si512(x, _mm512_set1_epi16(0x7f)), sign);
}

template <int64_t CODE>
void pair_values(const char* const* rows, const char* const* ahead, int64_t dim, uint32_t* out) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    int64_t width = padded_width(dim);
    for (int t = 0; t < kTokens; t += 2, out += width) {
        for (int64_t d = 0; d < width; d += 32) {
            constexpr int kBytes = CODE == kCodeBFloat16 ? 2 : 1;
            __builtin_prefetch(ahead[t] + d * kBytes);
            __builtin_prefetch(ahead[t + 1] + d * kBytes);
            __m512i a = load_wide<CODE>(rows[t], d, dim - d), b = load_wide<CODE>(rows[t + 1], d, dim - d);
            _mm512_store_si512(out + d, _mm512_permutex2var_epi16(a, low, b));
            if (d + 16 < width) _mm512_store_si512(out + d + 16, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

template <>
void pair_values<kCodeInt4>(const char* const* rows, const char* const* ahead, int64_t dim, uint32_t* out) {
    const __m512i low = _mm512_set1_epi16(15);
    for (int t = 0; t < kTokens; t += 2, out += dim) {
        for (int64_t d = 0; d < dim; d += kPairGroup) {
            __builtin_prefetch(ahead[t] + d / 2);
            __builtin_prefetch(ahead[t + 1] + d / 2);
            __m512i a = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(rows[t] + d / 2)));
            __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(rows[t + 1] + d / 2)));
            __m512i both = _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
            _mm512_store_si512(out + d, _mm512_and_si512(both, low));
            _mm512_store_si512(out + d + 16, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
        }
    }
}
#else
template <int64_t CODE>
void pair_values(const char* const*, const char* const*, int64_t, uint32_t*) {}
#endif

// Where the tile's values lie; tokens that are not seen are zero.
inline void find_rows(const Call& call, const Place& place, const char** rows) {
    const Side& side = call.format->v;
    int64_t stride = side.row_bytes, start = side.data_offset;
    bool in_runs = call.format->block_size % kRun == 0;
    for (int i = 0; i < kTokens; i += kRun) {
        uint64_t bits = place.seen >> i & 0xffff;
        if (in_runs && bits == 0xffff) {
            const char* row = head_of(call, place.unit, place.t + i) + start + call.offset_of(place.t + i) * stride;
            for (int k = 0; k < kRun; ++k) rows[i + k] = row + k * stride;
            continue;
        }
        for (int k = 0; k < kRun; ++k) {
            int64_t t = place.t + i + k;
            rows[i + k] = kZeroRow;
            if (bits >> k & 1) rows[i + k] = head_of(call, place.unit, t) + start + call.offset_of(t) * stride;
        }
    }
}

// Fills `values` with the tile at `place`, and asks for `next` if that is one.
inline void load_values(const Call& call, const Place& place, const Place& next, Values& values) {
    const Format& format = *call.format;
    const Side& side = format.v;
    const char *rows[kTokens], *next_rows[kTokens], **ahead = rows;
    find_rows(call, place, rows);
    if (next.seen) find_rows(call, next, ahead = next_rows);
    if (side.num_params) {
        load_params(call, place, side, values.params);
        prefetch_params(call, next, side);
    }
    values.is_searched = false;
    bool is_paired = value_arithmetic(call) != kFloats;
    with_code(side.code, [&](auto code) {
        constexpr int64_t kCode = decltype(code)::value;
        if (!is_paired)
            decode_values<kCode>(side, rows, ahead, format.head_dim, values.params,
                                 reinterpret_cast<float*>(values.words));
        else if constexpr (kCode != kCodeFloat32 && kCode != kCodeFloat16)
            pair_values<kCode>(rows, ahead, format.head_dim, values.words);
    });
}

// Which tokens of the tile hold an infinity or NaN. Integers and e4m3 under a finite scale hold none: a scale that
// is not goes into the weights.
inline void find_nonfinite(const Call& call, Values& values) {
    int64_t width = padded_width(call.format->head_dim);
    Arithmetic arithmetic = value_arithmetic(call);
    values.is_searched = true;
    values.nonfinite = 0;
    if (arithmetic == kInt16Pairs || (arithmetic != kFloats && call.format->v.num_params)) return;
    for (int t = 0; t < kTokens; ++t) {
        const uint32_t* row = values.words + (arithmetic == kFloats ? t : t / 2) * width;
        int shift = arithmetic == kFloats || t % 2 ? 0 : 16;
        uint32_t most = 0;
        for (int64_t d = 0; d < width; ++d) most = greater(most, row[d] << shift & 0x7fffffffu);
        if (most >= 0x7f800000u) values.nonfinite |= uint64_t(1) << t;
    }
}

// The tile with zeros for the tokens in `hidden`.
inline void copy_without(const Call& call, const Values& values, uint64_t hidden, uint32_t* out) {
    int64_t width = padded_width(call.format->head_dim);
    bool is_paired = value_arithmetic(call) != kFloats;
    memcpy(out, values.words, kTokens * width * sizeof(uint32_t) / (is_paired ? 2 : 1));
    for (int t = 0; t < kTokens; ++t) {
        if (!(hidden >> t & 1)) continue;
        uint32_t* row = out + (is_paired ? t / 2 : t) * width;
        for (int64_t d = 0; d < width; ++d) row[d] &= !is_paired ? 0 : t % 2 ? 0x0000ffffu : 0xffff0000u;
    }
}

// The weights of kDotRows rows as A of a product, for each group of dimensions that has scales of its own.
struct Weights {
    alignas(64) uint32_t words[8][kDotRows][kTokens];
    float factor[8][kDotRows];
};

// int16 weights of one row: p * scale, in steps of their largest / 32767. Adds p * minimum to *sum.
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
inline float scale_weights(const float* p, uint64_t seen, const float* scale, uint32_t* out) {
    vf w[kRuns], most = {};
    __mmask16 bad = 0;
    for (int i = 0; i < kRuns; ++i) {
        w[i] = _mm512_maskz_mul_ps(__mmask16(seen >> (i * 16)), load(p + i * 16), load(scale + i * 16));
        bad |= _mm512_cmp_ps_mask(w[i], w[i], _CMP_UNORD_Q);
        most = vmax(most, (vf)((vi)w[i] & 0x7fffffff));
    }
    float top = max_lanes(most);
    if (bad) return __builtin_nanf("");
    vf inverse = broadcast(top > 1e-30f ? 32767.f / top : 0.f);
    for (int i = 0; i < kRuns; ++i)
        _mm256_storeu_si256((__m256i*)out + i, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(w[i] * inverse)));
    return top / 32767.f;
}

// bfloat16 weights of one row: p * scale.
inline void round_weights(const float* p, uint64_t seen, const float* scale, uint32_t* out) {
    for (int i = 0; i < kRuns; ++i) {
        vf w = _mm512_maskz_mul_ps(__mmask16(seen >> (i * 16)), load(p + i * 16), load(scale + i * 16));
        _mm256_storeu_si256((__m256i*)out + i, (__m256i)_mm512_cvtneps_pbh(w));
    }
}
#else
inline float scale_weights(const float*, uint64_t, const float*, uint32_t*) { return 0; }
inline void round_weights(const float*, uint64_t, const float*, uint32_t*) {}
#endif

// p [rows][kTokens] -> weights, unless the softmax has written them; keep [rows] scales what `sums`
// [rows][sums_width] holds of minima.
inline void pack_weights(const Call& call, const Values& values, const float* p, const uint64_t* seen, int rows,
                         const float* keep, float* sums, Weights& weights) {
    const Side& side = call.format->v;
    Arithmetic arithmetic = value_arithmetic(call);
    int64_t groups = has_minima(call) ? side.num_groups : 1;
    for (int r = 0; r < rows; ++r, p += kTokens) {
        if (are_softened_pairs(call)) weights.factor[0][r] = 1.f;
        for (int64_t g = 0; g < groups && !are_softened_pairs(call); ++g) {
            const float* scale = side.num_params ? values.params + g * side.num_params * kTokens : nullptr;
            weights.factor[g][r] = 1.f;
            if (arithmetic == kFloats) memcpy(weights.words[0][r], p, kTokens * sizeof(float));
            else if (arithmetic == kBFloat16Pairs) round_weights(p, seen[r], scale, weights.words[0][r]);
            else weights.factor[g][r] = scale_weights(p, seen[r], scale, weights.words[g][r]);
        }
        if (!has_minima(call)) continue;
        float* minima = sums + r * sums_width(call) + call.format->head_dim;
        for (int64_t g = 0; g < groups; ++g) {
            vf sum = {};
            for (int i = 0; i < kTokens; i += W) {
                vf minimum = load(values.params + (2 * g + 1) * kTokens + i);
                sum = fma(load(p + i), select(seen[r] >> i, minimum, vf{}), sum);
            }
            minima[g] = minima[g] * keep[r] + sum_lanes(sum);
        }
    }
}

template <class Dot>
void multiply_values(const Call& call, const uint32_t* words, const Weights& weights, int first, int rows, Range steps,
                     const float* keep, float* sums) {
    int64_t width = padded_width(call.format->head_dim), group = has_minima(call) ? kPairGroup : width;
    for (int64_t d = 0; d < width;) {
        int64_t g = d / group;
        int vectors = next_vectors(lesser(width - d, group) / W);
        Product product = {weights.words[g][first] + steps.begin, kTokens, {}, {}, width, steps.end - steps.begin,
                           weights.factor[g] + first, keep, sums + d, sums_width(call)};
        for (int n = 0; n < vectors; ++n) product.b[n] = words + steps.begin * width + d + n * W;
        multiply<Dot>(product, rows, vectors);
        d += vectors * W;
    }
}

inline void multiply_values(const Call& call, const uint32_t* words, const Weights& weights, int first, int rows,
                            uint64_t seen, const float* keep, float* sums) {
    Range steps = {__builtin_ctzll(seen), kTokens - __builtin_clzll(seen)};
    Arithmetic arithmetic = value_arithmetic(call);
    if (arithmetic != kFloats) steps = {steps.begin / 2, (steps.end + 1) / 2};
    if (arithmetic == kFloats) multiply_values<FloatDot>(call, words, weights, first, rows, steps, keep, sums);
    else if (arithmetic == kBFloat16Pairs)
        multiply_values<BFloat16Dot>(call, words, weights, first, rows, steps, keep, sums);
    else multiply_values<Int16Dot>(call, words, weights, first, rows, steps, keep, sums);
}

// sums = keep * sums + weights * values, for rows that see `seen` of the tile; `p` are zero elsewhere. A weight of
// zero times an unseen token's NaN would still be NaN: there a row works on a copy without that token, in the same
// order.
inline void add_values(const Call& call, Values& values, const float* p, const uint64_t* seen, int rows,
                       const float* keep, Weights& weights, float* sums) {
    pack_weights(call, values, p, seen, rows, keep, sums, weights);
    uint64_t any = 0, all = ~uint64_t(0);
    for (int r = 0; r < rows; ++r) any |= seen[r], all &= seen[r];
    if (any != all && !values.is_searched) find_nonfinite(call, values);
    if (any == all || !(values.nonfinite & any & ~all))
        return multiply_values(call, values.words, weights, 0, rows, any, keep, sums);
    alignas(64) uint32_t copy[kTokens * kMaxHeadDim];
    for (int r = 0; r < rows; ++r) {
        if (!seen[r]) continue;
        copy_without(call, values, ~seen[r], copy);
        multiply_values(call, copy, weights, r, 1, any, keep + r, sums + r * sums_width(call));
    }
}

}  // namespace
}  // namespace SERVD_ISA
