// Owns: RMSNorm, with the residual add fused, on CPU vectors.
// Does not know: what the rows are (a hidden state, or one head for QK-norm).
#include "../common/norm.hpp"

namespace SERVD_ISA {
namespace {

template <class T>
void normalise(const NormRow<T>& row, const T* weight, int64_t hidden, float eps) {
    float squares = sum_row(hidden, [&](int64_t i, int64_t n, vf sum) SERVD_MEMBER {
        vf v = row.first(i, n);
        return fma(v, v, sum);
    });
    vf scale = broadcast(1.f / __builtin_sqrtf(squares / float(hidden) + eps));
    const T* values = row.values();
    walk_row(hidden, [&](int64_t i, int64_t n) SERVD_MEMBER {
        row.prefetch(i);
        store_part(row.out + i, load_part(values + i, n) * scale * load_part(weight + i, n), n);
    });
}

}  // namespace
}  // namespace SERVD_ISA

// Arguments: NormCall of common/norm.hpp.
SERVD_EXPORT(rms_norm)(const void* x, int64_t outer_stride, int64_t inner_stride, const void* residual,
                       int64_t residual_outer_stride, int64_t residual_inner_stride, const void* weight,
                       void* out, void* new_residual, int64_t outer, int64_t inner, int64_t hidden, float eps,
                       int dtype) {
    using namespace SERVD_ISA;
    NormCall call = {x, outer_stride, inner_stride, residual, residual_outer_stride, residual_inner_stride,
                     out, new_residual, outer, inner};
    return with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        for_norm_rows<T>(call, hidden, [&](const NormRow<T>& row) {
            normalise(row, static_cast<const T*>(weight), hidden, eps);
        });
        return 0;
    });
}
SERVD_RECORDABLE(rms_norm)
