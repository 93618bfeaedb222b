// Forward: online softmax over key blocks.
//
//   for a block of keys:  S = Q K^T;  m' = max(m, rowmax S);  a = 2^(m - m');  P = 2^(S - m')
//                         l = a l + rowsum P;  O = a O + P V
//
// A task owns a few tiles of one key/value head and walks the key blocks once, packing each block
// for all its tiles (packing costs about 8 / rows of the two products: 2 % at 384 rows). Blocks lie
// at fixed multiples of BC, so a row's result does not depend on which rows share its task.
// With too few tiles for the machine the keys are split as well, at fixed places that depend on the
// shape alone; partial (m, l, O) are merged in order.
#pragma once
#include "cpu/attention/decode.h"
#include "cpu/attention/score.h"

namespace genfast::cpu {
namespace {

template <class Unit>
struct TileState {
  Tile<Unit::rows> tile;
  float m[BR];  // running maximum, log2 units
  f32v l[BR];   // running sum, by lanes
  float* q;     // rows [BR][ldq]; times scale * log2(e) where they are fp32
  float* o;     // rows [BR][ldo]
};

template <class Unit>
struct ForwardScratch {
  TileState<Unit>* tiles;
  const char** rows;
  float *k, *v, *s;
  float* out;  // one row
};

template <class Unit>
struct Forward {
  using TileState = cpu::TileState<Unit>;
  using ForwardScratch = cpu::ForwardScratch<Unit>;
  static constexpr int RB = Unit::rows;

  const AttentionParams& p;
  int64_t ldq, ldo, lds;
  int64_t longest_q = 0, longest_k = 0;
  int64_t tiles_per_head = 0, tiles_per_task = 1, groups = 1;
  int64_t splits = 1, split_keys = 0;
  bool options, in_place;
  // partial results [splits][B][Hq][longest_q]
  float *part_o = nullptr, *part_m = nullptr, *part_l = nullptr;

  explicit Forward(const AttentionParams& params) : p(params) {
    ldq = odd_lines(Unit::words(p.D));
    ldo = odd_lines(p.Dv);
    lds = odd_lines(BC);
    options = has_score_options(p);
    for (int64_t b = 0; b < p.B; ++b) {
      const Sequence s = sequence_of(p, b);
      if (s.Sq > longest_q) longest_q = s.Sq;
      if (s.Sk > longest_k) longest_k = s.Sk;
    }
    const int64_t rows = longest_q * group();
    in_place = !Unit::matrix && decodes(rows, longest_k);
    tiles_per_head = tile_count(rows);
    const int64_t heads = p.B * p.Hkv, tiles = heads * tiles_per_head;
    // Six tiles share a packed block: packing is 2 % of the work then, and their q and o rows,
    // which stream through once per block, may come from L3.
    tiles_per_task = p.D + p.Dv <= 256 ? 6 : 3;
    if (tiles_per_task > tiles_per_head) tiles_per_task = tiles_per_head > 0 ? tiles_per_head : 1;
    const int threads = p.threads > 0 ? p.threads : 8;
    while (tiles_per_task > 1 &&
           heads * ((tiles_per_head + tiles_per_task - 1) / tiles_per_task) < 12 * threads)
      --tiles_per_task;  // the last task to finish then costs a few percent
    groups = (tiles_per_head + tiles_per_task - 1) / tiles_per_task;
    constexpr int64_t kWantedTiles = 64, kLeastKeys = 512;
    split_keys = longest_k;
    if (tiles < kWantedTiles && tiles > 0) {
      const int64_t wanted = (kWantedTiles + tiles - 1) / tiles;
      split_keys = round_up((longest_k + wanted - 1) / wanted, BC);
      if (split_keys < kLeastKeys) split_keys = kLeastKeys;
    }
    if (split_keys < 1) split_keys = 1;
    splits = longest_k > split_keys ? (longest_k + split_keys - 1) / split_keys : 1;
  }

  int64_t group() const { return p.Hq / p.Hkv; }
  int64_t rows_of_block() const { return longest_k < BC ? round_up(longest_k, NR) : BC; }

