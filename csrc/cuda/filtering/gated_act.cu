// y = act(gate) up of rows that hold both halves, and its backward, on CUDA: gate and up are read
// where they lie. Groups of eight of a row's half, on 16 bytes where the half is a multiple of
// eight, as it is in every gate of a transformer; other rows go element by element.
#include "api/filtering.h"
#include "cuda/noise.cuh"
#include "math/filtering.h"

namespace genfast::cuda {
namespace {

// The activation is a uniform branch: a kernel for each of 11 would be most of the same code again.
struct Gate {
  Groups groups;  // of y
  Stage x, y;
  Activation act;

  __device__ __forceinline__ void operator()(const Group& g) const {
    float gate[kGroup], up[kGroup];
    const int64_t at = g.index + g.row * groups.cols;
    load(x, at, g.low, g.high, gate);
    load(x, at + groups.cols, g.low, g.high, up);
    with_activation(act, [&](auto of) {
      using Act = decltype(of);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) up[i] = Act::value(gate[i], 0.0f) * up[i];
    });
    store(y, g.index, g.low, g.high, up);
  }
};

struct GateBackward {
  Groups groups;
  Stage x, grad, dx;
  Activation act;

  __device__ __forceinline__ void operator()(const Group& g) const {
    float gate[kGroup], up[kGroup], d[kGroup];
    const int64_t at = g.index + g.row * groups.cols;
    load(x, at, g.low, g.high, gate);
    load(x, at + groups.cols, g.low, g.high, up);
    load(grad, g.index, g.low, g.high, d);
    with_activation(act, [&](auto of) {
      using Act = decltype(of);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        up[i] = d[i] * up[i] * Act::slope(gate[i], 0.0f);
        d[i] = d[i] * Act::value(gate[i], 0.0f);
      }
    });
    store(dx, at, g.low, g.high, up);
    store(dx, at + groups.cols, g.low, g.high, d);
  }
};

Groups rows_of(const GatedActParams& p) {
  Noise rows;  // draws nothing; a seed a row, so that the groups of every row begin with it
  rows.n_seeds = p.rows;
  return Groups(p.rows * p.half, p.rows, rows);
}

}  // namespace

const char* gated_act(const GatedActParams& p) {
  return launch_groups(Gate{rows_of(p), Stage(p.x), Stage(p.y), p.act}, p.x);
}

const char* gated_act_backward(const GatedActBackwardParams& q) {
  const GatedActParams& p = q.forward;
  return launch_groups(GateBackward{rows_of(p), Stage(p.x), Stage(q.grad), Stage(q.dx), p.act},
                       p.x);
}

}  // namespace genfast::cuda
