// Owns: attention's arithmetic: one run of query rows over one span of keys, and the merge of spans. The
// papers: PagedAttention (Kwon et al. 2023); FlashAttention-2 (Dao 2023), whose online softmax runs here.
// Does not know: threads, or whether a row is prefill or decode: its arithmetic is the same with any others.
//
// Order, for each row: tiles of kTokens keys counted from token 0, inside spans of kSpan keys, each span with
// its own softmax state, the states merged in ascending order.
#pragma once
#include "../common/kernel.hpp"
#include "../common/tile.hpp"

namespace SERVD_ISA {
namespace {

constexpr int kTokens = 48;  // keys of a tile: a multiple of every tile width
constexpr int kSpan = 12 * kTokens;
constexpr int kRows = 32;  // query rows (token, head of the group) that share one load of the keys
constexpr int kMaxHeadDim = 256;
constexpr int kColumns = kTileVectors * W;
static_assert(kTokens % kColumns == 0 && kTokens % W == 0, "score tiles must be whole");

// The tile of values: four vectors hold a head of 64 in AVX-512, where three would leave a third idle.
constexpr int kValueRows = 6, kValueVectors = kTileVectors == 3 ? 4 : 2;

struct Call {
    const void* q;
    int64_t q_token_stride, q_head_stride;
    const void* cache;
    int64_t block_stride, kv_stride, head_stride, token_stride;
    const int32_t *cu_seqlens_q, *seq_lens, *block_tables;
    int64_t table_stride, num_reqs, q_heads, kv_heads, block_size, head_dim, window;
    float scale;
    void* out;
};

// A run of rows of one request and one key/value head. Row i is token i / group, head i % group.
struct Unit {
    int32_t request, kv_head, first_row, rows;
};

struct Range {
    int64_t begin, end;
};

// The softmax state of a unit's rows: running maximum, sum and weighted values.
struct State {
    float *top, *sum;  // [rows]
    float* values;     // [rows][width]

    static int64_t size(int rows, int64_t width) { return rows * (width + 2); }

