// Per-element and per-sample maths of the diffusion family. Compiled without contraction.
#pragma once
#include <math.h>

#include "api/diffusion.h"
#include "math/sampling.h"

namespace genfast {

// ---- the step ---------------------------------------------------------------------------------

// Factor of z for a learned variance v (Nichol & Dhariwal 2021, eq. 15).
template <class F>
GENFAST_FN F std_learned_range(F v, F logvar_min, F logvar_max) {
  const F f = (v + 1.0f) * 0.5f;
  return exp_of<F>((f * logvar_max + (1.0f - f) * logvar_min) * 0.5f);
}
template <class F>
GENFAST_FN F std_learned(F v) {  // a variance below 0 counts as 0
  return square_root(maximum(F{}, v));
}

// ---- training ---------------------------------------------------------------------------------

// What the model should have said, from x0 and eps.
template <class F>
GENFAST_FN F loss_target(Prediction prediction, F x0, F eps, F alpha, F sigma) {
  switch (prediction) {
    case Prediction::epsilon:
      return eps;
    case Prediction::sample:
      return x0;
    case Prediction::v:
      return alpha * eps - sigma * x0;
    default:
      return eps - x0;
  }
}

// Weight of one sample; the list and the sources stand in genfast/reference/diffusion.py.
GENFAST_FN double loss_weight(Weighting weighting, Prediction prediction, double alpha,
                              double sigma, double gamma, double k) {
  const double ratio = alpha / sigma, snr = ratio * ratio;
  switch (weighting) {
    case Weighting::min_snr: {
      const double least = snr > gamma ? gamma : snr;  // NaN stays
      switch (prediction) {
        case Prediction::epsilon:
          return snr == 0 ? 1.0 : least / snr;  // the limit at zero terminal SNR
        case Prediction::sample:
          return least;
        case Prediction::v:
          return least / (snr + 1);
        default:
          return least * (sigma * sigma);
      }
    }
    case Weighting::p2:
      return pow(k + snr, -gamma);
    case Weighting::snr:
      return snr;
    case Weighting::sigma_sqrt:
      return 1 / (sigma * sigma);
    case Weighting::cosmap:
      return 2 / (3.14159265358979323846 * ((1 - 2 * sigma) + 2 * (sigma * sigma)));
    case Weighting::edm:
      return 1 / (sigma * sigma) + 4.0;
    default:
      return 1;
  }
}

// ---- guidance ---------------------------------------------------------------------------------

struct GuidanceSums {  // over one sample: sums of c, u and of their products; n elements
  double c = 0, u = 0, cc = 0, uu = 0, cu = 0;
};

// The guided output is w[0] cond + w[1] uncond + w[2] average. Formulas and papers:
// genfast/reference/diffusion.py. `average` replaces cond - uncond; its sums come as `u`.
GENFAST_FN void guidance_weights(Guidance method, const GuidanceSums& s, double n, double scale,
                                 bool original, const double* option, bool has_average, double* w) {
  w[0] = original ? 1 + scale : scale;
  w[1] = original ? -scale : 1 - scale;
  w[2] = 0;
  switch (method) {
    case Guidance::cfg:
      return;
    case Guidance::rescale: {
      const double var_c = s.cc - s.c * s.c / n, var_u = s.uu - s.u * s.u / n;
      const double cov = s.cu - s.c * s.u / n;
      const double var_g = (w[0] * w[0] * var_c + w[1] * w[1] * var_u) + 2 * w[0] * w[1] * cov;
      // rounding leaves less of an output that is the same everywhere, which stays as it is
      const double least = 1e-13 * (w[0] * w[0] * s.cc + w[1] * w[1] * s.uu);
      const double ratio = var_g <= least ? 1 : sqrt((var_c < 0 ? 0 : var_c) / var_g);
      const double factor = option[0] * ratio + (1 - option[0]);
      w[0] *= factor;
      w[1] *= factor;
      return;
    }
    case Guidance::cfg_zero_star:
      w[1] *= s.cu / (s.uu + 1e-8);
      return;
    case Guidance::apg: {
      // d = average, or c - u: its norm and its product with c
      const double dd = has_average ? s.uu : (s.cc + s.uu) - 2 * s.cu;
      const double dc = has_average ? s.cu : s.cc - s.cu;
      double shrink = 1;
      if (option[1] > 0) {
        const double ratio = option[1] / sqrt(dd > 0 ? dd : 0.0);
        shrink = ratio < 1 ? ratio : 1;
      }
      // the part of c that is taken away; none of a c that is all zero
      const double along = (1 - option[0]) * shrink * dc / (s.cc > 0 ? s.cc : 1.0);
      w[0] = (original ? 1 : 0) - scale * along;
      w[1] = original ? 0 : 1;
      w[has_average ? 2 : 0] += scale * shrink;
      if (!has_average) w[1] -= scale * shrink;
      return;
    }
    case Guidance::mag: {
      const double dd = (s.cc + s.uu) - 2 * s.cu;
      const double damp = dd <= 0 ? 1 : exp(-option[0] * sqrt(dd) / sqrt(s.uu));
      const double damped = original ? scale * damp : 1 + (scale - 1) * damp;
      w[0] = original ? 1 + damped : damped;
      w[1] = original ? -damped : 1 - damped;
      return;
    }
    case Guidance::tcfg: {
      // First right singular vector p c + q u of [c; u], from the 2 x 2 Gram matrix.
      const double half = (s.cc - s.uu) / 2;
      const double top = (s.cc + s.uu) / 2 + sqrt(half * half + s.cu * s.cu);
      const bool first = s.cc >= s.uu;  // two forms of it; one is not close to zero
      const double p = first ? top - s.uu : s.cu, q = first ? s.cu : top - s.cc;
      const double vv = (p * p * s.cc + q * q * s.uu) + 2 * p * q * s.cu;
      // vv = 0: orthogonal of one length, c itself is such a vector; or both are zero
      const double r = (p * s.cu + q * s.uu) / (vv > 0 ? vv : 1.0);
      w[0] += w[1] * r * p;
      w[1] *= r * q;
      return;
    }
  }
}

}  // namespace genfast
