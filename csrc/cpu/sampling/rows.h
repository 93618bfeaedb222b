// Rows over the last dimension: their noise, their perturbed logits, and short rows side by side.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>

#include "cpu/sampling/sums.h"
#include "math/sampling.h"

namespace genfast::cpu::GENFAST_ISA {
namespace {

// Fp32 scratch of whole vectors.
class Row {
 public:
  explicit Row(int64_t cols) : data_(new float[((cols + 63) & ~int64_t{63}) + 64]) {}
  float* data() { return data_.get(); }

 private:
  std::unique_ptr<float[]> data_;
};

struct RowShape {
  int64_t rows, cols, per_seed;  // per_seed: rows that share a seed
  bool own_noise;                // a seed per row

  RowShape(const TensorView& t, const Noise& noise) {
    cols = t.ndim > 0 ? t.shape[t.ndim - 1] : 1;
    rows = cols > 0 ? t.numel / cols : 0;
    const int64_t seeds = noise_rows(noise, t);
    per_seed = seeds > 0 ? rows / seeds : 1;
    if (t.ndim < 2) per_seed = rows;
    own_noise = noise.n_seeds > 1 && per_seed == 1;
  }
};

// Gumbel noise of rows in their order: of short ones, of as many as share a chunk at a time.
class GumbelRows {
 public:
  GumbelRows(const Noise& noise, const RowShape& shape)
      : noise_(noise), shape_(shape), height_(rows_of_chunk(shape.cols, shape.own_noise)) {}
  // Of n elements from `first` on; valid until the next call.
  const float* values(int64_t row, int64_t first, int n) {
    if (height_ < 2)
      return noise_values<GumbelMap>(seed(row), noise_.stream, at(row) + first, n, chunk_);
    if (row < begin_ || row >= end_) make(row);
    return values_ + (row - begin_) * shape_.cols;
  }
  // How many rows from `row` on, up to `end`, `values` holds side by side.
  int side_by_side(int64_t row, int64_t end) {
    make(row);
    return static_cast<int>(std::min(end_, end) - row);
  }

 private:
  int64_t seed_row(int64_t row) const { return noise_.n_seeds > 1 ? row / shape_.per_seed : 0; }
  uint64_t seed(int64_t row) const { return seed_of_row(noise_, seed_row(row)); }
  uint64_t at(int64_t row) const {
    const int64_t before = (row - seed_row(row) * shape_.per_seed) * shape_.cols;
    return static_cast<uint64_t>(noise_.offset + before);
  }
  void make(int64_t row) {
    const int64_t last = shape_.own_noise || noise_.n_seeds <= 1
                             ? shape_.rows
                             : (seed_row(row) + 1) * shape_.per_seed;
    begin_ = row, end_ = std::min(row + height_, last);
    const int rows = static_cast<int>(end_ - begin_), cols = static_cast<int>(shape_.cols);
    values_ = shape_.own_noise
                  ? noise_of_rows<GumbelMap>(noise_.seeds + row, noise_.stream, at(row), cols, rows,
                                             chunk_)
                  : noise_values<GumbelMap>(seed(row), noise_.stream, at(row), rows * cols, chunk_);
  }

