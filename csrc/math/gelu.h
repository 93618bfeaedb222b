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
// relative to it 3e-7 above z = 0. -z log2 e is cut where 2^x would overflow; from there on s is 0,
// as SiLU of -3e38 would be -3.5 otherwise.
template <class F>
struct Logistic {
  F s, rest;
};
template <class F>
GENFAST_FN Logistic<F> logistic(F z) {
  const F e = exp2_nonpositive<F>(minimum(F{} + 126.0f, z * -kLog2e));
  const F s = reciprocal(1.0f + e) - 0x1p-126f;
  return {s, e * s};
}

// P(N(0, 1) <= z) and e^(-z^2 / 2): absolute error <= 2e-7. Abramowitz & Stegun 7.1.26, which
// PyTorch's vectors have too; Cephes' pair of rational functions took 1.7 times as long.
template <class F>
struct Normality {
  F below, density;  // the density without its 1 / sqrt(2 pi)
};
template <class F>
GENFAST_FN Normality<F> normality(F z) {
  const F x = minimum(F{} + 30.0f, maximum(z, -z) * 0.70710678118654752f);  // 1 / inf is no normal
  const F e = exp2_nonpositive<F>(x * x * -kLog2e);
  const F t = reciprocal(x * 0.3275911f + 1.0f);
  F p = fused_multiply_add(F{} + 1.061405429f, t, F{} + -1.453152027f);
  p = fused_multiply_add(p, t, F{} + 1.421413741f);
  p = fused_multiply_add(p, t, F{} + -0.284496736f);
  p = fused_multiply_add(p, t, F{} + 0.254829592f);
  const F upper = p * t * e * 0.5f;  // P(N > |z|)
  return {select(z < 0.0f, upper, 1.0f - upper), e};
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
struct GeluTanh {  // their fast form: z / (1 + e^-2u), u = sqrt(2 / pi) (z + 0.044715 z^3)
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
