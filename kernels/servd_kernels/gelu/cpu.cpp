// Owns: GELU without a gate, on CPU vectors.
// Does not know: the projections around it.
#include "../common/activation_rows.hpp"

// x [rows, width] with a row stride in elements; out [rows, width] contiguous, scales [rows] where code asks.
SERVD_EXPORT(gelu)(const void* x, int64_t row_stride, void* out, float* scales, int64_t rows, int64_t width, int dtype,
                   int code, int is_tanh) {
    using namespace SERVD_ISA;
    return gelu_rows<false>({x, row_stride, out, scales, rows, width, dtype, code}, is_tanh);
}
SERVD_RECORDABLE(gelu)
