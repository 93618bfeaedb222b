// The gradients by weight and bias: dU = sum over tiles of V^T dM, in slabs of tiles that are cut
// by the shape alone and summed in their order, so that threads change no bit.
#include "cpu/convolution/winograd.h"
#include "cpu/parallel.h"

namespace genfast::cpu {
namespace {

constexpr int64_t kSlabs = 16;       // at most: that many can work side by side
constexpr int64_t kSlabTiles = 128;  // at least: a slab has sums of its own to write and to read

// dM = A dY A^T of tiles [first, first + count); dY joins sums [channels].
void transform_grad(const Image& y, int64_t first, int64_t count, float* m, int64_t step,
                    float* sums) {
  const int64_t C = y.channels, row = y.W_ * C;
  y.each(first, count, [&](int64_t t, const float* image, int64_t i0, int64_t j0) {
    const float* from = image + i0 * row + j0 * C;
    const bool below = i0 + 1 < y.H, right = j0 + 1 < y.W_;
    for (int64_t c = 0; c < C; c += W) {
      f32v total{};
      both_sides<2, 4>(
          [](auto& s, auto& p) { spread_rows(s, p); },
          [&](int i, int j) {
            if ((i == 1 && !below) || (j == 1 && !right)) return f32v{};
            const f32v value = load(from + i * row + j * C + c);
            total += value;
            return value;
          },
          [&](int i, int j, f32v value) { store(m + t * C + (4 * i + j) * step + c, value); });
      store(sums + c, load(sums + c) + total);
    }
  });
}

// The kernels of output o: G^T dU G, of the sum of all slabs.
void transform_back(const float* u, int64_t slabs, int64_t step, int64_t o, int64_t inputs,
                    int64_t outputs, const TensorView& w) {
  float* to = static_cast<float*>(w.data) + o * w.strides[0];
  for (int64_t i = 0; i < inputs; ++i)
    both_sides<4, 3>([](auto& t, auto& g) { gather_rows(t, g); },
                     [&](int r, int c) {
                       const float* from = u + ((4 * r + c) * inputs + i) * outputs + o;
                       f32v total = load(from);
                       for (int64_t s = 1; s < slabs; ++s) total += load(from + s * step);
                       return total;
                     },
                     [&](int r, int c, f32v value) {
                       float* at = to + i * w.strides[1] + r * w.strides[2] + c * w.strides[3];
                       for (int l = 0; l < W; ++l) at[l * w.strides[0]] = value[l];
                     });
}

}  // namespace

namespace GENFAST_ISA {

void convolution_weight(const ConvolutionWeightParams& p) {
  const Image x(p.x), y(p.grad);
  const int64_t I = x.channels, O = y.channels, tiles = x.tiles;
  const int64_t slabs = std::clamp<int64_t>(tiles / kSlabTiles, 1, kSlabs);
  const int64_t block = round_up(std::max<int64_t>(65536 / (kPlaces * (I + O)), 1), MR);
  const int64_t of_v = odd_lines(block * I), of_m = odd_lines(block * O), of_u = I * O;
  const int64_t step = kPlaces * of_u + O;  // of a slab: dU [place][I][O], then the bias's [O]

  Memory memory(4 * (slabs * step + 4 * I));
  float* u = reinterpret_cast<float*>(memory.data());
  float* zeros = u + slabs * step;
  std::fill(zeros, zeros + 4 * I, 0.0f);

  Slots slots(workers(p.threads, slabs), 4 * (kPlaces * (of_v + of_m) + O));
  parallel_for(slabs, p.threads, [&](int64_t n) {
    slots.with([&](char* base) {
      float* v = reinterpret_cast<float*>(base);
      float* m = v + kPlaces * of_v;
      float* sums = m + kPlaces * of_m;
      float* du = u + n * step;
      float* db = du + kPlaces * of_u;
      std::fill(db, db + O, 0.0f);
      const int64_t begin = n * tiles / slabs, end = (n + 1) * tiles / slabs;
      for (int64_t first = begin; first < end || first == begin; first += block) {
        const int64_t count = std::min(block, end - first);
        std::fill(sums, sums + O, 0.0f);
        transform_input(x, first, count, zeros, v, of_v);
        transform_grad(y, first, count, m, of_m, sums);
        for (int64_t c = 0; c < O; c += W) store(db + c, load(db + c) + load(sums + c));
        for (int place = 0; place < kPlaces; ++place)
          for (int64_t o = 0; o < O; o += NR) {
            float* to = du + place * of_u + o;
            multiply<true>(static_cast<int>(I), columns_of(o, O), count, v + place * of_v, I,
                           m + place * of_m + o, O, [&](int row0, auto& acc) {
#pragma GCC unroll 16
                             for (auto& row : acc) {
                               float* at = to + row0++ * O;
#pragma GCC unroll 4
                               for (f32v& value : row) {
                                 store(at, first == begin ? value : value + load(at));
                                 at += W;
                               }
                             }
                           });
          }
      }
    });
  });

  parallel_for(O / W, p.threads,
               [&](int64_t n) { transform_back(u, slabs, step, n * W, I, O, p.dweight); });
  if (!p.dbias.defined()) return;
  float* db = static_cast<float*>(p.dbias.data);
  for (int64_t c = 0; c < O; c += W) {
    f32v total{};
    for (int64_t s = 0; s < slabs; ++s) total += load(u + s * step + kPlaces * of_u + c);
    store(db + c, total);
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast::cpu
