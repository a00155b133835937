// Owns: SwiGLU's gate, silu(a) * b, on CPU vectors.
// Does not know: where a and b come from.
#include "../common/kernel.hpp"

namespace SERVD_ISA {
namespace {

SERVD_INLINE vf gate(vf a, vf b) { return a / (vexp(-a) + 1.f) * b; }

template <class T>
void gate_span(const T* a, const T* b, T* out, int64_t count) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(out + i, gate(load(a + i), load(b + i)));
    int64_t n = count - i;
    if (n > 0) store_n(out + i, gate(load_n(a + i, n), load_n(b + i, n)), n);
}

constexpr int64_t kSpan = 1024;  // columns of one unit; a multiple of every W

}  // namespace
}  // namespace SERVD_ISA

// x [rows, 2 * width] with a row stride in elements; out [rows, width] contiguous.
SERVD_EXPORT(silu_and_mul)(const void* x, int64_t row_stride, void* out, int64_t rows, int64_t width,
                           int dtype) {
    using namespace SERVD_ISA;
    return with_dtype(dtype, [=](auto tag) {
        using T = typename decltype(tag)::type;
        int64_t spans = (width + kSpan - 1) / kSpan;
        parallel(rows * spans, rows * width * 4, [=](int64_t unit) {
            int64_t row = unit / spans, start = unit % spans * kSpan;
            const T* a = static_cast<const T*>(x) + row * row_stride + start;
            gate_span(a, a + width, static_cast<T*>(out) + row * width + start, lesser(kSpan, width - start));
        });
        return 0;
    });
}
