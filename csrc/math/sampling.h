// Per-element maths of reparameterized sampling. Compiled without contraction, like math/rng.h.
#pragma once
#include "math/gelu.h"
#include "math/rng.h"

namespace genfast {

// e^x for every x: error <= 1 ulp on normal results; gradual underflow, inf above 88.72, NaN
// stays NaN.
template <class F>
GENFAST_FN F exp_of(F x) {
  const F c = maximum(minimum(x, F{} + 89.0f), F{} - 104.0f);
  const F n = (c * 1.44269504f + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: round to nearest
  const F r = (c - n * 0.693359375f) - n * -2.12194440e-4f;
  F q = 0.001381459878757596f * r + 0.008368716575205326f;
  q = q * r + 0.04166838899254799f;
  q = q * r + 0.1666652113199234f;
  q = q * r + 0.4999999403953552f;
  const F y = (q * (r * r) + r) + 1.0f;
  return select(x == x, scale_by_power(y, n), x);
}

template <class F>
GENFAST_FN F sigmoid_of(F x) {  // 1 / (1 + e^-x), error <= 2.5 ulp for x > -80; 0 below -88.7
  return 1.0f / (1.0f + exp_of<F>(-x));
}

// tanh x = (1 - e) / (1 + e), e = e^-2|x|; a series below 0.25, where 1 - e would cancel
// (relative error of x - x^3/3 + 2x^5/15 - 17x^7/315 + 62x^9/2835 there: 3e-9). Error <= 0.7 ulp
// in the series, 2.5 ulp above it.
template <class F>
GENFAST_FN F tanh_of(F x) {
  const F a = select(x < 0.0f, -x, x), e = exp_of<F>(a * -2.0f), t = x * x;
  const F big = (1.0f - e) / (1.0f + e);
  F s = 0.021869488536155203f * t + -0.05396825396825397f;
  s = s * t + 0.13333333333333333f;
  s = s * t + -0.3333333333333333f;
  const F small = (s * t) * x + x;
  return select(a < 0.25f, small, select(x < 0.0f, -big, big));
}

// ln(1 + e^x) = max(x, 0) + log1p(e^-|x|), with log1p by -ln(1 - v) at v = -e is out of range, so
// through ln(1 + e): absolute error 6e-8, enough beside a sum of terms of order one.
template <class F>
GENFAST_FN F softplus_of(F x) {
  const F e = exp_of<F>(select(x < 0.0f, x, -x));
  return maximum(x, F{}) + log_positive<F>(1.0f + e);
}

// ln(1 + e^l) - x l, the -ln p(x | l) of a likelihood: no noise, so it may fuse and need not be the
// same bits everywhere. max(l, 0) - x l is one product, so that l = inf, x = 0 is no inf - 0 inf.
// The rest is ln(1 + e) = 2 artanh(e / (2 + e)) by its odd series, the next term of which is 1e-8
// at e = 1: absolute error <= 2e-7.
template <class F>
GENFAST_FN F bernoulli_nll(F l, F x) {
  const F e = exp2_nonpositive<F>(minimum(l, -l) * kLog2e), s = e * reciprocal(2.0f + e), t = s * s;
  F p = fused_multiply_add(F{} + 0.15384615384615385f, t, F{} + 0.18181818181818182f);
  p = fused_multiply_add(p, t, F{} + 0.2222222222222222f);
  p = fused_multiply_add(p, t, F{} + 0.2857142857142857f);
  p = fused_multiply_add(p, t, F{} + 0.4f);
  p = fused_multiply_add(p, t, F{} + 0.6666666666666666f);
  p = fused_multiply_add(p, t, F{} + 2.0f);
  return fused_multiply_add(s, p, (select(l > 0.0f, F{} + 1.0f, F{}) - x) * l);
}

// z = mu + sigma eps with sigma = e^(logvar / 2).
template <class F>
struct Draw {
  F sigma, z;
};
template <class F>
GENFAST_FN Draw<F> draw(F mu, F logvar, F eps) {
  const F sigma = exp_of<F>(logvar * 0.5f);
  return {sigma, mu + sigma * eps};
}

// KL(N(mu, sigma^2) || N(0, 1)) of one element.
template <class F>
GENFAST_FN F gaussian_kl(F mu, F logvar, F sigma) {
  return (((mu * mu - 1.0f) + sigma * sigma) - logvar) * 0.5f;
}

// How y = T(z) enters values, the log-density and the gradient.
struct NoneTransform {
  template <class F>
  GENFAST_FN F value(F z) {
    return z;
  }
  template <class F>
  GENFAST_FN F log_slope(F, F) {  // ln T'(z)
    return F{};
  }
  template <class F>
  GENFAST_FN F slope(F) {  // T'(z) of y
    return F{} + 1.0f;
  }
  template <class F>
  GENFAST_FN F log_slope_gradient(F) {  // d ln T'(z) / dz of y
    return F{};
  }
};
struct TanhTransform {  // ln(1 - tanh^2 z) = 2 (ln 2 - z - softplus(-2 z)), no cancellation
  template <class F>
  GENFAST_FN F value(F z) {
    return tanh_of<F>(z);
  }
  template <class F>
  GENFAST_FN F log_slope(F z, F) {
    return ((0.6931471805599453f - z) - softplus_of<F>(z * -2.0f)) * 2.0f;
  }
  template <class F>
  GENFAST_FN F slope(F y) {
    return 1.0f - y * y;
  }
  template <class F>
  GENFAST_FN F log_slope_gradient(F y) {
    return y * -2.0f;
  }
};
struct ExpTransform {
  template <class F>
  GENFAST_FN F value(F z) {
    return exp_of<F>(z);
  }
  template <class F>
  GENFAST_FN F log_slope(F z, F) {
    return z;
  }
  template <class F>
  GENFAST_FN F slope(F y) {
    return y;
  }
  template <class F>
  GENFAST_FN F log_slope_gradient(F) {
    return F{} + 1.0f;
  }
};

// ln q(y) of one element: -(eps^2 + logvar + ln 2 pi) / 2 - ln T'(z).
template <class F>
GENFAST_FN F log_density(F eps, F logvar, F log_slope) {
  return ((eps * eps + logvar) + 1.8378770664093453f) * -0.5f - log_slope;
}

}  // namespace genfast