  ForwardScratch lay_out(Arena& a) const {
    ForwardScratch x;
    const int64_t rows = longest_q * group();
    const int64_t tile_rows = round_up(rows < BR ? rows : BR, Unit::whole);
    const int64_t keys = rows_of_block();
    x.tiles = a.take<TileState>(tiles_per_task);
    for (int64_t t = 0; t < tiles_per_task; ++t) {
      float *q = a.take<float>(tile_rows * ldq), *o = a.take<float>(tile_rows * ldo);
      if (x.tiles != nullptr) x.tiles[t].q = q, x.tiles[t].o = o;
    }
    x.rows = a.take<const char*>(BC > BR ? BC : BR);
    x.s = a.take<float>((Unit::matrix && tile_rows > RB ? RB : tile_rows) * lds);
    x.out = a.take<float>(ldo);
    x.k = a.take<float>(in_place ? 0 : keys * round_up(Unit::words(p.D), W));
    x.v = a.take<float>(in_place ? 0 : keys / Unit::depth * round_up(p.Dv, NR));
    return x;
  }

  int64_t part_index(int64_t split, int64_t b, int64_t head, int64_t i) const {
    return ((split * p.B + b) * p.Hq + head) * longest_q + i;
  }

  void start_tile(TileState& st, const Sequence& s, int64_t kv_head, int64_t index,
                  const char** rows) const {
    make_tile(p, s, kv_head * group(), group(), index, st.tile);
    const int n = st.tile.n;
    for (int r = 0; r < n; ++r) {
      rows[r] = row_at(p.q, p.dtype, s.b, st.tile.head[r], s.q_row + st.tile.position[r]);
      st.m[r] = -kInf;
      st.l[r] = f32v{};
    }
    Unit::pack_rows(rows, n, p.dtype, static_cast<int>(p.D), p.scale * kLog2e, st.q, ldq);
    __builtin_memset(st.o, 0, sizeof(float) * n * ldo);
  }

  // Turns the scores of rows into weights: S -> P in place, updates m and l, alpha[r] = 2^(m - m').
  void softmax_rows(TileState& st, ScoreOptions& mods, const Span* spans, const f32v* most,
                    int64_t first, float* scores, float* alpha) const {
    const auto& t = st.tile;
    for (int r = 0; r < t.n; ++r) {
      const Span span = spans[r / RB];
      if (span.lo >= span.hi) continue;
      float* row = scores + r * lds;
      if (options) mods.apply(t.head[r], t.position[r], first, span.lo, span.hi, row, nullptr);
      const float block_max = horizontal_max(
          options || !span.full ? mask_edges(t.keys[r], first, span.lo, span.hi, row) : most[r]);
      const float m = st.m[r] > block_max ? st.m[r] : block_max;
      const float base = m == -kInf ? 0.0f : m;
      alpha[r] = m == st.m[r] ? 1.0f : __builtin_exp2f(st.m[r] - base);
      st.m[r] = m;
      f32v sum = f32v{};
#pragma GCC unroll 4
      for (int j = span.lo; j < span.hi; j += W) {
        const f32v e = exp2_nonpositive<f32v>(load(row + j) - base);
        store(row + j, e);
        sum += e;
      }
      st.l[r] = st.l[r] * alpha[r] + sum;
      if (p.dropout) {
        alignas(64) float factor[BC + W];
        keep_factors(p, mods.s.b, t.head[r], t.position[r], first, span.lo, span.hi, 1.0f, factor);
        for (int j = span.lo; j < span.hi; ++j) row[j] *= factor[j];
      }
    }
  }

