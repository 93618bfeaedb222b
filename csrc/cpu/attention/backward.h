// Backward: P is recomputed from LSE, five products per tile and block.
//
//   S = Q K^T,  P = 2^(S - LSE),  dP = dO V^T,  dS = P (dP - delta),  delta = rowsum(dO O) - dLSE
//   dV += P^T dO,  dK += dS^T Q,  dQ += dS K
//
// A task owns a range of key blocks of one key/value head: dK and dV of a block are complete when
// all query rows of the group have passed, dQ is kept in fp32 for all those rows (O(S) memory). One
// range when there are heads enough; else fixed ranges, whose dQ are added in a fixed order, each
// task in its turn. So there are five products, not the seven of separate dQ and dK/dV passes, and
// every sum has one order.
// With dropout D (0 or 1/(1-p)): dV uses P D, dS = P (D dP - delta). Softcap multiplies dS by its
// derivative. The sink's logit sees P_sink = 2^(sink - LSE): dsink = -sum P_sink delta.
#pragma once
#include <atomic>
#include <memory>
#include <thread>

#include "cpu/attention/score.h"

namespace genfast::cpu {
namespace {

// Key rows of a block: a multiple of MR and NR (6, 12 and 8, 16, 32).
constexpr int BK = 96;

template <class Unit>
struct BackwardScratch {
  const char** rows;
  Tile<Unit::rows>* tile;
  float *kt, *vt, *kp;    // K and V by columns, K by panels
  float *q, *dout;        // rows of the group or a tile; fp32 q times scale * log2(e)
  float *P, *dS, *slope;  // [BR][lds]; slope: derivative of the softcap
  float *dk, *dv, *dq;    // [BK][ldk], [BK][ldv], [rows][ldk]
  float* sums;            // mask gradient: [Sq or 1][BK]
  float *qp, *dp;         // matrix unit: q and dout by panels, tile by tile,
  float *Pt, *dSt;        // P and dS of a tile by keys, [BK][ldt]
};

template <class Unit>
struct Backward {
  using Tile = cpu::Tile<Unit::rows>;
  using BackwardScratch = cpu::BackwardScratch<Unit>;
  static constexpr int RB = Unit::rows;

  const AttentionGradParams& g;
  const AttentionParams& p;
  int64_t ldq, ldo, ldk, ldv;
  static constexpr int64_t lds = odd_lines(BK);
  static constexpr int64_t ldt = odd_lines(BR / Unit::depth);
  int64_t longest_q = 0, longest_k = 0;
  int64_t splits = 1, split_keys = 0;
  bool options, row_pass;
  float *lse2 = nullptr, *delta = nullptr;        // [Hq][stat_rows]
  float* total_dq = nullptr;                      // [B][Hkv][group_rows][ldk], of several ranges
  std::unique_ptr<std::atomic<int64_t>[]> turns;  // [B][Hkv]: ranges whose dQ has been added

  explicit Backward(const AttentionGradParams& params) : g(params), p(params.p) {
    ldq = odd_lines(Unit::words(p.D));
    ldo = odd_lines(Unit::words(p.Dv));
    ldk = odd_lines(p.D);
    ldv = odd_lines(p.Dv);
    options = has_score_options(p);
    row_pass = options || p.dropout;
    for (int64_t b = 0; b < p.B; ++b) {
      const Sequence s = sequence_of(p, b);
      if (s.Sq > longest_q) longest_q = s.Sq;
      if (s.Sk > longest_k) longest_k = s.Sk;
    }
    constexpr int64_t kWantedTasks = 32, kLeastKeys = 3 * BK;
    const int64_t heads = p.B * p.Hkv > 0 ? p.B * p.Hkv : 1;
    const int64_t wanted = (kWantedTasks + heads - 1) / heads;
    split_keys = round_up((longest_k + wanted - 1) / wanted, BK);
    if (split_keys < kLeastKeys) split_keys = kLeastKeys;
    splits = longest_k > split_keys ? (longest_k + split_keys - 1) / split_keys : 1;
  }

