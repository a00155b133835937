// Owns: the order of tokens (by falling logit, then by rising id) and the search for the best of them, unsorted.
// Does not know: what is measured: tokens are counted for top-k, and weighed for top-p.
#pragma once
#include <algorithm>

#include "../common/kernel.hpp"

namespace SERVD_ISA {
namespace {

// Sorted by std::sort, which is instantiated anew in each instruction set's namespace: so this must not be a type
// of the standard library, or the linker would keep one copy for all.
struct Entry {
    uint64_t key;
    double measure;
};

// Higher is better. + 0: zeros of both signs are equal. Negative floats order like sign-magnitude integers.
SERVD_INLINE uint64_t key_of(float value, int32_t id) {
    value += 0.f;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return uint64_t(bits) << 32 | (0xffffffffu - uint32_t(id));
}

SERVD_INLINE int32_t id_of(uint64_t key) { return int32_t(0xffffffffu - uint32_t(key)); }

inline void sort_best_first(Entry* entries, int64_t n) {
    std::sort(entries, entries + n, [](const Entry& a, const Entry& b) { return a.key > b.key; });
}

// Tokens by rising id, with a weight each.
struct Candidates {
    float* values;
    int32_t* ids;
    float* weights;
    int64_t count;
};

// Falling values to rising bins: monotone, since each step rounds monotonically.
struct Bins {
    static constexpr int kCount = 512;
    float highest, scale;

    Bins(const float* values, int64_t n) {
        highest = values[0];
        float lowest = values[0];
        for (int64_t i = 0; i < n; ++i) {
            highest = greater(values[i], highest);
            lowest = values[i] > -__builtin_inff() ? lesser(values[i], lowest) : lowest;
        }
        scale = (kCount - 1) / (highest - lowest);
        if (!(scale < 1e30f)) scale = 0.f;  // all equal: one bin
    }

    int of(float value) const { return int(lesser((highest - value) * scale, float(kCount - 1))); }
};

// The last of the shortest run of best tokens whose measures reach `wanted`, as a key; the very last token's if all
// do not. A null `weights` counts tokens. Sums of weights go by bin, by id within a bin, and one by one in the last:
// an order that the row alone fixes.
inline uint64_t last_key(const Candidates& from, const float* weights, double wanted, Entry* memory) {
    Bins bins(from.values, from.count);
    double measures[Bins::kCount] = {};
    for (int64_t i = 0; i < from.count; ++i) measures[bins.of(from.values[i])] += weights ? weights[i] : 1.;
    double before = 0.;
    int bin = 0, last_bin = Bins::kCount - 1;
    while (last_bin > 0 && measures[last_bin] == 0.) --last_bin;
    while (bin < last_bin && before + measures[bin] < wanted) before += measures[bin++];
    int64_t n = 0;
    for (int64_t i = 0; i < from.count; ++i)
        if (bins.of(from.values[i]) == bin)
            memory[n++] = {key_of(from.values[i], from.ids[i]), weights ? weights[i] : 1.};
    sort_best_first(memory, n);
    int64_t last = 0;
    for (double sum = before + memory[0].measure; sum < wanted && last + 1 < n;) sum += memory[++last].measure;
    return memory[last].key;
}

// Drops all candidates behind `last`.
inline void keep_to(Candidates& candidates, uint64_t last, bool has_weights) {
    int64_t n = 0;
    for (int64_t i = 0; i < candidates.count; ++i) {
        float value = candidates.values[i];
        int32_t id = candidates.ids[i];
        candidates.values[n] = value;
        candidates.ids[n] = id;
        if (has_weights) candidates.weights[n] = candidates.weights[i];
        n += key_of(value, id) >= last;
    }
    candidates.count = n;
}

}  // namespace
}  // namespace SERVD_ISA
