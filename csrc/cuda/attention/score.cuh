// What every attention kernel asks of a score: which query a row is, which keys it sees, softcap,
// ALiBi, mask, dropout. Scores are in units of log2.
#pragma once
#include "cuda/noise.cuh"
#include "cuda/team.cuh"
#include "math/attention.h"

namespace genfast::cuda {
namespace {

__device__ __forceinline__ float infinite() { return from_bits(0x7F800000u); }

// Query heads of a key/value head. In 32 bits: a division of 64 takes about 100 instructions.
__host__ __device__ __forceinline__ int group_of(const AttentionParams& p) {
  return static_cast<int>(static_cast<uint32_t>(p.Hq) / static_cast<uint32_t>(p.Hkv));
}

// Lengths and places come from device memory unchecked: clamped, so that no access leaves a tensor.
__device__ __forceinline__ Sequence device_sequence(const AttentionParams& p, int64_t b) {
  Sequence s = sequence_of(p, b);
  const auto clamp = [](int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
  };
  if (p.cu_seqlens_q != nullptr) {
    s.q_row = clamp(s.q_row, 0, p.total_q);
    s.Sq = clamp(s.Sq, 0, clamp(p.total_q - s.q_row, 0, p.Sq));
  }
  int64_t rows = p.Sk;  // of a cache: its capacity
  if (p.cu_seqlens_k != nullptr) {
    s.k_row = clamp(s.k_row, 0, p.total_k);
    rows = p.total_k;
  } else if (s.k_row != 0) {
    s.k_row = clamp(s.k_row, 0, rows);
  }
  s.Sk = clamp(s.Sk, 0, clamp(rows - s.k_row, 0, p.Sk));
  if (p.cache_batch_idx != nullptr) s.entry = clamp(s.entry, 0, p.entries - 1);
  s.offset = p.bottom_right ? s.Sk - s.Sq : 0;
  return s;
}

__device__ __forceinline__ int bytes_of(Dtype d) { return d == Dtype::f32 ? 4 : 2; }

__device__ __forceinline__ char* row_at(const AttentionRows& t, int bytes, int64_t b, int64_t h,
                                        int64_t s) {
  return static_cast<char*>(t.data) + (b * t.b_stride + h * t.h_stride + s * t.s_stride) * bytes;
}
__device__ __forceinline__ float& stat_at(const AttentionStats& t, int64_t b, int64_t h,
                                          int64_t s) {
  return t.data[b * t.b_stride + h * t.h_stride + s * t.s_stride];
}
// The page that holds a row of a sequence, and the row's place in it.
struct Page {
  int64_t entry, row;
};
__device__ __forceinline__ Page page_of(const AttentionParams& p, const Sequence& s, int64_t row) {
  const uint32_t at = static_cast<uint32_t>(row), size = static_cast<uint32_t>(p.page_size);
  const uint32_t block = at / size;
  const int64_t entry = p.block_table[s.b * p.block_table_stride + block];
  return {entry < 0 ? 0 : entry >= p.entries ? p.entries - 1 : entry, at - block * size};
}
// Row j of the keys (or values) of a sequence, through the page table when there is one.
__device__ __forceinline__ char* key_row(const AttentionParams& p, const AttentionRows& t,
                                         int bytes, const Sequence& s, int64_t h, int j) {
  if (p.block_table == nullptr) return row_at(t, bytes, s.entry, h, s.k_row + j);
  const Page page = page_of(p, s, s.k_row + j);
  return row_at(t, bytes, page.entry, h, page.row);
}

// Row r of a key/value head's queries, in the order (head of the group, position): a grouped-query
// decode step and a long prefill are the same thing.
struct Query {
  int head, position;
  int lo, hi;  // keys it sees; none for a row that does not exist
};
__device__ __forceinline__ Query query_of(const AttentionParams& p, const Sequence& s, int kv_head,
                                          int64_t r) {
  const int group = group_of(p);
  if (r >= s.Sq * group) return {0, -1, 0, 0};
  const uint32_t at = static_cast<uint32_t>(r), length = static_cast<uint32_t>(s.Sq);
  const int g = static_cast<int>(at / length), i = static_cast<int>(at % length);
  const KeyRange keys = visible_keys(p, s, i);
  return {kv_head * group + g, i, static_cast<int>(keys.lo), static_cast<int>(keys.hi)};
}

// Its row of an operand; null where there is none.
__device__ __forceinline__ char* query_row(const AttentionRows& t, int bytes, const Sequence& s,
                                           const Query& at) {
  return at.position < 0 ? nullptr : row_at(t, bytes, s.b, at.head, s.q_row + at.position);
}

__device__ __forceinline__ float load_any(const void* data, Dtype dtype, int64_t at) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data)[at];
  const uint16_t h = static_cast<const uint16_t*>(data)[at];
  return dtype == Dtype::f16 ? f32_of_f16(h) : f32_of_bf16(h);
}
__device__ __forceinline__ void store_any(void* data, Dtype dtype, int64_t at, float v) {
  if (dtype == Dtype::f32)
    static_cast<float*>(data)[at] = v;
  else
    static_cast<uint16_t*>(data)[at] =
        static_cast<uint16_t>(dtype == Dtype::f16 ? pack_f16(v, 0.0f) : pack_bf16(v, 0.0f));
}

