// The element at which a descending running sum of weights reaches a target, found without
// sorting: radix passes over 32-bit keys. Weights are integers, so that the atomics of the
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

// Digits of 11 bits at 21, 10 and 0: the last takes one more bit, which all its keys share. Three
// passes where 8 bits take four, and floats spread: a bin of the first digit is a quarter octave.
constexpr int kBins = 2048, kDigits = 3;

struct Digit {
  int shift;
  uint32_t known;  // the bits above, which are found

  __device__ __forceinline__ explicit Digit(int pass)
      : shift(pass == 0   ? 21
              : pass == 1 ? 10
                          : 0),
        known(pass == 0 ? 0u : ~0u << (pass == 1 ? 21 : 10)) {}
  __device__ __forceinline__ unsigned bin(uint32_t key) const {
    return key >> shift & static_cast<unsigned>(kBins - 1);
  }
};

// Weight by digit, 64 bits in two words: shared memory adds words by itself (ones, of a whole warp
// at once), 64 bits by compare and swap alone.
struct Histogram {
  unsigned low[kBins], high[kBins];

  __device__ __forceinline__ void clear() {
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += static_cast<int>(blockDim.x))
      low[i] = high[i] = 0;
  }
  __device__ __forceinline__ void add(unsigned bin) {  // fewer than 2^32 times
    atomicAdd(&low[bin], 1u);
  }
  __device__ __forceinline__ void add(unsigned bin, uint64_t weight) {
    const auto part = static_cast<unsigned>(weight);
    const unsigned before = atomicAdd(&low[bin], part);
    // How often the low words overflow depends on their sum, not on its order.
    const unsigned rest = static_cast<unsigned>(weight >> 32) + (before + part < before ? 1u : 0u);
    if (rest != 0) atomicAdd(&high[bin], rest);
  }
  __device__ __forceinline__ void set(int bin, uint64_t weight) {
    low[bin] = static_cast<unsigned>(weight), high[bin] = static_cast<unsigned>(weight >> 32);
  }
  __device__ __forceinline__ uint64_t operator[](int bin) const {
    return static_cast<uint64_t>(high[bin]) << 32 | low[bin];
  }
};

struct Selected {
  uint32_t key;        // largest key with weight(keys >= key) >= target
  uint64_t remaining;  // target - weight(keys > key)
  uint64_t weight;     // of the elements with exactly this key
};

// Finds one more digit of `found` in the histogram of the keys that begin like it. Every thread of
// the block calls it, after a barrier, and gets the same answer. blockDim.x: a power of two.
__device__ __forceinline__ Selected pick(const Histogram& bins, const Selected& found, int shift) {
  GENFAST_SHARED(Selected, picked);
  GENFAST_SHARED(uint64_t[32], of_warp);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int own = kBins / static_cast<int>(blockDim.x);  // consecutive bins, the largest first
  const int first = kBins - own * (thread + 1);
  uint64_t total = 0;
  // Each lane begins elsewhere: no two in one bank.
  for (int i = 0; i < own; ++i) total += bins[first + ((i + thread) & (own - 1))];
  uint64_t above = total;  // inclusive sum over the lanes up to this one
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const uint64_t other = __shfl_up_sync(kAllLanes, static_cast<unsigned long long>(above), step);
    if (lane >= step) above += other;
  }
  if (lane == 31) of_warp[warp] = above;
  __syncthreads();
  above -= total;
  for (int w = 0; w < warp; ++w) above += of_warp[w];
  if (above < found.remaining && above + total >= found.remaining) {  // one thread
    uint64_t rest = found.remaining - above;
    int bin = first + own - 1;
    for (; bins[bin] < rest; --bin) rest -= bins[bin];
    picked = {found.key | static_cast<uint32_t>(bin) << shift, rest, bins[bin]};
  }
  __syncthreads();
  return picked;
}

// visit(add): calls add(key), weight 1, or add(key, weight) for this thread's elements. The sum of
// all weights must reach the target, which is at least 1. Every thread of the block calls it and
// gets the same answer.
template <class Visit>
__device__ __forceinline__ Selected select_key(uint64_t target, Histogram& bins, Visit&& visit) {
  Selected found{0, target, 0};
#pragma unroll 1
  for (int pass = 0; pass < kDigits; ++pass) {
    const Digit digit(pass);
    bins.clear();
    __syncthreads();
    visit([&](uint32_t key, auto... weight) {
      if ((key & digit.known) == (found.key & digit.known)) bins.add(digit.bin(key), weight...);
    });
    __syncthreads();
    found = pick(bins, found, digit.shift);
  }
  return found;
}

}  // namespace genfast::cuda
