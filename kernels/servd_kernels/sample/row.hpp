// Owns: what one row of logits goes through: scan, edits, choice, report. A row is one unit of work on one thread.
// Does not know: rows beside it, or where their settings lie (cpu.cpp).
#pragma once
#include <memory>

#include "select.hpp"

namespace SERVD_ISA {
namespace {

constexpr int64_t kBlock = 64;  // logits in a block: its maximum tells whether it has to be looked at
constexpr float kInfinity = __builtin_inff();

enum Failure { kFine = 0, kNaN = 1, kInfinite = 2, kEmpty = 3, kBadTokenId = 4 };

// The settings of one row.
struct Settings {
    double temperature, top_p, min_p;
    int64_t top_k, seed, position;
};

// What a thread works in, kept from row to row and from call to call: fresh pages cost more than the arithmetic.
struct Memory {
    Scratch<float> edited, block_max, values;
    Scratch<int32_t> ids, counts;
    Scratch<float> weights;
    Scratch<double> block_sums;
    Scratch<Entry> entries;

    explicit Memory(int64_t vocab)
        : edited(vocab), block_max(vocab / kBlock + 1), values(vocab + W), ids(vocab + W), counts(vocab),
          weights(vocab + W), block_sums(vocab / kBlock + 1), entries(vocab) {}

    static Memory& of_this_thread(int64_t vocab) {
        thread_local int64_t capacity = 0;
        thread_local std::unique_ptr<Memory> memory;
        if (capacity < vocab) memory.reset(new Memory(capacity = vocab));
        return *memory;
    }
};

// One look at a row: its maximum, and that of every block.
struct Scan {
    float highest = -kInfinity;
    int failure = kFine;
};

inline Scan scan(const float* x, int64_t vocab, float* block_max) {
    Scan result;
    vi nan = {};
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        vf best = broadcast(-kInfinity);
        int64_t i = begin, end = lesser(begin + kBlock, vocab);
        for (; i + W <= end; i += W) {
            vf v = load(x + i);
            nan |= v != v;
            best = vmax(best, v);
        }
        for (; i < end; ++i) {
            nan[0] |= x[i] != x[i] ? -1 : 0;
            best[0] = greater(x[i], best[0]);
        }
        float highest = max_lanes(best);
        block_max[begin / kBlock] = highest;
        result.highest = greater(highest, result.highest);
    }
    bool any_nan = false;
    for (int lane = 0; lane < W; ++lane) any_nan |= nan[lane] != 0;
    if (any_nan) result.failure = kNaN;
    else if (result.highest == kInfinity) result.failure = kInfinite;
    else if (result.highest == -kInfinity) result.failure = kEmpty;
    return result;
}

// The lowest id of the highest logit.
inline int32_t argmax(const float* x, const Scan& scanned, const float* block_max) {
    int64_t block = 0;
    while (block_max[block] != scanned.highest) ++block;
    int64_t i = block * kBlock;
    while (x[i] != scanned.highest) ++i;
    return int32_t(i);
}

// Weights of softmax(x / temperature), up to a factor: that of the highest logit is exactly 1, those below `least`
// are 0. They are float32 within 2 units in the last place; sums are float32 within a block, and double from there.
struct Softmax {
    float highest, inverse_temperature, least;

    Softmax(float highest, double temperature, double least)
        : highest(highest), inverse_temperature(greater(float(1. / temperature), 1e-37f)), least(float(least)) {}

    vf operator()(vf x) const {
        vf weight = vexp((x - highest) * inverse_temperature);
        return weight < least ? vf{} : weight;
    }

    double sum(const float* x, int64_t vocab, double* block_sums) const {
        double total = 0.;
        for (int64_t begin = 0; begin < vocab; begin += kBlock) {
            vf sum = {};
            int64_t i = begin, end = lesser(begin + kBlock, vocab);
            for (; i + W <= end; i += W) sum += (*this)(load(x + i));
            if (i < end) {
                vf rest = broadcast(-kInfinity);
                for (int lane = 0; lane < end - i; ++lane) rest[lane] = x[i + lane];
                sum += (*this)(rest);
            }
            total += block_sums[begin / kBlock] = sum_lanes(sum);
        }
        return total;
    }

    // values must be readable, and weights writable, up to a whole vector.
    void weigh(const float* values, float* weights, int64_t n) const {
        for (int64_t i = 0; i < n; i += W) store(weights + i, (*this)(load(values + i)));
    }
};

// Where the running sum first exceeds `target`, which is below the total; weights of 0 are never chosen.
inline int64_t first_above(const float* weights, int64_t n, double running, double target) {
    int64_t last = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (weights[i] == 0.f) continue;
        last = i;
        if ((running += weights[i]) > target) break;
    }
    return last;  // in this order of additions the sum may stay a little below the total
}

// Philox-4x32-10 (Salmon et al. 2011): 53 bits of (seed, position) as a number in [0, 1).
inline double uniform(uint64_t seed, uint64_t position) {
    uint32_t c0 = uint32_t(position), c1 = uint32_t(position >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
        uint64_t product0 = 0xD2511F53ull * c0, product1 = 0xCD9E8D57ull * c2;
        c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
        c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
        c1 = uint32_t(product1);
        c3 = uint32_t(product0);
    }
    return double((uint64_t(c1) << 32 | c0) >> 11) * 0x1p-53;
}

// u of the total, but strictly below it, so that the walk ends at a token that has a weight.
inline double target_of(double u, double total) { return lesser(u * total, __builtin_nextafter(total, 0.)); }

