// GELU (Hendrycks & Gimpel 2016) and the logistic function, for the families that have activations.
// Built with fused multiply-adds or without.
#pragma once
#include "math/exp2.h"

namespace genfast {

#if GENFAST_VECTOR_LANES && defined(__AVX512F__)
// 1 / x for normal x: relative error <= 1e-7. A division of 16 lanes takes 16 cycles, which was
// half of a group norm with SiLU.
GENFAST_FN f32v reciprocal(f32v x) {
  const f32v y = (f32v)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)x);
  return y * fused_multiply_add(-x, y, splat(2.0f));
}
#endif
template <class F>
GENFAST_FN F reciprocal(F x) {
  return 1.0f / x;
}

// s = 1 / (1 + e^-z) and 1 - s without its cancellation: absolute error <= 1.5e-7, of the second
// relative to it 3e-7 above z = 0. -z log2 e is cut where 2^x would overflow.
template <class F>
struct Logistic {
  F s, rest;
};
template <class F>
GENFAST_FN Logistic<F> logistic(F z) {
  const F e = exp2_nonpositive<F>(minimum(F{} + 126.0f, z * -kLog2e)), s = reciprocal(1.0f + e);
  return {s, e * s};
}

// P(N(0, 1) <= z) and e^(-z^2 / 2): absolute error <= 2e-7. Cephes' erff and erfcf of |z| / sqrt 2.
template <class F>
struct Normality {
  F below, density;  // the density without its 1 / sqrt(2 pi)
};
template <class F>
GENFAST_FN F polynomial(F, float c) {
  return F{} + c;
}
template <class F, class... More>
GENFAST_FN F polynomial(F x, float c, More... more) {  // c + x (...)
  return fused_multiply_add(polynomial<F>(x, more...), x, F{} + c);
}
template <class F>
GENFAST_FN Normality<F> normality(F z) {
  const F x = maximum(z, -z) * 0.70710678118654752f, t = x * x;
  const F e = exp2_nonpositive<F>(t * -kLog2e), q = reciprocal(maximum(x, F{} + 1.0f)), s = q * q;
  const F erf =
      x * polynomial<F>(t, 1.128379165726710f, -3.761262582423300e-1f, 1.128358514861418e-1f,
                        -2.685381193529856e-2f, 5.188327685732524e-3f, -8.010193625184903e-4f,
                        7.853861353153693e-5f);
  const F near =
      polynomial<F>(s, 5.638259427386472e-1f, -2.741127028184656e-1f, 3.404879937665872e-1f,
                    -4.944515323274145e-1f, 6.210004621745983e-1f, -5.824733027278666e-1f,
                    3.687424674597105e-1f, -1.387039388740657e-1f, 2.326819970068386e-2f);
  const F far = polynomial<F>(s, 5.641895067754075e-1f, -2.820767439740514e-1f,
                              4.218463358204948e-1f, -1.015265279202700f, 2.921019019210786f,
                              -7.495518717768503f, 1.297719955372516e+1f, -1.047766399936249e+1f);
  const F rest = e * q * select(x < 2.0f, near, far);                // 1 - erf
  const F upper = select(x < 1.0f, 0.5f - erf * 0.5f, rest * 0.5f);  // P(N > |z|)
  return {select(z < 0.0f, upper, 1.0f - upper), select(z == z, e, z)};
}

// value(z), slope(z) = value'(z).
struct Gelu {
  template <class F>
  GENFAST_FN F value(F z) {
    return z * normality<F>(z).below;
  }
  template <class F>
  GENFAST_FN F slope(F z) {
    const auto n = normality<F>(z);
    return n.below + z * (n.density * 0.39894228040143268f);
  }
};
struct GeluTanh {  // their fast form: z / (1 + e^-2u), u = sqrt(2 / pi) (z + 0.044715
                   // z^3)
  static constexpr float kTwice = 1.5957691216057308f, kCube = 0.044715f;
  template <class F>
  GENFAST_FN F value(F z) {
    return z * logistic<F>(z * kTwice * (z * z * kCube + 1.0f)).s;
  }
  template <class F>
  GENFAST_FN F slope(F z) {
    const F t = z * z;
    const auto l = logistic<F>(z * kTwice * (t * kCube + 1.0f));
    return l.s * (z * l.rest * (kTwice * (t * (3.0f * kCube) + 1.0f)) + 1.0f);
  }
};

}  // namespace genfast
