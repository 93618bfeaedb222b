// y = act(gate) up of rows that hold both halves, and its backward: gate and up are read where
// they lie, where PyTorch copies each half of each row.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/stage.h"
#include "math/filtering.h"

namespace genfast::cpu::GENFAST_ISA {
namespace {

// The memory of a dense tensor in pieces of at most kChunk: fp32 of whole vectors where it lies,
// the rest through a buffer with zeros behind.
class Pieces {
 public:
  explicit Pieces(const TensorView& t)
      : base_(static_cast<char*>(t.data)), dtype_(t.dtype), size_(dtype_bytes(t.dtype)) {}
  const float* load(int64_t first, int n, Chunk& buffer) const {
    if (direct(n)) return reinterpret_cast<const float*>(base_) + first;
    to_f32(base_ + first * size_, dtype_, n, buffer.data);
    for (int i = n; i < ((n + 63) & ~63); ++i) buffer.data[i] = 0.0f;
    return buffer.data;
  }
  float* target(int64_t first, int n, Chunk& buffer) const {
    return direct(n) ? reinterpret_cast<float*>(base_) + first : buffer.data;
  }
  void store(int64_t first, int n, const float* from) const {
    if (!direct(n)) from_f32(from, n, base_ + first * size_, dtype_);
  }

 private:
  bool direct(int n) const { return dtype_ == Dtype::f32 && n % W == 0; }
  char* base_;
  Dtype dtype_;
  int size_;
};

// Rows that are worked on side by side: of short ones as many as have their x in a chunk.
int64_t height_of(const GatedActParams& p) {
  return p.half > 0 && p.half <= kChunk / 16 ? kChunk / (2 * p.half) : 1;
}

// run(x, y, n, rows): the element of x at which n of a row's gates begin, and that of y; of short
// rows n gates of several whole ones.
template <class Run>
void for_pieces(const GatedActParams& p, Run&& run) {
  const int64_t H = p.half, per_row = (H + kChunk - 1) / kChunk, height = height_of(p);
  const int64_t per_task = std::max<int64_t>(1, 16 * kChunk / std::max<int64_t>(1, H));
  const int threads = p.rows * H < 64 * kChunk ? 1 : p.threads;
  parallel_for((p.rows + per_task - 1) / per_task, threads, [&](int64_t task) {
    const int64_t end = std::min(p.rows, (task + 1) * per_task);
    for (int64_t r = task * per_task; r < end; r += height) {
      const int64_t rows = std::min(height, end - r);
      for (int64_t i = 0; i < per_row; ++i) {
        const int64_t at = i * kChunk, n = std::min<int64_t>(kChunk, H - at);
        run(2 * r * H + at, r * H + at, static_cast<int>(rows * n), rows);
      }
    }
  });
}

// Where in rows side by side the gates are. By a table: loops of 4 elements took 10 ns each.
class Halves {
 public:
  explicit Halves(const GatedActParams& p) : half_(p.half) {
    for (int64_t r = 0, at = 0; height_of(p) > 1 && r < height_of(p); ++r)
      for (int64_t i = 0; i < half_; ++i) gate_[at++] = static_cast<uint16_t>(2 * r * half_ + i);
  }
  void part(const float* x, int n, float* gate, float* up) const {
    for (int i = 0; i < n; ++i) gate[i] = x[gate_[i]], up[i] = x[gate_[i] + half_];
  }
  void join(const float* gate, const float* up, int n, float* x) const {
    for (int i = 0; i < n; ++i) x[gate_[i]] = gate[i], x[gate_[i] + half_] = up[i];
  }

 private:
  int64_t half_;
  uint16_t gate_[kChunk / 2];
};

}  // namespace

void gated_act(const GatedActParams& p) {
  const Pieces x(p.x), to(p.y);
  const Halves halves(p);
  advise_huge_pages(p.y.data, p.y.numel * dtype_bytes(p.y.dtype));
  with_activation(p.act, [&](auto act) {
    using Act = decltype(act);
    for_pieces(p, [&](int64_t of_x, int64_t of_y, int n, int64_t rows) {
      Chunk a, b, both, held;
      const float *gate = a.data, *up = b.data;
      if (rows > 1)
        halves.part(x.load(of_x, 2 * n, both), n, a.data, b.data);
      else
        gate = x.load(of_x, n, a), up = x.load(of_x + p.half, n, b);
      float* y = to.target(of_y, n, held);
      for (int i = 0; i < n; i += W) store(y + i, Act::value(load(gate + i), 0.0f) * load(up + i));
      to.store(of_y, n, y);
    });
  });
}

void gated_act_backward(const GatedActBackwardParams& q) {
  const GatedActParams& p = q.forward;
  const Pieces x(p.x), grad(q.grad), to(q.dx);
  const Halves halves(p);
  advise_huge_pages(q.dx.data, q.dx.numel * dtype_bytes(q.dx.dtype));
  with_activation(p.act, [&](auto act) {
    using Act = decltype(act);
    for_pieces(p, [&](int64_t of_x, int64_t of_y, int n, int64_t rows) {
      Chunk a, b, c, first, second, both;
      const float *gate = a.data, *up = b.data;
      float *d_gate = first.data, *d_up = second.data;
      if (rows > 1) {
        halves.part(x.load(of_x, 2 * n, both), n, a.data, b.data);
      } else {
        gate = x.load(of_x, n, a), up = x.load(of_x + p.half, n, b);
        d_gate = to.target(of_x, n, first), d_up = to.target(of_x + p.half, n, second);
      }
      const float* g = grad.load(of_y, n, c);
      for (int i = 0; i < n; i += W) {
        const f32v z = load(gate + i), d = load(g + i);
        store(d_gate + i, d * load(up + i) * Act::slope(z, 0.0f));
        store(d_up + i, d * Act::value(z, 0.0f));
      }
      if (rows > 1) {
        float* joined = to.target(of_x, 2 * n, both);
        halves.join(d_gate, d_up, n, joined);
        to.store(of_x, 2 * n, joined);
      } else {
        to.store(of_x, n, d_gate);
        to.store(of_x + p.half, n, d_up);
      }
    });
  });
}

}  // namespace genfast::cpu::GENFAST_ISA
