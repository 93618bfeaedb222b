// The ends of a network, images of up to four channels on one side: F of them, many on the other.
// A Winograd tile would be mostly transforms. So, on the products of the microkernel:
//   spread   few to many: patches [pixel][3 3 F + 1] by the kernels, the last 1 by the bias
//   gather   many to few: every pixel by all kernels, [pixel][3 3 F], whose nine shifts are summed
//   weight   patches transposed by the image of many channels
// oneDNN takes 16 -> 1 channel in 10 times the time of reading 16.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cpu/convolution/image.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace genfast::cpu {
namespace {

constexpr int64_t kNarrow = 4;

template <class Fn>
void with_few(int64_t channels, Fn&& fn) {
  if (channels == 1) return fn(std::integral_constant<int, 1>{});
  if (channels == 2) return fn(std::integral_constant<int, 2>{});
  if (channels == 3) return fn(std::integral_constant<int, 3>{});
  fn(std::integral_constant<int, 4>{});
}

// Of one row of pixels, [pixel][3 3 F + 1]: what its kernel sees, zeros outside, and a 1.
template <int F>
void patches(const Image& x, int64_t b, int64_t i, float* to) {
  constexpr int kSide = 3 * F, kLength = 3 * kSide + 1;
  for (int64_t j = 0; j < x.width; ++j) to[j * kLength + 3 * kSide] = 1.0f;
  for (int r = 0; r < 3; ++r, to += kSide) {
    const int64_t row = i + r - 1;
    if (row < 0 || row >= x.height) {
      for (int64_t j = 0; j < x.width; ++j) std::fill_n(to + j * kLength, kSide, 0.0f);
      continue;
    }
    const float* from = x.at(b, row, 0);
    const auto copy = [&](int64_t j, int first, int last) {  // of its three pixels
      for (int k = first * F; k < last * F; ++k) to[j * kLength + k] = from[(j - 1) * F + k];
    };
    const int64_t last = x.width - 1;
    std::fill_n(to, F, 0.0f);
    copy(0, 1, last > 0 ? 3 : 2);
    for (int64_t j = 1; j < last; ++j)
      __builtin_memcpy(to + j * kLength, from + (j - 1) * F, sizeof(float) * kSide);
    if (last > 0) copy(last, 0, 2);
    std::fill_n(to + last * kLength + 2 * F, F, 0.0f);
  }
}

// Rows of `width` pixels in blocks of about so many pixels.
inline int64_t rows_of(int64_t pixels, int64_t width) {
  return std::max<int64_t>(1, pixels / std::max<int64_t>(1, width));
}

template <int F>
void spread(const ConvolutionParams& p) {
  constexpr int kDeep = 9 * F + 1;
  const Image x(p.x), y(p.y);
  const int64_t C = y.channels, rows = y.count * y.height;
  if (rows * y.width == 0) return;
  const Taps taps(p.weight, p.transposed);
  const float* bias = static_cast<const float*>(p.bias.data);
  const Memory memory(4 * kDeep * C);  // [panel][9 F + 1][columns]
  float* panels = reinterpret_cast<float*>(memory.data());
  for (int64_t o = 0; o < C; ++o) {
    const int64_t first = o / NR * NR;
    float* to = panels + first * kDeep + (o - first);
    const int columns = columns_of(first, C);
    for (int t = 0; t < 9; ++t)
      for (int c = 0; c < F; ++c, to += columns) *to = taps.at(o, c, t / 3, t % 3);
    *to = bias == nullptr ? 0.0f : bias[o];
  }
  const int64_t block = rows_of(192, y.width), blocks = (rows + block - 1) / block;
  Slots slots(workers(p.threads, blocks), 4 * block * y.width * kDeep);
  parallel_for(blocks, p.threads, [&](int64_t n) {
    slots.with([&](char* base) {
      float* seen = reinterpret_cast<float*>(base);
      const int64_t first = n * block, count = std::min(block, rows - first);
      for (int64_t r = 0; r < count; ++r)
        patches<F>(x, (first + r) / y.height, (first + r) % y.height, seen + r * y.width * kDeep);
      float* to = y.data + first * y.width * C;
      for (int64_t o = 0; o < C; o += NR)
        multiply<false>(static_cast<int>(count * y.width), columns_of(o, C), kDeep, seen, kDeep,
                        panels + o * kDeep, columns_of(o, C), store_rows(to + o, C));
    });
  });
}

template <int F>
void gather(const ConvolutionParams& p) {
  constexpr int kColumns = round_up(9 * F, 16);
  const Image x(p.x), y(p.y);
  const int64_t C = x.channels, rows = y.count * y.height, width = y.width;
  if (rows * width == 0) return;
  const Taps taps(p.weight, p.transposed);
  float bias[F] = {};
  if (p.bias.defined()) std::copy_n(static_cast<const float*>(p.bias.data), F, bias);
  const Memory memory(4 * C * kColumns);  // [panel][channel][columns]
  float* panels = reinterpret_cast<float*>(memory.data());
  std::fill_n(panels, C * kColumns, 0.0f);
  for (int t = 0; t < 9; ++t)
    for (int o = 0; o < F; ++o) {
      const int column = t * F + o, first = column / NR * NR;
      for (int64_t c = 0; c < C; ++c)
        panels[first * C + c * columns_of(first, kColumns) + (column - first)] =
            taps.at(o, c, t / 3, t % 3);
    }
  // A task: rows of one image, of which it makes two more.
  const int64_t least = rows_of(1024, width);
  const int64_t parts = std::clamp<int64_t>(y.height / std::max<int64_t>(least, 8), 1, y.height);
  const int64_t of_row = (width + 2) * kColumns;
  Slots slots(workers(p.threads, y.count * parts), 4 * 3 * of_row);
  parallel_for(y.count * parts, p.threads, [&](int64_t task) {
    slots.with([&](char* base) {
      float* all = reinterpret_cast<float*>(base);  // three rows, a zero pixel before and behind
      std::fill_n(all, 3 * of_row, 0.0f);
      const auto row_at = [&](int64_t i) { return all + (i + 3) % 3 * of_row; };
      const int64_t b = task / parts, part = task % parts;
      const int64_t begin = part * y.height / parts, end = (part + 1) * y.height / parts;
      const auto make = [&](int64_t i) {
        float* to = row_at(i) + kColumns;
        if (i < 0 || i >= x.height) return (void)std::fill_n(to, width * kColumns, 0.0f);
        for (int o = 0; o < kColumns; o += NR)
          multiply<false>(static_cast<int>(width), columns_of(o, kColumns), C, x.at(b, i, 0), C,
                          panels + o * C, columns_of(o, kColumns), store_rows(to + o, kColumns));
      };
      make(begin - 1), make(begin);
      for (int64_t i = begin; i < end; ++i) {
        make(i + 1);
        const float* three[3] = {row_at(i - 1), row_at(i), row_at(i + 1)};
        float* to = y.at(b, i, 0);
        for (int64_t j = 0; j < width; ++j)
          for (int o = 0; o < F; ++o) {
            float sum[3];
            for (int r = 0; r < 3; ++r) {
              const float* from = three[r] + j * kColumns + 3 * r * F + o;
              sum[r] = from[0] + from[kColumns + F] + from[2 * (kColumns + F)];
            }
            to[j * F + o] = (sum[0] + sum[1]) + (sum[2] + bias[o]);
          }
      }
    });
  });
}

// Sums [3 3 F + 1][C] over pixels q of few[q + tap] many[q], in slabs of rows that are cut by the
// shape alone. Where the gradient is the image of few channels, taps count backwards.
template <int F>
void narrow_weight(const ConvolutionWeightParams& p) {
  constexpr int kDeep = 9 * F + 1;
  constexpr int64_t kMostSlabs = 16, kPixels = 1024;  // of a slab, at least
  const bool entering = p.x.shape[1] == F;
  const Image few(entering ? p.x : p.grad), many(entering ? p.grad : p.x);
  const int64_t C = many.channels, width = many.width, rows = many.count * many.height;
  const int64_t slabs = std::clamp<int64_t>(rows * width / kPixels, 1, kMostSlabs);
  const int64_t block = rows_of(192, width), step = kDeep * C;
  const Memory memory(8 * slabs * F + 4 * slabs * step);
  double* of_few = reinterpret_cast<double*>(memory.data());  // [slab][F]: the sums of few
  float* sums = reinterpret_cast<float*>(of_few + slabs * F);
  Slots slots(workers(p.threads, slabs), 4 * block * width * kDeep);
  parallel_for(slabs, p.threads, [&](int64_t n) {
    slots.with([&](char* base) {
      float *seen = reinterpret_cast<float*>(base), *own = sums + n * step;
      double* total = of_few + n * F;
      std::fill_n(own, step, 0.0f), std::fill_n(total, F, 0.0);
      const int64_t begin = n * rows / slabs, end = (n + 1) * rows / slabs;
      for (int64_t first = begin; first < end; first += block) {
        const int64_t count = std::min(block, end - first);
        for (int64_t r = 0; r < count; ++r)
          patches<F>(few, (first + r) / few.height, (first + r) % few.height,
                     seen + r * width * kDeep);
        const float* with = many.data + first * width * C;
        for (int64_t c = 0; c < C; c += NR)
          multiply<true>(kDeep, columns_of(c, C), count * width, seen, kDeep, with + c, C,
                         store_rows(own + c, C, true));
        for (int64_t q = 0; q < count * width; ++q)  // the middle of a patch
          for (int f = 0; f < F; ++f) total[f] += seen[q * kDeep + 4 * F + f];
      }
    });
  });
  const TensorView& w = p.dweight;
  float* dbias = static_cast<float*>(p.dbias.data);
  for (int64_t c = 0; c < C; ++c)
    for (int k = 0; k < kDeep; ++k) {
      float sum = sums[k * C + c];
      for (int64_t s = 1; s < slabs; ++s) sum += sums[s * step + k * C + c];
      if (k == kDeep - 1) {
        if (entering && dbias != nullptr) dbias[c] = sum;
        continue;
      }
      const int f = k % F, tap = entering ? k / F : 8 - k / F;
      static_cast<float*>(
          w.data)[(entering ? c : f) * w.strides[0] + (entering ? f : c) * w.strides[1] +
                  tap / 3 * w.strides[2] + tap % 3 * w.strides[3]] = sum;
    }
  if (entering || dbias == nullptr) return;
  for (int f = 0; f < F; ++f) {
    double total = 0;
    for (int64_t s = 0; s < slabs; ++s) total += of_few[s * F + f];
    dbias[f] = static_cast<float>(total);
  }
}

}  // namespace
}  // namespace genfast::cpu
