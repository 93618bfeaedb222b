// What both directions share: where the elements of a group lie, and what its channels are scaled
// by. W: elements that a thread takes at once, 8 on 16 bytes where everything is aligned, else 1,
// so that neighbouring threads read neighbouring elements anyway.
#pragma once
#include <initializer_list>

#include "api/normalization.h"
#include "cuda/rows.cuh"
#include "math/normalization.h"

namespace genfast::cuda {

// Dense memory of any dtype; `step` elements between rows where it has two dimensions.
struct Line {
  char* base = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t step = 0;

  Line() = default;
  explicit Line(const TensorView& t)
      : base(t.defined() ? static_cast<char*>(t.data) : nullptr),
        dtype(t.dtype),
        step(t.ndim == 2 ? t.strides[0] : 0) {}
  __device__ __forceinline__ bool defined() const { return base != nullptr; }
};

template <int W>
__device__ __forceinline__ void read(const Line& t, int64_t at, float (&v)[W]) {
  if constexpr (W == 1)
    v[0] = read_one(t.base, t.dtype, at);
  else
    read_whole(t.base, t.dtype, at, v);
}
template <int W>
__device__ __forceinline__ void write(const Line& t, int64_t at, const float (&v)[W]) {
  if constexpr (W == 1)
    write_one(t.base, t.dtype, at, v[0]);
  else
    write_whole(t.base, t.dtype, at, v);
}

// i / d: of 32 bits where they are, which is a third of the instructions.
__device__ __forceinline__ int64_t quotient(int64_t i, int64_t d) {
  if (((i | d) >> 32) == 0) return static_cast<uint32_t>(i) / static_cast<uint32_t>(d);
  return i / d;
}

// Pieces of W elements that a thread reads before it uses the first, and keeps in registers where a
// group has no more for its team: 32 floats on 16 bytes.
template <int W>
constexpr int kPieces = W == kGroup ? 4 : 8;

// The first behind the last.
template <int N, int W>
__device__ __forceinline__ void turn(float (&v)[N][W]) {
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const float first = v[0][i];
#pragma unroll
    for (int u = 0; u + 1 < N; ++u) v[u][i] = v[u + 1][i];
    v[N - 1][i] = first;
  }
}

// rows: a group is a row. runs: channels outside, a group is `width` runs of `inner` places.
// columns: channels inside, a group is `width` channels of each of `inner` places.
enum class Order : uint8_t { rows, runs, columns };

struct Layout {
  Order order = Order::rows;
  int64_t channels = 1, inner = 1;
  int64_t groups = 1;  // of a sample; rows: `inner`
  int64_t width = 1;   // channels of a group
  int64_t line = 1;    // elements of a group side by side
  int64_t count = 1;   // elements of a group
  int64_t samples = 0;
  double inverse = 1;  // 1 / count

  explicit Layout(const NormalizeParams& p)
      : channels(p.planes.channels), inner(p.planes.inner), samples(p.planes.outer) {
    if (p.groups > 0) order = p.planes.channels_inner ? Order::columns : Order::runs;
    groups = order == Order::rows ? inner : p.groups;
    width = order == Order::rows ? channels : channels / p.groups;
    line = order == Order::runs ? inner : width;
    count = order == Order::rows ? channels : width * inner;
    inverse = 1.0 / static_cast<double>(count);
  }
  __device__ __forceinline__ float mean_of(double sum) const {
    return static_cast<float>(sum * inverse);
  }
  int64_t side_by_side() const { return order == Order::runs ? inner : channels; }
  // Lines of whole groups of 8, and nothing off 16 bytes. line: elements side by side.
  bool whole(const NormalizeParams& p, std::initializer_list<const TensorView*> more,
             int64_t line) const {
    bool fits = line % kGroup == 0;
    const auto on_16 = [&](const TensorView& t) {
      fits = fits && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
      if (t.defined() && t.ndim == 2 && t.shape[0] > 1) fits = fits && t.strides[0] % kGroup == 0;
    };
    for (const TensorView* t : {&p.x, &p.w, &p.b, &p.scale, &p.shift, &p.add, &p.gate}) on_16(*t);
    for (const TensorView* t : more) on_16(*t);
    return fits;
  }
};

// The elements of one group.
struct GroupPlace {
  const Layout& of;
  int64_t sample, first;  // of its memory
  int64_t channel;

