// Per-element maths of the filtering family: activations and their slopes. Compiled without
// contraction, like math/rng.h.
#pragma once
#include "api/filtering.h"
#include "math/gelu.h"
#include "math/sampling.h"

namespace genfast {

// e^x - 1 for x <= 0: a series above -0.5, where the difference would cancel (the next term is
// 5e-10 of the sum there). Error <= 1.5 ulp in the series, 2 ulp below it.
template <class F>
GENFAST_FN F expm1_of(F x) {
  F s = 2.7557319224e-06f * x + 2.4801587302e-05f;
  s = s * x + 1.9841269841e-04f;
  s = s * x + 1.3888888889e-03f;
  s = s * x + 8.3333333333e-03f;
  s = s * x + 4.1666666667e-02f;
  s = s * x + 1.6666666667e-01f;
  s = s * x + 0.5f;
  return select(x > -0.5f, (s * x) * x + x, exp_of<F>(x) - 1.0f);
}

// ln(1 + e) for e in [0, 1]: as a logarithm of parts while 1 + e would round the small e away.
template <class F>
GENFAST_FN F log1p_of(F e) {
  return select(e < 0.41f, log_of_parts<F>(F{}, e), log_positive<F>(e + 1.0f));
}

template <class F>
GENFAST_FN F rectified(F z, F below) {  // z above 0, else `below`; NaN takes `below`
  return select(z > 0.0f, z, below);
}

// value(z) and slope(z) = value'(z). alpha: the slope of lrelu below 0.
struct LinearActivation {
  template <class F>
  GENFAST_FN F value(F z, float) {
    return z;
  }
  template <class F>
  GENFAST_FN F slope(F, float) {
    return F{} + 1.0f;
  }
};
struct ReluActivation {
  template <class F>
  GENFAST_FN F value(F z, float) {
    return select(z < 0.0f, F{}, z);
  }
  template <class F>
  GENFAST_FN F slope(F z, float) {  // 1 of NaN, as PyTorch's
    return select(z <= 0.0f, F{}, F{} + 1.0f);
  }
};
struct LreluActivation {
  template <class F>
  GENFAST_FN F value(F z, float alpha) {
    return rectified<F>(z, z * alpha);
  }
  template <class F>
  GENFAST_FN F slope(F z, float alpha) {
    return select(z > 0.0f, F{} + 1.0f, F{} + alpha);
  }
};
struct TanhActivation {
  template <class F>
  GENFAST_FN F value(F z, float) {
    return tanh_of<F>(z);
  }
  template <class F>
  GENFAST_FN F slope(F z, float) {
    const F t = tanh_of<F>(z);
    return 1.0f - t * t;
  }
};
struct SigmoidActivation {
  template <class F>
  GENFAST_FN F value(F z, float) {
    return sigmoid_of<F>(z);
  }
  template <class F>
  GENFAST_FN F slope(F z, float) {
    const F s = sigmoid_of<F>(z);
    return s * (1.0f - s);
  }
};
struct EluActivation {  // Clevert et al. 2016
  template <class F>
  GENFAST_FN F value(F z, float) {
    return rectified<F>(z, expm1_of<F>(z));
  }
  template <class F>
  GENFAST_FN F slope(F z, float) {
    return select(z > 0.0f, F{} + 1.0f, exp_of<F>(z));
  }
};
struct SeluActivation {  // Klambauer et al. 2017: lambda, and lambda alpha
  static constexpr float kScale = 1.0507009873554805f, kScaledAlpha = 1.7580993408473766f;
  template <class F>
  GENFAST_FN F value(F z, float) {
    return select(z > 0.0f, z * kScale, expm1_of<F>(z) * kScaledAlpha);
  }
  template <class F>
  GENFAST_FN F slope(F z, float) {
    return select(z > 0.0f, F{} + kScale, exp_of<F>(z) * kScaledAlpha);
  }
};
struct SoftplusActivation {  // max(z, 0) + ln(1 + e^-|z|)
  template <class F>
  GENFAST_FN F value(F z, float) {
    return rectified<F>(z, select(z == z, F{}, z)) +
           log1p_of<F>(exp_of<F>(select(z < 0.0f, z, -z)));
  }
  template <class F>
  GENFAST_FN F slope(F z, float) {
    return sigmoid_of<F>(z);
  }
};
struct SwishActivation {  // Ramachandran et al. 2017
  template <class F>
  GENFAST_FN F value(F z, float) {
    return z * sigmoid_of<F>(z);
  }
  template <class F>
  GENFAST_FN F slope(F z, float) {
    const F s = sigmoid_of<F>(z);
    return s * (z * (1.0f - s) + 1.0f);
  }
};

template <class Of>
struct WithoutAlpha {
  template <class F>
  GENFAST_FN F value(F z, float) {
    return Of::value(z);
  }
  template <class F>
  GENFAST_FN F slope(F z, float) {
    return Of::slope(z);
  }
};

// The struct of an enum value, handed to fn.
template <class Fn>
GENFAST_FN void with_activation(Activation act, Fn&& fn) {
  switch (act) {
    case Activation::linear:
      return fn(LinearActivation{});
    case Activation::relu:
      return fn(ReluActivation{});
    case Activation::lrelu:
      return fn(LreluActivation{});
    case Activation::tanh:
      return fn(TanhActivation{});
    case Activation::sigmoid:
      return fn(SigmoidActivation{});
    case Activation::elu:
      return fn(EluActivation{});
    case Activation::selu:
      return fn(SeluActivation{});
    case Activation::softplus:
      return fn(SoftplusActivation{});
    case Activation::swish:
      return fn(SwishActivation{});
    case Activation::gelu:
      return fn(WithoutAlpha<Gelu>{});
    case Activation::gelu_tanh:
      return fn(WithoutAlpha<GeluTanh>{});
  }
}

}  // namespace genfast
