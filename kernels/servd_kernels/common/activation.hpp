// Owns: the activations of feed-forward layers on vectors.
// Does not know: which op applies them (Hendrycks & Gimpel 2016, "Gaussian Error Linear Units").
#pragma once
#include "simd.hpp"

namespace SERVD_ISA {

SERVD_INLINE vf silu(vf x) { return x / (vexp(-x) + 1.f); }

// x * (1 + erf(x / sqrt(2))) / 2 with a relative error below 2e-6 down to x = -3 (small results keep their digits):
// erfc(z) = exp(-z^2) * p(t), t = 2 / (2 + z), with p a minimax fit of the relative error. Beyond 20 the tail is 0.
SERVD_INLINE vf gelu_erf(vf x) {
    vf size = vmax(x, -x);
    size = size > 20.f ? broadcast(20.f) : size;
    vf z = size * 0.70710678118654752f;
    vf t = 2.f / (z + 2.f);
    vf p = broadcast(-0.0588906929f);
    p = fma(p, t, broadcast(0.283701539f));
    p = fma(p, t, broadcast(-0.485382795f));
    p = fma(p, t, broadcast(0.275977075f));
    p = fma(p, t, broadcast(-0.0251769032f));
    p = fma(p, t, broadcast(0.202069491f));
    p = fma(p, t, broadcast(0.243261099f));
    p = fma(p, t, broadcast(0.282353461f));
    p = fma(p, t, broadcast(0.282087684f));
    vf tail = size * 0.5f * (p * t) * vexp(-z * z);  // |x| * erfc(|x| / sqrt(2)) / 2
    return x < 0.f ? -tail : x - tail;
}

// x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 x^3); (1 + tanh(u)) / 2 is sigmoid(2 u).
SERVD_INLINE vf gelu_tanh(vf x) {
    vf u = x * fma(x * x, broadcast(0.0713548162726f), broadcast(1.59576912160573f));
    return x / (vexp(-u) + 1.f);
}

}  // namespace SERVD_ISA