    static State empty(float* memory, int rows, int64_t width) {
        State state = {memory + rows * width, memory + rows * width + rows, memory};
        for (int r = 0; r < rows; ++r) state.top[r] = -__builtin_inff();
        memset(state.sum, 0, rows * sizeof(float));
        memset(state.values, 0, rows * width * sizeof(float));
        return state;
    }
};

struct Tile {
    alignas(64) float keys[kMaxHeadDim * kTokens];       // [head_dim][kTokens], transposed
    alignas(64) float values[kTokens * kMaxHeadDim];     // [kTokens][width]
    alignas(64) float scores[kRows * kTokens];
    alignas(64) float queries[kRows * kMaxHeadDim];
};

SERVD_INLINE int64_t padded_width(int64_t head_dim) { return (head_dim + W - 1) / W * W; }

// The keys that a row sees, clipped to [begin, end).
SERVD_INLINE Range visible(const Call& call, const Unit& unit, int row, int64_t begin, int64_t end) {
    int64_t tokens = call.cu_seqlens_q[unit.request + 1] - call.cu_seqlens_q[unit.request];
    int64_t token = (unit.first_row + row) / (call.q_heads / call.kv_heads);
    int64_t position = call.seq_lens[unit.request] - tokens + token;
    int64_t first = call.window > 0 ? greater(position + 1 - call.window, 0) : 0;
    Range range = {greater(first, begin), lesser(position + 1, end)};
    return range.begin < range.end ? range : Range{begin, begin};
}

// The keys that any row of the unit sees.
SERVD_INLINE Range reach(const Call& call, const Unit& unit) {
    return {visible(call, unit, 0, 0, INT64_MAX).begin,
            visible(call, unit, unit.rows - 1, 0, INT64_MAX).end};
}

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

// Where the keys of tokens begin.. lie; their values lie kv_stride further.
template <class T>
SERVD_INLINE void find_rows(const Call& call, const Unit& unit, int64_t begin, int count, const T** rows) {
    const int32_t* table = call.block_tables + unit.request * call.table_stride + begin / call.block_size;
    const T* head = static_cast<const T*>(call.cache) + unit.kv_head * call.head_stride;
    int64_t offset = begin % call.block_size;
    for (int t = 0; t < count; offset = 0, ++table) {
        const T* row = head + *table * call.block_stride + offset * call.token_stride;
        for (; offset < call.block_size && t < count; ++offset, row += call.token_stride) rows[t++] = row;
    }
}

// The tile that begins at `begin`: keys [first, end) of the request, and no other slot: later ones may hold
// anything, and blocks behind the window may be gone (the tile repeats a key there, which nobody sees).
template <class T>
void load_tile(const Call& call, const Unit& unit, int64_t begin, int64_t first, int64_t end, Tile& tile) {
    const T* rows[kTokens];
    int count = int(end - begin), skipped = int(first - begin);
    find_rows(call, unit, first, count - skipped, rows + skipped);
    for (int t = 0; t < skipped; ++t) rows[t] = rows[skipped];
    int64_t dim = call.head_dim, width = padded_width(dim);
    for (int t = 0; t < count; t += W) {
        for (int64_t d = 0; d < dim; d += W) {
            vf square[W];
            int64_t n = lesser(int64_t(W), dim - d);
            if (n == W && t + W <= count) {
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i) square[i] = load(rows[t + i] + d);
            } else {
                for (int i = 0; i < W; ++i) square[i] = t + i < count ? load_n(rows[t + i] + d, n) : vf{};
            }
            transpose(square);
            for (int64_t i = 0; i < n; ++i) store(tile.keys + (d + i) * kTokens + t, square[i]);
        }
    }
    for (int t = 0; t < count; ++t) {
        const T* row = rows[t] + call.kv_stride;
        int64_t d = 0;
        for (; d + W <= dim; d += W) store(tile.values + t * width + d, load(row + d));
        for (; d < width; d += W)
            store(tile.values + t * width + d, d < dim ? load_n(row + d, dim - d) : vf{});
    }
}

void compute_scores(Tile& tile, int rows, int64_t dim, int count) {
    for (int row = 0; row < rows; row += kTileRows) {
        with_count<kTileRows>(lesser(kTileRows, rows - row), [&](auto height) {
            constexpr int kHeight = decltype(height)::value;
            for (int t = 0; t < count; t += kColumns) {
                vf acc[kHeight][kTileVectors] = {};
                multiply_tile<kHeight, kTileVectors>(tile.queries + row * dim, dim, tile.keys + t, kTokens, dim,
                                                     acc);
#pragma GCC unroll 8
                for (int r = 0; r < kHeight; ++r)
#pragma GCC unroll 4
                    for (int v = 0; v < kTileVectors; ++v)
                        store(tile.scores + (row + r) * kTokens + t + v * W, acc[r][v]);
            }
        });
    }
}

// Turns a row's scores into weights relative to its new maximum; returns the factor for what it held.
SERVD_INLINE float soften(float* scores, Range seen, float& top, float& sum) {
    constexpr int kVectors = kTokens / W;
    const vf none = broadcast(-__builtin_inff());
    vf weights[kVectors], highest = none, total = {};
    if (seen.begin != 0 || seen.end != kTokens) {
        vi lane;
        for (int i = 0; i < W; ++i) lane[i] = i;
        for (int v = 0; v < kVectors; ++v, lane += W) {
            vi hidden = (lane < int(seen.begin)) | (lane >= int(seen.end));
            store(scores + v * W, hidden ? none : load(scores + v * W));
        }
    }
    for (int v = 0; v < kVectors; ++v) {
        weights[v] = load(scores + v * W);
        highest = vmax(highest, weights[v]);
    }
    float new_top = max_lanes(highest);
    new_top = top > new_top ? top : new_top;
    for (int v = 0; v < kVectors; ++v) {
        weights[v] = vexp(weights[v] - new_top);
        store(scores + v * W, weights[v]);
        total += weights[v];
    }
    float keep = top == new_top ? 1.f : vexp(broadcast(top - new_top))[0];
    top = new_top;
    sum = sum * keep + sum_lanes(total);
    return keep;
}

template <int ROWS, int VECTORS>
SERVD_INLINE void add_columns(const float* weights, const float* tile_values, int64_t tokens, float* out,
                              int64_t width) {
    vf acc[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) acc[r][v] = load(out + r * width + v * W);
    multiply_tile<ROWS, VECTORS>(weights, kTokens, tile_values, width, tokens, acc);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) store(out + r * width + v * W, acc[r][v]);
}

template <int ROWS>
void add_values(const Tile& tile, float* values, int row, Range tokens, int64_t width) {
    const float* weights = tile.scores + row * kTokens + tokens.begin;
    for (int64_t d = 0; d < width; d += kValueVectors * W) {
        with_count<kValueVectors>(int(lesser(int64_t(kValueVectors), (width - d) / W)), [&](auto vectors) {
            add_columns<ROWS, decltype(vectors)::value>(weights, tile.values + tokens.begin * width + d,
                                                        tokens.end - tokens.begin, values + row * width + d,
                                                        width);
        });
    }
}