  void attend_block(TileState& st, ScoreOptions& mods, const ForwardScratch& x, int64_t first,
                    int n) const {
    const auto& t = st.tile;
    Span spans[BR / RB] = {};
    f32v most[BR];
    float alpha[BR];
    const int row_blocks = (t.n + RB - 1) / RB;
    for (int rb = 0; rb < row_blocks; ++rb) spans[rb] = span_of(t, rb, first, n);
    for (int r = 0; r < t.n; ++r) most[r] = f32v{} - kInf;
    const int64_t depth = round_up(p.D, W);
    for (int j = 0; j < n; j += NR) {
      const int columns = n - j < NR ? n - j : NR;
      const bool ragged = columns % W != 0;
      const f32v edge = past_end(columns);
      for (int rb = 0; rb < row_blocks; ++rb) {
        if (j < spans[rb].lo || j >= spans[rb].hi) continue;
        const int r0 = rb * RB, m = t.n - r0 < RB ? t.n - r0 : RB;
        multiply<false>(m, columns, p.D, st.q + r0 * ldq, ldq, x.k + j * depth, NR,
                        [&](int row0, auto& acc) {
                          constexpr int M = sizeof(acc) / sizeof(acc[0]);
                          constexpr int N = sizeof(acc[0]) / sizeof(f32v);
                          if (ragged)
#pragma GCC unroll 16
                            for (int i = 0; i < M; ++i) acc[i][N - 1] += edge;
#pragma GCC unroll 16
                          for (int i = 0; i < M; ++i) {
                            f32v& top = most[r0 + row0 + i];
                            f32v now = top;
#pragma GCC unroll 4
                            for (int c = 0; c < N; ++c) {
                              store(x.s + (r0 + row0 + i) * lds + j + c * W, acc[i][c]);
                              now = maximum(now, acc[i][c]);
                            }
                            top = now;
                          }
                        });
      }
    }
    softmax_rows(st, mods, spans, most, first, x.s, alpha);
    for (int64_t d = 0; d < p.Dv; d += NR) {
      const int columns = static_cast<int>(p.Dv - d < NR ? p.Dv - d : NR);
      for (int rb = 0; rb < row_blocks; ++rb) {
        const Span& span = spans[rb];
        if (span.lo >= span.hi) continue;
        const int r0 = rb * RB, m = t.n - r0 < RB ? t.n - r0 : RB;
        multiply<false>(m, columns, span.hi - span.lo, x.s + r0 * lds + span.lo, lds,
                        x.v + d * rows_of_block() + span.lo * NR, NR, [&](int row0, auto& acc) {
                          constexpr int M = sizeof(acc) / sizeof(acc[0]);
                          constexpr int N = sizeof(acc[0]) / sizeof(f32v);
#pragma GCC unroll 16
                          for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
                            for (int c = 0; c < N; ++c) {
                              float* o = st.o + (r0 + row0 + i) * ldo + d + c * W;
                              store(o, load(o) * alpha[r0 + row0 + i] + acc[i][c]);
                            }
                        });
      }
    }
  }

#if defined(__AVX512BF16__)
  // Scores of a row, times `factor` still to come, to bf16 weights in place; updates m and l and
  // returns 2^(m - m'). [lo, hi): whole words; what stands behind key `end` is no score.
  float weigh_row(TileState& st, ScoreOptions& mods, int r, const Span& span, int hi, int64_t first,
                  float* row) const {
    const auto& t = st.tile;
    const int lo = span.lo;
    float factor = p.scale * kLog2e;
    // An infinity times a factor that is not positive is no mask.
    if (options || factor <= 0.0f) {
      for (int j = lo; j < hi; j += W) store(row + j, load(row + j) * factor);
      factor = 1.0f;
      if (options) mods.apply(t.head[r], t.position[r], first, lo, hi, row, nullptr);
    }
    f32v most = f32v{} - kInf;
    if (options || !span.full || hi != span.hi) {
      const int64_t end = first + span.hi;
      most =
          mask_edges({t.keys[r].lo, t.keys[r].hi < end ? t.keys[r].hi : end}, first, lo, hi, row);
    } else {
      f32v other = most;
      for (int j = lo; j < hi; j += 2 * W) {
        most = maximum(most, load(row + j));
        other = maximum(other, load(row + j + W));
      }
      most = maximum(most, other);
    }
    const float block_max = horizontal_max(most) * factor;
    const float m = st.m[r] > block_max ? st.m[r] : block_max;
    const float base = m == -kInf ? 0.0f : m;
    const float alpha = m == st.m[r] ? 1.0f : exp2_nonpositive<float>(st.m[r] - base);
    st.m[r] = m;
    f32v sum = f32v{};
    const f32v times = splat(factor), minus = splat(-base);
    for (int j = lo; j < hi; j += 2 * W) {
      f32v e = exp2_of_scores(fused_multiply_add(load(row + j), times, minus));
      f32v f = exp2_of_scores(fused_multiply_add(load(row + j + W), times, minus));
      sum += e + f;
      if (p.dropout) {
        alignas(64) float keep[4 * W];
        keep_factors(p, mods.s.b, t.head[r], t.position[r], first + j, 0, 2 * W, 1.0f, keep);
        e = e * load(keep);
        f = f * load(keep + W);
      }
      store(row + j / 2, row_words(e, f));  // behind what was read
    }
    st.l[r] = st.l[r] * alpha + sum;
    return alpha;
  }

