// Owns: what every kernel file needs besides vectors: dtype dispatch, threads, scratch memory.
// Does not know: any op.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <type_traits>

#include "pool.hpp"
#include "recordable.hpp"
#include "simd.hpp"

namespace SERVD_ISA {

// Below this many elementary steps a kernel stays on the calling thread: waking the pool costs more.
constexpr int64_t kSerialWork = 1 << 14;

// f(unit) for every unit, on all threads if `work` elementary steps are worth it.
template <class F>
SERVD_INLINE void parallel(int64_t units, int64_t work, F f) {
    if (work <= kSerialWork) {
        for (int64_t unit = 0; unit < units; ++unit) f(unit);
        return;
    }
    servd::parallel_for(units, [](void* context, int64_t unit) { (*static_cast<F*>(context))(unit); }, &f);
}

template <class T>
struct Tag { using type = T; };

// f(Tag<T>{}) for the dtype's element type.
template <class F>
SERVD_INLINE int with_dtype(int dtype, F&& f) {
    switch (dtype) {
        case kFloat32: return f(Tag<float>{});
        case kBFloat16: return f(Tag<bf16>{});
        default: return f(Tag<f16>{});
    }
}

// Memory of one call; 64-byte aligned.
template <class T>
struct Scratch {
    T* data;
    explicit Scratch(int64_t count)
        : data(static_cast<T*>(aligned_alloc(64, (count * sizeof(T) + 64) / 64 * 64))) {}
    ~Scratch() { free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

// A result of many MiB lies on fresh pages, which the system clears at the first write to each: huge ones, where it
// has them, save most of that time (8 of 42 ms for 512 rows of 49152 columns of bfloat16).
SERVD_INLINE void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t kHugePage = 2 << 20;
    uintptr_t first = (uintptr_t(memory) + kHugePage - 1) / kHugePage * kHugePage;
    uintptr_t last = (uintptr_t(memory) + bytes) / kHugePage * kHugePage;
    if (bytes >= int64_t(8 * kHugePage)) madvise((void*)first, last - first, MADV_HUGEPAGE);  // a hint: it may fail
#else
    (void)memory, (void)bytes;
#endif
}

}  // namespace SERVD_ISA
