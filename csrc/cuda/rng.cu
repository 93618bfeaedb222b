// rng on CUDA: two Philox blocks a thread, 16-byte stores. Same maths header as the CPU and
// compiled with -fmad=false, so the bits are the same.
#include "cuda/noise.cuh"

namespace genfast::cuda {
namespace {

template <class Map>
struct Fill {
  Groups groups;
  Stage out;
  Noise noise;
  uint32_t mask;  // 16-bit uniforms are rounded toward zero, so that [0, 1) holds in every dtype

  __device__ __forceinline__ void operator()(const Group& g) const {
    float v[kGroup];
    noise_of<Map>(noise, g, v);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) v[i] = from_bits(bits(v[i]) & mask);
    store(out, g.index, g.low, g.high, v);
  }
};

// Integers: the 32 x 32 -> 64 multiply-shift of Lemire (bias <= range / 2^32).
template <class T>
struct FillIntegers {
  Groups groups;
  T* out;  // contiguous
  Noise noise;
  int64_t low;
  uint64_t range;
  bool raw;

  __device__ __forceinline__ T value(uint64_t word) const {
    if (raw) return static_cast<T>(word);
    const uint64_t scaled = range == (uint64_t{1} << 32) ? word : word * range >> 32;
    return static_cast<T>(low + static_cast<int64_t>(scaled));
  }
  __device__ __forceinline__ void operator()(const Group& g) const {
    const uint64_t seed = seed_of_row(noise, g.seed_row);
    const Words<uint32_t> a = philox(seed, noise.stream, g.block);
    const Words<uint32_t> b = philox(seed, noise.stream, g.block + 1);
    const uint32_t words[kGroup] = {a.w0, a.w1, a.w2, a.w3, b.w0, b.w1, b.w2, b.w3};
    T* to = out + g.index;
    constexpr int kPer = 16 / sizeof(T);
    union Word {
      uint4 whole;
      T part[kPer];
    };
    if (g.low == 0 && g.high == kGroup && (reinterpret_cast<uintptr_t>(to) & 15) == 0) {
#pragma unroll
      for (int i = 0; i < kGroup; i += kPer) {
        Word w;
#pragma unroll
        for (int j = 0; j < kPer; ++j) w.part[j] = value(words[i + j]);
        *reinterpret_cast<uint4*>(to + i) = w.whole;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (i >= g.low && i < g.high) to[i] = value(words[i]);
  }
};

template <class Map>
const char* fill(const RandomParams& p, const Groups& groups) {
  uint32_t mask = ~0u;
  if (p.distribution == Distribution::uniform)
    mask = p.out.dtype == Dtype::bf16 ? 0xFFFF0000u : p.out.dtype == Dtype::f16 ? 0xFFFFE000u : ~0u;
  return launch_groups(Fill<Map>{groups, Stage(p.out), p.noise, mask}, p.out);
}

template <class T>
const char* fill_integers(const RandomParams& p, const Groups& groups) {
  return launch_groups(FillIntegers<T>{groups, static_cast<T*>(p.out.data), p.noise, p.low, p.range,
                                       p.distribution == Distribution::bits},
                       p.out);
}

}  // namespace

const char* random(const RandomParams& p) {
  if (p.out.numel == 0) return nullptr;
  const Groups groups(p.out.numel, noise_rows(p.noise, p.out), p.noise);
  switch (p.distribution) {
    case Distribution::uniform:
      return fill<UniformMap>(p, groups);
    case Distribution::normal:
      return fill<NormalMap>(p, groups);
    case Distribution::exponential:
      return fill<ExponentialMap>(p, groups);
    case Distribution::gumbel:
      return fill<GumbelMap>(p, groups);
    case Distribution::logistic:
      return fill<LogisticMap>(p, groups);
    default:
      return p.out.dtype == Dtype::i64 ? fill_integers<int64_t>(p, groups)
                                       : fill_integers<int32_t>(p, groups);
  }
}

}  // namespace genfast::cuda
