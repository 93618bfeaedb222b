// rng on the CPU: the contract's values straight into a tensor of any dtype and strides.
#include "cpu/kernels.h"
#include "cpu/noise.h"

namespace genfast::cpu::GENFAST_ISA {
namespace {

// 16-bit uniforms are rounded toward zero, so that [0, 1) holds in every dtype.
uint32_t uniform_mask(Distribution d, Dtype dtype) {
  if (d != Distribution::uniform) return ~0u;
  return dtype == Dtype::bf16 ? 0xFFFF0000u : dtype == Dtype::f16 ? 0xFFFFE000u : ~0u;
}

template <class Map>
void fill(const RandomParams& p) {
  const Stage out(p.out);
  const int64_t rows = noise_rows(p.noise, p.out), cols = rows ? p.out.numel / rows : 0;
  const NoiseAt noise(p.noise, p.out);
  const int64_t most = noise.height(cols);
  const uint32_t mask = uniform_mask(p.distribution, p.out.dtype);
  for_spans(rows, cols, most, p.threads, [&](int64_t row, int64_t first, int n, int) {
    NoiseChunk buffer;
    Chunk staged;
    const int64_t at = row * cols + first;
    float* to = out.target(at, n, staged);
    const float* v = noise.values<Map>(at, n, buffer, to);
    if (v != to || mask != ~0u)
      for (int i = 0; i < n; ++i) to[i] = from_bits(bits(v[i]) & mask);
    out.store(at, n, to);
  });
}

// Integers: words first, then the 32 x 32 -> 64 multiply-shift of Lemire (bias <= range / 2^32).
template <class T>
void fill_integers(const RandomParams& p) {
  const int64_t rows = noise_rows(p.noise, p.out), cols = rows ? p.out.numel / rows : 0;
  const NoiseAt noise(p.noise, p.out);
  const int64_t most = noise.height(cols);
  const bool raw = p.distribution == Distribution::bits;
  T* out = static_cast<T*>(p.out.data);
  for_spans(rows, cols, most, p.threads, [&](int64_t row, int64_t first, int n, int) {
    NoiseChunk buffer;
    const int64_t at = row * cols + first;
    const float* v = noise.values<BitsMap>(at, n, buffer);
    for (int i = 0; i < n; ++i) {
      const uint64_t word = bits(v[i]);
      out[at + i] = static_cast<T>(raw ? static_cast<int64_t>(word)
                                       : p.low + static_cast<int64_t>(p.range == uint64_t{1} << 32
                                                                          ? word
                                                                          : word * p.range >> 32));
    }
  });
}

}  // namespace

void random(const RandomParams& p) {
  advise_huge_pages(p.out.data, p.out.numel * dtype_bytes(p.out.dtype));
  switch (p.distribution) {
    case Distribution::uniform:
      return fill<UniformMap>(p);
    case Distribution::normal:
      return fill<NormalMap>(p);
    case Distribution::exponential:
      return fill<ExponentialMap>(p);
    case Distribution::gumbel:
      return fill<GumbelMap>(p);
    case Distribution::logistic:
      return fill<LogisticMap>(p);
    case Distribution::integer:
    case Distribution::bits:
      return p.out.dtype == Dtype::i64 ? fill_integers<int64_t>(p) : fill_integers<int32_t>(p);
  }
}

}  // namespace genfast::cpu::GENFAST_ISA
