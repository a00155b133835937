// Owns: the choice of the pages whose keys can score highest, on CPU vectors.
// Does not know: how bounds were made, or what attention does with the pages.
#include <algorithm>

#include "../common/kernel.hpp"
#include "../common/tile.hpp"

namespace SERVD_ISA {
namespace {

constexpr int64_t kPagesPerUnit = 128, kPagesAhead = 8;

struct Call {
    const void* q;
    int64_t q_token_stride, q_head_stride, q_heads, kv_heads, head_dim;
    const void* bounds;  // [num_blocks, kv_heads, 2, head_dim]
    const int32_t *seq_lens, *block_tables;
    int64_t max_blocks, num_reqs, block_size, top_k;
    int32_t* pages;  // [num_reqs, kv_heads, top_k]
    int64_t num_pages(int64_t request) const { return (seq_lens[request] + block_size - 1) / block_size; }
};

// In order of preference: the greater score, then the lower page.
struct Candidate {
    uint32_t score;
    int32_t page;
    bool operator<(const Candidate& other) const {
        return score != other.score ? score > other.score : page < other.page;
    }
};

struct ByPage {
    bool operator()(const Candidate& a, const Candidate& b) const { return a.page < b.page; }
};

// Ordered as the floats are; above all of them is kForced.
constexpr uint32_t kForced = 0xFFFFFFFF;
SERVD_INLINE uint32_t ordered(float score) {
    uint32_t bits;
    memcpy(&bits, &score, 4);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

constexpr int kHeads = 4;  // query heads that share the loads of a page's bounds

// The most that q . k can be for a key within the bounds, over HEADS query heads q [HEADS, padded]; infinity if that
// is NaN, so that the page is read. A channel adds the more with the bound on the side of q's sign.
template <int HEADS, class B>
SERVD_INLINE float upper_bound(const float* q, int64_t padded, const B* bounds, int64_t dim) {
    vf sums[HEADS] = {};
    for (int64_t i = 0; i < dim; i += W) {
        int64_t n = lesser(int64_t(W), dim - i);
        vf least = load_n(bounds + i, n), most = load_n(bounds + dim + i, n);
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; ++h) {
            vf x = load(q + h * padded + i);
            sums[h] = fma(x, x < 0.f ? least : most, sums[h]);
        }
    }
    float score = -__builtin_inff();
    for (int h = 0; h < HEADS; ++h) {
        float sum = sum_lanes(sums[h]);
        score = greater(sum == sum ? sum : __builtin_inff(), score);
    }
    return score;
}

template <class Q, class B>
void score_pages(const Call& call, int64_t request, int64_t head, int64_t first, uint32_t* scores) {
    int64_t count = call.num_pages(request), end = lesser(count, first + kPagesPerUnit);
    if (count <= call.top_k || first >= end) return;  // all of them, whatever they score
    int64_t group = call.q_heads / call.kv_heads, dim = call.head_dim, padded = (dim + W - 1) / W * W;
    Scratch<float> queries(group * padded);
    for (int64_t h = 0; h < group; ++h) {
        const Q* q = static_cast<const Q*>(call.q) + request * call.q_token_stride +
                     (head * group + h) * call.q_head_stride;
        for (int64_t i = 0; i < dim; i += W)
            store(queries.data + h * padded + i, load_n(q + i, lesser(int64_t(W), dim - i)));
    }
    const int32_t* table = call.block_tables + request * call.max_blocks;
    auto bounds_of = [&](int64_t page) {
        return static_cast<const B*>(call.bounds) + (table[page] * call.kv_heads + head) * 2 * dim;
    };
    for (int64_t page = first; page < end; ++page) {
        // Blocks lie anywhere in memory: no hardware guesses the next one.
        const B *bounds = bounds_of(page), *ahead = bounds_of(lesser(page + kPagesAhead, end - 1));
        for (int64_t i = 0; i < 2 * dim; i += 64 / int64_t(sizeof(B))) __builtin_prefetch(ahead + i);
        float most = -__builtin_inff();
        for (int64_t h = 0; h < group; h += kHeads)
            with_count<kHeads>(int(lesser(int64_t(kHeads), group - h)), [&](auto heads) {
                const float* q = queries.data + h * padded;
                most = greater(upper_bound<decltype(heads)::value>(q, padded, bounds, dim), most);
            });
        scores[page] = page == 0 || page == count - 1 ? kForced : ordered(most);
    }
}

void choose(const Call& call, int64_t request, const uint32_t* scores, int32_t* pages) {
    int64_t count = call.num_pages(request), kept = lesser(count, call.top_k);
    Scratch<Candidate> candidates(count);
    for (int64_t page = 0; page < count; ++page)
        candidates.data[page] = {kept < count ? scores[page] : kForced, int32_t(page)};
    if (kept < count) {
        std::nth_element(candidates.data, candidates.data + kept, candidates.data + count);
        std::sort(candidates.data, candidates.data + kept, ByPage{});
    }
    for (int64_t i = 0; i < call.top_k; ++i) pages[i] = i < kept ? candidates.data[i].page : -1;
}

template <class Q, class B>
int run(const Call& call) {
    int64_t chunks = (call.max_blocks + kPagesPerUnit - 1) / kPagesPerUnit, rows = call.num_reqs * call.kv_heads;
    int64_t work = 0;
    for (int64_t r = 0; r < call.num_reqs; ++r) work += call.num_pages(r) * call.q_heads * call.head_dim / 4;
    Scratch<uint32_t> scores(rows * call.max_blocks);
    parallel(rows * chunks, work, [&](int64_t unit) {
        int64_t row = unit / chunks;
        score_pages<Q, B>(call, row / call.kv_heads, row % call.kv_heads, unit % chunks * kPagesPerUnit,
                          scores.data + row * call.max_blocks);
    });
    parallel(rows, work / 4, [&](int64_t row) {
        choose(call, row / call.kv_heads, scores.data + row * call.max_blocks, call.pages + row * call.top_k);
    });
    return 0;
}

int check(const Call& call, int64_t num_blocks) {
    for (int64_t r = 0; r < call.num_reqs; ++r) {
        if (call.seq_lens[r] < 0) return 1;
        if (call.num_pages(r) > call.max_blocks) return 2;
        for (int64_t page = 0; page < call.num_pages(r); ++page) {
            int32_t block = call.block_tables[r * call.max_blocks + page];
            if (block < 0 || block >= num_blocks) return 3;
        }
    }
    return 0;
}

}  // namespace
}  // namespace SERVD_ISA

// Strides in elements; all else contiguous. bounds are float32 or bfloat16. Returns the reason why the arrays do not
// fit each other (see cpu.py), or 0.
SERVD_EXPORT(select_pages)(const void* q, int64_t q_token_stride, int64_t q_head_stride, int64_t q_heads,
                           int64_t kv_heads, int64_t head_dim, const void* bounds, int64_t num_blocks,
                           const int32_t* seq_lens, const int32_t* block_tables, int64_t max_blocks,
                           int64_t num_reqs, int64_t block_size, int64_t top_k, int32_t* pages, int q_dtype,
                           int bounds_dtype) {
    using namespace SERVD_ISA;
    Call call = {q, q_token_stride, q_head_stride, q_heads, kv_heads, head_dim, bounds, seq_lens, block_tables,
                 max_blocks, num_reqs, block_size, top_k, pages};
    int fault = check(call, num_blocks);
    if (fault) return fault;
    return with_dtype(q_dtype, [&](auto tag) {
        using Q = typename decltype(tag)::type;
        return bounds_dtype == kFloat32 ? run<Q, float>(call) : run<Q, bf16>(call);
    });
}
