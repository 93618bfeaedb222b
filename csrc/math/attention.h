// Per-element maths of attention, over a lane type, and which keys a query sees. Scores are kept in
// units of log2: the softmax needs 2^x only, and scale * log2(e) goes into the scores.
#pragma once
#include "api/attention.h"
#include "math/exp2.h"

namespace genfast {

// tanh x: absolute error <= 1.2e-7, relative error <= 3e-7 (small x by the odd series of Cephes'
// tanhf, because 1 - e^-2x cancels there).
template <class F>
GENFAST_FN F tanh_of(F x) {
  const F a = maximum(x, F{} - x);
  const F t = exp2_nonpositive<F>(a * (-2.0f * kLog2e));
  const F big = (1.0f - t) / (1.0f + t);
  const F z = x * x;
  F p = fused_multiply_add(F{} + -5.70498872745e-3f, z, F{} + 2.06390887954e-2f);
  p = fused_multiply_add(p, z, F{} + -5.37397155531e-2f);
  p = fused_multiply_add(p, z, F{} + 1.33314422036e-1f);
  p = fused_multiply_add(p, z, F{} + -3.33332819422e-1f);
  const F small = fused_multiply_add(p * z, x, x);
  return select(a < 0.625f, small, select(x < 0.0f, F{} - big, big));
}

// cap * tanh(s / cap), and its derivative by s.
template <class F>
GENFAST_FN F softcap(F s, float cap, float inv_cap, F& derivative) {
  const F t = tanh_of<F>(s * inv_cap);
  derivative = 1.0f - t * t;
  return t * cap;
}

// ---- sequences --------------------------------------------------------------------------------

struct Sequence {
  int64_t b = 0;
  int64_t Sq = 0, Sk = 0;  // of this sequence
  int64_t offset = 0;      // of the diagonal
  int64_t q_row = 0, k_row = 0;
  int64_t entry = 0;  // batch index of k and v
};

GENFAST_FN Sequence sequence_of(const AttentionParams& p, int64_t b) {
  Sequence s;
  s.b = b;
  s.Sq = p.Sq;
  s.Sk = p.Sk;
  s.entry = p.cache_batch_idx != nullptr ? p.cache_batch_idx[b] : b;
  if (p.cu_seqlens_q != nullptr) {
    s.q_row = p.cu_seqlens_q[b];
    s.Sq = p.cu_seqlens_q[b + 1] - s.q_row;
  }
  if (p.cu_seqlens_k != nullptr) {
    s.k_row = p.cu_seqlens_k[b];
    s.Sk = p.cu_seqlens_k[b + 1] - s.k_row;
  }
  if (p.seqlens_k != nullptr) s.Sk = p.seqlens_k[b] + p.added_k;
  if (p.leftpad_k != nullptr) {
    s.k_row += p.leftpad_k[b];
    s.Sk -= p.leftpad_k[b];
  }
  if (s.Sk < 0) s.Sk = 0;
  s.offset = p.bottom_right ? s.Sk - s.Sq : 0;
  return s;
}

struct KeyRange {
  int64_t lo, hi;
};

GENFAST_FN KeyRange visible_keys(const AttentionParams& p, const Sequence& s, int64_t i) {
  const int64_t at = i + s.offset;
  KeyRange r{0, s.Sk};
  if (p.window_left >= 0 && at - p.window_left > 0) r.lo = at - p.window_left;
  if (p.window_right >= 0 && at + p.window_right + 1 < s.Sk) r.hi = at + p.window_right + 1;
  if (r.lo > s.Sk) r.lo = s.Sk;
  if (r.hi < r.lo) r.hi = r.lo;
  return r;
}

}  // namespace genfast