  const Noise& noise_;
  const RowShape& shape_;
  int64_t height_, begin_ = 0, end_ = 0;
  const float* values_ = nullptr;
  NoiseChunk chunk_;
};

// Calls run(first row, end, noise) for the tasks of rows.
template <class Run>
void for_tasks(const RowShape& s, const Noise& noise, int threads, Run&& run) {
  if (s.rows * s.cols < 4 * kChunk) threads = 1;
  const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(s.cols, 1));
  parallel_for((s.rows + grain - 1) / grain, threads, [&](int64_t task) {
    GumbelRows gumbel(noise, s);
    run(task * grain, std::min(s.rows, (task + 1) * grain), gumbel);
  });
}
// fn(row, scratch, noise) for every row.
template <class Fn>
void for_rows(const RowShape& s, const Noise& noise, int threads, Fn&& fn) {
  for_tasks(s, noise, threads, [&](int64_t row, int64_t end, GumbelRows& gumbel) {
    Row scratch(s.cols);
    for (; row < end; ++row) fn(row, scratch.data(), gumbel);
  });
}
// fn(first row, rows, their noise) for rows of up to kNarrow classes, side by side.
template <class Fn>
void for_narrow_rows(const RowShape& s, const Noise& noise, int threads, Fn&& fn) {
  for_tasks(s, noise, threads, [&](int64_t row, int64_t end, GumbelRows& gumbel) {
    for (int height; row < end; row += height) {
      height = gumbel.side_by_side(row, end);
      fn(row, height, gumbel.values(row, 0, 0));
    }
  });
}

// to[i] = (logits[at + i] + g_i) * inv_tau, g of the row; returns the maximum, NaN when there is a
// NaN.
float perturb(const Stage& logits, int64_t at, int64_t row, int64_t cols, GumbelRows& noise,
              float inv_tau, float* to) {
  float top = -INFINITY;
  bool nan = false;
  for (int64_t c = 0; c < cols; c += kChunk) {
    Chunk staged;
    const int n = static_cast<int>(std::min<int64_t>(kChunk, cols - c));
    const float* l = logits.load(at + c, n, staged);
    const float* g = noise.values(row, c, n);
    float* v = to + c;
    int i = 0;
    f32p most = f32p{} - INFINITY;
    i32p strange{};
    for (; i < n; i += kStep) {
      const f32p x = (load_pair(l + i) + load_pair(g + i)) * inv_tau;
      store(v + i, x);
      if (i + kStep > n) break;
      most = maximum(x, most);
      strange |= x != x;
    }
    for (int j = 0; i > 0 && j < W; ++j) {
      top = std::max(top, std::max(most.a[j], most.b[j]));
      nan |= (strange.a[j] | strange.b[j]) != 0;
    }
    for (int j = i; j < n; ++j) {
      top = std::max(top, v[j]);
      nan |= v[j] != v[j];
    }
    for (int j = n; j < i + kStep && i < n; ++j) v[j] = -INFINITY;  // padding: e^-inf adds 0
  }
  return nan ? NAN : top;
}

// Rows of up to kNarrow classes side by side: vectors go over all of them, so that one of 10 does
// not take what one of 16 to 64 does. A row's bits depend on its number of classes alone.
constexpr int kNarrow = 64;

class NarrowRows {
 public:
  NarrowRows(const Stage& logits, const RowShape& shape, float inv_tau)
      : logits_(logits), cols_(static_cast<int>(shape.cols)), inv_tau_(inv_tau) {}
  // y = (logits + g) / tau; top: the maxima, NaN when there is one.
  void perturb(int64_t row, int height, const float* g, Chunk& y, float* top) const {
    const int n = height * cols_;
    const float* l = logits_.load(row * cols_, n, y);
    for (int i = 0; i < n; i += kStep)
      store(y.data + i, (load_pair(l + i) + load_pair(g + i)) * inv_tau_);
    for (int r = 0; r < height; ++r) {
      const float* v = y.data + r * cols_;
      float most = v[0];
      for (int i = 1; i < cols_; ++i) most = v[i] > most || v[i] != v[i] ? v[i] : most;
      top[r] = most;
    }
  }
  // y = the softmax of that.
  void soften(int height, const float* top, Chunk& y) const {
    const int n = height * cols_;
    NoiseChunk each;
    float scale[kChunk];
    spread(top, height, cols_, each);
    for (int i = 0; i < n; i += kStep)
      store(y.data + i, exp_of<f32p>(load_pair(y.data + i) - load_pair(each.data + i)));
    for (int r = 0; r < height; ++r) {
      float sum = 0.0f;
      for (int i = 0; i < cols_; ++i) sum += y.data[r * cols_ + i];
      scale[r] = 1.0f / sum;
    }
    spread(scale, height, cols_, each);
    for (int i = 0; i < n; i += kStep)
      store(y.data + i, load_pair(y.data + i) * load_pair(each.data + i));
  }

 private:
  const Stage& logits_;
  int cols_;
  float inv_tau_;
};

// First index of the largest value `top`; -1 when that is not finite.
int64_t argmax(const float* v, int64_t n, float top) {
  if (!(top > -INFINITY && top < INFINITY)) return -1;
  for (int64_t i = 0; i < n; ++i)
    if (v[i] == top) return i;
  return -1;
}

}  // namespace
}  // namespace genfast::cpu::GENFAST_ISA
