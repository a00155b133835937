// Owns: what every kernel file needs besides vectors: dtype dispatch, threads, scratch memory.
// Does not know: any op.
#pragma once
#include <cstdlib>
#include <type_traits>

#include "pool.hpp"
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

}  // namespace SERVD_ISA