// Softcap, ALiBi and mask of one score; `slope` is the softcap's derivative. The caller has checked
// that the query sees the key: nothing is read beyond the mask.
__device__ __forceinline__ float with_options(const AttentionParams& p, const Sequence& s,
                                              const Query& q, int j, float x, float& slope) {
  slope = 1.0f;
  if (p.softcap > 0.0f) {
    const float cap = p.softcap * kLog2e;
    x = softcap<float>(x, cap, 1.0f / cap, slope);
  }
  if (p.alibi_slopes != nullptr) {
    const float by = p.alibi_slopes[s.b * p.alibi_b_stride + q.head] * kLog2e;
    const float d = static_cast<float>(q.position + static_cast<int>(s.offset) - j);
    x -= by * (d < 0.0f ? -d : d);
  }
  if (p.mask.kind != MaskKind::none) {
    const int64_t at = s.b * p.mask.b_stride + q.head * p.mask.h_stride +
                       q.position * p.mask.i_stride + j * p.mask.j_stride;
    if (p.mask.kind == MaskKind::boolean)
      x = static_cast<const uint8_t*>(p.mask.data)[at] != 0 ? x : -infinite();
    else
      x += load_any(p.mask.data, p.mask.dtype, at) * kLog2e;
  }
  return x;
}

// A mask's row of a query, and a value of it in units of log2.
__device__ __forceinline__ int mask_bytes(const AttentionMask& m) {
  return m.kind == MaskKind::boolean ? 1 : bytes_of(m.dtype);
}
__device__ __forceinline__ const char* mask_row(const AttentionParams& p, const Sequence& s,
                                                const Query& q) {
  const AttentionMask& m = p.mask;
  return static_cast<const char*>(m.data) +
         (s.b * m.b_stride + q.head * m.h_stride + q.position * m.i_stride) * mask_bytes(m);
}
__device__ __forceinline__ float mask_value(const AttentionMask& m, const char* row, int j) {
  const int64_t at = j * m.j_stride;
  if (m.kind == MaskKind::boolean)
    return reinterpret_cast<const uint8_t*>(row)[at] != 0 ? 0.0f : -infinite();
  return load_any(row, m.dtype, at) * kLog2e;
}
// body(type, apply): a zero of the type of a mask's values, and apply(score, value), the score
// under the mask. One that is added leaves scores in units of log2, so that a dtype's lowest value
// is -inf and not a maximum; a boolean one leaves them as they came.
template <class Body>
__device__ __forceinline__ void by_mask_type(const AttentionParams& p, Body&& body) {
  const float to_log2 = p.scale * kLog2e;
  const auto added = [&](float x, float value) {
    return fused_multiply_add(x, to_log2, value * kLog2e);
  };
  if (p.mask.kind == MaskKind::boolean)
    body(uint8_t{}, [&](float x, uint8_t seen) { return seen != 0 ? x : -infinite(); });
  else if (p.mask.dtype == Dtype::f32)
    body(float{}, added);
  else if (p.mask.dtype == Dtype::f16)
    body(uint16_t{}, [&](float x, uint16_t h) { return added(x, f32_of_f16(h)); });
  else
    body(uint16_t{}, [&](float x, uint16_t h) { return added(x, f32_of_bf16(h)); });
}
// The same for all queries of a sequence.
inline bool is_key_mask(const AttentionMask& m) {
  return m.kind != MaskKind::none && m.h_stride == 0 && m.i_stride == 0;
}

// What a forward kernel has code for beside lengths, windows and sinks: nothing, a mask, or every
// option and any rows. What costs registers or instructions in the inner loop is not in all of
// them.
enum class Extras { none, mask, all };

inline Extras extras_of(const AttentionParams& p) {
  // Without options the maximum is found before the scale is applied, which wants a positive one.
  if (!(p.scale > 1e-30f) || p.softcap > 0.0f || p.alibi_slopes != nullptr || p.dropout)
    return Extras::all;
  if (p.mask.kind == MaskKind::none) return Extras::none;
  return p.mask.j_stride < 1 << 28 ? Extras::mask : Extras::all;  // bytes between keys: 32 bits
}

// Whether dropout keeps element (head, position, j): a word of the noise contract.
__device__ __forceinline__ bool kept(const AttentionParams& p, const Sequence& s, const Query& q,
                                     int j) {
  const uint64_t e =
      ((static_cast<uint64_t>(s.b) * p.Hq + q.head) * p.noise_Sq + q.position) * p.noise_Sk + j;
  const uint64_t seed = p.seeds != nullptr ? static_cast<uint64_t>(*p.seeds) : p.seed;
  const Words<uint32_t> w = philox(seed, p.stream, e >> 2);
  const uint32_t low = e & 1 ? w.w1 : w.w0, high = e & 1 ? w.w3 : w.w2;
  return (e & 2 ? high : low) >= p.dropout_threshold;
}

