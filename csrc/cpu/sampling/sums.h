// Vectors of one turn, and their sums.
#pragma once
#include "cpu/noise.h"
#include "cpu/scratch.h"

namespace genfast::cpu::GENFAST_ISA {
namespace {

constexpr int kStep = lane<f32p>::width;  // elements of one turn: two vectors in flight

inline float lane_sum(f32p v) {
  float s = 0;
  for (int i = 0; i < W; ++i) s += v.a[i] + v.b[i];
  return s;
}

// Sum over the first n elements of a chunk, whatever the padding of the last turn holds.
class Sum {
 public:
  void add(f32p term, int left) {
    if (left >= kStep) {
      lanes_ += term;
      return;
    }
    float t[kStep];
    store(t, term);
    for (int j = 0; j < left; ++j) tail_ += t[j];
  }
  void add(const float* terms, int left) {
    if (left >= kStep) {
      lanes_ += load_pair(terms);
      return;
    }
    for (int j = 0; j < left; ++j) tail_ += terms[j];
  }
  double total() const { return static_cast<double>(lane_sum(lanes_)) + tail_; }

 private:
  f32p lanes_{};
  float tail_ = 0;
};

// The sums of `height` rows of `cols` terms side by side, each as by `Sum`: the lanes of one that
// fills no turn are all 0, and adding them took 10 ns a row.
inline void sums_of_rows(const float* terms, int height, int cols, double* to) {
  for (int r = 0; r < height; ++r, terms += cols) {
    if (cols < kStep) {
      float sum = 0;
      for (int i = 0; i < cols; ++i) sum += terms[i];
      to[r] = sum;
      continue;
    }
    Sum sum;
    for (int i = 0; i < cols; i += kStep) sum.add(terms + i, cols - i);
    to[r] = sum.total();
  }
}

}  // namespace
}  // namespace genfast::cpu::GENFAST_ISA
