// sampling: reparameterized draws, the Gumbel family and token sampling.
#pragma once
#include "api/rng.h"

namespace genfast {

enum class Transform : uint8_t { none, tanh, exp };  // y = T(mu + sigma eps)
enum class Side : uint8_t { none, kl, log_prob };    // what is summed beside the draw

// y = T(mu + exp(logvar / 2) eps); side = side_scale * sum of the side term over each row.
struct ReparameterizeParams {
  TensorView mu, logvar;  // same shape S, f32/f16/bf16, any strides
  TensorView y;           // S; undefined: only the side sum is wanted
  TensorView side;        // f32 [rows]; undefined when side_kind is none
  TensorView scratch;     // CUDA: f64 [rows * parts], parts blocks sum a row; undefined: one block
  Noise noise;
  Transform transform = Transform::none;
  Side side_kind = Side::none;
  int64_t rows = 1;  // 1, or shape[0] for one sum per sample
  float side_scale = 1.0f;
  int threads = 1;
};

// Gradients of the above; eps is drawn again.
struct ReparameterizeBackwardParams {
  TensorView grad_y;                      // S or undefined
  TensorView grad_side;                   // f32 [rows] or undefined
  TensorView mu, logvar, d_mu, d_logvar;  // S
  Noise noise;
  Transform transform = Transform::none;
  Side side_kind = Side::none;
  int64_t rows = 1;
  float side_scale = 1.0f;
  int threads = 1;
};

// y = softmax((logits + g) / tau) over the last dimension, or its one-hot argmax.
struct GumbelSoftmaxParams {
  TensorView logits, y;  // [..., V]
  TensorView tau;        // f32, one element, here or on the CPU
  Noise noise;
  bool hard = false;
  int threads = 1;
};

// d_logits = y (grad - <grad, y>) / tau, with y given (soft) or drawn again from logits (hard).
struct GumbelSoftmaxBackwardParams {
  TensorView grad;    // [..., V]
  TensorView y;       // [..., V]: the soft sample; undefined: recompute from logits
  TensorView logits;  // [..., V]
  TensorView tau;
  TensorView d_logits;  // [..., V]
  Noise noise;
  int threads = 1;
};

// y = sigmoid((logits + logistic) / tau), or 1[y > 1/2]; backward as above.
struct RelaxedBernoulliParams {
  TensorView logits, y, tau;
  TensorView grad;  // backward only: d_logits is written to y
  Noise noise;
  bool hard = false, backward = false;
  int threads = 1;
};

// index = argmax(logits + g) over the last dimension; with filters: temperature, then top-k, top-p
// and min-p. Returns the number of rows without a finite maximum (their index is -1).
struct CategoricalParams {
  TensorView logits;                            // [..., V]
  TensorView index;                             // i64 [...]
  TensorView temperature, top_k, top_p, min_p;  // f32 / i64 / f32 / f32, [1] or [rows]; undefined
  Noise noise;
  int threads = 1;
};

// -ln p(x | logits) of a Bernoulli, summed over all but dim 0: softplus(l) - x l.
struct BernoulliNllParams {
  TensorView logits, x;      // [B, ...], one shape, any strides; f32/f16/bf16
  TensorView nll;            // f32 [B], contiguous: written by the forward
  TensorView scratch;        // CUDA forward: f64 [B * parts], parts blocks sum a sample; or one
  TensorView grad;           // backward only: f32 [B]
  TensorView d_logits, d_x;  // grad (sigmoid(l) - x) and -grad l, either or both; like logits
  int threads = 1;
};

namespace cuda {  // on the device and stream of the first tensor; null, or an error text
const char* reparameterize(const ReparameterizeParams& p);
const char* reparameterize_backward(const ReparameterizeBackwardParams& p);
const char* gumbel_softmax(const GumbelSoftmaxParams& p);
const char* gumbel_softmax_backward(const GumbelSoftmaxBackwardParams& p);
const char* relaxed_bernoulli(const RelaxedBernoulliParams& p);
const char* bernoulli_nll(const BernoulliNllParams& p);
const char* bernoulli_nll_backward(const BernoulliNllParams& p);
const char* categorical(const CategoricalParams& p);  // bad rows get index -1: nothing is counted
}  // namespace cuda

}  // namespace genfast
