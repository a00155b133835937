// Owns: what attention is asked: the arrays of one call, the cache's layout, and which keys a row sees.
// Does not know: any arithmetic on keys or values.
#pragma once
#include "../common/kernel.hpp"
#include "../common/kv_side.hpp"

namespace SERVD_ISA {
namespace {

constexpr int kTokens = 64;           // keys of a tile; what a row sees of it is one 64-bit mask
constexpr int kRun = 16;              // neighbouring keys of a tile that are loaded together
constexpr int kRuns = kTokens / kRun;
constexpr int kSpan = 16 * kTokens;   // keys with a softmax state of their own
constexpr int kRows = 96;             // query rows (token, head of the group) that share one load of the keys
constexpr int kMaxHeadDim = 256;
constexpr int kMaxGroups = kMaxHeadDim / 8;

// KVSide and KVLayout with what they say of groups of dimensions, which share parameters, worked out.
struct Side {
    int64_t code, data_offset, params_offset, row_bytes, num_groups, num_params;  // num_params: of one group

    Side(const KVSide& side, int64_t head_dim)
        : code(side.code), data_offset(side.data_offset), params_offset(side.params_offset),
          row_bytes(side.row_bytes), num_groups(side.num_params ? head_dim / side.group : 0),
          num_params(side.num_params ? side.num_params / num_groups : 0) {}
};

struct Format {
    int64_t kv_heads, head_dim, block_size, block_bytes, head_bytes;
    bool key_words, is_rotated;  // the keys; the values
    Side k, v;

    explicit Format(const KVLayout& layout)
        : kv_heads(layout.kv_heads), head_dim(layout.head_dim), block_size(layout.block_size),
          block_bytes(layout.block_bytes), head_bytes(layout.head_bytes), key_words(layout.k.is_words),
          is_rotated(layout.v.is_rotated), k(layout.k, layout.head_dim), v(layout.v, layout.head_dim) {}
};

struct Call {
    const Format* format;
    const void* q;
    int64_t q_token_stride, q_head_stride;
    int q_dtype;
    const char* cache;
    const int32_t *cu_seqlens_q, *seq_lens, *block_tables;
    int64_t table_stride, num_reqs, q_heads;
    float scale;
    const int32_t* pages;  // [num_reqs, kv_heads, max_pages] or null
    int64_t max_pages;
    void* out;
    float* lse;  // [num_tokens, q_heads] or null
    int64_t window, num_sinks, logn_length;
    float softcap;
    const float *alibi_slopes, *sink_logits;  // [q_heads] or null
    int block_shift;  // log2 of the block size, or -1: divisions would take a third of a short tile's time

    int64_t block_of(int64_t token) const {
        return block_shift >= 0 ? token >> block_shift : token / format->block_size;
    }
    int64_t offset_of(int64_t token) const { return token - block_of(token) * format->block_size; }
    int64_t group() const { return q_heads / format->kv_heads; }
};

// A run of rows of one request and one key/value head. Row i is token i / group, head i % group.
struct Unit {
    int32_t request, kv_head, first_row, rows;
    int64_t first_position, last_position;
};

struct Range {
    int64_t begin, end;
};

SERVD_INLINE Unit make_unit(const Call& call, int64_t request, int64_t head, int64_t row, int64_t rows) {
    int64_t tokens = call.cu_seqlens_q[request + 1] - call.cu_seqlens_q[request], group = call.group();
    int64_t position = call.seq_lens[request] - tokens;
    return {int32_t(request), int32_t(head), int32_t(row), int32_t(rows), position + row / group,
            position + (row + rows - 1) / group};
}

// The first key that the window leaves to a query at `position`.
SERVD_INLINE int64_t window_begin(const Call& call, int64_t position) {
    return call.window > 0 ? greater(position + 1 - call.window, 0) : 0;
}

// The keys that any row of the unit may see, and those between.
SERVD_INLINE Range reach(const Call& call, const Unit& unit) {
    int64_t first = window_begin(call, unit.first_position);
    return {call.num_sinks > 0 ? 0 : first, unit.last_position + 1};
}

// Tokens [begin, end) as bits of the tile that begins at token t.
SERVD_INLINE uint64_t bits_between(int64_t begin, int64_t end, int64_t t) {
    int64_t low = lesser(greater(begin - t, 0), kTokens), high = lesser(greater(end - t, 0), kTokens);
    return low < high ? (~uint64_t(0) >> (kTokens - (high - low))) << low : 0;
}

// What queries at positions first..last see of the tile at t, pages aside. Their windows overlap.
SERVD_INLINE uint64_t seen_by(const Call& call, int64_t first, int64_t last, int64_t t) {
    uint64_t bits = bits_between(window_begin(call, first), last + 1, t);
    if (call.num_sinks > 0) bits |= bits_between(0, lesser(call.num_sinks, window_begin(call, last)), t);
    return bits;
}

// The tokens of the tile at t that lie in pages chosen for the unit.
inline uint64_t chosen_bits(const Call& call, const Unit& unit, int64_t t) {
    if (!call.pages) return ~uint64_t(0);
    int64_t size = call.format->block_size, low = 0, high = call.max_pages;
    // As unsigned numbers the pages ascend to the end: -1 is the largest.
    auto* pages = reinterpret_cast<const uint32_t*>(
        call.pages + (unit.request * call.format->kv_heads + unit.kv_head) * call.max_pages);
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (pages[middle] < t / size) low = middle + 1;
        else high = middle;
    }
    uint64_t bits = 0;
    for (; low < call.max_pages && int64_t(pages[low]) * size < t + kTokens; ++low)
        bits |= bits_between(pages[low] * size, (pages[low] + int64_t(1)) * size, t);
    return bits;
}

// A tile of a unit and what any of its rows sees there: nothing, if there is no such tile.
struct Place {
    Unit unit;
    int64_t t;
    uint64_t seen;
};

// The first tile at t or later, before `end`, of which the unit sees anything.
inline Place find_tile(const Call& call, const Unit& unit, int64_t t, int64_t end) {
    int64_t first = unit.first_position, last = unit.last_position;
    for (; t < end; t += kTokens) {
        uint64_t seen = seen_by(call, first, last, t);
        if (seen) seen &= chosen_bits(call, unit, t);
        if (seen) return {unit, t, seen};
    }
    return {unit, end, 0};
}

// The part of the block that holds token `token` of the unit's request, for the unit's head.
SERVD_INLINE const char* head_of(const Call& call, const Unit& unit, int64_t token) {
    const Format& format = *call.format;
    int64_t block = call.block_tables[unit.request * call.table_stride + call.block_of(token)];
    return call.cache + block * format.block_bytes + unit.kv_head * format.head_bytes;
}

SERVD_INLINE int64_t padded_width(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

}  // namespace
}  // namespace SERVD_ISA