  int64_t group() const { return p.Hq / p.Hkv; }
  int64_t group_rows() const { return round_up(group() * longest_q, Unit::whole); }
  // Rows of a head in all sequences. Packed ones as they lie: padded to the longest, 40,000 of one
  // row beside one of 20,000 would take 24 GiB.
  int64_t stat_rows() const { return p.cu_seqlens_q ? p.total_q : p.B * longest_q; }
  int64_t stat_index(int64_t b, int64_t head, int64_t i) const {
    return head * stat_rows() + (p.cu_seqlens_q ? p.cu_seqlens_q[b] : b * longest_q) + i;
  }
  int64_t heads() const { return p.B * p.Hkv; }
  float* total_of(int64_t head) const { return total_dq + head * group_rows() * ldk; }

  BackwardScratch lay_out(Arena& a, bool for_mask) const {
    BackwardScratch x;
    const int64_t rows = group_rows() < BR ? group_rows() : BR;  // whole tiles where there are some
    const int64_t keys = longest_k < BK ? round_up(longest_k, NR) : BK;
    x.rows = a.take<const char*>(BR > BK ? BR : BK);
    x.tile = a.take<Tile>(1);
    x.kt = a.take<float>(keys * round_up(Unit::words(p.D), W));
    x.vt = a.take<float>(keys * round_up(Unit::words(p.Dv), W));
    x.kp = a.take<float>(for_mask ? 0 : BK / Unit::depth * round_up(p.D, NR));
    const bool kept = !for_mask && keeps_rows();
    const int64_t tiles = kept ? tile_count(group_rows()) : 1, packed = kept ? group_rows() : rows;
    x.q = a.take<float>(packed * ldq);
    x.dout = a.take<float>(packed * ldo);
    const int64_t score_rows = Unit::matrix && rows > RB ? RB : rows;
    x.P = a.take<float>(score_rows * lds);
    x.dS = a.take<float>(score_rows * lds);
    x.slope = a.take<float>(p.softcap > 0.0f ? score_rows * lds : 0);
    x.dk = a.take<float>(for_mask ? 0 : BK * ldk);
    x.dv = a.take<float>(for_mask ? 0 : BK * ldv);
    x.dq = a.take<float>(for_mask ? 0 : group_rows() * ldk);
    x.sums = a.take<float>(for_mask ? mask_rows() * (BK + W) : 0);
    x.qp = a.take<float>(Unit::matrix ? tiles * panels_of(p.D) : 0);
    x.dp = a.take<float>(Unit::matrix ? tiles * panels_of(p.Dv) : 0);
    x.Pt = a.take<float>(Unit::matrix ? BK * ldt : 0);
    x.dSt = a.take<float>(Unit::matrix ? BK * ldt : 0);
    return x;
  }

  // Query rows of the group are packed once a task and kept, up to 8 MiB a thread; longer ones once
  // a block, tile by tile. (Kept: 5 to 7 % less time with the matrix unit, 0 to 2 % with AVX2.)
  bool keeps_rows() const { return group_rows() * (ldq + ldo) <= int64_t{2} << 20; }
  static constexpr int64_t panels_of(int64_t dim) { return BR / 2 * round_up(dim, NR); }
  // The scratch of a tile of the group.
  BackwardScratch tile_of(const BackwardScratch& x, int64_t index) const {
    BackwardScratch y = x;
    if (!keeps_rows()) return y;
    y.q += index * BR * ldq, y.dout += index * BR * ldo;
    if constexpr (Unit::matrix) y.qp += index * panels_of(p.D), y.dp += index * panels_of(p.Dv);
    return y;
  }

