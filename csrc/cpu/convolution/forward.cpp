// The convolution and its gradient by the input: weights into Winograd's domain, then blocks of
// tiles whose V and M stay in the second-level cache.
#include "cpu/convolution/winograd.h"
#include "cpu/parallel.h"

namespace genfast::cpu {
namespace {

// The kernel of output o and input i, as strides: of the transposed convolution it is turned round.
struct Taps {
  const float* data;
  int64_t o, i, row, column;

  Taps(const TensorView& w, bool transposed)
      : data(static_cast<const float*>(w.data)),
        o(w.strides[transposed ? 1 : 0]),
        i(w.strides[transposed ? 0 : 1]),
        row(w.strides[2]),
        column(w.strides[3]) {
    if (!transposed) return;
    data += 2 * (row + column);
    row = -row, column = -column;
  }
};

inline f32v strided(const float* p, int64_t stride) {
  if (stride == 1) return load(p);
  f32v v;
  for (int l = 0; l < W; ++l) v[l] = p[l * stride];
  return v;
}

// U of outputs [o, o + W): G g G^T.
void transform_weight(const Taps& w, int64_t o, int64_t inputs, int64_t outputs, float* u) {
  const int64_t first = o / NR * NR, step = inputs * outputs;
  const int columns = columns_of(first, outputs);
  float* panel = u + first * inputs + (o - first);
  const auto kernel = [&](const float* from, int64_t stride, auto&& to) {
    both_sides<3, 4>([](auto& g, auto& t) { weight_rows(g, t); },
                     [&](int r, int c) { return strided(from + r * w.row + c * w.column, stride); },
                     to);
  };
  if (w.o == 1) {  // vectors of outputs, as they lie in U
    for (int64_t i = 0; i < inputs; ++i)
      kernel(w.data + o + i * w.i, 1, [&](int r, int c, f32v value) {
        store(panel + (4 * r + c) * step + i * columns, value);
      });
    return;
  }
  alignas(64) float turned[kPlaces][W][W];
  for (int64_t i = 0; i < inputs; i += W) {
    for (int l = 0; l < W; ++l)
      kernel(w.data + (o + l) * w.o + i * w.i, w.i,
             [&](int r, int c, f32v value) { store(turned[4 * r + c][l], value); });
    for (int place = 0; place < kPlaces; ++place) {
      f32v v[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) v[l] = load(turned[place][l]);
      transpose(v);
      float* to = panel + place * step + i * columns;
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) store(to + l * columns, v[l]);
    }
  }
}

// Y = A^T M A of tiles [first, first + count), places of M `step` floats apart.
void transform_output(const Image& y, int64_t first, int64_t count, const float* m, int64_t step,
                      const float* bias, const float* add) {
  const int64_t C = y.channels, row = y.W_ * C;
  y.each(first, count, [&](int64_t t, float* image, int64_t i0, int64_t j0) {
    float* to = image + i0 * row + j0 * C;
    const float* term = add == nullptr ? nullptr : add + (to - y.data);
    const float* from = m + t * C;
    const bool below = i0 + 1 < y.H, right = j0 + 1 < y.W_;
    for (int64_t c = 0; c < C; c += W) {
      const f32v b = bias == nullptr ? f32v{} : load(bias + c);
      both_sides<4, 2>([](auto& p, auto& s) { output_rows(p, s); },
                       [&](int i, int j) { return load(from + (4 * i + j) * step + c); },
                       [&](int i, int j, f32v value) {
                         if ((i == 1 && !below) || (j == 1 && !right)) return;
                         const int64_t at = i * row + j * C + c;
                         value += b;
                         store(to + at, term == nullptr ? value : value + load(term + at));
                       });
    }
  });
}

}  // namespace

namespace GENFAST_ISA {

void convolution(const ConvolutionParams& p) {
  const Image x(p.x), y(p.y);
  const int64_t I = x.channels, O = y.channels, tiles = x.tiles;
  if (tiles == 0) return;
  // V and M of a block in 256 KiB, half of the smallest second-level cache; whole rows of the
  // product; at least one block a thread.
  const int64_t fair = (tiles + workers(p.threads, tiles) - 1) / workers(p.threads, tiles);
  const int64_t block =
      round_up(std::min(fair, std::max<int64_t>(65536 / (kPlaces * (I + O)), 1)), MR);
  const int64_t blocks = (tiles + block - 1) / block;
  const int64_t of_v = odd_lines(block * I), of_m = odd_lines(block * O), of_u = I * O;

  Memory weights(4 * (kPlaces * of_u + 4 * I));
  float* u = reinterpret_cast<float*>(weights.data());
  float* zeros = u + kPlaces * of_u;
  std::fill(zeros, zeros + 4 * I, 0.0f);
  const Taps taps(p.weight, p.transposed);
  parallel_for(O / W, p.threads, [&](int64_t n) { transform_weight(taps, n * W, I, O, u); });

  Slots slots(workers(p.threads, blocks), 4 * kPlaces * (of_v + of_m));
  parallel_for(blocks, p.threads, [&](int64_t n) {
    slots.with([&](char* base) {
      float* v = reinterpret_cast<float*>(base);
      float* m = v + kPlaces * of_v;
      const int64_t first = n * block, count = std::min(block, tiles - first);
      transform_input(x, first, count, zeros, v, of_v);
      for (int place = 0; place < kPlaces; ++place)
        for (int64_t o = 0; o < O; o += NR) {
          const int columns = columns_of(o, O);
          float* to = m + place * of_m + o;
          multiply<false>(static_cast<int>(count), columns, I, v + place * of_v, I,
                          u + place * of_u + o * I, columns, [&](int row0, auto& acc) {
#pragma GCC unroll 16
                            for (auto& row : acc) {
                              float* at = to + row0++ * O;
#pragma GCC unroll 4
                              for (f32v& value : row) store(at, value), at += W;
                            }
                          });
        }
      transform_output(y, first, count, m, of_m, static_cast<const float*>(p.bias.data),
                       static_cast<const float*>(p.add.data));
    });
  });
}

}  // namespace GENFAST_ISA
}  // namespace genfast::cpu
