// Owns: LayerNorm, with the residual add fused, on CPU vectors.
// Does not know: what the rows are.
#include "../common/norm.hpp"

namespace SERVD_ISA {
namespace {

template <class T>
void normalise(const NormRow<T>& row, const T* weight, const T* bias, int64_t hidden, float eps) {
    float total = sum_row(hidden, [&](int64_t i, int64_t n, vf sum) SERVD_MEMBER {
        return sum + row.first(i, n);
    });
    vf mean = broadcast(total / float(hidden));
    const T* values = row.values();
    // A pass of its own, over values still in the cache: the mean of squares less the square of the mean cancels.
    float squares = sum_row(hidden, [&](int64_t i, int64_t n, vf sum) SERVD_MEMBER {
        if (n >= W) {
            vf d = load(values + i) - mean;
            return fma(d, d, sum);
        }
        float lanes[W] = {};  // no deviation where there is no value
        vf d = load_n(values + i, n) - mean;
        memcpy(lanes, &d, n * sizeof(float));
        d = load(lanes);
        return fma(d, d, sum);
    });
    vf scale = broadcast(1.f / __builtin_sqrtf(squares / float(hidden) + eps));
    walk_row(hidden, [&](int64_t i, int64_t n) SERVD_MEMBER {
        row.prefetch(i);
        vf shift = bias ? load_part(bias + i, n) : vf{};
        store_part(row.out + i, fma((load_part(values + i, n) - mean) * scale, load_part(weight + i, n), shift), n);
    });
}

}  // namespace
}  // namespace SERVD_ISA

// Arguments: NormCall of common/norm.hpp; bias may be null.
SERVD_EXPORT(layer_norm)(const void* x, int64_t outer_stride, int64_t inner_stride, const void* residual,
                         int64_t residual_outer_stride, int64_t residual_inner_stride, const void* weight,
                         const void* bias, void* out, void* new_residual, int64_t outer, int64_t inner,
                         int64_t hidden, float eps, int dtype) {
    using namespace SERVD_ISA;
    NormCall call = {x, outer_stride, inner_stride, residual, residual_outer_stride, residual_inner_stride,
                     out, new_residual, outer, inner};
    return with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        for_norm_rows<T>(call, hidden, [&](const NormRow<T>& row) {
            normalise(row, static_cast<const T*>(weight), static_cast<const T*>(bias), hidden, eps);
        });
        return 0;
    });
}
SERVD_RECORDABLE(layer_norm)
