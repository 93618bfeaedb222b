// The key/value cache: new rows are written behind the old ones, through the page table when there
// is one, keys (and queries) rotated on the way (rotary embedding, Su et al. 2021).
#pragma once
#include "cpu/attention/geometry.h"

namespace genfast::cpu {
namespace {

struct Append {
  const AttentionAppendParams& a;

  int64_t length(int64_t b) const { return a.seqlens_k != nullptr ? a.seqlens_k[b] : 0; }
  int64_t position(int64_t b, int64_t i) const {
    return length(b) - (a.leftpad_k != nullptr ? a.leftpad_k[b] : 0) + i;
  }

  // x (dim, fp32) at a position: pairs (x0, x1) -> (x0 cos - x1 sin, x0 sin + x1 cos).
  void rotate(float* x, int64_t at) const {
    const int64_t half = a.rotary_dim / 2;
    float cos[kMaxDim / 2], sin[kMaxDim / 2];
    const int64_t skip = at * a.rotary_stride * dtype_bytes(a.rotary_dtype);
    to_f32(static_cast<const char*>(a.cos) + skip, a.rotary_dtype, static_cast<int>(half), cos);
    to_f32(static_cast<const char*>(a.sin) + skip, a.rotary_dtype, static_cast<int>(half), sin);
    const int64_t step = a.rotary_interleaved ? 2 : 1, other = a.rotary_interleaved ? 1 : half;
    for (int64_t r = 0; r < half; ++r) {
      const float x0 = x[r * step], x1 = x[r * step + other];
      x[r * step] = x0 * cos[r] - x1 * sin[r];
      x[r * step + other] = x0 * sin[r] + x1 * cos[r];
    }
  }

  void rotated_row(const char* from, char* to, int64_t at) const {
    float x[kMaxDim];
    to_f32(from, a.dtype, static_cast<int>(a.D), x);
    rotate(x, at);
    from_f32(x, static_cast<int>(a.D), to, a.dtype);
  }

  void append_keys(int64_t b, int64_t h) const {
    const int bytes = dtype_bytes(a.dtype);
    for (int64_t i = 0; i < a.S_new; ++i) {
      int64_t row = length(b) + i;
      if (row < 0 || row >= a.capacity) continue;
      int64_t entry = a.cache_batch_idx != nullptr ? a.cache_batch_idx[b] : b;
      if (a.block_table != nullptr) {
        entry = a.block_table[b * a.block_table_stride + row / a.page_size];
        row %= a.page_size;
      }
      const char* k = row_at(a.k_new, a.dtype, b, h, i);
      char* to = row_at(a.k_cache, a.dtype, entry, h, row);
      if (a.cos != nullptr)
        rotated_row(k, to, position(b, i));
      else
        __builtin_memcpy(to, k, a.D * bytes);
      __builtin_memcpy(row_at(a.v_cache, a.dtype, entry, h, row), row_at(a.v_new, a.dtype, b, h, i),
                       a.Dv * bytes);
    }
  }

  void rotate_queries(int64_t b, int64_t h) const {
    for (int64_t i = 0; i < a.Sq; ++i)
      rotated_row(row_at(a.q, a.dtype, b, h, i), row_at(a.q_out, a.dtype, b, h, i),
                  position(b, a.q_same_position ? 0 : i));
  }
};

}  // namespace
}  // namespace genfast::cpu
