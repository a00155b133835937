// Owns: attention's schedule: which rows and spans of keys run on which thread, and the check of the arrays.
// Does not know: the arithmetic (span.hpp), which gives the same bits under any schedule.
#include "span.hpp"

namespace SERVD_ISA {
namespace {

// A stretch of a unit's spans that one thread runs. A split unit has one job for each span, whose state goes
// to `memory`; otherwise memory is null, and the job merges and writes by itself.
struct Job {
    Unit unit;
    int32_t first_span, last_span;
    float* memory;
};

// following: the job after this one, or null.
void run_job(const Call& call, const Job& job, const Job* following) {
    int64_t width = sums_width(call);
    alignas(64) float span_memory[kStateFloats], total_memory[kStateFloats];
    Tile tile;
    const Unit* next = following ? &following->unit : nullptr;
    load_rows(call, job.unit, tile);
    if (job.memory) {
        State state = State::empty(job.memory, job.unit.rows, width);
        compute_span(call, job.unit, job.first_span, nullptr, tile, state);
        return;
    }
    State total = State::empty(total_memory, job.unit.rows, width);
    for (int64_t span = job.first_span; span < job.last_span; ++span) {
        bool is_first = span == job.first_span;  // it is the total
        State state = is_first ? total : State::empty(span_memory, job.unit.rows, width);
        compute_span(call, job.unit, span, next, tile, state);
        if (!is_first) merge(total, state, job.unit.rows, width);
    }
    write_rows(call, job.unit, total);
}

// The jobs of one unit lie next to each other; returns how many there are.
int64_t merge_jobs(const Call& call, const Job* jobs, int64_t left) {
    int64_t width = sums_width(call), count = 0;
    const Unit& unit = jobs[0].unit;
    alignas(64) float memory[kStateFloats];
    State total = State::empty(memory, unit.rows, width);
    for (; count < left && memcmp(&jobs[count].unit, &unit, sizeof unit) == 0; ++count)
        merge(total, State::at(jobs[count].memory, unit.rows, width), unit.rows, width);
    write_rows(call, unit, total);
    return count;
}

// f(unit) for every unit of the call.
template <class F>
void each_unit(const Call& call, F f) {
    for (int32_t request = 0; request < call.num_reqs; ++request) {
        int64_t tokens = call.cu_seqlens_q[request + 1] - call.cu_seqlens_q[request];
        int64_t rows = tokens * call.group();
        for (int32_t head = 0; head < call.format->kv_heads; ++head)
            for (int64_t row = 0; row < rows; row += kRows)
                f(make_unit(call, request, head, row, lesser(int64_t(kRows), rows - row)));
    }
}

Range spans_of(const Call& call, const Unit& unit) {
    Range keys = reach(call, unit);
    return {keys.begin / kSpan, (keys.end + kSpan - 1) / kSpan};
}

int run(const Call& call) {
    int64_t width = sums_width(call), total = 0, units = 0;
    each_unit(call, [&](const Unit& unit) {
        Range spans = spans_of(call, unit);
        total += spans.end - spans.begin;
        ++units;
    });
    // A unit is split over threads if it alone would hold one of them up: only the schedule depends on this.
    int64_t most = greater(total / (4 * servd::num_threads()), 1), split = 0, floats = 0, work = 0;
    Scratch<Job> jobs(total + units);
    Scratch<Job> split_jobs(total + units);
    int64_t count = 0;
    each_unit(call, [&](const Unit& unit) {
        Range spans = spans_of(call, unit), keys = reach(call, unit);
        work += unit.rows * (keys.end - keys.begin) * call.format->head_dim / 4;
        if (spans.end - spans.begin <= most) {
            jobs.data[count++] = {unit, int32_t(spans.begin), int32_t(spans.end), nullptr};
            return;
        }
        for (int64_t span = spans.begin; span < spans.end; ++span) {
            split_jobs.data[split++] = {unit, int32_t(span), int32_t(span + 1), nullptr};
            floats += State::size(unit.rows, width);
        }
    });
    Scratch<float> memory(floats);
    float* next = memory.data;
    for (int64_t i = 0; i < split; ++i) {
        split_jobs.data[i].memory = next;
        next += State::size(split_jobs.data[i].unit.rows, width);
        jobs.data[count++] = split_jobs.data[i];
    }
    parallel(count, work, [&call, &jobs, count](int64_t i) {
        run_job(call, jobs.data[i], i + 1 < count ? &jobs.data[i + 1] : nullptr);
    });
    for (int64_t i = 0; i < split;) i += merge_jobs(call, split_jobs.data + i, split - i);
    return 0;
}

// Whether the chosen pages of one request and head ascend and lie below `blocks`, with -1 after the last.
bool is_ascending(const int32_t* pages, int64_t count, int64_t blocks) {
    int64_t last = -1, i = 0;
    for (; i < count && pages[i] >= 0; last = pages[i++])
        if (pages[i] <= last || pages[i] >= blocks) return false;
    for (; i < count; ++i)
        if (pages[i] >= 0) return false;
    return true;
}

// 0, or the reason that the arrays do not fit each other (see faults.py).
int check(const Call& call, int64_t num_tokens, int64_t num_blocks) {
    int64_t size = call.format->block_size, heads = call.format->kv_heads;
    if (call.cu_seqlens_q[0] != 0 || call.cu_seqlens_q[call.num_reqs] != num_tokens) return 1;
    for (int64_t r = 0; r < call.num_reqs; ++r)
        if (call.cu_seqlens_q[r + 1] < call.cu_seqlens_q[r]) return 1;
    for (int64_t r = 0; r < call.num_reqs; ++r) {
        int64_t tokens = call.cu_seqlens_q[r + 1] - call.cu_seqlens_q[r], length = call.seq_lens[r];
        if (length < tokens) return 2;
        int64_t blocks = (length + size - 1) / size;
        if (blocks > call.table_stride) return 3;
        int64_t first = window_begin(call, length - tokens), sinks = lesser(call.num_sinks, first);
        const int32_t* table = call.block_tables + r * call.table_stride;
        for (int64_t b = 0; b < blocks && tokens > 0; ++b)
            if ((b * size < sinks || b >= first / size) && (table[b] < 0 || table[b] >= num_blocks)) return 4;
        for (int64_t h = r * heads; call.pages && h < (r + 1) * heads; ++h)
            if (!is_ascending(call.pages + h * call.max_pages, call.max_pages, blocks)) return 5;
    }
    return 0;
}

}  // namespace
}  // namespace SERVD_ISA

