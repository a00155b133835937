// Owns: the walk of an activation over rows: gated or not, rounded to x's dtype or quantized by row.
// Does not know: which op calls.
#pragma once
#include "activation.hpp"
#include "kernel.hpp"
#include "row_codes.hpp"

namespace SERVD_ISA {

struct ActivationCall {
    const void* x;  // [rows, width] or, gated, [rows, 2 * width]; row_stride in elements
    int64_t row_stride;
    void* out;      // [rows, width], contiguous: x's dtype, or codes
    float* scales;  // [rows]; null where out has x's dtype
    int64_t rows, width;
    int dtype, code;  // enum DType, enum RowCode
};

constexpr int64_t kActivationSpan = 1024;  // columns of one unit; a multiple of every W

// use(i, n, value) for every vector of columns: it begins at i and has n valid elements, W but in the last.
template <bool GATED, class T, class F, class Use>
SERVD_INLINE void activate_row(const T* x, int64_t gap, int64_t count, F f, Use use) {
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        vf value = f(load(x + i));
        if (GATED) value = value * load(x + gap + i);
        use(i, W, value);
    }
    if (i < count) {
        vf value = f(load_n(x + i, count - i));
        if (GATED) value = value * load_n(x + gap + i, count - i);
        use(i, count - i, value);
    }
}

template <bool GATED, class T, class F>
void activate_to_floats(const ActivationCall& call, F f) {
    int64_t spans = (call.width + kActivationSpan - 1) / kActivationSpan;
    parallel(call.rows * spans, call.rows * call.width * 4, [&](int64_t unit) {
        int64_t row = unit / spans, start = unit % spans * kActivationSpan;
        const T* x = static_cast<const T*>(call.x) + row * call.row_stride + start;
        T* out = static_cast<T*>(call.out) + row * call.width + start;
        int64_t count = lesser(kActivationSpan, call.width - start);
        activate_row<GATED>(x, call.width, count, f, [&](int64_t i, int64_t n, vf value) SERVD_MEMBER {
            if (n == W) store(out + i, value);
            else store_n(out + i, value, n);
        });
    });
}

template <bool GATED, class T, class F>
void activate_to_codes(const ActivationCall& call, F f) {
    parallel(call.rows, call.rows * call.width * 8, [&](int64_t row) {
        const T* x = static_cast<const T*>(call.x) + row * call.row_stride;
        uint8_t* out = static_cast<uint8_t*>(call.out) + row * call.width;
        Scratch<float> values(call.width + W);
        AbsMax most;
        activate_row<GATED>(x, call.width, call.width, f, [&](int64_t i, int64_t, vf value) SERVD_MEMBER {
            store(values.data + i, value);  // beyond the row f(0), which is 0
            most.add(value);
        });
        call.scales[row] = store_codes(call.code, values.data, most, out, call.width);
    });
}

template <bool GATED, class F>
int activate_rows(const ActivationCall& call, F f) {
    return with_dtype(call.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (call.code == kNoCode) activate_to_floats<GATED, T>(call, f);
        else activate_to_codes<GATED, T>(call, f);
        return 0;
    });
}

template <bool GATED>
int gelu_rows(const ActivationCall& call, int is_tanh) {
    if (is_tanh) return activate_rows<GATED>(call, [](vf x) { return gelu_tanh(x); });
    return activate_rows<GATED>(call, [](vf x) { return gelu_erf(x); });
}

}  // namespace SERVD_ISA
