// Owns: the activations of feed-forward layers on vectors.
// Does not know: which op applies them (Hendrycks & Gimpel 2016, "Gaussian Error Linear Units").
#pragma once
#include "normal_tail.hpp"

namespace SERVD_ISA {

SERVD_INLINE vf silu(vf x) { return x / (vexp(-x) + 1.f); }

// x * Phi(x). From the tail, so that small results keep their digits: 1 + erf(x / sqrt(2)) would cancel.
SERVD_INLINE vf gelu_erf(vf x) {
    vf size = vmax(x, -x);
    size = size > 20.f ? broadcast(20.f) : size;  // where the tail is 0: infinity * 0 would be NaN
    vf tail = size * normal_tail(size);
    return x < 0.f ? -tail : x - tail;
}

// x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 x^3); (1 + tanh(u)) / 2 is sigmoid(2 u).
SERVD_INLINE vf gelu_tanh(vf x) {
    vf u = x * fma(x * x, broadcast(0.0713548162726f), broadcast(1.59576912160573f));
    return x / (vexp(-u) + 1.f);
}

// linear/packed.py has the names.
enum Activation { kNoActivation = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3 };

SERVD_INLINE vf activated(int activation, vf x) {
    switch (activation) {
        case kSilu: return silu(x);
        case kGelu: return gelu_erf(x);
        case kGeluTanh: return gelu_tanh(x);
        default: return x;
    }
}

}  // namespace SERVD_ISA