  // Per row: LSE in units of log2 (+inf for a row that sees nothing, so that P = 0) and delta.
  void prepare_rows(int64_t b, int64_t head) const {
    const Sequence s = sequence_of(p, b);
    RowBuffer out, dout;
    for (int64_t i = 0; i < s.Sq; ++i) {
      const float* o = row_f32(row_at(p.out, p.out_dtype, b, head, s.q_row + i), p.out_dtype,
                               static_cast<int>(p.Dv), out.data);
      const float* d = row_f32(row_at(g.dout, p.out_dtype, b, head, s.q_row + i), p.out_dtype,
                               static_cast<int>(p.Dv), dout.data);
      f32v sum = f32v{};
      for (int64_t c = 0; c < p.Dv; c += W) sum = fused_multiply_add(load(o + c), load(d + c), sum);
      const float lse = stat_at(p.lse, b, head, s.q_row + i);
      const int64_t at = stat_index(b, head, i);
      lse2[at] = lse == -kInf ? kInf : lse * kLog2e;
      delta[at] = horizontal_sum(sum);
      if (g.dlse.data != nullptr) delta[at] -= stat_at(g.dlse, b, head, s.q_row + i);
    }
  }

  void load_tile(const Sequence& s, const BackwardScratch& x) const {
    const Tile& t = *x.tile;
    for (int r = 0; r < t.n; ++r)
      x.rows[r] = row_at(p.q, p.dtype, s.b, t.head[r], s.q_row + t.position[r]);
    Unit::pack_rows(x.rows, t.n, p.dtype, static_cast<int>(p.D), p.scale * kLog2e, x.q, ldq);
    if constexpr (Unit::matrix)
      Unit::pack_panels(x.rows, t.n, p.dtype, static_cast<int>(p.D), BR, x.qp);
    for (int r = 0; r < t.n; ++r)
      x.rows[r] = row_at(g.dout, p.out_dtype, s.b, t.head[r], s.q_row + t.position[r]);
    Unit::pack_rows(x.rows, t.n, p.out_dtype, static_cast<int>(p.Dv), 1.0f, x.dout, ldo);
    if constexpr (Unit::matrix)
      Unit::pack_panels(x.rows, t.n, p.out_dtype, static_cast<int>(p.Dv), BR, x.dp);
  }

