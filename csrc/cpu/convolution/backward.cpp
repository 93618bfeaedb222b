// The gradients by weight and bias: dU = sum over tiles of V^T dM, in slabs of tiles that are cut
// by the shape alone and summed in their order, so that threads change no bit.
#include "cpu/convolution/narrow.h"
#include "cpu/convolution/winograd.h"
#include "cpu/parallel.h"

namespace genfast::cpu {
namespace {

constexpr int64_t kSlabs = 16;       // at most: that many can work side by side
constexpr int64_t kSlabTiles = 128;  // at least: a slab has sums of its own to write and to read

// dM = A dY A^T of tiles [first, first + n); dY joins sums [channels].
template <class Form>
void transform_grad(const Image& y, const Tiles& tiles, int64_t first, int64_t n, float* m,
                    int64_t step, float* sums) {
  const int64_t C = y.channels, row = y.row();
  tiles.each(first, n, [&](int64_t t, int64_t b, int64_t i0, int64_t j0) {
    const int64_t top = i0 * Form::output_step, left = j0 * Form::output_step;
    const float* from = y.at(b, top, left);
    const bool below = top + 1 < y.height, right = left + 1 < y.width;
    for (int64_t c = 0; c < C; c += W) {
      f32v total{};
      both_sides(
          Form::grad,
          [&](int i, int j) {
            if ((i == 1 && !below) || (j == 1 && !right)) return f32v{};
            const f32v value = load(from + i * row + j * C + c);
            total += value;
            return value;
          },
          [&](int i, int j, f32v value) {
            store(m + t * C + (Form::places * i + j) * step + c, value);
          });
      store(sums + c, load(sums + c) + total);
    }
  });
}

// The kernels of outputs [o, o + W): G^T dU G, of the sum of all slabs.
template <class Form>
void transform_back(const float* u, int64_t slabs, int64_t step, int64_t o, int64_t inputs,
                    int64_t outputs, const TensorView& w) {
  float* to = static_cast<float*>(w.data) + o * w.strides[0];
  for (int64_t i = 0; i < inputs; ++i)
    both_sides(
        Form::weight_grad,
        [&](int r, int c) {
          const float* from = u + ((Form::places * r + c) * inputs + i) * outputs + o;
          f32v total = load(from);
          for (int64_t s = 1; s < slabs; ++s) total += load(from + s * step);
          return total;
        },
        [&](int r, int c, f32v value) {
          float* at = to + i * w.strides[1] + r * w.strides[2] + c * w.strides[3];
          for (int l = 0; l < W; ++l) at[l * w.strides[0]] = value[l];
        });
}

template <class Form>
void weight_gradient(const ConvolutionWeightParams& p) {
  constexpr int places = Form::places * Form::places;
  const Image x(p.x), y(p.grad);
  const Tiles tiles(y, Form::output_step);
  const int64_t I = x.channels, O = y.channels;
  const int64_t slabs = std::clamp<int64_t>(tiles.count / kSlabTiles, 1, kSlabs);
  const int64_t block = round_up(std::max<int64_t>(65536 / (places * (I + O)), 1), MR);
  const int64_t of_v = odd_lines(block * I), of_m = odd_lines(block * O), of_u = I * O;
  const int64_t step = places * of_u + O;  // of a slab: dU [place][I][O], then the bias's [O]

  Memory memory(4 * (slabs * step + 4 * I));
  float* u = reinterpret_cast<float*>(memory.data());
  float* zeros = u + slabs * step;
  std::fill(zeros, zeros + 4 * I, 0.0f);

  Slots slots(workers(p.threads, slabs), 4 * (places * (of_v + of_m) + O));
  parallel_for(slabs, p.threads, [&](int64_t n) {
    slots.with([&](char* base) {
      float* v = reinterpret_cast<float*>(base);
      float* m = v + places * of_v;
      float* sums = m + places * of_m;
      float* du = u + n * step;
      float* db = du + places * of_u;
      std::fill(du, du + step, 0.0f);
      const int64_t begin = n * tiles.count / slabs, end = (n + 1) * tiles.count / slabs;
      for (int64_t first = begin; first < end; first += block) {
        const int64_t rows = std::min(block, end - first);
        std::fill(sums, sums + O, 0.0f);
        transform_input<Form>(x, tiles, first, rows, zeros, v, of_v);
        transform_grad<Form>(y, tiles, first, rows, m, of_m, sums);
        for (int64_t c = 0; c < O; c += W) store(db + c, load(db + c) + load(sums + c));
        for (int place = 0; place < places; ++place)
          for (int64_t o = 0; o < O; o += NR)
            multiply<true>(static_cast<int>(I), columns_of(o, O), rows, v + place * of_v, I,
                           m + place * of_m + o, O, store_rows(du + place * of_u + o, O, true));
      }
    });
  });

  parallel_for(O / W, p.threads,
               [&](int64_t n) { transform_back<Form>(u, slabs, step, n * W, I, O, p.dweight); });
  if (!p.dbias.defined()) return;
  float* db = static_cast<float*>(p.dbias.data);
  for (int64_t c = 0; c < O; c += W) {
    f32v total{};
    for (int64_t s = 0; s < slabs; ++s) total += load(u + s * step + places * of_u + c);
    store(db + c, total);
  }
}

}  // namespace

namespace GENFAST_ISA {

void convolution_weight(const ConvolutionWeightParams& p) {
  if (std::min(p.x.shape[1], p.grad.shape[1]) <= kNarrow)
    with_few(std::min(p.x.shape[1], p.grad.shape[1]),
             [&](auto few) { narrow_weight<decltype(few)::value>(p); });
  else if (p.enlarged)
    weight_gradient<Enlarging>(p);
  else
    weight_gradient<Whole>(p);
}

}  // namespace GENFAST_ISA
}  // namespace genfast::cpu
