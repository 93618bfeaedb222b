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

// run(first, n): the element of x at which n of a row's gates begin, and that of y.
template <class Run>
void for_pieces(const GatedActParams& p, Run&& run) {
  const int64_t H = p.half, per_row = (H + kChunk - 1) / kChunk;
  const int64_t per_task = std::max<int64_t>(1, 16 * kChunk / std::max<int64_t>(1, H));
  const int threads = p.rows * H < 64 * kChunk ? 1 : p.threads;
  parallel_for((p.rows + per_task - 1) / per_task, threads, [&](int64_t task) {
    for (int64_t r = task * per_task; r < std::min(p.rows, (task + 1) * per_task); ++r)
      for (int64_t i = 0; i < per_row; ++i) {
        const int64_t at = i * kChunk;
        run(2 * r * H + at, r * H + at, static_cast<int>(std::min<int64_t>(kChunk, H - at)));
      }
  });
}

}  // namespace

void gated_act(const GatedActParams& p) {
  const Pieces x(p.x), to(p.y);
  advise_huge_pages(p.y.data, p.y.numel * dtype_bytes(p.y.dtype));
  with_activation(p.act, [&](auto act) {
    using Act = decltype(act);
    for_pieces(p, [&](int64_t of_x, int64_t of_y, int n) {
      Chunk a, b, held;
      const float *gate = x.load(of_x, n, a), *up = x.load(of_x + p.half, n, b);
      float* y = to.target(of_y, n, held);
      for (int i = 0; i < n; i += W) store(y + i, Act::value(load(gate + i), 0.0f) * load(up + i));
      to.store(of_y, n, y);
    });
  });
}

void gated_act_backward(const GatedActBackwardParams& q) {
  const GatedActParams& p = q.forward;
  const Pieces x(p.x), grad(q.grad), to(q.dx);
  advise_huge_pages(q.dx.data, q.dx.numel * dtype_bytes(q.dx.dtype));
  with_activation(p.act, [&](auto act) {
    using Act = decltype(act);
    for_pieces(p, [&](int64_t of_x, int64_t of_y, int n) {
      Chunk a, b, c, first, second;
      const float *gate = x.load(of_x, n, a), *up = x.load(of_x + p.half, n, b);
      const float* g = grad.load(of_y, n, c);
      float *d_gate = to.target(of_x, n, first), *d_up = to.target(of_x + p.half, n, second);
      for (int i = 0; i < n; i += W) {
        const f32v z = load(gate + i), d = load(g + i);
        store(d_gate + i, d * load(up + i) * Act::slope(z, 0.0f));
        store(d_up + i, d * Act::value(z, 0.0f));
      }
      to.store(of_x, n, d_gate);
      to.store(of_x + p.half, n, d_up);
    });
  });
}

}  // namespace genfast::cpu::GENFAST_ISA
