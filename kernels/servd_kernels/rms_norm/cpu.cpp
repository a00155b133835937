// Owns: RMSNorm, with the residual add fused, on CPU vectors.
// Does not know: what the rows are (a hidden state, or one head for QK-norm).
#include "../common/kernel.hpp"

namespace SERVD_ISA {
namespace {

template <class T>
void normalise_row(const T* x, const T* residual, const T* weight, T* out, T* new_residual, int64_t hidden,
                   float eps) {
    vf squares = {};
    const T* values = residual ? new_residual : x;
    for (int64_t i = 0; i < hidden; i += W) {
        int64_t n = hidden - i;
        if (n >= W) {
            vf v = load(x + i);
            if (residual) {
                // The statistics are those of the rounded sum: it is what the next layer will read.
                store(new_residual + i, v + load(residual + i));
                v = load(new_residual + i);
            }
            squares = fma(v, v, squares);
        } else {
            vf v = load_n(x + i, n);
            if (residual) {
                store_n(new_residual + i, v + load_n(residual + i, n), n);
                v = load_n(new_residual + i, n);
            }
            squares = fma(v, v, squares);
        }
    }
    vf scale = broadcast(1.f / __builtin_sqrtf(sum_lanes(squares) / float(hidden) + eps));
    for (int64_t i = 0; i < hidden; i += W) {
        int64_t n = hidden - i;
        if (n >= W) store(out + i, load(values + i) * scale * load(weight + i));
        else store_n(out + i, load_n(values + i, n) * scale * load_n(weight + i, n), n);
    }
}

}  // namespace
}  // namespace SERVD_ISA

// Rows are [outer, inner]; strides in elements. residual and new_residual may be null; out and new_residual
// are contiguous.
SERVD_EXPORT(rms_norm)(const void* x, int64_t outer_stride, int64_t inner_stride, const void* residual,
                       int64_t residual_outer_stride, int64_t residual_inner_stride, const void* weight,
                       void* out, void* new_residual, int64_t outer, int64_t inner, int64_t hidden, float eps,
                       int dtype) {
    using namespace SERVD_ISA;
    return with_dtype(dtype, [=](auto tag) {
        using T = typename decltype(tag)::type;
        parallel(outer, outer * inner * hidden, [=](int64_t i) {
            for (int64_t j = 0; j < inner; ++j) {
                int64_t row = (i * inner + j) * hidden;
                normalise_row(static_cast<const T*>(x) + i * outer_stride + j * inner_stride,
                              residual ? static_cast<const T*>(residual) + i * residual_outer_stride +
                                             j * residual_inner_stride
                                       : nullptr,
                              static_cast<const T*>(weight), static_cast<T*>(out) + row,
                              residual ? static_cast<T*>(new_residual) + row : nullptr, hidden, eps);
            }
        });
        return 0;
    });
}
