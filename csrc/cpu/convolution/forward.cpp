// The convolution and its gradient by the input: weights into Winograd's domain, then blocks of
// tiles whose V and M stay in the second-level cache. Few channels go another way.
#include "cpu/convolution/narrow.h"
#include "cpu/convolution/winograd.h"
#include "cpu/parallel.h"

namespace genfast::cpu {
namespace {

inline f32v strided(const float* p, int64_t stride) {
  if (stride == 1) return load(p);
  f32v v;
  for (int l = 0; l < W; ++l) v[l] = p[l * stride];
  return v;
}

// U of outputs [o, o + W): G g G^T.
template <class Form>
void transform_weight(const Taps& w, int64_t o, int64_t inputs, int64_t outputs, float* u) {
  constexpr int P = Form::places;
  const int64_t first = o / NR * NR, step = inputs * outputs;
  const int columns = columns_of(first, outputs);
  float* panel = u + first * inputs + (o - first);
  const auto kernel = [&](const float* from, int64_t stride, auto&& to) {
    both_sides(
        Form::weight,
        [&](int r, int c) { return strided(from + r * w.row + c * w.column, stride); }, to);
  };
  if (w.o == 1) {  // vectors of outputs, as they lie in U
    for (int64_t i = 0; i < inputs; ++i)
      kernel(w.data + o + i * w.i, 1, [&](int r, int c, f32v value) {
        store(panel + (P * r + c) * step + i * columns, value);
      });
    return;
  }
  alignas(64) float turned[P * P][W][W];
  for (int64_t i = 0; i < inputs; i += W) {
    for (int l = 0; l < W; ++l)
      kernel(w.data + (o + l) * w.o + i * w.i, w.i,
             [&](int r, int c, f32v value) { store(turned[P * r + c][l], value); });
    for (int place = 0; place < P * P; ++place) {
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

// Y = A^T M A of tiles [first, first + n), places of M `step` floats apart.
template <class Form>
void transform_output(const Image& y, const Tiles& tiles, int64_t first, int64_t n, const float* m,
                      int64_t step, const float* bias, const float* term) {
  const int64_t C = y.channels, row = y.row();
  tiles.each(first, n, [&](int64_t t, int64_t b, int64_t i0, int64_t j0) {
    const int64_t top = i0 * Form::output_step, left = j0 * Form::output_step;
    float* to = y.at(b, top, left);
    const float* plus = term == nullptr ? nullptr : term + (to - y.data);
    const float* from = m + t * C;
    const bool below = top + 1 < y.height, right = left + 1 < y.width;
    for (int64_t c = 0; c < C; c += W) {
      const f32v shift = bias == nullptr ? f32v{} : load(bias + c);
      both_sides(
          Form::output,
          [&](int i, int j) { return load(from + (Form::places * i + j) * step + c); },
          [&](int i, int j, f32v value) {
            if ((i == 1 && !below) || (j == 1 && !right)) return;
            const int64_t at = i * row + j * C + c;
            value += shift;
            store(to + at, plus == nullptr ? value : value + load(plus + at));
          });
    }
  });
}

// y = x by projection [O][C], the products of a 1 x 1 convolution.
void project(const Image& x, const TensorView& projection, const Image& y, int threads) {
  const int64_t C = x.channels, O = y.channels, rows = y.count * y.height * y.width;
  Memory memory(4 * C * O);  // [panel][C][columns]
  float* panels = reinterpret_cast<float*>(memory.data());
  const float* from = static_cast<const float*>(projection.data);
  for (int64_t o = 0; o < O; ++o)
    for (int64_t c = 0; c < C; ++c) {
      const int64_t first = o / NR * NR;
      panels[first * C + c * columns_of(first, O) + (o - first)] =
          from[o * projection.strides[0] + c * projection.strides[1]];
    }
  constexpr int64_t block = 16 * MR;
  parallel_for((rows + block - 1) / block, threads, [&](int64_t n) {
    const int64_t first = n * block;
    const int m = static_cast<int>(std::min(block, rows - first));
    for (int64_t o = 0; o < O; o += NR)
      multiply<false>(m, columns_of(o, O), C, x.data + first * C, C, panels + o * C,
                      columns_of(o, O), store_rows(y.data + first * O + o, O));
  });
}

template <class Form>
void convolve(const ConvolutionParams& p) {
  constexpr int places = Form::places * Form::places;
  const Image x(p.x), y(p.y);
  const Tiles tiles(y, Form::output_step);
  const int64_t I = x.channels, O = y.channels, count = tiles.count;
  if (count == 0) return;
  const bool projects = p.projection.defined();
  if (projects) project(Image(p.term), p.projection, y, p.threads);
  const float* term = projects ? y.data : static_cast<const float*>(p.term.data);

  // V and M of a block in 256 KiB, half of the smallest second-level cache; whole rows of the
  // product; at least one block a thread.
  const int64_t fair = (count + workers(p.threads, count) - 1) / workers(p.threads, count);
  const int64_t most = std::max<int64_t>(65536 / (places * (I + O)), 1);
  const int64_t block = round_up(std::min(fair, most), MR);
  const int64_t blocks = (count + block - 1) / block;
  const int64_t of_v = odd_lines(block * I), of_m = odd_lines(block * O), of_u = I * O;

  Memory weights(4 * (places * of_u + 4 * I));
  float* u = reinterpret_cast<float*>(weights.data());
  float* zeros = u + places * of_u;
  std::fill(zeros, zeros + 4 * I, 0.0f);
  const Taps taps(p.weight, p.transposed);
  parallel_for(O / W, p.threads, [&](int64_t n) { transform_weight<Form>(taps, n * W, I, O, u); });

  Slots slots(workers(p.threads, blocks), 4 * places * (of_v + of_m));
  parallel_for(blocks, p.threads, [&](int64_t n) {
    slots.with([&](char* base) {
      float* v = reinterpret_cast<float*>(base);
      float* m = v + places * of_v;
      const int64_t first = n * block, rows = std::min(block, count - first);
      transform_input<Form>(x, tiles, first, rows, zeros, v, of_v);
      for (int place = 0; place < places; ++place)
        for (int64_t o = 0; o < O; o += NR)
          multiply<false>(static_cast<int>(rows), columns_of(o, O), I, v + place * of_v, I,
                          u + place * of_u + o * I, columns_of(o, O),
                          store_rows(m + place * of_m + o, O));
      transform_output<Form>(y, tiles, first, rows, m, of_m, static_cast<const float*>(p.bias.data),
                             term);
    });
  });
}

}  // namespace

namespace GENFAST_ISA {

void convolution(const ConvolutionParams& p) {
  advise_huge_pages(p.y.data, 4 * p.y.numel);
  if (p.x.shape[1] <= kNarrow)
    with_few(p.x.shape[1], [&](auto few) { spread<decltype(few)::value>(p); });
  else if (p.y.shape[1] <= kNarrow)
    with_few(p.y.shape[1], [&](auto few) { gather<decltype(few)::value>(p); });
  else if (!p.enlarged)
    convolve<Whole>(p);
  else if (p.transposed)
    convolve<Reducing>(p);
  else
    convolve<Enlarging>(p);
}

}  // namespace GENFAST_ISA
}  // namespace genfast::cpu