// q's strides in elements; block_tables [num_reqs, max_blocks], pages and out [num_tokens, q_heads, head_dim]
// contiguous; pages, lse, alibi_slopes and sink_logits may be null.
SERVD_EXPORT(paged_attention)(const int64_t* layout, const void* q, int64_t q_token_stride, int64_t q_head_stride,
                              int q_dtype, const void* cache, int64_t num_blocks, const int32_t* cu_seqlens_q,
                              const int32_t* seq_lens, const int32_t* block_tables, int64_t max_blocks,
                              int64_t num_reqs, int64_t num_tokens, int64_t q_heads, float scale,
                              const int32_t* pages, int64_t max_pages, void* out, float* lse, int64_t window,
                              int64_t num_sinks, int64_t logn_length, float softcap, const float* alibi_slopes,
                              const float* sink_logits) {
    using namespace SERVD_ISA;
    Format format(*reinterpret_cast<const KVLayout*>(layout));
    Call call = {&format, q, q_token_stride, q_head_stride, q_dtype,
                 static_cast<const char*>(cache), cu_seqlens_q, seq_lens, block_tables, max_blocks, num_reqs,
                 q_heads, scale, pages, max_pages, out, lse, window, num_sinks, logn_length, softcap,
                 alibi_slopes, sink_logits, -1};
    if ((format.block_size & (format.block_size - 1)) == 0) call.block_shift = __builtin_ctzll(format.block_size);
    int fault = check(call, num_tokens, num_blocks);
    return fault ? fault : run(call);
}
SERVD_RECORDABLE(paged_attention)