// A row takes only the values it sees: a weight of zero times a later token's NaN would still be NaN. The
// stretch that all rows of a tile see runs together; what lies before and after it, row by row.
void accumulate(const Tile& tile, const State& state, const Range* seen, int rows, int64_t width) {
    for (int row = 0; row < rows; row += kValueRows) {
        int height = lesser(kValueRows, rows - row);
        Range common = seen[row];
        for (int r = 1; r < height; ++r) {
            common.begin = greater(common.begin, seen[row + r].begin);
            common.end = lesser(common.end, seen[row + r].end);
        }
        bool shared = common.begin < common.end;
        auto alone = [&](int r, Range tokens) {
            if (tokens.begin < tokens.end) add_values<1>(tile, state.values, r, tokens, width);
        };
        for (int r = row; r < row + height; ++r)
            alone(r, {seen[r].begin, shared ? common.begin : seen[r].end});
        if (!shared) continue;
        with_count<kValueRows>(height, [&](auto count) {
            add_values<decltype(count)::value>(tile, state.values, row, common, width);
        });
        for (int r = row; r < row + height; ++r) alone(r, {common.end, seen[r].end});
    }
}

template <class T>
void load_queries(const Call& call, const Unit& unit, Tile& tile) {
    int64_t group = call.q_heads / call.kv_heads;
    for (int r = 0; r < unit.rows; ++r) {
        int64_t row = unit.first_row + r;
        const T* q = static_cast<const T*>(call.q) +
                     (call.cu_seqlens_q[unit.request] + row / group) * call.q_token_stride +
                     (unit.kv_head * group + row % group) * call.q_head_stride;
        for (int64_t d = 0; d < call.head_dim; d += W) {
            int64_t n = lesser(int64_t(W), call.head_dim - d);
            store_n(tile.queries + r * call.head_dim + d, load_n(q + d, n) * call.scale, n);
        }
    }
}

// Adds one span of keys to the empty state. tile.queries is filled.
template <class T>
void compute_span(const Call& call, const Unit& unit, int64_t span, Tile& tile, const State& state) {
    int64_t width = padded_width(call.head_dim);
    Range all = reach(call, unit);
    for (int64_t t = span * kSpan; t < lesser((span + 1) * kSpan, all.end); t += kTokens) {
        if (t + kTokens <= all.begin) continue;
        int count = int(lesser(int64_t(kTokens), all.end - t));
        load_tile<T>(call, unit, t, greater(t, all.begin), t + count, tile);
        compute_scores(tile, unit.rows, call.head_dim, count);
        Range seen[kRows];
        for (int r = 0; r < unit.rows; ++r) {
            seen[r] = visible(call, unit, r, t, t + count);
            seen[r] = {seen[r].begin - t, seen[r].end - t};
            if (seen[r].begin == seen[r].end) continue;
            float keep = soften(tile.scores + r * kTokens, seen[r], state.top[r], state.sum[r]);
            if (keep == 1.f) continue;
            float* values = state.values + r * width;
            for (int64_t d = 0; d < width; d += W) store(values + d, load(values + d) * keep);
        }
        accumulate(tile, state, seen, unit.rows, width);
    }
}

// Adds a later span's state to the total.
void merge(const State& total, const State& span, int rows, int64_t width) {
    for (int r = 0; r < rows; ++r) {
        if (span.sum[r] == 0.f) continue;  // the row sees no key there
        float top = total.top[r] > span.top[r] ? total.top[r] : span.top[r];
        float keep = vexp(broadcast(total.top[r] - top))[0], add = vexp(broadcast(span.top[r] - top))[0];
        total.top[r] = top;
        total.sum[r] = total.sum[r] * keep + span.sum[r] * add;
        for (int64_t d = r * width; d < (r + 1) * width; d += W)
            store(total.values + d, fma(load(span.values + d), broadcast(add), load(total.values + d) * keep));
    }
}

template <class T>
void write_rows(const Call& call, const Unit& unit, const State& state) {
    int64_t group = call.q_heads / call.kv_heads, width = padded_width(call.head_dim);
    for (int r = 0; r < unit.rows; ++r) {
        int64_t row = unit.first_row + r;
        T* out = static_cast<T*>(call.out) +
                 ((call.cu_seqlens_q[unit.request] + row / group) * call.q_heads + unit.kv_head * group +
                  row % group) * call.head_dim;
        for (int64_t d = 0; d < call.head_dim; d += W)
            store_n(out + d, load(state.values + r * width + d) / state.sum[r],
                    lesser(int64_t(W), call.head_dim - d));
    }
}

}  // namespace
}  // namespace SERVD_ISA
