// Owns: GEGLU's gate, gelu(a) * b, on CPU vectors.
// Does not know: where a and b come from.
#include "../common/activation_rows.hpp"

// x [rows, 2 * width] with a row stride in elements; out [rows, width] contiguous, scales [rows] where code asks.
SERVD_EXPORT(gelu_and_mul)(const void* x, int64_t row_stride, void* out, float* scales, int64_t rows, int64_t width,
                           int dtype, int code, int is_tanh) {
    using namespace SERVD_ISA;
    return gelu_rows<true>({x, row_stride, out, scales, rows, width, dtype, code}, is_tanh);
}
SERVD_RECORDABLE(gelu_and_mul)