  // Weights P (times the dropout factor) and dS of the tile in x and the block [first, first + n).
  // dS is the gradient of the scores after the softcap when `after_softcap`, else before it.
  void weights(const Sequence& s, ScoreOptions& mods, const BackwardScratch& x, const Span* spans,
               int64_t first, int n, bool after_softcap) const {
    const Tile& t = *x.tile;
    float row_lse[BR], row_delta[BR];
    for (int r = 0; r < t.n; ++r) {
      const int64_t at = stat_index(s.b, t.head[r], t.position[r]);
      row_lse[r] = lse2[at];
      row_delta[r] = delta[at];
    }
    const int row_blocks = (t.n + RB - 1) / RB;
    for (int j = 0; j < n; j += NR) {
      const int columns = n - j < NR ? n - j : NR;
      for (int rb = 0; rb < row_blocks; ++rb) {
        if (j < spans[rb].lo || j >= spans[rb].hi) continue;
        const int r0 = rb * RB, m = t.n - r0 < RB ? t.n - r0 : RB;
        const bool plain = !options && spans[rb].full, ragged = columns % W != 0;
        multiply<false>(m, columns, p.D, x.q + r0 * ldq, ldq, x.kt + j * round_up(p.D, W), NR,
                        [P = x.P + r0 * lds + j, lse = row_lse + r0, columns, ragged, plain](
                            int row0, auto& acc) {
                          constexpr int M = sizeof(acc) / sizeof(acc[0]);
                          constexpr int N = sizeof(acc[0]) / sizeof(f32v);
                          float* to = P + row0 * lds;
                          if (ragged)
#pragma GCC unroll 16
                            for (int i = 0; i < M; ++i) acc[i][N - 1] += past_end(columns);
#pragma GCC unroll 16
                          for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
                            for (int c = 0; c < N; ++c) store(to + i * lds + c * W, acc[i][c]);
                          if (!plain) return;
                          for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
                            for (int c = 0; c < N; ++c) {
                              float* e = to + i * lds + c * W;
                              store(e, exp2_nonpositive<f32v>(load(e) - lse[row0 + i]));
                            }
                        });
      }
    }
    for (int r = 0; r < t.n; ++r) {
      const Span& span = spans[r / RB];
      if (span.lo >= span.hi || (!options && span.full)) continue;
      float* row = x.P + r * lds;
      if (options)
        mods.apply(t.head[r], t.position[r], first, span.lo, span.hi, row,
                   p.softcap > 0.0f ? x.slope + r * lds : nullptr);
      mask_edges(t.keys[r], first, span.lo, span.hi, row);
      for (int j = span.lo; j < span.hi; j += W)
        store(row + j, exp2_nonpositive<f32v>(load(row + j) - row_lse[r]));
    }
    for (int j = 0; j < n; j += NR) {
      const int columns = n - j < NR ? n - j : NR;
      for (int rb = 0; rb < row_blocks; ++rb) {
        if (j < spans[rb].lo || j >= spans[rb].hi) continue;
        const int r0 = rb * RB, m = t.n - r0 < RB ? t.n - r0 : RB;
        multiply<false>(m, columns, p.Dv, x.dout + r0 * ldo, ldo, x.vt + j * round_up(p.Dv, W), NR,
                        [P = x.P + r0 * lds + j, dS = x.dS + r0 * lds + j, shift = row_delta + r0,
                         weigh = !row_pass](int row0, auto& acc) {
                          constexpr int M = sizeof(acc) / sizeof(acc[0]);
                          constexpr int N = sizeof(acc[0]) / sizeof(f32v);
                          if (weigh)
#pragma GCC unroll 16
                            for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
                              for (int c = 0; c < N; ++c)
                                acc[i][c] = load(P + (row0 + i) * lds + c * W) *
                                            (acc[i][c] - shift[row0 + i]);
#pragma GCC unroll 16
                          for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
                            for (int c = 0; c < N; ++c)
                              store(dS + (row0 + i) * lds + c * W, acc[i][c]);
                        });
      }
    }
    if (!row_pass) return;
    for (int r = 0; r < t.n; ++r) {
      const Span& span = spans[r / RB];
      if (span.lo >= span.hi) continue;
      float *P = x.P + r * lds, *dS = x.dS + r * lds;
      alignas(64) float keep[BK + W];
      if (p.dropout)
        keep_factors(p, s.b, t.head[r], t.position[r], first, span.lo, span.hi, p.dropout_scale,
                     keep);
      for (int j = span.lo; j < span.hi; j += W) {
        f32v w = load(P + j), d = load(dS + j);
        if (p.dropout) {
          const f32v k = load(keep + j);
          d = d * k;
          store(P + j, w * k);
        }
        d = w * (d - row_delta[r]);
        if (p.softcap > 0.0f && !after_softcap) d = d * load(x.slope + r * lds + j);
        store(dS + j, d);
      }
    }
  }

  // c = accumulators, or what it holds plus them. Epilogues hold what they use by value: a store
  // might change a member, which would be read again for every vector (3 % of the time).
  static auto add_to(float* c, int64_t ld, bool add) {
    return [c, ld, add](int row0, auto& acc) {
      constexpr int M = sizeof(acc) / sizeof(acc[0]);
      constexpr int N = sizeof(acc[0]) / sizeof(f32v);
      float* to = c + row0 * ld;
#pragma GCC unroll 16
      for (int i = 0; i < M && add; ++i)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[i][n] += load(to + i * ld + n * W);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) store(to + i * ld + n * W, acc[i][n]);
    };
  }

  // to[key][:] += sum over query rows of w[row][key] * from[row][:], for the rows that see the key.
  void add_transposed(const Tile& t, const Span* spans, int n, const float* w, const float* from,
                      int64_t ld, int64_t dim, float* to) const {
    const int row_blocks = (t.n + RB - 1) / RB;
    for (int k0 = 0; k0 < n; k0 += BK / 4) {  // a multiple of 12 keys
      const int m = n - k0 < BK / 4 ? n - k0 : BK / 4;
      int begin = row_blocks, end = 0;
      for (int rb = 0; rb < row_blocks; ++rb)
        if (spans[rb].lo < k0 + m && spans[rb].hi > k0) {
          if (rb < begin) begin = rb;
          end = rb + 1;
        }
      if (begin >= end) continue;
      const int r0 = begin * RB, depth = (end * RB < t.n ? end * RB : t.n) - r0;
      for (int64_t d = 0; d < dim; d += NR)
        multiply<true>(m, static_cast<int>(dim - d < NR ? dim - d : NR), depth, w + r0 * lds + k0,
                       lds, from + r0 * ld + d, ld, add_to(to + k0 * ld + d, ld, true));
    }
  }