  __device__ __forceinline__ GroupPlace(const Layout& layout, int64_t group)
      : of(layout),
        sample(quotient(group, layout.groups)),
        first(group * layout.count),
        channel(0) {
    if (of.order == Order::rows) return;
    channel = (group - sample * of.groups) * of.width;
    if (of.order == Order::columns) first = sample * of.channels * of.inner + channel;
  }
  // fn(at, c) of element j: it lies at `at`, of channel c.
  template <class Fn>
  __device__ __forceinline__ void find(int64_t j, Fn&& fn) const {
    if (of.order == Order::rows) return fn(first + j, j);
    const int64_t q = quotient(j, of.line), r = j - q * of.line;
    if (of.order == Order::runs)
      fn(first + j, channel + q);
    else
      fn(first + q * of.channels + r, channel + r);
  }
};

// The pieces of W elements (of runs all of one channel) that a thread has of a group at once: those
// of its team from element `base` on.
template <int W, class Team>
struct Pieces {
  const GroupPlace& place;
  int64_t begin, step;

  __device__ __forceinline__ Pieces(const GroupPlace& group, const Team& team, int64_t base)
      : place(group),
        begin(base + static_cast<int64_t>(team.rank()) * W),
        step(static_cast<int64_t>(team.size()) * W) {}
  // All on their way before the first is used.
  __device__ __forceinline__ void load(const Line& t, float (&v)[kPieces<W>][W]) const {
#pragma unroll
    for (int u = 0; u < kPieces<W>; ++u)
      if (const int64_t j = begin + u * step; j < place.of.count)
        place.find(j, [&](int64_t at, int64_t) { read(t, at, v[u]); });
  }
  // fn(at, c) of each, whose values stand first in the `held` meanwhile. One copy of the code: four
  // made ten times the instructions and took nvcc as much longer.
  template <class Fn, class... V>
  __device__ __forceinline__ void each(Fn&& fn, V&... held) const {
#pragma unroll 1
    for (int u = 0; u < kPieces<W>; ++u) {
      if (const int64_t j = begin + u * step; j < place.of.count) place.find(j, fn);
      (turn(held), ...);
    }
  }
};

// y = act(h a + k), a = w (1 + scale), k = b (1 + scale) + shift.
struct Affine {
  Line w, b, scale, shift;
  bool broadcast;  // one channel for all W

  Affine(const NormalizeParams& p, const Layout& layout)
      : w(p.w), b(p.b), scale(p.scale), shift(p.shift), broadcast(layout.order == Order::runs) {}

  template <int W>
  __device__ __forceinline__ void get(const Line& t, int64_t at, float (&v)[W]) const {
    if (W == 1 || !broadcast) return read(t, at, v);
    const float one = read_one(t.base, t.dtype, at);
#pragma unroll
    for (int i = 0; i < W; ++i) v[i] = one;
  }
  template <int W>
  __device__ __forceinline__ void at(int64_t sample, int64_t c, float (&a)[W],
                                     float (&k)[W]) const {
#pragma unroll
    for (int i = 0; i < W; ++i) a[i] = 1.0f, k[i] = 0.0f;
    if (w.defined()) get(w, c, a);
    if (b.defined()) get(b, c, k);
    float s[W];
    if (scale.defined()) {
      get(scale, sample * scale.step + c, s);
#pragma unroll
      for (int i = 0; i < W; ++i) a[i] *= 1.0f + s[i], k[i] *= 1.0f + s[i];
    }
    if (shift.defined()) {
      get(shift, sample * shift.step + c, s);
#pragma unroll
      for (int i = 0; i < W; ++i) k[i] += s[i];
    }
  }
};

// A sum of many terms: fp32 for 32 of them, then double, whose additions are a 64th of the speed on
// small GPUs.
class LongSum {
 public:
  __device__ __forceinline__ void add(float term) {
    part_ += term;
    if (++terms_ == 32) flush();
  }
  template <class Team>
  __device__ __forceinline__ double of(const Team& team) {
    flush();
    return team.reduce(total_, Add());
  }

 private:
  __device__ __forceinline__ void flush() {
    total_ += part_;
    part_ = 0.0f, terms_ = 0;
  }
  float part_ = 0.0f;
  int terms_ = 0;
  double total_ = 0;
};

// Op(team, group, null) for every group, or any other kind of row: by a warp, or a block of as many
// threads as hold it in registers.
template <int W, class Op>
const char* launch_each(const Op& op, int64_t rows, int64_t count, const TensorView& on) {
  if (count <= kWarpColumns)
    return launch(each_row<WarpTeam, Op>, blocks_for(rows, kWarpsPerBlock),
                  dim3(32 * kWarpsPerBlock), 0, on, op, rows, int64_t{0});
  int threads = 64;
  while (threads < 512 && threads * kPieces<W> * W < count) threads *= 2;
  return launch(each_row<BlockTeam, Op>, blocks_for(rows, 1), dim3(threads), 0, on, op, rows,
                int64_t{0});
}

}  // namespace genfast::cuda
