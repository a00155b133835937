// Owns: attention's order: one run of query rows over one span of keys, and the writing of finished rows. The
// papers: PagedAttention (Kwon et al. 2023); FlashAttention-2 (Dao 2023).
// Does not know: threads, or whether a row is prefill or decode: its arithmetic is the same with any others.
//
// Order, for each row: tiles of kTokens keys counted from token 0, inside spans of kSpan keys, each span with
// its own softmax state, the states merged in ascending order.
#pragma once
#include "softmax.hpp"

namespace SERVD_ISA {
namespace {

// Units of so few rows wait for memory: the next tile is asked for while one is computed, a line here and there,
// since a burst of requests would fill the processor's miss buffers and hold it up.
constexpr int kAheadRows = 24;
constexpr int kMaxSumsWidth = kMaxHeadDim + 16;
constexpr int kStateFloats = kRows * (kMaxSumsWidth + 2);

struct Tile {
    Queries queries;
    Keys keys;
    Values values;
    int64_t positions[kRows];
    alignas(64) float lanes[kRows * W];  // the rows' sums of weights
};

inline void load_rows(const Call& call, const Unit& unit, Tile& tile) {
    load_queries(call, unit, tile.queries);
    int64_t group = call.group(), skipped = unit.first_row % group;
    for (int r = 0; r < unit.rows; ++r) tile.positions[r] = unit.first_position + (skipped + r) / group;
}

// The tile at `place`, whose keys and values are loaded.
inline void compute_tile(const Call& call, const Place& place, Tile& tile, const State& state) {
    const Unit& unit = place.unit;
    int64_t t = place.t;
    int64_t width = sums_width(call), group = call.group();
    bool has_options = call.alibi_slopes || call.softcap > 0;
    alignas(64) float scores[kDotRows * kTokens];
    Weights weights;
    for (int row = 0; row < unit.rows; row += kDotRows) {
        int rows = lesser(kDotRows, unit.rows - row);
        uint64_t seen[kDotRows], any = 0;
        float keep[kDotRows], *top = state.top + row, *lanes = tile.lanes + row * W;
        for (int r = 0; r < rows; ++r) {
            int64_t position = tile.positions[row + r];
            any |= seen[r] = seen_by(call, position, position, t) & place.seen;
        }
        if (!any) continue;
        score_rows(call, tile.queries, tile.keys, row, rows, kTokens - __builtin_clzll(any), scores);
        for (int r = 0; has_options && r < rows; ++r) {
            int64_t head = unit.kv_head * group + (unit.first_row + row + r) % group;
            apply_options(call, head, tile.positions[row + r], t, scores + r * kTokens);
        }
        if (are_softened_pairs(call)) soften<true>(scores, seen, rows, top, lanes, keep, weights);
        else soften<false>(scores, seen, rows, top, lanes, keep, weights);
        add_values(call, tile.values, scores, seen, rows, keep, weights, state.sums + row * width);
    }
}

// Adds one span of keys to the empty state. load_rows has filled the tile's queries; `following` is the unit that
// this thread will take up next, or null.
inline void compute_span(const Call& call, const Unit& unit, int64_t span, const Unit* following, Tile& tile,
                         const State& state) {
    int64_t last = reach(call, unit).end, end = lesser((span + 1) * kSpan, last);
    Place place = find_tile(call, unit, span * kSpan, end);
    memset(tile.lanes, 0, unit.rows * W * sizeof(float));
    while (place.t < end) {
        Place next = find_tile(call, unit, place.t + kTokens, last), ahead = next;
        if (!next.seen && following) ahead = find_tile(call, *following, 0, reach(call, *following).end);
        if (unit.rows > kAheadRows) ahead.seen = 0;
        load_keys(call, place, ahead, tile.keys);
        load_values(call, place, ahead, tile.values);
        compute_tile(call, place, tile, state);
        place = next;
    }
    for (int r = 0; r < unit.rows; ++r) state.sum[r] = sum_lanes(load(tile.lanes + r * W));
}

// out [head_dim], padded to whole vectors, from the sums of one row; stored order and rotation undone.
inline void finish_row(const Call& call, const float* sums, float sum, float* out) {
    int64_t dim = call.format->head_dim;
    vf divisor = broadcast(sum == 0.f ? 1.f : sum);  // a row that sees no key is zero
    if (has_minima(call)) {
        for (int64_t d = 0; d < dim; ++d) {
            int64_t in_group = d % kPairGroup;
            out[d] = sums[d - in_group + in_group % 2 * (kPairGroup / 2) + in_group / 2] + sums[dim + d / kPairGroup];
        }
        sums = out;
    }
    for (int64_t d = 0; d < dim; d += W) store(out + d, load(sums + d) / divisor);
    if (call.format->is_rotated) hadamard(out, dim);
}

inline void write_rows(const Call& call, const Unit& unit, const State& state) {
    int64_t group = call.group(), dim = call.format->head_dim, width = sums_width(call);
    alignas(64) float out[kMaxHeadDim + 16];
    for (int r = 0; r < unit.rows; ++r) {
        int64_t row = unit.first_row + r, head = unit.kv_head * group + row % group;
        float *top = state.top + r, *sum = state.sum + r, *sums = state.sums + r * width;
        if (call.sink_logits && call.sink_logits[head] > -__builtin_inff())
            merge_row(top, sum, sums, call.sink_logits[head], 1.f, nullptr, width);
        finish_row(call, sums, *sum, out);
        int64_t place = (call.cu_seqlens_q[unit.request] + row / group) * call.q_heads + head;
        if (call.lse) call.lse[place] = *sum == 0 ? -__builtin_inff() : *top + __builtin_logf(*sum);
        with_dtype(call.q_dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            T* target = static_cast<T*>(call.out) + place * dim;
            for (int64_t d = 0; d < dim; d += W) store_n(target + d, load(out + d), lesser(int64_t(W), dim - d));
            return 0;
        });
    }
}

}  // namespace
}  // namespace SERVD_ISA
