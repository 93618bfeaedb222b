// Noise for the CPU kernels of every family: a chunk of contract values in L1, and the walk over
// rows and chunks that all elementwise kernels share.
#pragma once
#include <cstring>

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

// A pair's even and odd lanes apart make four chains in flight: with two the latency of the
// multiplications shows.
using Chains = Pair<Pair<Wide>>;
inline Chains split(u32p x) {
  return {{even_words(x.a), odd_words(x.a)}, {even_words(x.b), odd_words(x.b)}};
}
inline uint32_t split(uint32_t x) { return x; }
inline u32p join(Chains x) { return {join_words(x.a.a, x.a.b), join_words(x.b.a, x.b.b)}; }

// One Philox block per lane, its number and its seed (Key: of all, or one per lane) in two words.
template <class Key>
Words<u32p> philox_lanes(Key seed_low, Key seed_high, uint64_t stream, u32p low, u32p high) {
  const u32p zero{};
  const Words<Chains> w = philox4x32_10(
      split(low), split(high), split(zero + static_cast<uint32_t>(stream)),
      split(zero + static_cast<uint32_t>(stream >> 32)), split(seed_low), split(seed_high));
  return {join(w.w0), join(w.w1), join(w.w2), join(w.w3)};
}

// Blocks from `first` on.
inline Words<u32p> philox_blocks(uint64_t seed, uint64_t stream, uint64_t first) {
  u32p iota;
  for (int i = 0; i < W; ++i) iota.a[i] = i, iota.b[i] = i + W;
  const u32p low = static_cast<uint32_t>(first) + iota;
  const u32p high = static_cast<uint32_t>(first >> 32) + (as_unsigned(low < iota) & 1u);
  return philox_lanes(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), stream, low,
                      high);
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

// Short rows that have their own seeds, side by side: `height` of `cols` elements, each from
// element `first` of its noise on. One after the other, a row of 20 would cost what 64 to 128
// values do.
template <class Map>
const float* noise_of_rows(const int64_t* seeds, uint64_t stream, uint64_t first, int cols,
                           int height, NoiseChunk& buffer) {
  constexpr int kLanes = lane<f32p>::width;
  const int skip = static_cast<int>(first & 3), blocks = (skip + cols + 3) / 4;
  alignas(64) uint32_t words[4][kLanes];
  for (int at = 0, row = 0, block = 0; at < height * blocks; at += kLanes) {
    for (int i = 0; i < kLanes; ++i) {  // past the end: the last row's, unread
      const uint64_t seed = static_cast<uint64_t>(seeds[row]), number = (first >> 2) + block;
      words[0][i] = static_cast<uint32_t>(seed), words[1][i] = static_cast<uint32_t>(seed >> 32);
      words[2][i] = static_cast<uint32_t>(number);
      words[3][i] = static_cast<uint32_t>(number >> 32);
      if (++block == blocks) block = 0, row += row + 1 < height;
    }
    u32p w[4];
    memcpy(w, words, sizeof w);
    f32p v[4];
    Map::map(philox_lanes(w[0], w[1], stream, w[2], w[3]), v);
    store_interleaved(buffer.data + 4 * at, v[0], v[1], v[2], v[3]);
  }
  if (skip != 0 || cols % 4 != 0)
    for (int row = 0; row < height; ++row)
      memmove(buffer.data + row * cols, buffer.data + row * blocks * 4 + skip,
              cols * sizeof(float));
  return buffer.data;
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

// How many rows share a chunk, where each makes noise of its own (`noise_of_rows`, in whole blocks)
// or not. Whole turns if they can be, which need no buffer.
inline int64_t rows_of_chunk(int64_t cols, bool own_noise) {
  const int64_t most = cols > 0 ? kChunk / (own_noise ? 4 * ((cols + 3) / 4 + 1) : cols) : 1;
  int64_t whole = kTurn;
  while (whole > 1 && whole / 2 * cols % kTurn == 0) whole /= 2;
  return most > whole ? most / whole * whole : most;
}

// As for_chunks, where up to `most` short rows share a chunk: fn(first row, first element in it,
// count, rows).
template <class Fn>
void for_spans(int64_t rows, int64_t cols, int64_t most, int threads, Fn&& fn) {
  if (most < 2 || rows < 2)
    return for_chunks(rows, cols, threads,
                      [&](int64_t, int64_t row, int64_t first, int n) { fn(row, first, n, 1); });
  const int64_t spans = (rows + most - 1) / most;
  for_chunks(spans, most * cols, threads, [&](int64_t, int64_t span, int64_t, int) {
    const int64_t row = span * most, left = rows - row, here = left < most ? left : most;
    fn(row, int64_t{0}, static_cast<int>(here * cols), static_cast<int>(here));
  });
}

// A coefficient of a chunk: of one row, or of an element each, of short rows side by side.
struct Same {
  f32v value;
  explicit Same(float v) : value(splat(v)) {}
  f32v operator()(int) const { return value; }
};
struct Each {
  const float* values;
  f32v operator()(int i) const { return load(values + i); }
};

// to[i] = value of the row of i, `height` rows of `cols` elements side by side: whole vectors, of
// which the next row's cover what is too much. What lies beyond the last row counts for nothing.
inline void spread(const float* values, int height, int64_t cols, NoiseChunk& to) {
  float* at = to.data;
  if (cols == 1)
    memcpy(at, values, height * sizeof(float));
  else if (cols <= W)
    for (int r = 0; r < height; ++r, at += cols) store(at, splat(values[r]));
  else
    for (int r = 0; r < height; ++r, at += cols)
      for (int64_t i = 0; i < cols; i += W) store(at + i, splat(values[r]));
}

// Rows of dim 0 when there is one seed per row, else one row.
inline int64_t noise_rows(const Noise& noise, const TensorView& t) {
  return noise.seeds != nullptr && noise.n_seeds > 1 && t.ndim > 0 ? t.shape[0] : 1;
}

// Element index of the noise, and its key, for element `first` of row `row`.
struct NoiseAt {
  const Noise& noise;
  bool own_rows;       // a seed per row
  int64_t noise_cols;  // elements that share a seed: numel / noise rows

  NoiseAt(const Noise& n, const TensorView& t)
      : noise(n),
        own_rows(noise_rows(n, t) > 1),
        noise_cols(t.numel / (own_rows ? noise_rows(n, t) : 1)) {}
  // How many rows of `cols` elements share a chunk: none that are parts of one that shares a seed.
  int64_t height(int64_t cols) const {
    return own_rows && noise_cols != cols ? 1 : rows_of_chunk(cols, own_rows);
  }
  // Of a range within one seed row, or of several whole ones. `to`: as in `noise_values`.
  template <class Map>
  const float* values(int64_t at, int n, NoiseChunk& buffer, float* to = nullptr) const {
    const int64_t row = noise.n_seeds > 1 ? at / noise_cols : 0;
    const uint64_t first = static_cast<uint64_t>(noise.offset + at - row * noise_cols);
    if (noise.n_seeds > 1 && n > noise_cols)
      return noise_of_rows<Map>(noise.seeds + row, noise.stream, first,
                                static_cast<int>(noise_cols), static_cast<int>(n / noise_cols),
                                buffer);
    return noise_values<Map>(seed_of_row(noise, row), noise.stream, first, n, buffer, to);
  }
};

}  // namespace
}  // namespace genfast::cpu
