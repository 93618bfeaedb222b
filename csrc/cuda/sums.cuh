// Sums per sample over the walk of groups, in double: blocks sum parts, a warp adds the parts in
// order. The number of parts comes with the scratch and depends on the shape alone, so a result
// never depends on the GPU.
#pragma once
#include "cuda/noise.cuh"
#include "cuda/team.cuh"

namespace genfast::cuda {

struct SumPlan {
  void* partial = nullptr;  // Op::Sum [samples, parts]; null: nothing is summed over parts
  int64_t samples = 0, parts = 1;
  int64_t rows_per_sample = 1;  // rows of the walk in one sample
};

struct Nothing {};

// Op: groups; Sum; sum(group, sample, prepared) -> Sum; finish(sample, Sum) by one thread, and
// Prepared prepare(sample), once per block.
template <class Op>
__global__ void __launch_bounds__(kThreads, 2)
    sample_sums(const __grid_constant__ Op op, const __grid_constant__ SumPlan plan) {
  using Sum = typename Op::Sum;
  const int64_t sample = blockIdx.x / plan.parts, part = blockIdx.x - sample * plan.parts;
  const int64_t groups = plan.rows_per_sample * op.groups.per_row;
  GENFAST_SHARED(typename Op::Prepared, prepared);
  if (threadIdx.x == 0) prepared = op.prepare(sample);
  __syncthreads();
  Sum total{};
  for (int64_t t = part * kThreads + threadIdx.x; t < groups; t += plan.parts * kThreads) {
    const int64_t inner = plan.rows_per_sample == 1 ? 0 : t / op.groups.per_row;
    const Group g(op.groups, sample * plan.rows_per_sample + inner, t - inner * op.groups.per_row);
    if (!g.empty()) total += op.sum(g, sample, prepared);
  }
  total = BlockTeam().reduce(total, Add());
  if (threadIdx.x != 0) return;
  if (plan.parts == 1)
    op.finish(sample, total);
  else if (plan.partial != nullptr)
    static_cast<Sum*>(plan.partial)[blockIdx.x] = total;
}

template <class Op>
__global__ void __launch_bounds__(kThreads, 2)
    finish_sums(const __grid_constant__ Op op, const __grid_constant__ SumPlan plan) {
  using Sum = typename Op::Sum;
  const int64_t sample = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (sample >= plan.samples) return;  // a whole warp
  const Sum* partial = static_cast<const Sum*>(plan.partial) + sample * plan.parts;
  Sum total{};
  for (int64_t i = threadIdx.x % 32; i < plan.parts; i += 32) total += partial[i];
  total = reduce_warp(total, Add());
  if (threadIdx.x % 32 == 0) op.finish(sample, total);
}

template <class Op>
const char* launch_samples(const Op& op, const SumPlan& plan, const TensorView& on) {
  return launch(sample_sums<Op>, dim3(static_cast<unsigned>(plan.samples * plan.parts)),
                dim3(kThreads), 0, on, op, plan);
}

// scratch: f64, room for samples * parts sums; without it a block takes a whole sample.
template <class Op>
const char* launch_sums(const Op& op, int64_t samples, const TensorView& scratch,
                        const TensorView& on) {
  if (samples == 0) return nullptr;
  SumPlan plan{scratch.data, samples, 1, op.groups.rows / samples};
  constexpr int64_t kDoubles = sizeof(typename Op::Sum) / sizeof(double);
  if (scratch.defined() && scratch.numel >= samples * kDoubles)
    plan.parts = scratch.numel / (samples * kDoubles);
  const char* error = launch_samples(op, plan, on);
  if (error != nullptr || plan.parts == 1) return error;
  return launch(finish_sums<Op>, blocks_for(samples, kThreads / 32), dim3(kThreads), 0, on, op,
                plan);
}

}  // namespace genfast::cuda
