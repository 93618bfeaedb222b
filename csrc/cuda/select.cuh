// The element at which a descending running sum of weights reaches a target, found without
// sorting: four radix passes over 32-bit keys. Weights are integers, so that the atomics of the
// histogram commute and the result is repeatable.
#pragma once
#include "cuda/team.cuh"
#include "math/lane.h"

namespace genfast::cuda {

// Larger float, larger key; -0 counts as +0.
__device__ __forceinline__ uint32_t ordered_key(float x) {
  const uint32_t u = bits(x + 0.0f);
  return u >> 31 ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ float value_of_key(uint32_t key) {
  return from_bits(key >> 31 ? key & 0x7FFFFFFFu : ~key);
}

// Eight copies of the histogram: warps of a block mostly hit the few bins of the common exponents.
constexpr int kBins = 256, kCopies = 8;
template <class Count>
using Histogram = Count[kCopies][kBins];

struct Selected {
  uint32_t key;        // largest key with weight(keys >= key) >= target
  uint64_t remaining;  // target - weight(keys > key)
  uint64_t weight;     // of the elements with exactly this key
};

// Count: unsigned where every weight is 1 (shared memory adds those by itself, of a whole warp at
// once; a copy overflows at 2^35 elements in all), else unsigned long long (compare and swap).
// visit(add): calls add(key, weight) for this thread's elements. The sum of all weights must reach
// the target, which is at least 1. Every thread of the block calls it and gets the same answer.
template <class Count, class Visit>
__device__ __forceinline__ Selected select_key(uint64_t target, Histogram<Count>& bins,
                                               Visit&& visit) {
  GENFAST_SHARED(Selected, shared);
  Selected found{0, target, 0};
  Count* mine = bins[threadIdx.x / 32 % kCopies];
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = static_cast<int>(threadIdx.x); i < kBins * kCopies;
         i += static_cast<int>(blockDim.x))
      bins[i / kBins][i % kBins] = 0;
    __syncthreads();
    const uint32_t prefix = found.key, known = shift == 24 ? 0u : ~0u << (shift + 8);
    visit([&](uint32_t key, uint64_t weight) {
      if ((key & known) == prefix && weight != 0)
        atomicAdd(&mine[key >> shift & 255u], static_cast<Count>(weight));
    });
    __syncthreads();
    if (threadIdx.x < 32) {  // lane l owns bins 255 - 8 l … 248 - 8 l, the largest first
      const int lane = static_cast<int>(threadIdx.x);
      uint64_t sums[8], total = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sums[i] = 0;
        for (int c = 0; c < kCopies; ++c) sums[i] += bins[c][255 - 8 * lane - i];
        total += sums[i];
      }
      uint64_t above = total;  // inclusive sum over the lanes up to this one
#pragma unroll
      for (int step = 1; step < 32; step <<= 1) {
        const uint64_t other =
            __shfl_up_sync(kAllLanes, static_cast<unsigned long long>(above), step);
        if (lane >= step) above += other;
      }
      above -= total;
      if (above < found.remaining && above + total >= found.remaining) {  // one lane
        uint64_t rest = found.remaining - above;
        bool open = true;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (open && sums[i] >= rest) {
            shared = {prefix | static_cast<uint32_t>(255 - 8 * lane - i) << shift, rest, sums[i]};
            open = false;
          }
          if (open) rest -= sums[i];
        }
      }
    }
    __syncthreads();
    found = shared;
  }
  return found;
}

}  // namespace genfast::cuda