  void add_dq(const Tile& t, const Span* spans, const BackwardScratch& x, float* dq,
              bool add) const {
    for (int64_t d = 0; d < p.D; d += NR)
      for (int rb = 0; rb * RB < t.n; ++rb) {
        const Span& span = spans[rb];
        if (span.lo >= span.hi) continue;
        const int r0 = rb * RB, m = t.n - r0 < RB ? t.n - r0 : RB;
        multiply<false>(m, static_cast<int>(p.D - d < NR ? p.D - d : NR), span.hi - span.lo,
                        x.dS + r0 * lds + span.lo, lds, x.kp + d * BK + span.lo * NR, NR,
                        add_to(dq + r0 * ldk + d, ldk, add));
      }
  }

#if defined(__AVX512BF16__)
  // P and dS of one row in place of S (times `factor`, still to come) and dP.
  void weigh_row(const Sequence& s, ScoreOptions& mods, const Tile& t, int r, const Span& span,
                 int hi, int64_t first, float* P, float* dS, float* slope) const {
    const int lo = span.lo;
    const int64_t at = stat_index(s.b, t.head[r], t.position[r]);
    float factor = p.scale * kLog2e;
    if (options || factor <= 0.0f) {
      for (int j = lo; j < hi; j += W) store(P + j, load(P + j) * factor);
      factor = 1.0f;
      if (options)
        mods.apply(t.head[r], t.position[r], first, lo, hi, P, p.softcap > 0.0f ? slope : nullptr);
    }
    if (options || !span.full || hi != span.hi) {
      const int64_t end = first + span.hi;
      mask_edges({t.keys[r].lo, t.keys[r].hi < end ? t.keys[r].hi : end}, first, lo, hi, P);
    }
    alignas(64) float keep[BK + W];
    if (p.dropout)
      keep_factors(p, s.b, t.head[r], t.position[r], first, lo, hi, p.dropout_scale, keep);
    const f32v times = splat(factor), minus = splat(-lse2[at]), shift = splat(delta[at]);
    for (int j = lo; j < hi; j += W) {
      const f32v w = exp2_of_scores(fused_multiply_add(load(P + j), times, minus));
      f32v d = load(dS + j);
      if (p.dropout) {
        const f32v k = load(keep + j);
        d = d * k;
        store(P + j, w * k);
      } else {
        store(P + j, w);
      }
      d = w * (d - shift);
      if (p.softcap > 0.0f) d = d * load(slope + j);
      // A key behind the last has no value: its dP is noise, and 0 * NaN no zero.
      store(dS + j, select(w == 0.0f, f32v{}, d));
    }
  }

  // to[key][pair] = rows (r, r + 1) of m rows of w, bf16; zeros outside the keys [lo, hi) of n.
  static void pairs_by_keys(const float* w, int64_t ld, int m, int lo, int hi, int n, float* to) {
    for (int j = 0; j < n; j += W) {
      f32v v[W];
      const bool some = j >= lo && j < hi;
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const float* row = w + 2 * i * ld + j;
        v[i] = pair_words(some && 2 * i < m ? load(row) : f32v{},
                          some && 2 * i + 1 < m ? load(row + ld) : f32v{});
      }
      if (some) transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(to + (j + i) * ldt, v[i]);
    }
  }

