// Vectors of one turn, and their sums.
#pragma once
#include "cpu/noise.h"

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

}  // namespace
}  // namespace genfast::cpu::GENFAST_ISA
