// Owns: where the rows' settings lie, the edits that they ask for, and the answer's layout.
// Does not know: how a token is chosen (row.hpp).
#include "row.hpp"

namespace SERVD_ISA {
namespace {

constexpr int64_t kHeader = 4;  // columns of an answer before the alternatives

// As in params.py; pointers to what nobody asked for are null.
struct Call {
    const float* logits;
    int64_t row_stride, rows, vocab;
    const double *temperature, *top_p, *min_p;
    const int64_t *top_k, *seeds, *positions, *num_logprobs;
    const int32_t *bias_offsets, *bias_ids;
    const float* bias_values;
    const int32_t *history_offsets, *history_ids, *num_prompt_tokens;
    const float *repetition, *presence, *frequency;
    const uint32_t* allowed;
    const int32_t* given;
    int32_t* packed;
    int64_t width;
};

void forbid(const uint32_t* allowed, int64_t vocab, float* x) {
    for (int64_t begin = 0; begin < vocab; begin += 32) {
        uint32_t word = allowed[begin / 32];
        if (word == 0xffffffffu) continue;
        for (int64_t i = begin, end = lesser(begin + 32, vocab); i < end; ++i)
            x[i] = word >> (i - begin) & 1 ? x[i] : -kInfinity;
    }
}

bool are_tokens(const int32_t* ids, int64_t n, int64_t vocab) {
    bool all = true;
    for (int64_t i = 0; i < n; ++i) all &= uint32_t(ids[i]) < uint64_t(vocab);
    return all;
}

void penalize(const Call& call, int64_t row, float* x, int32_t* counts) {
    const int32_t* ids = call.history_ids + call.history_offsets[row];
    int64_t n = call.history_offsets[row + 1] - call.history_offsets[row];
    for (int64_t i = 0; i < n; ++i) counts[ids[i]] = 0;
    for (int64_t i = call.num_prompt_tokens[row]; i < n; ++i) ++counts[ids[i]];
    float repetition = call.repetition[row], presence = call.presence[row], frequency = call.frequency[row];
    for (int64_t i = 0; i < n; ++i) {
        int32_t id = ids[i], count = counts[id];
        if (count < 0) continue;  // done at its first occurrence
        counts[id] = -1;
        float value = x[id] > 0.f ? x[id] / repetition : x[id] * repetition;
        value -= float(count) * frequency;
        x[id] = value - (count > 0 ? presence : 0.f);
    }
}

// The row's logits after mask, bias and penalties: the raw ones if it asks for none; null for a bad token id.
const float* edit(const Call& call, int64_t row, const float* raw, Memory& memory) {
    const int32_t *bias = call.bias_offsets, *history = call.history_offsets;
    bool has_bias = bias && bias[row] < bias[row + 1], has_history = history && history[row] < history[row + 1];
    if (!has_bias && !has_history && !call.allowed) return raw;
    float* x = memory.edited.data;
    memcpy(x, raw, call.vocab * sizeof(float));
    if (call.allowed) forbid(call.allowed + row * ((call.vocab + 31) / 32), call.vocab, x);
    if (has_bias) {
        if (!are_tokens(call.bias_ids + bias[row], bias[row + 1] - bias[row], call.vocab)) return nullptr;
        for (int64_t i = bias[row]; i < bias[row + 1]; ++i) x[call.bias_ids[i]] += call.bias_values[i];
    }
    if (has_history) {
        if (!are_tokens(call.history_ids + history[row], history[row + 1] - history[row], call.vocab)) return nullptr;
        penalize(call, row, x, memory.counts.data);
    }
    return x;
}

// The failure, or 0 and the token.
int choose(const Call& call, int64_t row, const float* raw, const Scan& raw_scan, Memory& memory, int32_t& token) {
    if (raw_scan.failure) return raw_scan.failure;
    if (call.given) {
        token = call.given[row];
        return are_tokens(&token, 1, call.vocab) ? kFine : kBadTokenId;
    }
    const float* x = edit(call, row, raw, memory);
    if (!x) return kBadTokenId;
    Scan scanned = x == raw ? raw_scan : scan(x, call.vocab, memory.block_max.data);
    if (scanned.failure) return scanned.failure;
    Settings settings{call.temperature[row], call.top_p[row], call.min_p[row],
                      call.top_k[row],       call.seeds[row], call.positions[row]};
    token = settings.temperature > 0. ? draw(x, call.vocab, scanned, settings, memory)
                                      : argmax(x, scanned, memory.block_max.data);
    return kFine;
}

int32_t rank_of(const float* x, int64_t vocab, float value) {
    vi higher = {};
    int64_t i = 0;
    for (; i + W <= vocab; i += W) higher -= load(x + i) > value;
    int32_t rank = 1;
    for (; i < vocab; ++i) rank += x[i] > value;
    for (int lane = 0; lane < W; ++lane) rank += higher[lane];
    return rank;
}

void put(int32_t& at, double logprob) {
    float rounded = float(logprob);
    memcpy(&at, &rounded, 4);
}

void report(const Call& call, int64_t row, const float* raw, Memory& memory, int32_t* answer) {
    Scan scanned = scan(raw, call.vocab, memory.block_max.data);  // edits and draw have used the memory since
    Softmax softmax(scanned.highest, 1., 0.);
    double lse = scanned.highest + __builtin_log(softmax.sum(raw, call.vocab, memory.block_sums.data));
    answer[2] = rank_of(raw, call.vocab, raw[answer[0]]);
    put(answer[3], raw[answer[0]] - lse);
    int64_t num_top = lesser(lesser(call.num_logprobs[row], call.vocab), (call.width - kHeader) / 2);
    if (num_top == 0) return;
    Candidates best = collect_best(raw, call.vocab, memory.block_max.data, num_top, memory);
    for (int64_t i = 0; i < best.count; ++i) memory.entries.data[i] = {key_of(best.values[i], best.ids[i]), 0.};
    sort_best_first(memory.entries.data, best.count);
    int32_t *ids = answer + kHeader, *logprobs = answer + (call.width + kHeader) / 2;
    for (int64_t i = 0; i < best.count; ++i) {
        ids[i] = id_of(memory.entries.data[i].key);
        put(logprobs[i], raw[ids[i]] - lse);
    }
}

void sample_row(const Call& call, int64_t row) {
    Memory& memory = Memory::of_this_thread(call.vocab);
    const float* raw = call.logits + row * call.row_stride;
    int32_t* answer = call.packed + row * call.width;
    for (int64_t i = 0; i < call.width; ++i) answer[i] = i >= kHeader && i < (call.width + kHeader) / 2 ? -1 : 0;
    answer[1] = choose(call, row, raw, scan(raw, call.vocab, memory.block_max.data), memory, answer[0]);
    if (answer[1]) answer[0] = 0;
    else if (call.num_logprobs[row] >= 0) report(call, row, raw, memory, answer);
}

}  // namespace
}  // namespace SERVD_ISA

SERVD_EXPORT(sample)(const void* call) {
    using namespace SERVD_ISA;
    const Call& rows = *static_cast<const Call*>(call);
    parallel(rows.rows, rows.rows * rows.vocab, [&rows](int64_t row) { sample_row(rows, row); });
    return 0;
}
