// Noise for the CPU kernels of every family: a chunk of contract values in L1, and the walk over
// rows and chunks that all elementwise kernels share.
#pragma once
#include "api/rng.h"
#include "cpu/parallel.h"
#include "cpu/stage.h"
#include "math/rng.h"

namespace genfast::cpu {
namespace {

constexpr int kGroup = 4 * lane<f32p>::width;  // values of one turn

struct alignas(64) NoiseChunk {
  float data[kChunk + kGroup];
};

inline uint64_t seed_of_row(const Noise& noise, int64_t row) {
  if (noise.seeds == nullptr) return noise.seed;
  return static_cast<uint64_t>(noise.seeds[noise.n_seeds > 1 ? row : 0]);
}

// One Philox block per lane of a pair, starting at block `first`. Even and odd lanes apart make
// four chains in flight: with two the latency of the multiplications shows.
inline Words<u32p> philox_blocks(uint64_t seed, uint64_t stream, uint64_t first) {
  using Chains = Pair<Pair<Wide>>;
  u32p iota;
  for (int i = 0; i < W; ++i) iota.a[i] = i, iota.b[i] = i + W;
  const auto split = [](u32p x) {
    return Chains{{even_words(x.a), odd_words(x.a)}, {even_words(x.b), odd_words(x.b)}};
  };
  const auto join = [](Chains x) {
    return u32p{join_words(x.a.a, x.a.b), join_words(x.b.a, x.b.b)};
  };
  const u32p low = static_cast<uint32_t>(first) + iota;
  const u32p high = static_cast<uint32_t>(first >> 32) + (as_unsigned(low < iota) & 1u);
  const u32p zero{};
  const Words<Chains> w =
      philox4x32_10<Chains>(split(low), split(high), split(zero + static_cast<uint32_t>(stream)),
                            split(zero + static_cast<uint32_t>(stream >> 32)),
                            static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return {join(w.w0), join(w.w1), join(w.w2), join(w.w3)};
}

// How the four words of a block become four values.
struct UniformMap {
  static void map(const Words<u32p>& w, f32p* v) {
    v[0] = uniform<f32p>(w.w0), v[1] = uniform<f32p>(w.w1);
    v[2] = uniform<f32p>(w.w2), v[3] = uniform<f32p>(w.w3);
  }
};
struct NormalMap {
  static void map(const Words<u32p>& w, f32p* v) {
    box_muller<f32p>(w.w0, w.w1, v[0], v[1]);
    box_muller<f32p>(w.w2, w.w3, v[2], v[3]);
  }
};
template <f32p (*value)(u32p)>
struct EachMap {
  static void map(const Words<u32p>& w, f32p* v) {
    v[0] = value(w.w0), v[1] = value(w.w1), v[2] = value(w.w2), v[3] = value(w.w3);
  }
};
inline f32p exponential_lane(u32p w) { return exponential_noise<f32p>(w); }
inline f32p gumbel_lane(u32p w) { return gumbel_noise<f32p>(w); }
inline f32p logistic_lane(u32p w) { return logistic_noise<f32p>(w); }
inline f32p bits_lane(u32p w) { return from_bits(w); }
using ExponentialMap = EachMap<exponential_lane>;
using GumbelMap = EachMap<gumbel_lane>;
using LogisticMap = EachMap<logistic_lane>;
using BitsMap = EachMap<bits_lane>;

// Values of elements [first, first + n), n <= kChunk, written to `to` when the range starts at a
// block boundary and fills it, else to `buffer`; returns where they are.
template <class Map>
const float* noise_values(uint64_t seed, uint64_t stream, uint64_t first, int n, NoiseChunk& buffer,
                          float* to = nullptr) {
  const int skip = static_cast<int>(first & 3);
  float* out = to != nullptr && skip == 0 && n % kGroup == 0 ? to : buffer.data;
  uint64_t block = first >> 2;
  for (int i = 0; i < skip + n; i += kGroup, block += kGroup / 4) {
    f32p v[4];
    Map::map(philox_blocks(seed, stream, block), v);
    store_interleaved(out + i, v[0], v[1], v[2], v[3]);
  }
  return out + skip;
}

// Calls fn(chunk number, row, first element of the chunk within the row, count) over rows x cols in
// chunks of at most kChunk. Chunk borders depend on the shape alone, never on the threads.
template <class Fn>
void for_chunks(int64_t rows, int64_t cols, int threads, Fn&& fn) {
  const int64_t per_row = (cols + kChunk - 1) / kChunk, total = rows * per_row;
  if (total == 0) return;
  if (rows * cols < 8 * kChunk) threads = 1;  // under ~20 us of work a second thread costs more
  int64_t grain = total / (int64_t{8} * (threads > 0 ? threads : 8));
  if (grain < 1) grain = 1;  // and no upper limit: two threads must not meet in one 2 MiB page
  parallel_for((total + grain - 1) / grain, threads, [&](int64_t task) {
    const int64_t end = (task + 1) * grain < total ? (task + 1) * grain : total;
    for (int64_t c = task * grain; c < end; ++c) {
      const int64_t row = c / per_row, first = (c - row * per_row) * kChunk;
      const int64_t left = cols - first;
      fn(c, row, first, static_cast<int>(left < kChunk ? left : kChunk));
    }
  });
}

// Rows of dim 0 when there is one seed per row, else one row.
inline int64_t noise_rows(const Noise& noise, const TensorView& t) {
  return noise.seeds != nullptr && noise.n_seeds > 1 && t.ndim > 0 ? t.shape[0] : 1;
}

// Element index of the noise, and its key, for element `first` of row `row`.
struct NoiseAt {
  const Noise& noise;
  int64_t noise_cols;  // elements that share a seed: numel / noise rows

  NoiseAt(const Noise& n, const TensorView& t)
      : noise(n), noise_cols(t.numel / (noise_rows(n, t) > 1 ? noise_rows(n, t) : 1)) {}
  template <class Map>
  const float* values(int64_t at, int n, NoiseChunk& buffer) const {  // range within one seed row
    const int64_t row = noise.n_seeds > 1 ? at / noise_cols : 0;
    return noise_values<Map>(seed_of_row(noise, row), noise.stream,
                             static_cast<uint64_t>(noise.offset + at - row * noise_cols), n,
                             buffer);
  }
};

}  // namespace
}  // namespace genfast::cpu
