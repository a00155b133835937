// Owns: the way of queries and keys to scores: which arithmetic their types take, the tile of keys, the product.
// Does not know: masks, softmax, values.
#pragma once
#include "codes.hpp"
#include "dot.hpp"

namespace SERVD_ISA {
namespace {

// How numbers are multiplied. Pairs keep what the codes hold: bfloat16 and e4m3 are exact in bfloat16; int8 and
// int4 codes in int16, where the other factor (a query, a weight) becomes int16 with a scale for its row.
enum Arithmetic { kFloats, kBFloat16Pairs, kInt16Pairs };

SERVD_INLINE Arithmetic arithmetic_of(const Call& call, int64_t code) {
    if (!kHasPairs || call.q_dtype == kFloat32) return kFloats;
    if (code == kCodeInt8 || code == kCodeInt4) return kInt16Pairs;
    bool is_exact = call.q_dtype == kBFloat16 && (code == kCodeBFloat16 || code == kCodeFp8);
    return is_exact ? kBFloat16Pairs : kFloats;
}

// The dimension of a word's codes that is the j-th of its pairs: pairs are what shifts and masks of a word give.
constexpr int64_t paired_dim(int64_t code, int64_t j) {
    if (code == kCodeInt4) return (j & ~int64_t(7)) + (j & 7) / 2 + (j & 1) * 4;
    if (code == kCodeInt8 || code == kCodeFp8) return (j & ~int64_t(3)) + (j & 3) / 2 + (j & 1) * 2;
    return j;
}

struct Queries {
    alignas(64) uint32_t words[kRows * kMaxHeadDim];  // [rows][stride]: float32, or pairs
    int64_t stride;
    float factor[kRows];              // of a row's products: the scale of scores and that of the row
    float sums[kRows * kMaxGroups];   // [rows][num_groups] times the factor; for keys with minima
};

// Moves 16-bit numbers [dim], padded to 32, to the order of a word's codes; see paired_dim.
template <int64_t CODE>
void pair_up(const uint16_t* in, int64_t dim, uint16_t* out) {
    for (int64_t j = 0; j < dim; j += 8)
#pragma GCC unroll 8
        for (int64_t k = 0; k < 8; ++k) out[j + k] = in[j + paired_dim(CODE, k)];
}

// q [dim], zero up to a whole vector -> words, the row as the arithmetic takes it; returns the step of its numbers.
inline float pack_query(const float* q, int64_t dim, int64_t code, Arithmetic arithmetic, uint32_t* words) {
    if (arithmetic == kFloats) {
        memcpy(words, q, dim * sizeof(float));
        return 1.f;
    }
    alignas(64) uint16_t halves[kMaxHeadDim + W];
    float step = 1.f;
    if (arithmetic == kBFloat16Pairs) {
        for (int64_t d = 0; d < dim; d += W) store(reinterpret_cast<bf16*>(halves + d), load(q + d));
    } else {
        vf most = {}, probe = {};  // probe: NaN if any is NaN or infinite
        for (int64_t d = 0; d < dim; d += W) {
            vf x = load(q + d);
            most = vmax(most, (vf)((vi)x & 0x7fffffff));
            probe += x * 0.f;
        }
        float top = max_lanes(most), bad = sum_lanes(probe);
        vf inverse = broadcast(top > 1e-30f && bad == 0.f ? 32767.f / top : 0.f);
        const vf magic = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
        for (int64_t d = 0; d < dim; d += W) {
            vi number = (vi)(load(q + d) * inverse + magic) - (vi)magic;
            vh narrow = __builtin_convertvector((vu)number, vh);
            memcpy(halves + d, &narrow, sizeof narrow);
        }
        step = top / 32767.f + bad;
    }
    auto* out = reinterpret_cast<uint16_t*>(words);
    if (code == kCodeInt4) pair_up<kCodeInt4>(halves, dim, out);
    else if (code == kCodeInt8 || code == kCodeFp8) pair_up<kCodeInt8>(halves, dim, out);
    else memcpy(out, halves, dim * sizeof(uint16_t));
    return step;
}

inline void load_queries(const Call& call, const Unit& unit, Queries& queries) {
    int64_t group = call.group(), dim = call.format->head_dim;
    const Side& side = call.format->k;
    Arithmetic arithmetic = arithmetic_of(call, side.code);
    queries.stride = arithmetic == kFloats ? dim : dim / 2;
    alignas(64) float q[kMaxHeadDim];
    for (int r = 0; r < unit.rows; ++r) {
        int64_t row = unit.first_row + r;
        int64_t offset = (call.cu_seqlens_q[unit.request] + row / group) * call.q_token_stride +
                         (unit.kv_head * group + row % group) * call.q_head_stride;
        with_dtype(call.q_dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            const T* source = static_cast<const T*>(call.q) + offset;
            for (int64_t d = 0; d < dim; d += W) store(q + d, load_n(source + d, lesser(int64_t(W), dim - d)));
            return 0;
        });
        uint32_t* words = queries.words + r * queries.stride;
        float factor = call.scale * pack_query(q, dim, side.code, arithmetic, words);
        if (call.logn_length > 0) {
            double logarithm = __builtin_log(double(unit.first_position + (row / group) - unit.first_row / group + 1));
            factor *= float(greater(1.0, logarithm / __builtin_log(double(call.logn_length))));
        }
        queries.factor[r] = factor;
        if (arithmetic != kInt16Pairs || side.num_params < 2) continue;
        int64_t size = dim / side.num_groups;
        auto* numbers = reinterpret_cast<const int16_t*>(words);
        for (int64_t g = 0; g < side.num_groups; ++g) {
            int32_t sum = 0;
            for (int64_t j = g * size; j < (g + 1) * size; ++j) sum += numbers[j];
            queries.sums[r * side.num_groups + g] = factor * float(sum);
        }
    }
}

// Keys as words: run i of 16 tokens has step s (a dimension, a pair) at runs[i] + s * stride. ahead: the same of
// the tile that comes next, where runs are read in place and it pays to ask for them early.
struct Keys {
    const uint32_t *runs[kRuns], *ahead[kRuns];
    int64_t stride;
    bool has_ahead;
    alignas(64) uint32_t gathered[kMaxHeadDim * kTokens];
    alignas(64) uint32_t decoded[kMaxHeadDim * kTokens];
    alignas(64) float params[2 * kMaxGroups * kTokens];
};

// W x W: after log2(W) perfect shuffles of the rows' halves, lane and row have changed places.
SERVD_INLINE void transpose(vf (&rows)[W]) {
#pragma GCC unroll 4
    for (int step = 1; step < W; step *= 2) {
        vf next[W];
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; ++i) {
            vf a = rows[i], b = rows[i + W / 2];
#if defined(__AVX512F__)
            next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            next[2 * i + 1] =
                __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
            next[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
            next[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
            next[2 * i] = __builtin_shufflevector(a, b, 0, 4, 1, 5);
            next[2 * i + 1] = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) rows[i] = next[i];
    }
}

// Keys that lie in rows: out [words][kRun] from the rows of kRun tokens.
inline void transpose_run(const char* const* rows, int64_t words, uint32_t* out) {
    for (int t = 0; t < kRun; t += W) {
        for (int64_t w = 0; w < words; w += W) {
            vf square[W];
            int64_t count = lesser(int64_t(W), words - w);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) {
                auto* source = reinterpret_cast<const float*>(rows[t + i]) + w;
                square[i] = count == W ? load(source) : load_n(source, count);
            }
            transpose(square);
            for (int64_t i = 0; i < count; ++i) memcpy(out + (w + i) * kRun + t, &square[i], sizeof(vf));
        }
    }
}

// A run of keys whose words do not lie in one place: in rows, or in blocks that are no multiple of a run. Only
// blocks of seen tokens are read: others may be gone.
inline void gather_run(const Call& call, const Unit& unit, int64_t t, uint32_t seen, uint32_t* out) {
    const Format& format = *call.format;
    int64_t size = format.block_size, words = format.k.row_bytes / 4;
    const char *rows[kRun], *last = nullptr;
    for (int64_t i = 0; i < kRun;) {
        int64_t offset = call.offset_of(t + i), length = lesser(size - offset, kRun - i);
        if (seen >> i & ((1u << length) - 1)) {
            const char* data = head_of(call, unit, t + i) + format.k.data_offset;
            last = data;
            auto* source = reinterpret_cast<const uint32_t*>(data) + offset;
            for (int64_t w = 0; format.key_words && w < words; ++w) {
                if (length == 8) memcpy(out + w * kRun + i, source + w * size, 32);
                else memcpy(out + w * kRun + i, source + w * size, length * 4);
            }
            for (int64_t k = 0; k < length; ++k) rows[i + k] = data + (offset + k) * format.k.row_bytes;
        } else {
            for (int64_t k = 0; k < length; ++k) rows[i + k] = nullptr;
        }
        i += length;
    }
    if (format.key_words) return;
    for (const char*& row : rows) row = row ? row : last;  // repeats some row, which nobody sees
    transpose_run(rows, words, out);
}

// Words of one run to float32 [head_dim][kRun], scales applied (params [group * num_params + i][kTokens]).
template <int64_t CODE>
void decode_run(const Side& side, const uint32_t* words, const uint32_t* ahead, int64_t stride, const float* params,
                uint32_t* out) {
    constexpr int kDims = dims_of_word(CODE);
    int64_t count = side.row_bytes / 4, words_of_group = side.num_params ? count / side.num_groups : count;
    for (int v = 0; v < kRun; v += W) {
        for (int64_t w = 0; w < count; ++w) {
            vu x;
            memcpy(&x, words + w * stride + v, sizeof x);
            __builtin_prefetch(ahead + w * stride + v);
            const float* p = params + w / words_of_group * side.num_params * kTokens + v;
#pragma GCC unroll 8
            for (int i = 0; i < kDims; ++i) {
                vf value = decode_word<CODE>(x, i);
                if (CODE == kCodeInt4) value = value * load(p) + load(p + kTokens);
                else if (CODE == kCodeInt8 || CODE == kCodeFp8) value = value * load(p);
                memcpy(out + (w * kDims + i) * kRun + v, &value, sizeof value);
            }
        }
    }
}

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
// e4m3 in the low bytes of the 16-bit lanes of `magnitude` (7 bits) and the signs in their place, to bfloat16.
SERVD_INLINE __m512i e4m3_to_bfloat16(__m512i magnitude, __m512i sign) {
    // What the exponent's shift gets wrong: 0 and the subnormals m * 2^-9.
    const __m512i small = _mm512_broadcast_i32x4(
        _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    __m512i bits = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(0x3c00));
    __mmask32 is_small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
    bits = _mm512_mask_permutexvar_epi16(bits, is_small, magnitude, small);
    return _mm512_or_si512(bits, sign);
}

// Words of one run to pairs [steps][kRun], scales left aside.
template <int64_t CODE>
void pair_run(int64_t words, const uint32_t* source, const uint32_t* ahead, int64_t stride, uint32_t* out) {
    for (int64_t w = 0; w < words; ++w) {
        __builtin_prefetch(ahead + w * stride);
        __m512i x = _mm512_loadu_si512(source + w * stride);
        if constexpr (CODE == kCodeInt8) {
            _mm512_store_si512(out, _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
            _mm512_store_si512(out + kRun, _mm512_srai_epi16(x, 8));
            out += 2 * kRun;
        } else if constexpr (CODE == kCodeFp8) {
            const __m512i low = _mm512_set1_epi16(0x7f), top = _mm512_set1_epi16(short(0x8000));
            __m512i odd = _mm512_and_si512(_mm512_srli_epi16(x, 8), low);
            __m512i even_sign = _mm512_and_si512(_mm512_slli_epi16(x, 8), top);
            _mm512_store_si512(out, e4m3_to_bfloat16(_mm512_and_si512(x, low), even_sign));
            _mm512_store_si512(out + kRun, e4m3_to_bfloat16(odd, _mm512_and_si512(x, top)));
            out += 2 * kRun;
        } else if constexpr (CODE == kCodeInt4) {
            const __m512i low = _mm512_set1_epi16(15);
            for (int i = 0; i < 4; ++i, out += kRun)
                _mm512_store_si512(out, _mm512_and_si512(_mm512_srli_epi16(x, 4 * i), low));
        }
    }
}
#else
template <int64_t CODE>
void pair_run(int64_t, const uint32_t*, const uint32_t*, int64_t, uint32_t*) {}
#endif

SERVD_INLINE const uint32_t* run_of(const Call& call, const Place& place, int run) {
    int64_t t = place.t + run * kRun;
    auto* data = reinterpret_cast<const uint32_t*>(head_of(call, place.unit, t) + call.format->k.data_offset);
    return data + call.offset_of(t);
}

SERVD_INLINE uint32_t run_bits(const Place& place, int run) { return uint32_t(place.seen >> (run * kRun)) & 0xffff; }

// Fills `keys` with the tile at `place`, and asks for `next` if that is one.
inline void load_keys(const Call& call, const Place& place, const Place& next, Keys& keys) {
    const Format& format = *call.format;
    const Side& side = format.k;
    Arithmetic arithmetic = arithmetic_of(call, side.code);
    bool in_place = format.key_words && format.block_size % kRun == 0;
    bool as_stored = side.code == (arithmetic == kFloats ? kCodeFloat32 : kCodeBFloat16);
    int64_t words = side.row_bytes / 4, stride = in_place ? format.block_size : kRun;
    int64_t steps = arithmetic == kFloats ? format.head_dim : format.head_dim / 2;
    if (side.num_params) {
        load_params(call, place, side, keys.params);
        prefetch_params(call, next, side);
    }
    keys.stride = as_stored ? stride : kRun;
    keys.has_ahead = in_place && as_stored && next.seen;
    const uint32_t* any = nullptr;
    for (int run = 0; run < kRuns; ++run) {
        uint32_t *gathered = keys.gathered + run * words * kRun, *decoded = keys.decoded + run * steps * kRun;
        keys.runs[run] = nullptr;
        if (!run_bits(place, run)) continue;
        const uint32_t* source = in_place ? run_of(call, place, run) : gathered;
        if (!in_place) gather_run(call, place.unit, place.t + run * kRun, run_bits(place, run), gathered);
        keys.ahead[run] = in_place && run_bits(next, run) ? run_of(call, next, run) : source;
        if (!as_stored) {
            with_code(side.code, [&](auto code) {
                constexpr int64_t kCode = decltype(code)::value;
                const float* params = keys.params + run * kRun;
                if (arithmetic != kFloats) pair_run<kCode>(words, source, keys.ahead[run], stride, decoded);
                else decode_run<kCode>(side, source, keys.ahead[run], stride, params, decoded);
            });
        }
        any = keys.runs[run] = as_stored ? source : decoded;
    }
    for (int run = 0; run < kRuns; ++run) {
        if (keys.runs[run]) continue;
        keys.runs[run] = keys.ahead[run] = any;  // its scores will be hidden
    }
}

template <class Dot>
void multiply_keys(const Queries& queries, const Keys& keys, int row, int rows, int tokens, int64_t begin,
                   int64_t steps, float* out) {
    for (int v = 0; v < tokens; v += kDotVectors * W) {
        Product product = {queries.words + row * queries.stride + begin, queries.stride, {}, {}, keys.stride, steps,
                           queries.factor + row, nullptr, out + v, kTokens};
        for (int n = 0; n < kDotVectors; ++n) {
            int token = v + n * W;
            product.b[n] = keys.runs[token / kRun] + token % kRun + begin * keys.stride;
            product.ahead[n] = keys.ahead[token / kRun] + token % kRun + begin * keys.stride;
        }
        int vectors = keys.has_ahead ? kDotVectors : fitting_vectors((tokens - v + W - 1) / W);
        if (keys.has_ahead && row == 0) multiply<Dot, true>(product, rows, vectors);
        else multiply<Dot>(product, rows, vectors);
    }
}

// scores [rows][kTokens] of rows row.. of the unit, kDotRows at most, for the first `tokens` keys of the tile.
inline void score_rows(const Call& call, const Queries& queries, const Keys& keys, int row, int rows, int tokens,
                       float* scores) {
    const Side& side = call.format->k;
    int64_t dim = call.format->head_dim, groups = side.num_groups;
    Arithmetic arithmetic = arithmetic_of(call, side.code);
    if (arithmetic == kFloats) return multiply_keys<FloatDot>(queries, keys, row, rows, tokens, 0, dim, scores);
    if (side.num_params < 2) {
        if (arithmetic == kInt16Pairs) multiply_keys<Int16Dot>(queries, keys, row, rows, tokens, 0, dim / 2, scores);
        else multiply_keys<BFloat16Dot>(queries, keys, row, rows, tokens, 0, dim / 2, scores);
        for (int i = 0; side.num_params && i < rows * kTokens; i += W)
            store(scores + i, load(scores + i) * load(keys.params + i % kTokens));
        return;
    }
    alignas(64) float part[kDotRows * kTokens];
    memset(scores, 0, rows * kTokens * sizeof(float));
    for (int64_t g = 0; g < groups; ++g) {
        int64_t steps = dim / groups / 2;
        multiply_keys<Int16Dot>(queries, keys, row, rows, tokens, g * steps, steps, part);
        const float *scale = keys.params + 2 * g * kTokens, *minimum = scale + kTokens;
        for (int i = 0; i < rows * kTokens; i += W) {
            vf sum = broadcast(queries.sums[(row + i / kTokens) * groups + g]);
            vf score = fma(load(part + i), load(scale + i % kTokens), load(scores + i));
            store(scores + i, fma(sum, load(minimum + i % kTokens), score));
        }
    }
}

}  // namespace
}  // namespace SERVD_ISA
