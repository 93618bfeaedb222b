// Winograd's F(2 x 2, 3 x 3): a tile of 2 x 2 outputs sees 4 x 4 inputs, and
//   Y = A^T [(G g G^T) . (B^T d B)] A
// takes 16 products of channels for it instead of 36. Winograd, "Arithmetic complexity of
// computations", 1980; Lavin & Gray, "Fast algorithms for convolutional neural networks", 2016.
// Letters are theirs: d a tile of the input, g the kernel, Y the outputs; V, U and M the same three
// in Winograd's domain, where each of the 16 places is a product of matrices of its own:
//   V [place][tile][I] by U [place][panel of outputs][I][columns] is M [place][tile][O].
#pragma once
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/microkernel.h"
#include "cpu/scratch.h"
#include "cpu/transpose.h"

namespace genfast::cpu {
namespace {

constexpr int kPlaces = 16;  // of a tile in Winograd's domain

// ---- the transforms, of one vector of channels --------------------------------------------------

// B^T d of four rows.
GENFAST_FN void input_rows(const f32v (&d)[4], f32v (&t)[4]) {
  t[0] = d[0] - d[2];
  t[1] = d[1] + d[2];
  t[2] = d[2] - d[1];
  t[3] = d[1] - d[3];
}
// A^T m of four rows.
GENFAST_FN void output_rows(const f32v (&m)[4], f32v (&y)[2]) {
  const f32v sum = m[1] + m[2], difference = m[1] - m[2];
  y[0] = m[0] + sum;
  y[1] = difference - m[3];
}
// A y of two rows: what `output_rows` does, backward.
GENFAST_FN void spread_rows(const f32v (&y)[2], f32v (&m)[4]) {
  m[0] = y[0];
  m[1] = y[0] + y[1];
  m[2] = y[0] - y[1];
  m[3] = -y[1];
}
// G g of three rows.
GENFAST_FN void weight_rows(const f32v (&g)[3], f32v (&u)[4]) {
  const f32v half = (g[0] + g[2]) * 0.5f, middle = g[1] * 0.5f;
  u[0] = g[0];
  u[1] = half + middle;
  u[2] = half - middle;
  u[3] = g[2];
}
// G^T u of four rows: what `weight_rows` does, backward.
GENFAST_FN void gather_rows(const f32v (&u)[4], f32v (&g)[3]) {
  const f32v half = (u[1] + u[2]) * 0.5f;
  g[0] = u[0] + half;
  g[1] = (u[1] - u[2]) * 0.5f;
  g[2] = half + u[3];
}

// rows on the columns of an N x N square and then on its rows: M x M. from(i, j), to(i, j, vector).
template <int N, int M, class Rows, class From, class To>
GENFAST_INLINE void both_sides(Rows&& rows, From&& from, To&& to) {
  f32v half[M][N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    f32v in[N], out[M];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) in[i] = from(i, j);
    rows(in, out);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) half[i][j] = out[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    f32v out[M];
    rows(half[i], out);
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) to(i, j, out[j]);
  }
}

// ---- images and tiles ---------------------------------------------------------------------------

// (B, channels, H, W) with the channels inside, cut into tiles of 2 x 2 places.
struct Image {
  float* data;
  int64_t channels, H, W_, across, down, tiles;

  explicit Image(const TensorView& t)
      : data(static_cast<float*>(t.data)),
        channels(t.shape[1]),
        H(t.shape[2]),
        W_(t.shape[3]),
        across((W_ + 1) / 2),
        down((H + 1) / 2),
        tiles(t.shape[0] * across * down) {}

  // fn(row in the block, first place of the tile's image, i, j) for tiles [first, first + count),
  // whose upper left place is (2 i, 2 j).
  template <class Fn>
  GENFAST_INLINE void each(int64_t first, int64_t count, Fn&& fn) const {
    int64_t j = first % across, i = first / across % down, b = first / across / down;
    for (int64_t t = 0; t < count; ++t) {
      fn(t, data + b * H * W_ * channels, 2 * i, 2 * j);
      if (++j == across) {
        j = 0;
        if (++i == down) i = 0, ++b;
      }
    }
  }
};

// V of tiles [first, first + count): B^T d B, places `step` floats apart. zeros: 4 pixels of them.
inline void transform_input(const Image& x, int64_t first, int64_t count, const float* zeros,
                            float* v, int64_t step) {
  const int64_t C = x.channels, row = x.W_ * C;
  x.each(first, count, [&](int64_t t, const float* image, int64_t i0, int64_t j0) {
    float* to = v + t * C;
    const auto tile = [&](auto&& at) {
      for (int64_t c = 0; c < C; c += W)
        both_sides<4, 4>(
            [](auto& d, auto& u) { input_rows(d, u); },
            [&](int i, int j) { return load(at(i, j) + c); },
            [&](int i, int j, f32v value) { store(to + (4 * i + j) * step + c, value); });
    };
    const float* rows[4];  // from column j0 - 1 on
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int64_t at = i0 - 1 + i;
      rows[i] = at < 0 || at >= x.H ? zeros : image + at * row + (j0 - 1) * C;
    }
    if (j0 > 0 && j0 + 2 < x.W_) return tile([&](int i, int j) { return rows[i] + j * C; });
    const float* places[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int64_t at = j0 - 1 + j;
        places[i][j] = at < 0 || at >= x.W_ ? zeros : rows[i] + (rows[i] == zeros ? 0 : j * C);
      }
    tile([&](int i, int j) { return places[i][j]; });
  });
}

// Columns of a panel of U that begins at output o.
inline int columns_of(int64_t o, int64_t outputs) {
  return static_cast<int>(std::min<int64_t>(NR, outputs - o));
}

}  // namespace
}  // namespace genfast::cpu