// From a row's maximum and denominator: what its sum is multiplied by, and the log-sum-exp.
struct Finish {
  float factor, lse;
};
__device__ __forceinline__ Finish finish(const AttentionParams& p, int head, float m, float l) {
  float down = 1.0f;
  if (p.sinks != nullptr) {
    const float sink = p.sinks[head] * kLog2e, top = m > sink ? m : sink;
    if (top != -infinite()) {
      down = exp2f(m - top);
      l = l * down + exp2f(sink - top);
      m = top;
    }
  }
  if (l == 0.0f) return {0.0f, -infinite()};
  return {(p.dropout ? p.dropout_scale : 1.0f) / l * down, (m + log2f(l)) * kLn2};
}

// Rows of an operand start at multiples of 16 bytes.
inline bool whole_rows(const AttentionRows& t, int64_t dim) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && dim % 8 == 0 && t.b_stride % 8 == 0 &&
         t.h_stride % 8 == 0 && t.s_stride % 8 == 0;
}

// Whether every block of `count` keys of a call lies at equal distances: always, but for pages.
inline bool even_keys(const AttentionParams& p, int count) {
  return p.block_table == nullptr ||
         (p.page_size % count == 0 && p.leftpad_k == nullptr && p.cu_seqlens_k == nullptr);
}

// Rows and blocks of keys as the kernels for fewer options want them.
inline bool plain_rows(const AttentionParams& p, int keys) {
  return even_keys(p, keys) && whole_rows(p.q, p.D) && whole_rows(p.k, p.D) &&
         whole_rows(p.v, p.Dv);
}

inline TensorView on(const AttentionPlace& place) {
  TensorView t;
  t.device = place.device, t.stream = place.stream;
  return t;
}

// The walk of a call: tiles of kRows query rows, and the places where keys are split.
struct Walk {
  int64_t tiles = 1, splits = 1, split_keys = 0;
  float* part = nullptr;  // [splits][B][Hq][Sq][Dv + 2]

  __host__ __device__ Walk(const AttentionParams& p, int rows)
      : tiles((p.Sq * group_of(p) + rows - 1) / rows) {}
  Walk(const AttentionParams& p, int rows, int keys) : Walk(p, rows) {
    split_keys = p.Sk;
    const int64_t room = p.B * p.Hq * p.Sq * (p.Dv + 2);
    if (room == 0 || p.place.scratch_size < 2 * room) return;
    splits = p.place.scratch_size / room;
    part = p.place.scratch;
    split_keys = ((p.Sk + splits - 1) / splits + keys - 1) / keys * keys;
  }
  int64_t blocks(const AttentionParams& p) const { return p.B * p.Hkv * tiles * splits; }
  __device__ __forceinline__ float* part_of(const AttentionParams& p, int64_t split, int64_t b,
                                            int64_t head, int64_t i) const {
    return part + (((split * p.B + b) * p.Hq + head) * p.Sq + i) * (p.Dv + 2);
  }
};

// Which tile of which head a block has; the longest causal rows come first.
struct Task {
  int64_t b, tile, split;
  int kv_head;
};
__device__ __forceinline__ Task task_of(const AttentionParams& p, const Walk& w) {
  const auto splits = static_cast<uint32_t>(w.splits), tiles = static_cast<uint32_t>(w.tiles);
  const auto heads = static_cast<uint32_t>(p.Hkv);
  const uint32_t tile = blockIdx.x / splits, head = tile / tiles;
  Task t;
  t.split = blockIdx.x % splits;
  t.tile = tiles - 1 - tile % tiles;
  t.kv_head = static_cast<int>(head % heads);
  t.b = head / heads;
  return t;
}

// Keys that some row sees, and that every row sees, of the queries in shared memory.
struct Seen {
  int any_lo, any_hi, every_lo, every_hi;
};
template <int kRows>  // by a whole warp
__device__ __forceinline__ Seen seen_by(const Query* queries) {
  int any_lo = 0x7FFFFFFF, any_hi = 0, every_lo = 0, every_hi = 0x7FFFFFFF;
  for (int r = static_cast<int>(threadIdx.x % 32); r < kRows; r += 32) {
    const Query q = queries[r];
    if (q.lo < q.hi) {
      any_lo = q.lo < any_lo ? q.lo : any_lo;
      any_hi = q.hi > any_hi ? q.hi : any_hi;
    }
    every_lo = q.lo > every_lo ? q.lo : every_lo;
    every_hi = q.hi < every_hi ? q.hi : every_hi;
  }
  return {least_of_warp(any_lo), most_of_warp(any_hi), most_of_warp(every_lo),
          least_of_warp(every_hi)};
}

}  // namespace
}  // namespace genfast::cuda
