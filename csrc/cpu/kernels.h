// The CPU kernels of one ISA level, and the choice of the level.
#pragma once
#include "api/attention.h"
#include "api/convolution.h"
#include "api/diffusion.h"
#include "api/filtering.h"
#include "api/limits.h"
#include "api/linear.h"
#include "api/normalization.h"
#include "api/rng.h"
#include "api/sampling.h"

namespace genfast::cpu {

struct Kernels {
  void (*random)(const RandomParams&);
  void (*reparameterize)(const ReparameterizeParams&);
  void (*reparameterize_backward)(const ReparameterizeBackwardParams&);
  void (*gumbel_softmax)(const GumbelSoftmaxParams&);
  void (*gumbel_softmax_backward)(const GumbelSoftmaxBackwardParams&);
  void (*relaxed_bernoulli)(const RelaxedBernoulliParams&);
  int64_t (*categorical)(const CategoricalParams&);
  void (*bernoulli_nll)(const BernoulliNllParams&);
  void (*bernoulli_nll_backward)(const BernoulliNllParams&);
  void (*diffusion_step)(const StepParams&);
  void (*diffusion_step_backward)(const StepBackwardParams&);
  void (*diffusion_mix)(const MixParams&);
  void (*guidance_weights)(const GuidanceParams&);
  void (*dynamic_threshold)(const ThresholdParams&);
  void (*denoising_loss)(const LossParams&);
  void (*attention_forward)(const AttentionParams&);
  void (*attention_backward)(const AttentionGradParams&);
  void (*attention_append)(const AttentionAppendParams&);
  void (*bias_act)(const BiasActParams&);
  void (*bias_act_backward)(const BiasActBackwardParams&);
  void (*gated_act)(const GatedActParams&);
  void (*gated_act_backward)(const GatedActBackwardParams&);
  void (*upfirdn2d)(const UpfirdnParams&);
  void (*normalize)(const NormalizeParams&);
  void (*normalize_backward)(const NormalizeBackwardParams&);
  void (*convolution)(const ConvolutionParams&);
  void (*convolution_weight)(const ConvolutionWeightParams&);
  void (*linear)(const LinearParams&);
  void (*linear_weight)(const LinearWeightParams&);
  double (*fma_limit)(const LimitParams&);
  double (*read_limit)(const LimitParams&);
};

// The best level this processor runs, or the one that GENFAST_ISA names; fixed at the first call.
const Kernels& kernels();
const char* isa_name();
// Levels built into the binary that this processor runs, best first; null-terminated.
const char* const* isa_usable();

}  // namespace genfast::cpu

namespace genfast::cpu::v4 {
const Kernels& table();  // levels amx and bf16 stand on it
}

// Every kernel file is compiled once per level with GENFAST_ISA = base, v3 or v4.
#if defined(GENFAST_ISA)
namespace genfast::cpu::GENFAST_ISA {
void random(const RandomParams&);
void reparameterize(const ReparameterizeParams&);
void reparameterize_backward(const ReparameterizeBackwardParams&);
void gumbel_softmax(const GumbelSoftmaxParams&);
void gumbel_softmax_backward(const GumbelSoftmaxBackwardParams&);
void relaxed_bernoulli(const RelaxedBernoulliParams&);
int64_t categorical(const CategoricalParams&);
void bernoulli_nll(const BernoulliNllParams&);
void bernoulli_nll_backward(const BernoulliNllParams&);
void diffusion_step(const StepParams&);
void diffusion_step_backward(const StepBackwardParams&);
void diffusion_mix(const MixParams&);
void guidance_weights(const GuidanceParams&);
void dynamic_threshold(const ThresholdParams&);
void denoising_loss(const LossParams&);
void attention_forward(const AttentionParams&);
void attention_backward(const AttentionGradParams&);
void attention_append(const AttentionAppendParams&);
void bias_act(const BiasActParams&);
void bias_act_backward(const BiasActBackwardParams&);
void gated_act(const GatedActParams&);
void gated_act_backward(const GatedActBackwardParams&);
void upfirdn2d(const UpfirdnParams&);
void normalize(const NormalizeParams&);
void normalize_backward(const NormalizeBackwardParams&);
void convolution(const ConvolutionParams&);
void convolution_weight(const ConvolutionWeightParams&);
void linear(const LinearParams&);
void linear_weight(const LinearWeightParams&);
double fma_limit(const LimitParams&);
double read_limit(const LimitParams&);
const Kernels& table();
}  // namespace genfast::cpu::GENFAST_ISA
#endif
