// Owns: x @ weight.T over e4m3 weights scaled by output channel, x as it comes or rounded to e4m3 first.
// Does not know: where the codes come from. (Micikevicius et al. 2022, "FP8 Formats for Deep Learning".)
#include "../common/coded_linear.hpp"

namespace SERVD_ISA {
namespace {

// e4m3 numbers are exact in either.
using Rounded = Operand<bf16>;

template <class T>
SERVD_INLINE vf load_number(const T* x, int64_t n) { return load_n(x, n); }
SERVD_INLINE vf load_number(const uint8_t* x, int64_t n) {
    vu code{};
    for (int64_t i = 0; i < n; ++i) code[i] = x[i];
    return Fp8::from_code(code);
}

// A row rounded to e4m3 by its absmax / 448, or e4m3 already.
template <class T>
void round_row(const T* x, int64_t k, int64_t depth, Rounded* out, float* scale) {
    constexpr bool kIsCode = sizeof(T) == 1;
    if constexpr (!kIsCode) *scale = largest_magnitude(x, k) / 448.f;
    for (int64_t i = 0; i < k; i += W) {
        int64_t n = lesser(int64_t(W), k - i);
        vf v = load_number(x + i, n);
        if constexpr (!kIsCode) v = round_to_fp8(clamp(v / *scale, 448.f));
        store_n(out + i, v, n);
    }
    memset(static_cast<void*>(out + k), 0, (depth - k) * sizeof(Rounded));
}

template <class T>
void rounded_linear(CodedCall call, const T* x, int64_t x_stride, const float* given) {
    int64_t depth = round_up(call.k, Fp8::kDepth);
    Scratch<Rounded> rows(call.m * depth);
    Scratch<float> scales(call.m);
    parallel(call.m, call.m * call.k, [&](int64_t row) {
        if (given) scales.data[row] = given[row];
        round_row(x + row * x_stride, call.k, depth, rows.data + row * depth, &scales.data[row]);
    });
    call.row_scales = scales.data;
    coded_linear<Fp8, Rounded>(call, rows.data, depth);
}

}  // namespace
}  // namespace SERVD_ISA

// x [m, k] with a row stride in elements, of a DType, or e4m3 codes (kFp8) with x_scales [m]; scales float
// [panels][columns of a panel]. The rest: LinearEnd.
SERVD_EXPORT(linear_fp8)(const void* x, int64_t x_stride, int x_dtype, const void* x_scales, const void* words,
                         const void* scales, int64_t m, int64_t k, int is_rounded, const void* bias,
                         const void* residual, int64_t residual_stride, void* out, int64_t n, int bias_dtype,
                         int residual_dtype, int out_dtype, int activation, int is_gated) {
    using namespace SERVD_ISA;
    LinearEnd end = {bias, residual, out, n, residual_stride, bias_dtype, residual_dtype, out_dtype, activation,
                     is_gated};
    CodedCall call = {static_cast<const uint32_t*>(words), scales, nullptr, nullptr, m, k, k, kFloat32, end, nullptr,
                      nullptr};
    if (x_dtype == kFp8) {
        rounded_linear(call, static_cast<const uint8_t*>(x), x_stride, static_cast<const float*>(x_scales));
        return 0;
    }
    return with_dtype(x_dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (is_rounded) rounded_linear(call, static_cast<const T*>(x), x_stride, nullptr);
        else coded_linear_of<Fp8>(call, static_cast<const T*>(x), x_stride);
        return 0;
    });
}
