// What happens to a score between the two products: softcap, ALiBi, mask, window and sequence
// edges, dropout. All scores are in units of log2. Row passes over the tile of scores; the plain
// path (no option, row block fully visible) runs none of them.
#pragma once
#include "cpu/attention/geometry.h"
#include "cpu/noise.h"
#include "math/attention.h"

namespace genfast::cpu {
namespace {

constexpr float kInf = __builtin_inff();

// Key rows of a block. V's panel of a block is BC * NR floats: 16 KiB with AVX2, half of L1.
constexpr int BC = 256;

GENFAST_INLINE i32v lane_index() {
  i32v v;
  for (int i = 0; i < W; ++i) v[i] = i;
  return v;
}

// A bool mask that is the same for all queries (key padding) often hides a whole head or tail of
// the keys: narrows `range` to the keys that some head of [first, first + group) sees.
inline void clip_padding(const AttentionParams& p, int64_t b, int64_t first, int64_t group,
                         KeyRange& range) {
  const AttentionMask& m = p.mask;
  if (m.kind != MaskKind::boolean || m.i_stride != 0 || range.lo >= range.hi) return;
  KeyRange seen{range.hi, range.lo};
  for (int64_t h = first; h < first + (m.h_stride != 0 ? group : 1); ++h) {
    const char* row = static_cast<const char*>(m.data) + b * m.b_stride + h * m.h_stride;
    int64_t lo = range.lo, hi = range.hi;
    while (lo < hi && row[lo * m.j_stride] == 0) ++lo;
    while (hi > lo && row[(hi - 1) * m.j_stride] == 0) --hi;
    if (lo < seen.lo) seen.lo = lo;
    if (hi > seen.hi) seen.hi = hi;
  }
  // Whole vectors: what stands behind the last key of a block must be a score or outside the keys.
  seen.hi = round_up(seen.hi, W);
  if (seen.hi < range.hi) range.hi = seen.hi;
  range.lo = seen.lo;
}

inline bool has_score_options(const AttentionParams& p) {
  return p.softcap > 0.0f || p.alibi_slopes != nullptr || p.mask.kind != MaskKind::none;
}

// Softcap, ALiBi and mask on rows of one block. One object per task: it remembers the mask row it
// expanded last, because a key padding mask is the same row for all queries.
struct ScoreOptions {
  const AttentionParams& p;
  const Sequence& s;
  const char* expanded = nullptr;
  int64_t expanded_first = -1;
  alignas(64) float bias[BC + W];

  ScoreOptions(const AttentionParams& params, const Sequence& sequence) : p(params), s(sequence) {}

  // mask row of columns [first + lo, first + hi) in units of log2; true -> 0, false -> -inf.
  const float* mask_row(int64_t head, int64_t i, int64_t first, int lo, int hi) {
    const AttentionMask& m = p.mask;
    const int bytes = m.kind == MaskKind::boolean ? 1 : dtype_bytes(m.dtype);
    const char* row = static_cast<const char*>(m.data) +
                      (s.b * m.b_stride + head * m.h_stride + i * m.i_stride) * bytes;
    if (row == expanded && first == expanded_first && m.i_stride == 0) return bias;
    if (m.i_stride == 0) lo = 0, hi = static_cast<int>(s.Sk - first < BC ? s.Sk - first : BC);
    if (hi > s.Sk - first) hi = static_cast<int>(s.Sk - first);
    const int64_t at = (first + lo) * m.j_stride;
    if (m.kind == MaskKind::boolean) {
      const char* seen = row + at;
      for (int j = lo; j < hi; ++j) bias[j] = seen[(j - lo) * m.j_stride] != 0 ? 0.0f : -kInf;
    } else if (m.j_stride == 1) {
      to_f32(row + at * bytes, m.dtype, hi - lo, bias + lo);
    } else {
      gather_f32(row + at * bytes, m.dtype, m.j_stride, hi - lo, bias + lo);
    }
    if (m.kind == MaskKind::additive)
      for (int j = lo; j < hi; ++j) bias[j] *= kLog2e;
    expanded = row;
    expanded_first = first;
    return bias;
  }

  // scores[lo ... hi) of query i of head, keys from `first`; derivative (of softcap) when wanted.
  void apply(int64_t head, int64_t i, int64_t first, int lo, int hi, float* scores,
             float* derivative) {
    if (p.softcap > 0.0f) {
      const float cap = p.softcap * kLog2e, inv_cap = 1.0f / cap;
      for (int j = lo; j < hi; j += W) {
        f32v d;
        store(scores + j, softcap<f32v>(load(scores + j), cap, inv_cap, d));
        if (derivative != nullptr) store(derivative + j, d);
      }
    }
    if (p.alibi_slopes != nullptr) {
      const float slope = p.alibi_slopes[s.b * p.alibi_b_stride + head] * kLog2e;
      const int32_t from = static_cast<int32_t>(i + s.offset - first);
      for (int j = lo; j < hi; j += W) {
        const f32v d = to_float(from - (lane_index() + j));
        store(scores + j, load(scores + j) - slope * maximum(d, f32v{} - d));
      }
    }
    if (p.mask.kind != MaskKind::none) {
      const float* m = mask_row(head, i, first, lo, hi);
      for (int j = lo; j < hi; j += W) store(scores + j, load(scores + j) + load(m + j));
    }
  }
};

// Sets columns outside [keys) to -inf over the whole vectors of [lo, hi); returns the maximum.
inline f32v mask_edges(const KeyRange& keys, int64_t first, int lo, int hi, float* scores) {
  const int64_t from = keys.lo - first, to = keys.hi - first;
  const int32_t a = static_cast<int32_t>(from < 0 ? 0 : from > BC ? BC : from);
  const int32_t b = static_cast<int32_t>(to < 0 ? 0 : to > BC ? BC : to);
  f32v most = f32v{} - kInf;
  for (int j = lo; j < hi; j += W) {
    const i32v at = lane_index() + j;
    const f32v v = select((at >= a) & (at < b), load(scores + j), f32v{} - kInf);
    store(scores + j, v);
    most = maximum(most, v);
  }
  return most;
}

// factors[j] = dropout_scale where the word of (b, head, i, first + j) keeps it, else 0.
inline void keep_factors(const AttentionParams& p, int64_t b, int64_t head, int64_t i,
                         int64_t first, int lo, int hi, float scale, float* factors) {
  NoiseChunk chunk;
  const uint64_t element =
      ((static_cast<uint64_t>(b) * p.Hq + head) * p.noise_Sq + i) * p.noise_Sk + first + lo;
  const float* words = noise_values<BitsMap>(p.seed, p.stream, element, hi - lo, chunk);
  for (int j = lo; j < hi; ++j)
    factors[j] = bits(words[j - lo]) >= p.dropout_threshold ? scale : 0.0f;
}

}  // namespace
}  // namespace genfast::cpu
