// diffusion: one affine step for every solver, the forward process, guidance, thresholds, losses.
#pragma once
#include "api/rng.h"

namespace genfast {

// A row of a solver plan, fp32 (genfast/schedulers/plan.py has the layout in words):
// d_x d_m clip input_scale logvar_min logvar_max c_0[10] c_1[10] c_2[10].
constexpr int kRowColumns = 36, kRowCoefficients = 6;
constexpr int kSources = 10;  // x m x0 H1..H6 z
constexpr int kModels = 3, kHistory = 6, kOutputs = 3;
enum Source : int { kX = 0, kM = 1, kX0 = 2, kH1 = 3, kZ = 9 };

enum class Variance : uint8_t { fixed, learned_range, learned };

// m = sum_j w_j m_j; x0 = clamp(d_x x + d_m m, +-clip); out_i = c_i . [x m x0 H1..H6 z].
struct StepParams {
  TensorView x;                // S = (B, ...)
  TensorView models[kModels];  // S; at least the first
  TensorView weights;          // f32 [models] or [B, models]; undefined: one model, weight 1
  TensorView log_variance;     // S: second half of the model's channels; undefined: fixed
  TensorView table;            // f32 [R, 36], contiguous
  TensorView
      index;  // i64 contiguous, shape a prefix of S: (), (B), (B, T); undefined: `row` for all
  int64_t row = 0;
  TensorView history[kHistory];  // S, undefined where empty
  TensorView z;                  // S: given noise; undefined: drawn when `draws`
  Noise noise;
  bool draws = false;
  Variance variance = Variance::fixed;
  TensorView threshold;  // f32 [B]: x0 = clamp(x0, +-s) / s
  // out_0 = mask out_0 + (1 - mask) (level[0] known + level[1] known_z)
  TensorView mask, known, known_z;  // S (mask may be expanded)
  TensorView level;                 // f32 [2] or [B, 2]
  TensorView out[kOutputs];         // S; x's memory itself is allowed
  // Log-probability: out[0] is the sample; `sample` given: it is judged instead of drawn.
  TensorView sample;    // S
  TensorView log_prob;  // f32 [B]
  TensorView scratch;  // f64, CUDA: [B, parts] sums of blocks that share a sample; may be undefined
  int threads = 1;
};

// Gradients of the step (fixed variance): the transposed affine map, with the clamp's mask.
struct StepBackwardParams {
  TensorView grad[kOutputs];                                              // S, undefined: zero
  TensorView x, models[kModels], weights, table, index, threshold, mask;  // as in the forward
  int64_t row = 0;
  TensorView d_x, d_models[kModels], d_history[kHistory], d_z;  // S, undefined: not wanted
  int threads = 1;
};

// A coefficient of the forward process: one number, or one per group (a prefix of the shape).
struct Coefficient {
  double value = 0;
  const void* data = nullptr;  // f32 or f64 [groups] on the kernel's device
  bool wide = false;           // f64
};

// out = a_sign a p + b_sign b q. q: given, drawn, or absent (velocity: p = x0, a = -sigma).
struct MixParams {
  TensorView out, p, q;  // S
  Noise noise;
  bool draws = false;
  Coefficient a, b;
  int64_t groups = 1;  // product of the leading sizes that own a coefficient
  bool a_is_one_minus_b = false;
  float a_sign = 1.0f, b_sign = 1.0f;
  int threads = 1;
};

enum class Guidance : uint8_t { cfg, rescale, cfg_zero_star, apg, mag, tcfg };

// weights[b] of (cond, uncond[, average]) from the five per-sample sums.
struct GuidanceParams {
  TensorView cond, uncond, average;  // S; average only with apg
  TensorView scale;                  // f32 [1] or [B]
  TensorView weights;                // f32 [B, 2 or 3]
  Guidance method = Guidance::cfg;
  bool original = false;
  double option[2] = {0, 0};  // rescale: phi; apg: eta, norm threshold; mag: alpha
  TensorView scratch;         // f64, CUDA: [B, parts, 5]; may be undefined
  int threads = 1;
};

constexpr int64_t kThresholdRoom = 2064;  // numbers that the blocks of a sample share

// s[b] = clamp(quantile(|x0|, ratio), 1, max), x0 = clamp-free d_x x + d_m m, or x itself.
struct ThresholdParams {
  TensorView x, m;  // S; m undefined: x is x0
  TensorView s;     // f32 [B]
  TensorView table, index;
  int64_t row = 0;
  double ratio = 0.995, max = 1.0;
  TensorView scratch;  // f64, CUDA: [B, kThresholdRoom] of anything; undefined: a block per sample
  int threads = 1;
};

enum class Prediction : uint8_t { epsilon, sample, v, flow };
enum class Weighting : uint8_t { none, min_snr, p2, snr, sigma_sqrt, cosmap, edm, given };

// loss[b] = weight[b] mean_b (output - target)^2; total = sum_b loss[b] * total_scale.
struct LossParams {
  TensorView output, x0, z;  // S; z undefined: drawn
  Noise noise;
  Coefficient alpha, sigma, weight;  // [B] or a number; weight with Weighting::given
  bool flow_alpha = false;           // alpha = 1 - sigma
  Prediction prediction = Prediction::epsilon;
  Weighting weighting = Weighting::none;
  double gamma = 5, k = 1;
  TensorView per_sample;  // f32 [B]
  TensorView total;       // f32 [1] or undefined
  TensorView d_output;    // S: gradient of the total; with per_sample too: both in one pass
  TensorView grad;        // f32 [1] (of the total) or [B] (of per_sample); undefined: 1
  double total_scale = 1;
  TensorView scratch;  // f64, CUDA: [B, parts], at least [B] when `total` is wanted
  int threads = 1;
};

namespace cuda {  // on the device and stream of the first tensor; null, or an error text
const char* diffusion_step(const StepParams& p);
const char* diffusion_step_backward(const StepBackwardParams& p);
const char* diffusion_mix(const MixParams& p);
const char* guidance_weights(const GuidanceParams& p);
const char* dynamic_threshold(const ThresholdParams& p);
const char* denoising_loss(const LossParams& p);
}  // namespace cuda

}  // namespace genfast
