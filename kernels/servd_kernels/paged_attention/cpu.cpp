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

template <class T>
void run_job(const Call& call, const Job& job) {
    int64_t width = padded_width(call.head_dim);
    alignas(64) float span_memory[kRows * (kMaxHeadDim + 2)], total_memory[kRows * (kMaxHeadDim + 2)];
    Tile tile;
    load_queries<T>(call, job.unit, tile);
    if (job.memory) {
        State state = State::empty(job.memory, job.unit.rows, width);
        compute_span<T>(call, job.unit, job.first_span, tile, state);
        return;
    }
    State total = State::empty(total_memory, job.unit.rows, width);
    for (int64_t span = job.first_span; span < job.last_span; ++span) {
        State state = State::empty(span_memory, job.unit.rows, width);
        compute_span<T>(call, job.unit, span, tile, state);
        merge(total, state, job.unit.rows, width);
    }
    write_rows<T>(call, job.unit, total);
}

// The jobs of one unit lie next to each other; returns how many there are.
template <class T>
int64_t merge_jobs(const Call& call, const Job* jobs, int64_t left) {
    int64_t width = padded_width(call.head_dim), count = 0;
    const Unit& unit = jobs[0].unit;
    float memory[kRows * (kMaxHeadDim + 2)];
    State total = State::empty(memory, unit.rows, width);
    for (; count < left && memcmp(&jobs[count].unit, &unit, sizeof unit) == 0; ++count) {
        float* part = jobs[count].memory;
        merge(total, {part + unit.rows * width, part + unit.rows * width + unit.rows, part}, unit.rows, width);
    }
    write_rows<T>(call, unit, total);
    return count;
}

// f(unit) for every unit of the call.
template <class F>
void each_unit(const Call& call, F f) {
    for (int32_t request = 0; request < call.num_reqs; ++request) {
        int64_t tokens = call.cu_seqlens_q[request + 1] - call.cu_seqlens_q[request];
        int64_t rows = tokens * (call.q_heads / call.kv_heads);
        for (int32_t head = 0; head < call.kv_heads; ++head)
            for (int64_t row = 0; row < rows; row += kRows)
                f(Unit{request, head, int32_t(row), int32_t(lesser(int64_t(kRows), rows - row))});
    }
}

Range spans_of(const Call& call, const Unit& unit) {
    Range keys = reach(call, unit);
    return {keys.begin / kSpan, (keys.end + kSpan - 1) / kSpan};
}

template <class T>
int run(const Call& call) {
    int64_t width = padded_width(call.head_dim), total = 0, units = 0;
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
        work += unit.rows * (keys.end - keys.begin) * call.head_dim / 4;
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
    parallel(count, work, [&call, &jobs](int64_t i) { run_job<T>(call, jobs.data[i]); });
    for (int64_t i = 0; i < split;) i += merge_jobs<T>(call, split_jobs.data + i, split - i);
    return 0;
}

// 0, or the reason that the arrays do not fit each other (see cpu.py).
int check(const Call& call, int64_t num_tokens, int64_t num_blocks) {
    if (call.cu_seqlens_q[0] != 0 || call.cu_seqlens_q[call.num_reqs] != num_tokens) return 1;
    for (int64_t r = 0; r < call.num_reqs; ++r) {
        int64_t tokens = call.cu_seqlens_q[r + 1] - call.cu_seqlens_q[r], length = call.seq_lens[r];
        if (tokens < 0) return 1;
        if (length < tokens) return 2;
        int64_t blocks = (length + call.block_size - 1) / call.block_size;
        if (blocks > call.table_stride) return 3;
        int64_t first = call.window > 0 ? greater(length - tokens + 1 - call.window, 0) : 0;
        const int32_t* table = call.block_tables + r * call.table_stride;
        for (int64_t b = first / call.block_size; b < blocks && tokens > 0; ++b)
            if (table[b] < 0 || table[b] >= num_blocks) return 4;
    }
    return 0;
}

}  // namespace
}  // namespace SERVD_ISA

// Strides in elements; block_tables [num_reqs, max_blocks] and out [num_tokens, q_heads, head_dim] contiguous.
SERVD_EXPORT(paged_attention)(const void* q, int64_t q_token_stride, int64_t q_head_stride, const void* cache,
                              int64_t block_stride, int64_t kv_stride, int64_t head_stride,
                              int64_t token_stride, const int32_t* cu_seqlens_q, const int32_t* seq_lens,
                              const int32_t* block_tables, int64_t max_blocks, int64_t num_reqs,
                              int64_t num_tokens, int64_t q_heads, int64_t kv_heads, int64_t num_blocks,
                              int64_t block_size, int64_t head_dim, float scale, int64_t window, void* out,
                              int dtype) {
    using namespace SERVD_ISA;
    Call call = {q, q_token_stride, q_head_stride, cache, block_stride, kv_stride, head_stride, token_stride,
                 cu_seqlens_q, seq_lens, block_tables, max_blocks, num_reqs, q_heads, kv_heads, block_size,
                 head_dim, window, scale, out};
    int fault = check(call, num_tokens, num_blocks);
    if (fault) return fault;
    return with_dtype(dtype, [&](auto tag) { return run<typename decltype(tag)::type>(call); });
}
