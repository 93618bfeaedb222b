// Where rows lie and which keys they see. Every later step works on two lists of rows:
//   a tile:  up to BR query rows of one key/value head, in the order (head of the group, position),
//            so a grouped-query decode step and a long prefill are the same thing;
//   a block: up to BC key rows, through the page table when there is one.
#pragma once
#include <cstdint>

#include "api/attention.h"
#include "cpu/attention/pack.h"
#include "math/attention.h"

namespace genfast::cpu {
namespace {

constexpr int BR = 96;  // query rows of a tile: a multiple of 6, 12 and 32

inline char* row_at(const AttentionRows& t, Dtype dtype, int64_t b, int64_t h, int64_t s) {
  return static_cast<char*>(t.data) +
         (b * t.b_stride + h * t.h_stride + s * t.s_stride) * dtype_bytes(dtype);
}

inline float& stat_at(const AttentionStats& t, int64_t b, int64_t h, int64_t s) {
  return t.data[b * t.b_stride + h * t.h_stride + s * t.s_stride];
}

// Key (or value) rows [first, first + n) of key/value head h.
inline void key_rows(const AttentionParams& p, const AttentionRows& t, const Sequence& s, int64_t h,
                     int64_t first, int n, const char** rows) {
  const int64_t step = t.s_stride * dtype_bytes(p.dtype);
  if (p.block_table == nullptr) {
    const char* row = row_at(t, p.dtype, s.entry, h, s.k_row + first);
    for (int j = 0; j < n; ++j) rows[j] = row + j * step;
    return;
  }
  const int32_t* table = p.block_table + s.b * p.block_table_stride;
  int64_t at = s.k_row + first;
  for (int j = 0; j < n;) {
    const int64_t in_page = at % p.page_size;
    const char* row = row_at(t, p.dtype, table[at / p.page_size], h, in_page);
    for (int64_t left = p.page_size - in_page; left > 0 && j < n; --left, ++j, ++at) {
      rows[j] = row;
      row += step;
    }
  }
}

// The rows of one tile and what they see. Rows: of a row block, which is clipped as a whole.
template <int Rows>
struct Tile {
  int n = 0;
  KeyRange seen{0, 0};        // union over rows
  int32_t head[BR];           // query head
  int64_t position[BR];       // within the sequence
  KeyRange keys[BR];          // visible keys
  KeyRange any[BR / Rows];    // per row block: keys some row sees
  KeyRange every[BR / Rows];  // keys every row sees
};

inline int64_t tile_count(int64_t rows) { return (rows + BR - 1) / BR; }

// Tile `index` of the rows of query heads [head, head + heads).
template <int Rows>
inline void make_tile(const AttentionParams& p, const Sequence& s, int64_t head, int64_t heads,
                      int64_t index, Tile<Rows>& t) {
  const int64_t first = index * BR, rows = s.Sq * heads;
  t.n = static_cast<int>(rows - first < BR ? rows - first : BR);
  int64_t g = first / s.Sq, i = first - g * s.Sq;
  t.seen = {s.Sk, 0};
  for (int r = 0; r < t.n; ++r) {
    t.head[r] = static_cast<int32_t>(head + g);
    t.position[r] = i;
    const KeyRange k = t.keys[r] = visible_keys(p, s, i);
    KeyRange& any = t.any[r / Rows];
    KeyRange& every = t.every[r / Rows];
    if (r % Rows == 0) any = {s.Sk, 0}, every = {0, s.Sk};
    if (k.lo < k.hi) {
      if (k.lo < any.lo) any.lo = k.lo;
      if (k.hi > any.hi) any.hi = k.hi;
    }
    if (k.lo > every.lo) every.lo = k.lo;
    if (k.hi < every.hi) every.hi = k.hi;
    if (++i == s.Sq) i = 0, ++g;
  }
  for (int rb = 0; rb * Rows < t.n; ++rb) {
    if (t.any[rb].lo >= t.any[rb].hi) continue;
    if (t.any[rb].lo < t.seen.lo) t.seen.lo = t.any[rb].lo;
    if (t.any[rb].hi > t.seen.hi) t.seen.hi = t.any[rb].hi;
  }
}

// Added to the last vector of a panel of `columns` columns: -inf behind the last one.
inline f32v past_end(int columns) {
  f32v v;
  for (int i = 0; i < W; ++i) v[i] = (columns - 1) % W < i ? -__builtin_inff() : 0.0f;
  return v;
}

// Columns of a block [first, first + n) that row block rb of a tile needs: whole panels, and
// whether all its rows see every one of them.
struct Span {
  int lo, hi;  // multiples of NR but for hi = n; empty when lo >= hi
  bool full;
};

template <int Rows>
inline Span span_of(const Tile<Rows>& t, int rb, int64_t first, int n) {
  const int64_t lo = t.any[rb].lo - first, hi = t.any[rb].hi - first;
  Span s;
  s.lo = static_cast<int>(lo <= 0 ? 0 : lo >= n ? n : lo / NR * NR);
  s.hi = static_cast<int>(hi >= n ? n : hi <= 0 ? 0 : round_up(hi, NR) < n ? round_up(hi, NR) : n);
  s.full = t.every[rb].lo <= first + s.lo && t.every[rb].hi >= first + s.hi;
  return s;
}

}  // namespace
}  // namespace genfast::cpu