  // Row block by row block, so that its scores (32 KiB) stay in L1 from product to product.
  void attend_by_tiles(TileState& st, ScoreOptions& mods, const ForwardScratch& x, int64_t first,
                       int n) const {
    const auto& t = st.tile;
    const int64_t words = Unit::words(p.D), value_panel = rows_of_block() / 2 * NR;
    for (int r0 = 0; r0 < t.n; r0 += RB) {
      const Span span = span_of(t, r0 / RB, first, n);
      if (span.lo >= span.hi) continue;
      const int m = t.n - r0 < RB ? t.n - r0 : RB;
      const int lo = span.lo, hi = static_cast<int>(round_up(span.hi, NR));
      multiply_tiles(m, span.hi - lo, depth_of(p.D), st.q + r0 * ldq, ldq, x.k + lo * words,
                     words * NR, x.s + lo, lds, false);
      for (int r = 0; r < m; ++r) {
        const float alpha = weigh_row(st, mods, r0 + r, span, hi, first, x.s + r * lds);
        float* o = st.o + (r0 + r) * ldo;
        if (alpha != 1.0f)
          for (int64_t d = 0; d < p.Dv; d += W) store(o + d, load(o + d) * alpha);
      }
      multiply_tiles(m, p.Dv, depth_of(span.hi - lo), x.s + lo / 2, lds, x.v + lo / 2 * NR,
                     value_panel, st.o + r0 * ldo, ldo, true);
    }
  }
#endif

  // A tile of few rows reads keys and values where they lie. soon: keys of the next block.
  void attend_in_place(TileState& st, ScoreOptions& mods, const ForwardScratch& x,
                       const Sequence& s, int64_t kv_head, int64_t first, int n, int soon) const {
    const auto& t = st.tile;
    Span spans[BR / RB] = {};
    float alpha[BR];
    for (int rb = 0; rb * RB < t.n; ++rb) {
      spans[rb] = {0, n, false};  // not full: the products in place keep no maxima
      if (t.any[rb].lo >= first + n || t.any[rb].hi <= first) spans[rb].hi = 0;
    }
    const char* values[BC];
    key_rows(p, p.k, s, kv_head, first, n, x.rows);
    key_rows(p, p.v, s, kv_head, first, n, values);
    scores_in_place(p, st.q, ldq, t.n, x.rows, values, n, x.s, lds);
    softmax_rows(st, mods, spans, nullptr, first, x.s, alpha);
    for (int r = 0; r < t.n; ++r)
      if (spans[r / RB].hi == 0) {
        alpha[r] = 1.0f;
        __builtin_memset(x.s + r * lds, 0, sizeof(float) * n);
      }
    key_rows(p, p.k, s, kv_head, first + n, soon, x.rows);
    weigh_in_place(p, x.s, lds, t.n, values, n, alpha, st.o, ldo, x.rows, soon);
  }

  // out = O / l, LSE = ln 2 (m + log2 l), with the sink in the denominator.
  void finish_row(const Sequence& s, int64_t head, int64_t i, float m, float l, const float* o,
                  float* buffer) const {
    if (p.sinks != nullptr) {
      const float sink = p.sinks[head] * kLog2e;
      const float top = m > sink ? m : sink;
      if (top != -kInf) {
        const float down = __builtin_exp2f(m - top);
        l = l * down + __builtin_exp2f(sink - top);
        for (int64_t d = 0; d < p.Dv; d += W) store(buffer + d, load(o + d) * down);
        o = buffer;
        m = top;
      }
    }
    const float factor = l == 0.0f ? 0.0f : (p.dropout ? p.dropout_scale : 1.0f) / l;
    const char* row[1] = {row_at(p.out, p.out_dtype, s.b, head, s.q_row + i)};
    unpack_rows(o, ldo, 1, static_cast<int>(p.Dv), &factor, const_cast<char* const*>(row),
                p.out_dtype);
    if (p.lse.data != nullptr)
      stat_at(p.lse, s.b, head, s.q_row + i) = l == 0.0f ? -kInf : (m + __builtin_log2f(l)) * kLn2;
  }

