// Winograd's F(2 x 2, 3 x 3): a tile of 2 x 2 outputs sees 4 x 4 inputs, and
//   Y = A^T [(G g G^T) . (B^T d B)] A
// takes 16 products of channels for it instead of 36. Winograd, "Arithmetic complexity of
// computations", 1980; Lavin & Gray, "Fast algorithms for convolutional neural networks", 2016.
// Letters are theirs: d a tile of the input, g the kernel, Y the outputs; V, U and M the same three
// in Winograd's domain, where each place is a product of matrices of its own:
//   V [place][tile][I] by U [place][panel of outputs][I][columns] is M [place][tile][O].
// Of an image that is enlarged by nearest, rows of d are a b b c, and the third row of B^T d is
// b - b: 9 products do.
#pragma once

#include "cpu/convolution/image.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/transpose.h"

namespace genfast::cpu {
namespace {

// ---- the transforms of a row of vectors ---------------------------------------------------------

// A convolution and its gradient by the input.
struct Whole {
  static constexpr int inputs = 4, places = 4, outputs = 2;
  static constexpr int input_step = 2, output_step = 2;  // from a tile to the next
  static void input(const f32v (&d)[4], f32v (&v)[4]) {  // B^T d
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
  static void weight(const f32v (&g)[3], f32v (&u)[4]) {  // G g
    const f32v half = (g[0] + g[2]) * 0.5f, middle = g[1] * 0.5f;
    u[0] = g[0];
    u[1] = half + middle;
    u[2] = half - middle;
    u[3] = g[2];
  }
  static void output(const f32v (&m)[4], f32v (&y)[2]) {  // A^T m
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) - m[3];
  }
  static void grad(const f32v (&y)[2], f32v (&m)[4]) {  // A y
    m[0] = y[0];
    m[1] = y[0] + y[1];
    m[2] = y[0] - y[1];
    m[3] = -y[1];
  }
  static void weight_grad(const f32v (&u)[4], f32v (&g)[3]) {  // G^T u
    const f32v half = (u[1] + u[2]) * 0.5f;
    g[0] = u[0] + half;
    g[1] = (u[1] - u[2]) * 0.5f;
    g[2] = half + u[3];
  }
};

// What both directions of an enlarged image share: the places but the third.
struct Enlarged {
  static constexpr int places = 3;
  static void weight(const f32v (&g)[3], f32v (&u)[3]) {
    u[0] = g[0];
    u[1] = (g[0] + g[2]) * 0.5f + g[1] * 0.5f;
    u[2] = g[2];
  }
};
// A tile is a place of the image: 2 x 2 outputs.
struct Enlarging : Enlarged {
  static constexpr int inputs = 3, outputs = 2;
  static constexpr int input_step = 1, output_step = 2;
  static void input(const f32v (&d)[3], f32v (&v)[3]) {
    v[0] = d[0] - d[1];
    v[1] = d[1] + d[1];
    v[2] = d[1] - d[2];
  }
  static void output(const f32v (&m)[3], f32v (&y)[2]) {
    y[0] = m[0] + m[1];
    y[1] = m[1] - m[2];
  }
  static void grad(const f32v (&y)[2], f32v (&m)[3]) {
    m[0] = y[0];
    m[1] = y[0] + y[1];
    m[2] = -y[1];
  }
  static void weight_grad(const f32v (&u)[3], f32v (&g)[3]) {
    g[1] = u[1] * 0.5f;
    g[0] = u[0] + g[1];
    g[2] = g[1] + u[2];
  }
};
// Its gradient by the image: the sum of a convolution's 2 x 2 outputs, (1, 2, 0, -1) m.
struct Reducing : Enlarged {
  static constexpr int inputs = 4, outputs = 1;
  static constexpr int input_step = 2, output_step = 1;
  static void input(const f32v (&d)[4], f32v (&v)[3]) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[1] - d[3];
  }
  static void output(const f32v (&m)[3], f32v (&y)[1]) { y[0] = (m[0] - m[2]) + (m[1] + m[1]); }
};

// `rows` on the columns of an N x N square and then on its rows: M x M. from(i, j), to(i, j, v).
template <int N, int M, class From, class To>
GENFAST_INLINE void both_sides(void (*rows)(const f32v (&)[N], f32v (&)[M]), From&& from, To&& to) {
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

// ---- tiles --------------------------------------------------------------------------------------

// The tiles of images whose upper left places are `step` apart.
struct Tiles {
  int64_t down, across, count;

  Tiles(const Image& t, int step)
      : down((t.height + step - 1) / step),
        across((t.width + step - 1) / step),
        count(t.count * down * across) {}

  // fn(tile - first, image, row, column) for tiles [first, first + n).
  template <class Fn>
  GENFAST_INLINE void each(int64_t first, int64_t n, Fn&& fn) const {
    int64_t j = first % across, i = first / across % down, b = first / across / down;
    for (int64_t t = 0; t < n; ++t) {
      fn(t, b, i, j);
      if (++j == across) {
        j = 0;
        if (++i == down) i = 0, ++b;
      }
    }
  }
};

// V of tiles [first, first + n): B^T d B, places `step` floats apart. zeros: four pixels of them.
template <class Form>
inline void transform_input(const Image& x, const Tiles& tiles, int64_t first, int64_t n,
                            const float* zeros, float* v, int64_t step) {
  constexpr int N = Form::inputs;
  const int64_t C = x.channels;
  tiles.each(first, n, [&](int64_t t, int64_t b, int64_t i0, int64_t j0) {
    float* to = v + t * C;
    const auto tile = [&](auto&& at) {
      for (int64_t c = 0; c < C; c += W)
        both_sides(
            Form::input, [&](int i, int j) { return load(at(i, j) + c); },
            [&](int i, int j, f32v d) { store(to + (Form::places * i + j) * step + c, d); });
    };
    const int64_t top = i0 * Form::input_step - 1, left = j0 * Form::input_step - 1;
    const float* rows[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i)
      rows[i] = top + i < 0 || top + i >= x.height ? zeros : x.at(b, top + i, left);
    if (left >= 0 && left + N <= x.width)
      return tile([&](int i, int j) { return rows[i] + j * C; });
    const float* places[N][N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const bool outside = rows[i] == zeros || left + j < 0 || left + j >= x.width;
        places[i][j] = outside ? zeros : rows[i] + j * C;
      }
    tile([&](int i, int j) { return places[i][j]; });
  });
}

}  // namespace
}  // namespace genfast::cpu
