// Operands of any dtype and stride into the aligned layouts that the products read, in words: an
// fp32 element for the vector unit; for the matrix unit two bf16 that lie side by side in depth.
//   rows:    [row][ld], ld an odd number of cache lines, so that a column of rows spreads over all
//            L1 sets (with ld = 128 floats, 96 rows would share 8 of the 64 sets)
//   columns: [panel][depth][NR], the transpose of rows: panel p holds rows p NR ... p NR + NR - 1
//   panels:  [panel][row or pair of rows][NR], columns p NR ... of every row
#pragma once
#include "cpu/attention/matrix.h"
#include "cpu/convert.h"
#include "cpu/scratch.h"
#include "cpu/transpose.h"

namespace genfast::cpu {
namespace {

constexpr int kMaxDim = 512;

struct alignas(64) RowBuffer {
  float data[W * kMaxDim];
};

// One row as fp32, zero up to a whole vector: the row itself where it already is that.
inline const float* row_f32(const char* row, Dtype dtype, int dim, float* buffer) {
  if (dtype == Dtype::f32 && dim % W == 0) return reinterpret_cast<const float*>(row);
  to_f32(row, dtype, dim, buffer);
  for (int d = dim; d < round_up(dim, W); ++d) buffer[d] = 0.0f;
  return buffer;
}

inline void pack_rows(const char* const* rows, int n, Dtype dtype, int dim, float factor, float* to,
                      int64_t ld) {
  RowBuffer buffer;
  for (int r = 0; r < n; ++r) {
    const float* from = row_f32(rows[r], dtype, dim, buffer.data);
    for (int d = 0; d < dim; d += W) store(to + r * ld + d, load(from + d) * factor);
  }
}

template <class Unit>
inline void pack_columns(const char* const* rows, int n, Dtype dtype, int dim, float* to) {
  RowBuffer buffer;
  const int64_t depth = round_up(Unit::words(dim), W);
  for (int j = 0; j < n; j += W) {
    const int count = n - j < W ? n - j : W;
    const float* from[W];
    for (int r = 0; r < count; ++r)
      from[r] = Unit::row(rows[j + r], dtype, dim, buffer.data + r * depth);
    float* panel = to + (j / NR) * depth * NR + j % NR;
    for (int d = 0; d < depth; d += W) {
      f32v v[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) v[r] = r < count ? load(from[r] + d) : f32v{};
      transpose(v);
#pragma GCC unroll 16
      for (int t = 0; t < W; ++t) store(panel + (d + t) * NR, v[t]);
    }
  }
}

// `capacity` rows are laid out per panel, n of them filled.
inline void pack_panels(const char* const* rows, int n, Dtype dtype, int dim, int64_t capacity,
                        float* to) {
  RowBuffer buffer;
  for (int r = 0; r < n; ++r) {
    const float* from = row_f32(rows[r], dtype, dim, buffer.data);
    for (int d = 0; d < dim; d += W)
      store(to + (d / NR) * capacity * NR + r * NR + d % NR, load(from + d));
  }
}

// Rows of fp32 times factor[r] to memory.
inline void unpack_rows(const float* from, int64_t ld, int n, int dim, const float* factor,
                        char* const* rows, Dtype dtype) {
  RowBuffer buffer;
  for (int r = 0; r < n; ++r) {
    const bool direct = dtype == Dtype::f32 && dim % W == 0;
    float* to = direct ? reinterpret_cast<float*>(rows[r]) : buffer.data;
    for (int d = 0; d < dim; d += W) store(to + d, load(from + r * ld + d) * factor[r]);
    if (!direct) from_f32(to, dim, rows[r], dtype);
  }
}

// ---- what computes the products -----------------------------------------------------------------

// FMAs on fp32 copies of the operands.
struct VectorUnit {
  struct Turn {};  // what a thread holds while it works
  static constexpr bool matrix = false;
  static constexpr int rows = MR;  // of a row block
  static constexpr int depth = 1;  // elements of a word
  static constexpr int whole = 1;  // buffers have room for a multiple of this many rows
  static int64_t words(int64_t dim) { return dim; }
  static const float* row(const char* row, Dtype dtype, int dim, float* buffer) {
    return row_f32(row, dtype, dim, buffer);
  }
  static constexpr auto pack_rows = cpu::pack_rows;
  static constexpr auto pack_panels = cpu::pack_panels;
};

#if defined(__AVX512BF16__)
// Words of bf16 operands as they are: nothing is rounded, so scale comes after the product.
struct MatrixUnit {
  using Turn = MatrixTurn;
  static constexpr bool matrix = true;
  static constexpr int rows = 2 * kTile;
  static constexpr int depth = 2;
  static constexpr int whole = kTile;
  static int64_t words(int64_t dim) { return round_up(dim, 2 * kTile) / 2; }

  // Zero up to whole tiles: the row itself where it already is that.
  static const float* row(const char* row, Dtype, int dim, float* buffer) {
    if (dim % (2 * kTile) == 0) return reinterpret_cast<const float*>(row);
    char* to = reinterpret_cast<char*>(buffer);
    __builtin_memcpy(to, row, 2 * dim);
    __builtin_memset(to + 2 * dim, 0, 4 * words(dim) - 2 * dim);
    return buffer;
  }

  static void pack_rows(const char* const* rows, int n, Dtype dtype, int dim, float, float* to,
                        int64_t ld) {
    RowBuffer buffer;
    for (int r = 0; r < n; ++r) {
      const float* from = row(rows[r], dtype, dim, buffer.data);
      for (int64_t d = 0; d < words(dim); d += W) store(to + r * ld + d, load(from + d));
    }
  }

  // Pairs of rows; zeros behind the last row up to whole tiles.
  static void pack_panels(const char* const* rows, int n, Dtype dtype, int dim, int64_t capacity,
                          float* to) {
    alignas(64) static constexpr float zeros[kMaxDim / 2] = {};
    RowBuffer even, odd;
    for (int r = 0; r < round_up(n, 2 * kTile); r += 2) {
      const float* x = r < n ? row(rows[r], dtype, dim, even.data) : zeros;
      const float* y = r + 1 < n ? row(rows[r + 1], dtype, dim, odd.data) : zeros;
      for (int64_t d = 0; d < words(dim); d += W) {  // a vector of pairs is one panel's row
        f32v low, high;
        interleave_halves(load(x + d), load(y + d), low, high);
        float* panel = to + (d / W * capacity + r) / 2 * NR;
        store(panel, low);
        store(panel + W, high);
      }
    }
  }
};
#endif

}  // namespace
}  // namespace genfast::cpu