// The tokens of x[begin, end) from `lowest` upwards; may write a vector's width beyond them.
SERVD_INLINE void append(Candidates& found, const float* x, int64_t begin, int64_t end, float lowest) {
    int64_t i = begin;
#if defined(__AVX512F__)
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + W <= end; i += W) {
        __m512 v = load(x + i);
        __mmask16 mask = _mm512_cmp_ps_mask(v, broadcast(lowest), _CMP_GE_OQ);
        // Compressed in the register and stored whole: Zen 4 compresses into memory in microcode, at a hundred cycles.
        _mm512_storeu_ps(found.values + found.count, _mm512_maskz_compress_ps(mask, v));
        __m512i ids = _mm512_add_epi32(lanes, _mm512_set1_epi32(int(i)));
        _mm512_storeu_si512(found.ids + found.count, _mm512_maskz_compress_epi32(mask, ids));
        found.count += __builtin_popcount(mask);
    }
#endif
    for (; i < end; ++i) {
        found.values[found.count] = x[i];
        found.ids[found.count] = int32_t(i);
        found.count += x[i] >= lowest;
    }
}

// All tokens from `lowest` upwards, by rising id; blocks whose maximum is below are passed over.
inline Candidates collect(const float* x, int64_t vocab, const float* block_max, float lowest, Memory& memory) {
    Candidates found{memory.values.data, memory.ids.data, memory.weights.data, 0};
    for (int64_t begin = 0; begin < vocab; begin += kBlock)
        if (block_max[begin / kBlock] >= lowest) append(found, x, begin, lesser(begin + kBlock, vocab), lowest);
    return found;
}

// The `count` best tokens, by rising id. So many blocks have a maximum of at least their count-th largest, and
// therefore so many tokens.
inline Candidates collect_best(const float* x, int64_t vocab, const float* block_max, int64_t count,
                               Memory& memory) {
    int64_t blocks = (vocab + kBlock - 1) / kBlock;
    float lowest = -kInfinity;
    if (count <= blocks) {
        for (int64_t i = 0; i < blocks; ++i) {
            memory.values.data[i] = block_max[i];
            memory.ids.data[i] = int32_t(i);
        }
        Candidates maxima{memory.values.data, memory.ids.data, nullptr, blocks};
        lowest = block_max[id_of(last_key(maxima, nullptr, double(count), memory.entries.data))];
    }
    Candidates found = collect(x, vocab, block_max, lowest, memory);
    keep_to(found, last_key(found, nullptr, double(count), memory.entries.data), false);
    return found;
}

// What top-p could keep: tokens this far below the highest hold, all together, less than the 1 - top_p that may go.
inline float lowest_in_nucleus(const Settings& settings, double highest, double total, int64_t vocab) {
    double may_go = (1. - settings.top_p) * total / double(vocab);
    double reach = -__builtin_log(may_go) * (1. + 1e-6) + 1e-6;  // more than any rounding on the way
    return float(highest - reach * settings.temperature) - float(1e-6 * __builtin_fabs(highest));
}

inline int32_t draw_from_all(const float* x, int64_t vocab, const Softmax& softmax, double u, Memory& memory) {
    double* block_sums = memory.block_sums.data;
    double target = target_of(u, softmax.sum(x, vocab, block_sums)), running = 0.;
    int64_t block = 0;
    while (running + block_sums[block] <= target) running += block_sums[block++];
    int64_t begin = block * kBlock, n = lesser(kBlock, vocab - begin);
    float values[kBlock + W] = {};
    float weights[kBlock + W];
    memcpy(values, x + begin, n * sizeof(float));
    softmax.weigh(values, weights, n);
    return int32_t(begin + first_above(weights, n, running, target));
}

// One token of x, whose scan is fine, at a temperature above 0.
inline int32_t draw(const float* x, int64_t vocab, const Scan& scanned, const Settings& settings, Memory& memory) {
    double u = uniform(uint64_t(settings.seed), uint64_t(settings.position));
    Softmax softmax(scanned.highest, settings.temperature, 0.);
    Softmax floored(scanned.highest, settings.temperature, settings.min_p);
    bool has_top_k = settings.top_k > 0 && settings.top_k < vocab, has_top_p = settings.top_p < 1.;
    if (!has_top_k && !has_top_p) return draw_from_all(x, vocab, floored, u, memory);
    Candidates kept;
    double total = 0.;
    if (has_top_k) {
        kept = collect_best(x, vocab, memory.block_max.data, settings.top_k, memory);
    } else {
        total = softmax.sum(x, vocab, memory.block_sums.data);
        float lowest = lowest_in_nucleus(settings, scanned.highest, total, vocab);
        kept = collect(x, vocab, memory.block_max.data, lowest, memory);
    }
    if (has_top_p) {
        softmax.weigh(kept.values, kept.weights, kept.count);
        if (has_top_k)
            for (int64_t i = 0; i < kept.count; ++i) total += kept.weights[i];
        keep_to(kept, last_key(kept, kept.weights, settings.top_p * total, memory.entries.data), true);
    }
    floored.weigh(kept.values, kept.weights, kept.count);
    double sum = 0.;
    for (int64_t i = 0; i < kept.count; ++i) sum += kept.weights[i];
    return kept.ids[first_above(kept.weights, kept.count, 0., target_of(u, sum))];
}

}  // namespace
}  // namespace SERVD_ISA
