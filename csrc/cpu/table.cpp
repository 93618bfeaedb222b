#include "cpu/kernels.h"

namespace genfast::cpu::GENFAST_ISA {

const Kernels& table() {
  static const Kernels kernels = {
      random,
      reparameterize,
      reparameterize_backward,
      gumbel_softmax,
      gumbel_softmax_backward,
      relaxed_bernoulli,
      categorical,
      bernoulli_nll,
      bernoulli_nll_backward,
      diffusion_step,
      diffusion_step_backward,
      diffusion_mix,
      guidance_weights,
      dynamic_threshold,
      denoising_loss,
      attention_forward,
      attention_backward,
      attention_append,
      bias_act,
      bias_act_backward,
      gated_act,
      gated_act_backward,
      upfirdn2d,
      normalize,
      normalize_backward,
      convolution,
      convolution_weight,
      linear,
      linear_weight,
      fma_limit,
      read_limit,
  };
  return kernels;
}

}  // namespace genfast::cpu::GENFAST_ISA
