// limits on the CPU: chains of fused multiply-adds that fill every unit, and one pass over memory.
#include <atomic>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "math/lane.h"

namespace genfast::cpu::GENFAST_ISA {

// Runs `rounds` times kChains dependent FMAs on each thread; returns the operations of all (an FMA
// counts two).
double fma_limit(const LimitParams& p) {
  constexpr int kChains = 12;  // 2 units x 4 to 5 cycles of latency
  float kept[64] = {};
  const int threads = p.threads > 0 && p.threads < 64 ? p.threads : 1;
  parallel_for(threads, threads, [&](int64_t task) {
    f32v x[kChains];
    for (int i = 0; i < kChains; ++i) x[i] = splat(1.0f + static_cast<float>(i));
    const f32v a = splat(0.5f), b = splat(0.25f);
    for (int64_t round = 0; round < p.rounds; ++round)
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) x[i] = fused_multiply_add(x[i], a, b);
    for (int i = 0; i < kChains; ++i) kept[task] += x[i][0];
  });
  for (float v : kept)
    if (v != v) return 0;  // keeps the chains from being optimised away
  return 2.0 * W * kChains * threads * static_cast<double>(p.rounds);
}

// Reads the tensor once, in runs of 2 MiB; returns the exclusive or of its words.
double read_limit(const LimitParams& p) {
  constexpr int64_t kRun = int64_t{2} << 20, kAhead = 4096;
  const int64_t bytes = p.data.numel * 4;
  const char* data = static_cast<const char*>(p.data.data);
  std::atomic<uint32_t> all{0};
  parallel_for((bytes + kRun - 1) / kRun, p.threads, [&](int64_t task) {
    const char* from = data + task * kRun;
    const int64_t n = bytes - task * kRun < kRun ? bytes - task * kRun : kRun;
    u32v sum[4] = {};
    int64_t i = 0;
    for (; i + 16 * W <= n; i += 16 * W) {
      for (int at = 0; at < 16 * W; at += 64) __builtin_prefetch(from + i + kAhead + at);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
        sum[k] ^= bits(load(reinterpret_cast<const float*>(from + i) + k * W));
    }
    uint32_t word = 0;
    for (int k = 0; k < 4; ++k)
      for (int lane = 0; lane < W; ++lane) word ^= sum[k][lane];
    for (; i + 4 <= n; i += 4) word ^= *reinterpret_cast<const uint32_t*>(from + i);
    all.fetch_xor(word, std::memory_order_relaxed);
  });
  return all.load();
}

}  // namespace genfast::cpu::GENFAST_ISA