  // The five products of the tile in x and the block [first, first + n); row blocks one by one, so
  // that P and dS stay in L1 from product to product.
  void tile_by_tiles(const Sequence& s, ScoreOptions& mods, const BackwardScratch& x, int64_t first,
                     int n, float* dq, bool add) const {
    const Tile& t = *x.tile;
    const int64_t words = Unit::words(p.D), value_words = Unit::words(p.Dv);
    const int keys = static_cast<int>(round_up(n, kTile));
    for (int r0 = 0; r0 < t.n; r0 += RB) {
      const Span span = span_of(t, r0 / RB, first, n);
      const int m = t.n - r0 < RB ? t.n - r0 : RB;
      const bool some = span.lo < span.hi;
      const int lo = some ? span.lo : 0, hi = some ? static_cast<int>(round_up(span.hi, NR)) : 0;
      if (some) {
        multiply_tiles(m, span.hi - lo, depth_of(p.D), x.q + r0 * ldq, ldq, x.kt + lo * words,
                       words * NR, x.P + lo, lds, false);
        multiply_tiles(m, span.hi - lo, depth_of(p.Dv), x.dout + r0 * ldo, ldo,
                       x.vt + lo * value_words, value_words * NR, x.dS + lo, lds, false);
        for (int r = 0; r < m; ++r)
          weigh_row(s, mods, t, r0 + r, span, hi, first, x.P + r * lds, x.dS + r * lds,
                    x.slope + r * lds);
      }
      pairs_by_keys(x.P, lds, m, lo, hi, keys, x.Pt + r0 / 2);
      pairs_by_keys(x.dS, lds, m, lo, hi, keys, x.dSt + r0 / 2);
      if (!some) continue;
      for (int r = 0; r < m; ++r)
        for (int j = lo; j < hi; j += 2 * W) {
          float* row = x.dS + r * lds;
          store(row + j / 2, row_words(load(row + j), load(row + j + W)));
        }
      multiply_tiles(m, p.D, depth_of(span.hi - lo), x.dS + lo / 2, lds, x.kp + lo / 2 * NR,
                     BK / 2 * NR, dq + r0 * ldk, ldk, add);
    }
    const int64_t pairs = depth_of(t.n);
    multiply_tiles(n, p.Dv, pairs, x.Pt, ldt, x.dp, BR / 2 * NR, x.dv, ldv, true);
    multiply_tiles(n, p.D, pairs, x.dSt, ldt, x.qp, BR / 2 * NR, x.dk, ldk, true);
  }
#endif

  // Spans of all row blocks; weights outside them are cleared when some row block has a part only,
  // since the transposed products run over rectangles.
  bool spans_of(const BackwardScratch& x, int64_t first, int n, Span* spans) const {
    const Tile& t = *x.tile;
    bool dense = true, some = false;
    for (int rb = 0; rb * RB < t.n; ++rb) {
      spans[rb] = span_of(t, rb, first, n);
      dense &= spans[rb].lo == 0 && spans[rb].hi == n;
      some |= spans[rb].lo < spans[rb].hi;
    }
    if (some && !dense) {
      __builtin_memset(x.P, 0, sizeof(float) * t.n * lds);
      __builtin_memset(x.dS, 0, sizeof(float) * t.n * lds);
    }
    return some;
  }

