// Owns: the library's threads: start, spin, sleep, hand out units, survive fork().
// Does not know: what a unit computes. Compiled once, for the baseline instruction set.
#include "pool.hpp"

#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

namespace servd {
namespace {

constexpr int kMaxThreads = 256;
constexpr int64_t kSpinNanoseconds = 50'000;  // the gap between two kernels of a step is shorter
// The gate packs generation | open bit | number of workers inside, so that one compare-and-swap decides
// whether a late worker may still join the job it saw.
constexpr uint64_t kOpen = 1u << 15;
constexpr int kGenerationShift = 16;

struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
};

struct Pool {
    std::atomic<int> wanted{0};  // threads asked for, the caller included; 0: one for each online processor
    int workers = 0;             // threads running now, the caller not included
    bool started = false;
    bool stop = false;
    pthread_t threads[kMaxThreads];
    pthread_mutex_t job_mutex;    // held by the caller whose job is running
    pthread_mutex_t sleep_mutex;  // guards the condition below
    pthread_cond_t wake;
    std::atomic<int> sleepers{0};
    std::atomic<uint64_t> gate{0};
    UnitFn fn = nullptr;
    void* context = nullptr;
    Range ranges[kMaxThreads];
};

Pool pool;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

// Its own share first (the same rows of a weight stay in the same core's cache from step to step), then
// what the others have left.
void run_units(int self, int participants) {
    for (int i = 0; i < participants; ++i) {
        Range& range = pool.ranges[(self + i) % participants];
        while (range.next.load(std::memory_order_relaxed) < range.end) {
            int64_t unit = range.next.fetch_add(1, std::memory_order_relaxed);
            if (unit >= range.end) break;
            pool.fn(pool.context, unit);
        }
    }
}

uint64_t wait_for_job(uint64_t seen) {
    int64_t deadline = now() + kSpinNanoseconds;
    do {
        for (int i = 0; i < 64; ++i) {
            uint64_t gate = pool.gate.load(std::memory_order_acquire);
            if ((gate >> kGenerationShift) != seen) return gate;
            relax();
        }
    } while (now() < deadline);
    pthread_mutex_lock(&pool.sleep_mutex);
    pool.sleepers.fetch_add(1);
    while ((pool.gate.load() >> kGenerationShift) == seen) pthread_cond_wait(&pool.wake, &pool.sleep_mutex);
    pool.sleepers.fetch_sub(1);
    pthread_mutex_unlock(&pool.sleep_mutex);
    return pool.gate.load(std::memory_order_acquire);
}

struct WorkerArgs {
    int index;
    uint64_t seen;
};
WorkerArgs worker_args[kMaxThreads];

void* worker_main(void* argument) {
    int self = static_cast<WorkerArgs*>(argument)->index;
    uint64_t seen = static_cast<WorkerArgs*>(argument)->seen;
    for (;;) {
        uint64_t gate = wait_for_job(seen);
        seen = gate >> kGenerationShift;
        if (pool.stop) return nullptr;
        while ((gate & kOpen) && (gate >> kGenerationShift) == seen) {
            if (pool.gate.compare_exchange_weak(gate, gate + 1)) {
                run_units(self, pool.workers + 1);
                pool.gate.fetch_sub(1);
                break;
            }
        }
    }
}

void publish(uint64_t open) {
    uint64_t generation = (pool.gate.load() >> kGenerationShift) + 1;
    pool.gate.store((generation << kGenerationShift) | open);
    if (pool.sleepers.load() == 0) return;
    pthread_mutex_lock(&pool.sleep_mutex);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.sleep_mutex);
}

// A forked child has none of its parent's threads; it starts its own at its first job.
void forget_threads() {
    pool.workers = 0;
    pool.started = false;
    pool.sleepers.store(0);
    pool.gate.store(0);
    pthread_mutex_init(&pool.job_mutex, nullptr);
    pthread_mutex_init(&pool.sleep_mutex, nullptr);
    pthread_cond_init(&pool.wake, nullptr);
}

__attribute__((constructor)) void initialise() {
    forget_threads();
    pthread_atfork(nullptr, nullptr, forget_threads);
}

int wanted_threads() {
    long wanted = pool.wanted.load(std::memory_order_relaxed);
    if (wanted <= 0) wanted = sysconf(_SC_NPROCESSORS_ONLN);
    return wanted < 1 ? 1 : wanted > kMaxThreads ? kMaxThreads : int(wanted);
}

void start_threads() {
    uint64_t seen = pool.gate.load() >> kGenerationShift;
    int wanted = wanted_threads() - 1;
    pool.stop = false;
    pool.started = true;
    // Set before the first thread starts: workers read it. The job is published only after this returns.
    pool.workers = wanted;
    for (int i = 0; i < wanted; ++i) {
        worker_args[i] = {i + 1, seen};
        if (pthread_create(&pool.threads[i], nullptr, worker_main, &worker_args[i]) != 0) {
            pool.workers = i;  // fewer threads than asked for still compute everything
            return;
        }
    }
}

void stop_threads() {
    pool.stop = true;
    publish(0);
    for (int i = 0; i < pool.workers; ++i) pthread_join(pool.threads[i], nullptr);
    pool.workers = 0;
    pool.started = false;
}

}  // namespace

int num_threads() { return wanted_threads(); }

void parallel_for(int64_t units, UnitFn fn, void* context) {
    if (units <= 1 || wanted_threads() == 1 || pthread_mutex_trylock(&pool.job_mutex) != 0) {
        for (int64_t unit = 0; unit < units; ++unit) fn(context, unit);
        return;
    }
    if (!pool.started) start_threads();
    int participants = pool.workers + 1;
    pool.fn = fn;
    pool.context = context;
    for (int i = 0; i < participants; ++i) {
        pool.ranges[i].next.store(units * i / participants, std::memory_order_relaxed);
        pool.ranges[i].end = units * (i + 1) / participants;
    }
    publish(kOpen);
    run_units(0, participants);
    pool.gate.fetch_and(~kOpen);  // a worker that has not woken by now finds nothing left and stays out
    for (int spins = 0; (pool.gate.load(std::memory_order_acquire) & (kOpen - 1)) != 0; ++spins) {
        if (spins < 4096) relax();
        else sched_yield();  // on a busy machine the worker inside may have lost its core to us
    }
    pthread_mutex_unlock(&pool.job_mutex);
}

}  // namespace servd

#define SERVD_PUBLIC extern "C" __attribute__((visibility("default")))

SERVD_PUBLIC void servd_set_num_threads(int threads) {
    pthread_mutex_lock(&servd::pool.job_mutex);
    if (servd::pool.started) servd::stop_threads();
    servd::pool.wanted = threads;
    pthread_mutex_unlock(&servd::pool.job_mutex);
}

SERVD_PUBLIC int servd_num_threads() { return servd::num_threads(); }

// 1 if this processor can run the library's code for the instruction set.
SERVD_PUBLIC int servd_cpu_supports(int isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == 1) return avx2;
    if (isa == 2) {
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    }
#endif
    return isa == 0;
}
