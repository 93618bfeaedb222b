// Per-element maths of the normalization family: activations and their slopes. Compiled with fused
// multiply-adds.
#pragma once
#include "api/normalization.h"
#include "math/gelu.h"

namespace genfast {

// value(z), slope(z) = value'(z), like those of math/gelu.h.
struct NoActivation {
  template <class F>
  GENFAST_FN F value(F z) {
    return z;
  }
  template <class F>
  GENFAST_FN F slope(F) {
    return F{} + 1.0f;
  }
};
struct SiluActivation {
  template <class F>
  GENFAST_FN F value(F z) {
    return z * logistic<F>(z).s;
  }
  template <class F>
  GENFAST_FN F slope(F z) {
    const auto l = logistic<F>(z);
    return l.s * (z * l.rest + 1.0f);
  }
};
// The struct of an enum value, handed to fn.
template <class Fn>
GENFAST_FN void with_activation(NormActivation act, Fn&& fn) {
  switch (act) {
    case NormActivation::linear:
      return fn(NoActivation{});
    case NormActivation::silu:
      return fn(SiluActivation{});
    case NormActivation::gelu:
      return fn(Gelu{});
    case NormActivation::gelu_tanh:
      return fn(GeluTanh{});
  }
}

}  // namespace genfast