  void run_task(int64_t task, const BackwardScratch& x) const {
    // The last keys first: causal ones are the least work, so a task seldom waits for its turn.
    const int64_t turn = task / heads(), split = splits - 1 - turn;
    const int64_t kv_head = task % p.Hkv, b = task % heads() / p.Hkv;
    const Sequence s = sequence_of(p, b);
    ScoreOptions mods(p, s);
    const int64_t rows = s.Sq * group();
    const int64_t begin = split * split_keys;
    const int64_t last = begin + split_keys < s.Sk ? begin + split_keys : s.Sk;
    float* dq = turn == 0 && splits > 1 ? total_of(task % heads()) : x.dq;
    // Where every row sees every key the first block writes all of dQ.
    const bool add = p.window_left >= 0 || p.window_right >= 0 || begin >= last;
    if (add) __builtin_memset(dq, 0, sizeof(float) * rows * ldk);
    float ones[BK], scales[BK];
    for (int j = 0; j < BK; ++j)
      ones[j] = 1.0f, scales[j] = Unit::matrix ? p.scale : kLn2;  // fp32 q carries scale * log2(e)
    for (int64_t first = begin; first < last; first += BK) {
      const int n = static_cast<int>(last - first < BK ? last - first : BK);
      key_rows(p, p.k, s, kv_head, first, n, x.rows);
      pack_columns<Unit>(x.rows, n, p.dtype, static_cast<int>(p.D), x.kt);
      Unit::pack_panels(x.rows, n, p.dtype, static_cast<int>(p.D), BK, x.kp);
      key_rows(p, p.v, s, kv_head, first, n, x.rows);
      pack_columns<Unit>(x.rows, n, p.dtype, static_cast<int>(p.Dv), x.vt);
      __builtin_memset(x.dk, 0, sizeof(float) * n * ldk);
      __builtin_memset(x.dv, 0, sizeof(float) * n * ldv);
      for (int64_t index = 0; index < tile_count(rows); ++index) {
        make_tile(p, s, kv_head * group(), group(), index, *x.tile);
        const Tile& t = *x.tile;
        if (t.seen.lo >= first + n || t.seen.hi <= first) continue;
        const BackwardScratch y = tile_of(x, index);
        // Kept from the first block that it sees.
        if (!keeps_rows() || first == begin || t.seen.lo >= first) load_tile(s, y);
#if defined(__AVX512BF16__)
        if constexpr (Unit::matrix) {
          tile_by_tiles(s, mods, y, first, n, dq + index * BR * ldk, add || first > begin);
          continue;
        }
#endif
        Span spans[BR / RB];
        if (!spans_of(y, first, n, spans)) continue;
        weights(s, mods, y, spans, first, n, false);
        add_transposed(t, spans, n, y.P, y.dout, ldo, p.Dv, y.dv);
        add_transposed(t, spans, n, y.dS, y.q, ldq, p.D, y.dk);
        add_dq(t, spans, y, dq + index * BR * ldk, add || first > begin);
      }
      key_rows(p, g.dk, s, kv_head, first, n, x.rows);
      unpack_rows(x.dk, ldk, n, static_cast<int>(p.D), scales, const_cast<char* const*>(x.rows),
                  p.dtype);
      key_rows(p, g.dv, s, kv_head, first, n, x.rows);
      unpack_rows(x.dv, ldv, n, static_cast<int>(p.Dv), ones, const_cast<char* const*>(x.rows),
                  p.dtype);
    }
    if (splits > 1) add_to_total(task % heads(), turn, rows * ldk, dq);
    if (turn == splits - 1) store_dq(s, kv_head, dq);
  }

  // Adds dq to the head's total (the first range's own dQ), or the total to dq when no range is
  // left. Tasks are handed out in the order of their turns, so the one that is waited for runs.
  void add_to_total(int64_t head, int64_t turn, int64_t count, float* dq) const {
    std::atomic<int64_t>& now = turns[head];
    while (now.load(std::memory_order_acquire) != turn) std::this_thread::yield();
    const float* total = total_of(head);
    float* to = turn == splits - 1 ? dq : total_of(head);
    for (int64_t c = 0; c < count && turn > 0; c += W)
      store(to + c, load(total + c) + load(dq + c));
    now.store(turn + 1, std::memory_order_release);
  }

  void store_dq(const Sequence& s, int64_t kv_head, const float* dq) const {
    const float factor = p.scale;
    for (int64_t r = 0; r < s.Sq * group(); ++r) {
      char* row = row_at(g.dq, p.dtype, s.b, kv_head * group() + r / s.Sq, s.q_row + r % s.Sq);
      unpack_rows(dq + r * ldk, ldk, 1, static_cast<int>(p.D), &factor, &row, p.dtype);
    }
  }

  void sink_gradient(int64_t head) const {
    double sum = 0.0;
    for (int64_t b = 0; b < p.B; ++b) {
      const Sequence s = sequence_of(p, b);
      for (int64_t i = 0; i < s.Sq; ++i) {
        const int64_t at = stat_index(b, head, i);
        sum -= static_cast<double>(__builtin_exp2f(p.sinks[head] * kLog2e - lse2[at])) * delta[at];
      }
    }
    g.dsinks[head] = static_cast<float>(sum);
  }

