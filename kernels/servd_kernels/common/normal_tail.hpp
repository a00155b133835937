// Owns: the tail of the normal distribution on vectors.
// Does not know: GELU, which is made of it.
#pragma once
#include "simd.hpp"

namespace SERVD_ISA {

// Phi(-t), the normal distribution's tail, for t >= 0, with a relative error below 1e-5 and far below it up to t = 3.
#if defined(__AVX512F__)
// A polynomial of degree 4 on each of 32 intervals of [0, 6), from its middle: minimax fits of the relative error. Two
// registers hold the 32 coefficients of a degree, and a permutation looks them up: no exponential, no division.
constexpr float kTailStep = 0.1875f;
alignas(64) static const float kTail[5][32] = {
    {-4.66585578e-03f, -1.31281978e-02f, -1.93888303e-02f, -2.25580018e-02f, -2.24267822e-02f, -1.94471292e-02f, -1.45456651e-02f,
     -8.84568878e-03f, -3.38916946e-03f, 1.06559915e-03f, 4.13252879e-03f, 5.77656645e-03f, 6.21814933e-03f, 5.80618437e-03f,
     4.91047418e-03f, 3.83969233e-03f, 2.80847936e-03f, 1.93558587e-03f, 1.26312510e-03f, 7.83213181e-04f, 4.62621625e-04f,
     2.60815141e-04f, 1.40561024e-04f, 7.25026257e-05f, 3.58288089e-05f, 1.69769210e-05f, 7.71851410e-06f, 3.36907965e-06f,
     1.41256930e-06f, 5.69137910e-07f, 2.20444178e-07f, 8.21101906e-08f},
    {6.55099750e-02f, 5.87676652e-02f, 4.64262888e-02f, 3.05040684e-02f, 1.34375123e-02f, -2.43185600e-03f, -1.52917346e-02f,
     -2.41140071e-02f, -2.86968183e-02f, -2.95229163e-02f, -2.75076572e-02f, -2.37224940e-02f, -1.91644039e-02f, -1.46105420e-02f,
     -1.05631500e-02f, -7.26709142e-03f, -4.76924516e-03f, -2.99141090e-03f, -1.79585570e-03f, -1.03308470e-03f, -5.69997705e-04f,
     -3.01865715e-04f, -1.53544039e-04f, -7.50519248e-05f, -3.52693023e-05f, -1.59406700e-05f, -6.93165157e-06f, -2.90077605e-06f,
     -1.16855813e-06f, -4.53255666e-07f, -1.69308990e-07f, -6.09169604e-08f},
    {1.86186954e-02f, 5.39258905e-02f, 8.37738588e-02f, 1.05543472e-01f, 1.17896982e-01f, 1.20868094e-01f, 1.15678616e-01f,
     1.04357503e-01f, 8.92762691e-02f, 7.27155730e-02f, 5.65473102e-02f, 4.20698933e-02f, 2.99893226e-02f, 2.05071773e-02f,
     1.34644276e-02f, 8.49438179e-03f, 5.15224738e-03f, 3.00604943e-03f, 1.68774882e-03f, 9.12182091e-04f, 4.74727683e-04f,
     2.37961081e-04f, 1.14910566e-04f, 5.34673381e-05f, 2.39752680e-05f, 1.03621014e-05f, 4.31715353e-06f, 1.73405203e-06f,
     6.71562020e-07f, 2.50789469e-07f, 9.03165756e-08f, 3.13684474e-08f},
    {-3.97192717e-01f, -3.83471549e-01f, -3.57434839e-01f, -3.21656615e-01f, -2.79460192e-01f, -2.34411687e-01f, -1.89832419e-01f,
     -1.48420319e-01f, -1.12033546e-01f, -8.16459432e-02f, -5.74450865e-02f, -3.90214063e-02f, -2.55908463e-02f, -1.62030961e-02f,
     -9.90473945e-03f, -5.84547361e-03f, -3.33064166e-03f, -1.83217786e-03f, -9.73058341e-04f, -4.98932204e-04f, -2.46987882e-04f,
     -1.18043237e-04f, -5.44675568e-05f, -2.42641963e-05f, -1.04357860e-05f, -4.33326841e-06f, -1.73714932e-06f, -6.72341230e-07f,
     -2.51231086e-07f, -9.06333284e-08f, -3.15670086e-08f, -1.06147491e-08f},
    {4.62653875e-01f, 3.89259338e-01f, 3.19624186e-01f, 2.55831629e-01f, 1.99404567e-01f, 1.51211798e-01f, 1.11469544e-01f,
     7.98249543e-02f, 5.54960221e-02f, 3.74358110e-02f, 2.44909041e-02f, 1.55320745e-02f, 9.54548176e-03f, 5.68284048e-03f,
     3.27645568e-03f, 1.82894524e-03f, 9.88219632e-04f, 5.16740372e-04f, 2.61442794e-04f, 1.27965817e-04f, 6.05841815e-05f,
     2.77404688e-05f, 1.22830079e-05f, 5.25876931e-06f, 2.17674960e-06f, 8.71040243e-07f, 3.36928167e-07f, 1.25971653e-07f,
     4.55212934e-08f, 1.58977258e-08f, 5.36548006e-09f, 1.74989490e-09f},
};

SERVD_INLINE vf normal_tail(vf t) {
    __m512i interval = _mm512_cvttps_epi32(t * (1 / kTailStep));
    vf d = fma(_mm512_cvtepi32_ps(interval), broadcast(-kTailStep), t) - kTailStep / 2;
    vf p = {};
#pragma GCC unroll 5
    for (int i = 0; i < 5; ++i) {
        vf c = _mm512_permutex2var_ps(load(kTail[i]), interval, load(kTail[i] + 16));
        p = i ? fma(p, d, c) : c;
    }
    return t < 32 * kTailStep ? p : vf{};
}
#else
// exp(-t^2 / 2) * s * p(s) with s = 1 / (1 + t / 4): a minimax fit of Mills' ratio, which is smooth in s for all t.
SERVD_INLINE vf normal_tail(vf t) {
    vf s = 1.f / fma(t, broadcast(0.25f), broadcast(1.f));
    vf p = broadcast(2.0382587e-2f);
    p = fma(p, s, broadcast(-8.3539479e-2f));
    p = fma(p, s, broadcast(1.0054114e-1f));
    p = fma(p, s, broadcast(-3.6714198e-2f));
    p = fma(p, s, broadcast(6.6686865e-2f));
    p = fma(p, s, broadcast(5.7898642e-2f));
    p = fma(p, s, broadcast(8.1831062e-2f));
    p = fma(p, s, broadcast(9.3439970e-2f));
    p = fma(p, s, broadcast(9.9737865e-2f));
    p = fma(p, s, broadcast(9.9735541e-2f));
    return vexp(t * t * -0.5f) * s * p;
}
#endif

}  // namespace SERVD_ISA