  void run_task(int64_t task, const ForwardScratch& x) const {
    const int64_t split = task % splits;
    const int64_t bundle = groups - 1 - task / splits % groups;  // the longest causal rows first
    const int64_t kv_head = task / splits / groups % p.Hkv, b = task / splits / groups / p.Hkv;
    const Sequence s = sequence_of(p, b);
    const int64_t begin = bundle * tiles_per_task, all = tile_count(s.Sq * group());
    const int64_t end = begin + tiles_per_task < all ? begin + tiles_per_task : all;
    if (begin >= end) return;
    ScoreOptions mods(p, s);
    KeyRange range{s.Sk, 0};
    for (int64_t t = begin; t < end; ++t) {
      TileState& st = x.tiles[t - begin];
      start_tile(st, s, kv_head, t, x.rows);
      if (st.tile.seen.lo < range.lo) range.lo = st.tile.seen.lo;
      if (st.tile.seen.hi > range.hi) range.hi = st.tile.seen.hi;
    }
    clip_padding(p, s.b, kv_head * group(), group(), range);
    if (splits > 1) {
      if (range.lo < split * split_keys) range.lo = split * split_keys;
      if (range.hi > (split + 1) * split_keys) range.hi = (split + 1) * split_keys;
    }
    for (int64_t first = range.lo / BC * BC; first < range.hi; first += BC) {
      const int n = static_cast<int>(range.hi - first < BC ? range.hi - first : BC);
      if (in_place) {
        const int64_t left = range.hi - first - n;
        attend_in_place(x.tiles[0], mods, x, s, kv_head, first, n,
                        static_cast<int>(left < BC ? left : BC));
        continue;
      }
      key_rows(p, p.k, s, kv_head, first, n, x.rows);
      pack_columns<Unit>(x.rows, n, p.dtype, static_cast<int>(p.D), x.k);
      key_rows(p, p.v, s, kv_head, first, n, x.rows);
      Unit::pack_panels(x.rows, n, p.dtype, static_cast<int>(p.Dv), rows_of_block(), x.v);
      for (int64_t t = begin; t < end; ++t) {
        TileState& st = x.tiles[t - begin];
        if (st.tile.seen.lo >= first + n || st.tile.seen.hi <= first) continue;
#if defined(__AVX512BF16__)
        if constexpr (Unit::matrix) {
          attend_by_tiles(st, mods, x, first, n);
          continue;
        }
#endif
        attend_block(st, mods, x, first, n);
      }
    }
    for (int64_t t = begin; t < end; ++t) finish_tile(x.tiles[t - begin], s, split, x.out);
  }

  void finish_tile(const TileState& st, const Sequence& s, int64_t split, float* buffer) const {
    const auto& t = st.tile;
    for (int r = 0; r < t.n; ++r) {
      const float l = horizontal_sum(st.l[r]);
      const float* o = st.o + r * ldo;
      if (splits == 1) {
        finish_row(s, t.head[r], t.position[r], st.m[r], l, o, buffer);
        continue;
      }
      const int64_t at = part_index(split, s.b, t.head[r], t.position[r]);
      part_m[at] = st.m[r];
      part_l[at] = l;
      __builtin_memcpy(part_o + at * ldo, o, sizeof(float) * ldo);
    }
  }

  void merge_row(int64_t b, int64_t head, int64_t i) const {
    const Sequence s = sequence_of(p, b);
    if (i >= s.Sq) return;
    alignas(64) float o[kMaxDim + 16], buffer[kMaxDim + 16];
    float m = -kInf, l = 0.0f;
    for (int64_t k = 0; k < splits; ++k) {
      const float now = part_m[part_index(k, b, head, i)];
      if (now > m) m = now;
      if (now != now) m = now, k = splits;
    }
    __builtin_memset(o, 0, sizeof o);
    for (int64_t k = 0; k < splits && m != -kInf; ++k) {
      const int64_t at = part_index(k, b, head, i);
      const float down = __builtin_exp2f(part_m[at] - m);
      l += part_l[at] * down;
      for (int64_t d = 0; d < p.Dv; d += W)
        store(o + d, load(o + d) + load(part_o + at * ldo + d) * down);
    }
    finish_row(s, head, i, m, l, o, buffer);
  }
};

}  // namespace
}  // namespace genfast::cpu