  // ---- gradient of the mask --------------------------------------------------------------------
  // A pass of its own (two more products) in which one task owns the elements it writes, so that
  // sums over broadcast dimensions run in a fixed order.
  int64_t mask_rows() const { return g.dmask.i_stride != 0 ? p.Sq : 1; }
  int64_t mask_batches() const { return g.dmask.b_stride != 0 ? p.B : 1; }
  int64_t mask_heads() const { return g.dmask.h_stride != 0 ? p.Hq : 1; }
  int64_t mask_blocks() const { return g.dmask.j_stride != 0 ? (p.Sk + BK - 1) / BK : 1; }

  void mask_task(int64_t task, const BackwardScratch& x) const {
    const int64_t block = task % mask_blocks();
    const int64_t mh = task / mask_blocks() % mask_heads();
    const int64_t mb = task / mask_blocks() / mask_heads();
    const bool every_j = g.dmask.j_stride == 0, every_i = g.dmask.i_stride == 0;
    __builtin_memset(x.sums, 0, sizeof(float) * mask_rows() * (BK + W));
    // Of a mask that all rows share: 32,768 rows in one chain of fp32 would lose 28 times what
    // PyTorch's sum does.
    double shared[BK + W] = {};
    for (int64_t b = mb; b < (mask_batches() == 1 ? p.B : mb + 1); ++b) {
      const Sequence s = sequence_of(p, b);
      ScoreOptions mods(p, s);
      for (int64_t head = mh; head < (mask_heads() == 1 ? p.Hq : mh + 1); ++head) {
        const int64_t end = every_j ? s.Sk : (block + 1) * BK < s.Sk ? (block + 1) * BK : s.Sk;
        for (int64_t first = block * BK; first < end; first += BK) {
          const int n = static_cast<int>(end - first < BK ? end - first : BK);
          key_rows(p, p.k, s, head / group(), first, n, x.rows);
          pack_columns<Unit>(x.rows, n, p.dtype, static_cast<int>(p.D), x.kt);
          key_rows(p, p.v, s, head / group(), first, n, x.rows);
          pack_columns<Unit>(x.rows, n, p.dtype, static_cast<int>(p.Dv), x.vt);
          for (int64_t index = 0; index < tile_count(s.Sq); ++index) {
            make_tile(p, s, head, 1, index, *x.tile);
            Span spans[BR / RB];
            if (!spans_of(x, first, n, spans)) continue;
            load_tile(s, x);
            weights(s, mods, x, spans, first, n, true);
            const Tile& t = *x.tile;
            for (int r = 0; r < t.n; ++r) {
              const Span& span = spans[r / RB];
              float* to = x.sums + (every_i ? 0 : t.position[r] * (BK + W));
              const float* dS = x.dS + r * lds;
              if (every_j) {
                double sum = 0.0;
                for (int j = span.lo; j < span.hi; ++j) sum += dS[j];
                if (every_i)
                  shared[0] += sum;
                else
                  to[0] += static_cast<float>(sum);
              } else if (every_i) {
                for (int j = span.lo; j < span.hi; ++j) shared[j] += dS[j];
              } else {
                for (int j = span.lo; j < span.hi; ++j) to[j] += dS[j];
              }
            }
          }
        }
      }
    }
    if (every_i)
      for (int j = 0; j < BK; ++j) x.sums[j] = static_cast<float>(shared[j]);
    const AttentionMask& m = g.dmask;
    const int64_t left = p.Sk - block * BK;
    const int n = every_j ? 1 : static_cast<int>(left < BK ? left : BK);
    for (int64_t i = 0; i < mask_rows(); ++i)
      scatter_f32(x.sums + i * (BK + W), n,
                  static_cast<char*>(m.data) + (mb * m.b_stride + mh * m.h_stride + i * m.i_stride +
                                                block * BK * m.j_stride) *
                                                   dtype_bytes(m.dtype),
                  m.dtype, m.j_stride);
  }
};

}  // namespace
}  // namespace genfast::cpu
