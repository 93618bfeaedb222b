// Scores by columns: S^T instead of S, a vector holds W queries.
//
//   forward:   S^T = K Q^T;  m' = max(m, max S^T);  P^T = 2^(S^T - m');  l = a l + sum P^T;
//              O = a O + P V;  a = 2^(m - m')
//   backward:  S^T = K Q^T,  dP^T = V dO^T,  P^T = 2^(S^T - LSE) / sum 2^(S^T - LSE),
//              delta = sum P^T dP^T - dLSE,  dS^T = P^T (dP^T - delta),
//              dV = P^T dO,  dK = dS^T Q,  dQ = dS K
//
// The softmax is element by element, without the maximum and the sum across each row's lanes, keys
// are read where they lie, and only queries are transposed: 15 % faster than rows of scores from 64
// to 1024 keys, twice as fast at 16 (heads of 64, AVX2). Options that work on rows of scores (mask,
// ALiBi, softcap, dropout) and pages take the other way, forward.h and backward.h.
#pragma once
#include "cpu/attention/score.h"
#include "math/rng.h"

namespace genfast::cpu {
namespace {

// Rows in fp32, whole vectors of them readable. Columns d ... d + NR - 1 lie at data + d / NR *
// panel, ld apart from row to row.
struct Matrix {
  float* data;
  int64_t ld;
  int64_t panel = NR;
};

inline bool in_place(Dtype dtype, int64_t dim) { return dtype == Dtype::f32 && dim % W == 0; }

// Rows [first, first + n) of head h: where they lie, or converted to `room`.
inline Matrix matrix_of(const AttentionRows& t, Dtype dtype, int64_t b, int64_t h, int64_t first,
                        int64_t n, int64_t dim, float* room) {
  char* row = row_at(t, dtype, b, h, first);
  if (in_place(dtype, dim)) return {reinterpret_cast<float*>(row), t.s_stride};
  const int64_t ld = round_up(dim, W), step = t.s_stride * dtype_bytes(dtype);
  for (int64_t r = 0; r < n; ++r, row += step) {
    to_f32(row, dtype, static_cast<int>(dim), room + r * ld);
    for (int64_t d = dim; d < ld; ++d) room[r * ld + d] = 0.0f;
  }
  return {room, ld};
}

// Where the rows of a result are written to, and from where they go home.
inline Matrix target_of(const AttentionRows& t, Dtype dtype, int64_t b, int64_t h, int64_t first,
                        int64_t dim, float* room) {
  if (!in_place(dtype, dim)) return {room, round_up(dim, W)};
  return {reinterpret_cast<float*>(row_at(t, dtype, b, h, first)), t.s_stride};
}
inline void bring_home(const Matrix& from, const AttentionRows& t, Dtype dtype, int64_t b,
                       int64_t h, int64_t first, int64_t n, int64_t dim) {
  if (in_place(dtype, dim)) return;
  for (int64_t r = 0; r < n; ++r)
    from_f32(from.data + r * from.ld, static_cast<int>(dim), row_at(t, dtype, b, h, first + r),
             dtype);
}

// c (m x columns) = put(a b, row, what c holds). b has whole vectors.
template <bool Transposed, class Put>
inline void product(int m, int64_t columns, int64_t depth, const float* a, int64_t lda,
                    const Matrix& b, const Matrix& c, Put&& put) {
  for (int64_t d = 0; d < columns; d += NR)
    multiply<Transposed>(m, static_cast<int>(columns - d < NR ? columns - d : NR), depth, a, lda,
                         b.data + d / NR * b.panel, b.ld,
                         [data = c.data + d, ld = c.ld, &put](int row0, auto& acc) {
                           constexpr int M = sizeof(acc) / sizeof(acc[0]);
                           constexpr int N = sizeof(acc[0]) / sizeof(f32v);
                           float* to = data + row0 * ld;
#pragma GCC unroll 16
                           for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
                             for (int n = 0; n < N; ++n) {
                               float* at = to + i * ld + n * W;
                               store(at, put(acc[i][n], row0 + i, at));
                             }
                         });
}

// Of W queries from i on: the keys that each sees, that some see, and that all see.
struct Visible {
  i32v lo{}, hi{};
  KeyRange any{0, 0}, every{0, 0};
};
inline Visible visible_of(const AttentionParams& p, const Sequence& s, int64_t i) {
  Visible v;
  v.any = v.every = {0, s.Sk};
  if (p.window_left < 0 && p.window_right < 0) return v;
  v.any = {s.Sk, 0};
  for (int lane = 0; lane < W; ++lane) {
    const KeyRange r = visible_keys(p, s, i + lane < s.Sq ? i + lane : s.Sq - 1);
    v.lo[lane] = static_cast<int32_t>(r.lo), v.hi[lane] = static_cast<int32_t>(r.hi);
    if (r.lo > v.every.lo) v.every.lo = r.lo;
    if (r.hi < v.every.hi) v.every.hi = r.hi;
    if (r.lo >= r.hi) continue;
    if (r.lo < v.any.lo) v.any.lo = r.lo;
    if (r.hi > v.any.hi) v.any.hi = r.hi;
  }
  return v;
}
GENFAST_INLINE f32v hide(const Visible& seen, int64_t key, f32v score) {
  const i32v at = i32v{} + static_cast<int32_t>(key);
  return select((at >= seen.lo) & (at < seen.hi), score, f32v{} - kInf);
}

struct Columns {
  const AttentionParams& p;
  int64_t longest_q, longest_k;

  // Nothing works on rows of scores, and vectors of queries are mostly full.
  bool fits() const {
    return !has_score_options(p) && !p.dropout && p.block_table == nullptr && p.scale > 0.0f &&
           longest_q >= W / 2;
  }
  float log_scale() const { return p.scale * kLog2e; }
};

// A task owns a chunk of queries of one head. It walks the key blocks once, panels of NR queries
// inside. A query's result depends neither on its chunk nor on the queries beside it.
struct ColumnForward : Columns {
  // Keys of a block: 16 KiB of scores with AVX2 (with 512 or 1024 long heads take 3 to 10 % more).
  static constexpr int64_t kBlock = 256, kMostRows = 384, kLeastRows = 32;
  // One chain of additions over all keys makes the error of a gradient twice as large at 270 keys.
  static constexpr int kSum = 32;
  int64_t rows = kMostRows;  // of a chunk

  ColumnForward(const AttentionParams& params, int64_t longest_q, int64_t longest_k)
      : Columns{params, longest_q, longest_k} {
    const int threads = p.threads > 0 ? p.threads : 8;
    // Whole panels: where they begin, a window's first key, must not depend on the threads.
    while (rows > kLeastRows && tasks() < 12 * threads) rows = round_up(rows / 2, NR);
  }

  struct Panel {
    f32v m[NV], l[NV];  // running maximum (units of log2) and sum
    Visible seen[NV];
    KeyRange range;  // keys that some query sees
  };
  struct Scratch {
    const char** rows;
    Panel* panels;
    float *k, *v, *q, *scores, *o;
  };
  int64_t chunks() const { return (longest_q + rows - 1) / rows; }
  int64_t tasks() const { return p.B * p.Hq * chunks(); }
  // Chunks for many threads, without splitting the keys.
  bool enough() const { return p.B * p.Hq * ((longest_q + kLeastRows - 1) / kLeastRows) >= 64; }
  int64_t block() const { return longest_k < kBlock ? longest_k : kBlock; }
  int64_t chunk_rows() const { return round_up(longest_q < rows ? longest_q : rows, NR); }
  // Values of a long chunk are packed: by columns of long rows they would share a few sets of L1
  // (16 of 64 for rows of 64 floats: packed, 197 keys take 7 % less time).
  bool packs_values() const {
    return !in_place(p.dtype, p.Dv) || (p.Dv >= 64 && chunk_rows() >= 2 * NR);
  }

  Scratch lay_out(Arena& a) const {
    Scratch x;
    const int64_t n = chunk_rows();
    x.rows = a.take<const char*>(block() > NR ? block() : NR);
    x.panels = a.take<Panel>(n / NR);
    x.k = a.take<float>(p.dtype == Dtype::f32 ? 0 : block() * round_up(p.D, W));
    x.v = a.take<float>(packs_values() ? block() * round_up(p.Dv, NR) : 0);
    x.q = a.take<float>(n * round_up(p.D, W));
    x.scores = a.take<float>(block() * NR);
    x.o = a.take<float>(in_place(p.out_dtype, p.Dv) ? 0 : n * round_up(p.Dv, W));
    return x;
  }

  Matrix keys(const Scratch& x, const Sequence& s, int64_t kv_head, int64_t first, int n) const {
    if (p.dtype != Dtype::f32)
      return matrix_of(p.k, p.dtype, s.entry, kv_head, s.k_row + first, n, p.D, x.k);
    // Read one by one, so that any length of row will do.
    return {reinterpret_cast<float*>(row_at(p.k, p.dtype, s.entry, kv_head, s.k_row + first)),
            p.k.s_stride};
  }
  Matrix values(const Scratch& x, const Sequence& s, int64_t kv_head, int64_t first, int n) const {
    if (!packs_values())
      return matrix_of(p.v, p.dtype, s.entry, kv_head, s.k_row + first, n, p.Dv, x.v);
    key_rows(p, p.v, s, kv_head, first, n, x.rows);
    pack_panels(x.rows, n, p.dtype, static_cast<int>(p.Dv), block(), x.v);
    return {x.v, NR, block() * NR};
  }

  void start_panel(const Scratch& x, const Sequence& s, int64_t head, int64_t i, int n, float* q,
                   Panel& t) const {
    for (int r = 0; r < n; ++r) x.rows[r] = row_at(p.q, p.dtype, s.b, head, s.q_row + i + r);
    pack_columns<VectorUnit>(x.rows, n, p.dtype, static_cast<int>(p.D), q);
    // q, not the score, takes the factor: a backward by rows (backward.h) makes the same bits of S
    // from it. With others P near 1 fits its LSE less: errors of up to 5x plain PyTorch's.
    const f32v factor = splat(log_scale());
    for (float* at = q; at < q + round_up(p.D, W) * NR; at += NR)
      for (int c = 0; c < n; c += W) store(at + c, load(at + c) * factor);
    t.range = {s.Sk, 0};
    for (int c = 0; c * W < n; ++c) {
      t.m[c] = f32v{} - kInf, t.l[c] = f32v{};
      t.seen[c] = visible_of(p, s, i + c * W);
      if (t.seen[c].any.lo < t.range.lo) t.range.lo = t.seen[c].any.lo;
      if (t.seen[c].any.hi > t.range.hi) t.range.hi = t.seen[c].any.hi;
    }
  }

  // P^T in place of S^T for vector c of a panel, keys from `first`; returns a.
  f32v softmax(Panel& t, int c, f32v most, int64_t first, int n, float* scores) const {
    const Visible& seen = t.seen[c];
    if (seen.every.lo > first || seen.every.hi < first + n) {
      most = f32v{} - kInf;
      for (int j = 0; j < n; ++j) {
        f32v v = load(scores + j * NR);
        if (first + j < seen.every.lo || first + j >= seen.every.hi) {
          v = hide(seen, first + j, v);
          store(scores + j * NR, v);
        }
        most = maximum(most, v);
      }
    }
    const f32v m = maximum(t.m[c], most), base = select(m == -kInf, f32v{}, m);
    const f32v down = exp2_nonpositive<f32v>(t.m[c] - base);
    t.m[c] = m, t.l[c] = t.l[c] * down;
    for (int begin = 0; begin < n; begin += kSum) {
      f32v sum = f32v{};
      for (int j = begin; j < n && j < begin + kSum; ++j) {
        const f32v e = exp2_nonpositive<f32v>(load(scores + j * NR) - base);
        store(scores + j * NR, e);
        sum += e;
      }
      t.l[c] += sum;
    }
    return down;
  }

  // 1 / l by query, and LSE = ln 2 m + ln l, with the sink in the denominator.
  void finish(Panel& t, const Sequence& s, int64_t head, int64_t i, int n, float* factor) const {
    alignas(64) float lse[NR];
    for (int c = 0; c * W < n; ++c) {
      f32v m = t.m[c], l = t.l[c], down = f32v{} + 1.0f;
      if (p.sinks != nullptr) {
        const f32v sink = splat(p.sinks[head] * kLog2e), top = maximum(m, sink);
        const f32v base = select(top == -kInf, f32v{}, top);
        down = exp2_nonpositive<f32v>(m - base);
        l = l * down + exp2_nonpositive<f32v>(sink - base);
        m = top;
      }
      store(factor + c * W, select(l == 0.0f, f32v{}, down / l));
      if (p.lse.data != nullptr)  // l - l: the logarithm knows no NaN
        store(lse + c * W,
              select(l == 0.0f, f32v{} - kInf,
                     fused_multiply_add(m, splat(kLn2), log_positive<f32v>(l)) + (l - l)));
    }
    for (int r = 0; r < n && p.lse.data != nullptr; ++r)
      stat_at(p.lse, s.b, head, s.q_row + i + r) = lse[r];
  }

  // Keys [first, first + n) of a panel of `queries` rows; o: its rows of the result.
  void attend(const Scratch& x, const Sequence& s, int64_t head, int64_t i, int queries, Panel& t,
              const float* q, const Matrix& o, int64_t first, int n, const Matrix& k,
              const Matrix& v) const {
    const bool begins = t.range.lo >= first, ends = t.range.hi <= first + n;
    const int lo = static_cast<int>(begins ? t.range.lo - first : 0);
    const int count = static_cast<int>(ends ? t.range.hi - first : n) - lo;
    f32v most[NV];
    for (f32v& top : most) top = f32v{} - kInf;
    multiply<false>(count, queries, p.D, k.data + lo * k.ld, k.ld, q, NR, [&](int row0, auto& acc) {
      constexpr int M = sizeof(acc) / sizeof(acc[0]);
      constexpr int N = sizeof(acc[0]) / sizeof(f32v);
#pragma GCC unroll 4
      for (int c = 0; c < N; ++c) {
        f32v top = most[c];
#pragma GCC unroll 16
        for (int r = 0; r < M; ++r) {
          store(x.scores + (row0 + r) * NR + c * W, acc[r][c]);
          top = maximum(top, acc[r][c]);
        }
        most[c] = top;
      }
    });
    alignas(64) float factor[NR];
    for (int c = 0; c * W < queries; ++c)
      store(factor + c * W, softmax(t, c, most[c], first + lo, count, x.scores + c * W));
    const Matrix weighted{v.data + lo * v.ld, v.ld, v.panel};
    const auto weigh = [&](auto put) {
      product<true>(queries, p.Dv, count, x.scores, NR, weighted, o, put);
    };
    if (begins && ends) {
      finish(t, s, head, i, queries, factor);
      weigh([&](f32v sum, int r, const float*) { return sum * factor[r]; });
    } else if (begins) {
      weigh([&](f32v sum, int, const float*) { return sum; });
    } else {
      weigh([&](f32v sum, int r, const float* old) { return load(old) * factor[r] + sum; });
      if (ends) finish_rows(t, s, head, i, queries, o);
    }
  }

  // What has been summed in several blocks, or in none.
  void finish_rows(Panel& t, const Sequence& s, int64_t head, int64_t i, int queries,
                   const Matrix& o) const {
    alignas(64) float factor[NR];
    finish(t, s, head, i, queries, factor);
    const bool none = t.range.lo >= t.range.hi;
    for (int r = 0; r < queries; ++r)
      for (int64_t d = 0; d < p.Dv; d += W) {
        float* at = o.data + r * o.ld + d;
        store(at, none ? f32v{} : load(at) * factor[r]);
      }
  }

  void run_task(int64_t task, const Scratch& x) const {
    const int64_t chunk = chunks() - 1 - task % chunks();  // the longest causal rows first
    const int64_t head = task / chunks() % p.Hq, kv_head = head / (p.Hq / p.Hkv);
    const Sequence s = sequence_of(p, task / chunks() / p.Hq);
    const int64_t begin = chunk * rows, end = begin + rows < s.Sq ? begin + rows : s.Sq;
    if (begin >= end) return;
    const Matrix o = target_of(p.out, p.out_dtype, s.b, head, s.q_row + begin, p.Dv, x.o);
    const int64_t depth = round_up(p.D, W);
    const auto each_panel = [&](auto&& body) {
      for (int64_t i = begin; i < end; i += NR) {
        const int n = static_cast<int>(end - i < NR ? end - i : NR);
        body(i, n, x.panels[(i - begin) / NR], x.q + (i - begin) * depth,
             Matrix{o.data + (i - begin) * o.ld, o.ld});
      }
    };
    KeyRange range{s.Sk, 0};
    each_panel([&](int64_t i, int n, Panel& t, float* q, const Matrix& rows_of_o) {
      start_panel(x, s, head, i, n, q, t);
      if (t.range.lo >= t.range.hi) finish_rows(t, s, head, i, n, rows_of_o);
      if (t.range.lo < range.lo) range.lo = t.range.lo;
      if (t.range.hi > range.hi) range.hi = t.range.hi;
    });
    for (int64_t first = range.lo / kBlock * kBlock; first < range.hi; first += kBlock) {
      const int n = static_cast<int>(range.hi - first < kBlock ? range.hi - first : kBlock);
      const Matrix k = keys(x, s, kv_head, first, n), v = values(x, s, kv_head, first, n);
      each_panel([&](int64_t i, int queries, Panel& t, float* q, const Matrix& rows_of_o) {
        if (t.range.lo < first + n && t.range.hi > first)
          attend(x, s, head, i, queries, t, q, rows_of_o, first, n, k, v);
      });
    }
    bring_home(o, p.out, p.out_dtype, s.b, head, s.q_row + begin, end - begin, p.Dv);
  }
};

// A task owns a key/value head whose keys are one block, so that delta comes from P and dP
// themselves and dQ is written once. (In several blocks it gains nothing: 1 % faster than
// backward.h at heads of 64, 4 % slower at 128, 6 % at 256.)
struct ColumnBackward : Columns {
  static constexpr int64_t kMostKeys = 288, kMostRows = 128;  // of a tile
  const AttentionGradParams& g;
  int64_t rows;

  ColumnBackward(const AttentionGradParams& grad, int64_t longest_q, int64_t longest_k)
      : Columns{grad.p, longest_q, longest_k},
        g(grad),
        rows(longest_q < kMostRows ? longest_q : kMostRows) {}
  bool fits() const { return Columns::fits() && longest_k <= kMostKeys && g.dsinks == nullptr; }
  int64_t tasks() const { return p.B * p.Hkv; }

  struct Scratch {
    const char** rows;
    Visible* seen;            // by vectors of queries
    float *q, *k, *v, *dout;  // fp32 copies
    float *qt, *dt;           // Q and dO by columns
    float *P, *dS;            // [Sk][lds]
    float *dq, *dk, *dv;      // where fp32 results stay before they go home
  };
  int64_t lds() const { return odd_lines(round_up(rows, W)); }
  Scratch lay_out(Arena& a) const {
    Scratch x;
    const int64_t D = round_up(p.D, W), Dv = round_up(p.Dv, W);
    const bool copy = !in_place(p.dtype, p.D), copy_v = !in_place(p.dtype, p.Dv);
    x.rows = a.take<const char*>(rows);
    x.seen = a.take<Visible>((rows + W - 1) / W);
    x.q = a.take<float>(copy ? rows * D : 0);
    x.k = a.take<float>(copy ? longest_k * D : 0);
    x.v = a.take<float>(copy_v ? longest_k * Dv : 0);
    x.dout = a.take<float>(in_place(p.out_dtype, p.Dv) ? 0 : rows * Dv);
    x.qt = a.take<float>(round_up(rows, NR) * D);
    x.dt = a.take<float>(round_up(rows, NR) * Dv);
    x.P = a.take<float>(longest_k * lds());
    x.dS = a.take<float>(longest_k * lds());
    x.dq = a.take<float>(copy ? rows * D : 0);
    x.dk = a.take<float>(copy ? longest_k * D : 0);
    x.dv = a.take<float>(copy_v ? longest_k * Dv : 0);
    return x;
  }

  // A tile: n queries of `head` from i on.
  struct Queries {
    const Sequence& s;
    int64_t head, i;
    int n;
    bool whole = true;  // every one sees every key
  };

  // Keys that some query of the panel from i on sees.
  KeyRange seen_by(const Scratch& x, const Queries& t, int64_t i) const {
    KeyRange r{t.s.Sk, 0};
    for (int64_t c = i; c < i + NR && c < t.n; c += W) {
      const KeyRange& any = x.seen[c / W].any;
      if (any.lo < r.lo) r.lo = any.lo;
      if (any.hi > r.hi) r.hi = any.hi;
    }
    return r.lo < r.hi ? r : KeyRange{0, 0};
  }

  // to = a b^T: keys that the queries see by rows, queries by columns.
  void scores(const Scratch& x, const Queries& t, int64_t dim, const Matrix& a, const float* b,
              float* to) const {
    for (int i = 0; i < t.n; i += NR) {
      const KeyRange r = seen_by(x, t, i);
      multiply<false>(static_cast<int>(r.hi - r.lo), t.n - i < NR ? t.n - i : NR, dim,
                      a.data + r.lo * a.ld, a.ld, b + i * round_up(dim, W), NR,
                      [&](int row0, auto& acc) {
                        constexpr int M = sizeof(acc) / sizeof(acc[0]);
                        constexpr int N = sizeof(acc[0]) / sizeof(f32v);
                        float* at = to + (r.lo + row0) * lds() + i;
#pragma GCC unroll 16
                        for (int j = 0; j < M; ++j)
#pragma GCC unroll 4
                          for (int c = 0; c < N; ++c) store(at + j * lds() + c * W, acc[j][c]);
                      });
    }
  }

  // S^T and dP^T of W queries from i on -> P^T and dS^T. P is divided by its sum: LSE is rounded,
  // which a P near 1 feels. (95 of 100 dQ of 16 keys err by at most 1.6x plain PyTorch's, 2.5x
  // without.)
  void weigh(const Scratch& x, const Queries& t, int i) const {
    const Visible& seen = x.seen[i / W];
    const int64_t step = lds();
    float *P = x.P + i, *dS = x.dS + i;
    f32v minus = f32v{} - kInf, of_lse = f32v{};
    for (int r = 0; r < W && i + r < t.n; ++r) {
      const int64_t at = t.i + i + r;
      const float lse = stat_at(p.lse, t.s.b, t.head, t.s.q_row + at);
      minus[r] = lse == -kInf ? -kInf : -lse * kLog2e;
      if (g.dlse.data != nullptr) of_lse[r] = stat_at(g.dlse, t.s.b, t.head, t.s.q_row + at);
    }
    const f32v factor = splat(log_scale());
    f32v delta = f32v{}, total = f32v{};
    if (p.sinks != nullptr) total = exp2_nonpositive<f32v>(splat(p.sinks[t.head] * kLog2e) + minus);
    const auto weigh_keys = [&](int64_t begin, int64_t end, bool hidden) {
      for (int64_t j = begin; j < end; ++j) {
        f32v e = fused_multiply_add(load(P + j * step), factor, minus);
        if (hidden) e = hide(seen, j, e);
        e = exp2_nonpositive<f32v>(e);
        store(P + j * step, e);
        total += e;
        delta = fused_multiply_add(e, load(dS + j * step), delta);
      }
    };
    // All that the panel sees: the products take whole panels.
    const KeyRange any = seen_by(x, t, i / NR * NR), every = seen.every;
    const int64_t from = every.lo < every.hi ? every.lo : any.hi;  // keys that all see
    const int64_t to = every.lo < every.hi ? every.hi : any.hi;
    weigh_keys(any.lo, from, true);
    weigh_keys(from, to, false);
    weigh_keys(to, any.hi, true);
    const f32v one = f32v{} + 1.0f, norm = select(total == 0.0f, one, one / total);
    delta = delta * norm - of_lse;
    for (int64_t j = any.lo; j < any.hi; ++j) {
      const f32v e = load(P + j * step) * norm;
      store(P + j * step, e);
      store(dS + j * step, e * (load(dS + j * step) - delta));
    }
  }

  // to[key] (+)= factor * sum over the queries that see it of w[key][query] from[query].
  void by_keys(const Scratch& x, const Queries& t, int64_t dim, const float* w, const Matrix& from,
               const Matrix& to, float factor, bool add) const {
    const int keys = static_cast<int>(t.s.Sk), step = t.whole ? keys : 2 * MR;
    for (int j = 0; j < keys; j += step) {
      const int n = keys - j < step ? keys - j : step;
      int begin = 0, end = t.n;
      if (!t.whole) {
        begin = t.n, end = 0;
        for (int i = 0; i < t.n; i += W)
          if (x.seen[i / W].any.lo < j + n && x.seen[i / W].any.hi > j) {
            if (i < begin) begin = i;
            end = i + W < t.n ? i + W : t.n;
          }
        if (begin > end) begin = end;
      }
      sum<false>(n, dim, end - begin, w + j * lds() + begin, {from.data + begin * from.ld, from.ld},
                 {to.data + j * to.ld, to.ld}, factor, add);
    }
  }

  // c (+)= factor * a b
  template <bool Transposed>
  void sum(int m, int64_t columns, int64_t depth, const float* a, const Matrix& b, const Matrix& c,
           float factor, bool add) const {
    if (add)
      product<Transposed>(m, columns, depth, a, lds(), b, c,
                          [factor](f32v now, int, const float* old) {
                            return fused_multiply_add(now, splat(factor), load(old));
                          });
    else
      product<Transposed>(m, columns, depth, a, lds(), b, c,
                          [factor](f32v now, int, const float*) { return now * factor; });
  }

  void run_tile(const Scratch& x, Queries& t, const Matrix& k, const Matrix& v, const Matrix& dk,
                const Matrix& dv, bool add) const {
    const int64_t row = t.s.q_row + t.i;
    const Matrix q = matrix_of(p.q, p.dtype, t.s.b, t.head, row, t.n, p.D, x.q);
    const Matrix dout = matrix_of(g.dout, p.out_dtype, t.s.b, t.head, row, t.n, p.Dv, x.dout);
    const auto by_columns = [&](const Matrix& m, int64_t dim, float* to) {
      for (int r = 0; r < t.n; ++r) x.rows[r] = reinterpret_cast<const char*>(m.data + r * m.ld);
      pack_columns<VectorUnit>(x.rows, t.n, Dtype::f32, static_cast<int>(round_up(dim, W)), to);
    };
    by_columns(q, p.D, x.qt);
    by_columns(dout, p.Dv, x.dt);
    for (int i = 0; i < t.n; i += W) {
      const Visible& seen = x.seen[i / W] = visible_of(p, t.s, t.i + i);
      t.whole &= seen.any.lo == 0 && seen.any.hi == t.s.Sk;
    }
    if (!t.whole) {  // the products over queries run over rectangles
      __builtin_memset(x.P, 0, sizeof(float) * t.s.Sk * lds());
      __builtin_memset(x.dS, 0, sizeof(float) * t.s.Sk * lds());
    }
    scores(x, t, p.D, k, x.qt, x.P);
    scores(x, t, p.Dv, v, x.dt, x.dS);
    for (int i = 0; i < t.n; i += W) weigh(x, t, i);
    by_keys(x, t, p.Dv, x.P, dout, dv, 1.0f, add);
    by_keys(x, t, p.D, x.dS, q, dk, p.scale, add);
    const Matrix dq = target_of(g.dq, p.dtype, t.s.b, t.head, row, p.D, x.dq);
    for (int i = 0; i < t.n; i += NR) {
      const KeyRange r = seen_by(x, t, i);
      sum<true>(t.n - i < NR ? t.n - i : NR, p.D, r.hi - r.lo, x.dS + r.lo * lds() + i,
                {k.data + r.lo * k.ld, k.ld}, {dq.data + i * dq.ld, dq.ld}, p.scale, false);
    }
    bring_home(dq, g.dq, p.dtype, t.s.b, t.head, row, t.n, p.D);
  }

  void run_task(int64_t task, const Scratch& x) const {
    const int64_t kv_head = task % p.Hkv, group = p.Hq / p.Hkv;
    const Sequence s = sequence_of(p, task / p.Hkv);
    const Matrix k = matrix_of(p.k, p.dtype, s.entry, kv_head, s.k_row, s.Sk, p.D, x.k);
    const Matrix v = matrix_of(p.v, p.dtype, s.entry, kv_head, s.k_row, s.Sk, p.Dv, x.v);
    const Matrix dk = target_of(g.dk, p.dtype, s.entry, kv_head, s.k_row, p.D, x.dk);
    const Matrix dv = target_of(g.dv, p.dtype, s.entry, kv_head, s.k_row, p.Dv, x.dv);
    bool add = false;  // the first tile writes all keys, the others add to it
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
      for (int64_t i = 0; i < s.Sq; i += rows) {
        Queries t{s, h, i, static_cast<int>(s.Sq - i < rows ? s.Sq - i : rows)};
        run_tile(x, t, k, v, dk, dv, add);
        add = true;
      }
    if (!add) clear(dk, s.Sk, p.D), clear(dv, s.Sk, p.Dv);
    bring_home(dk, g.dk, p.dtype, s.entry, kv_head, s.k_row, s.Sk, p.D);
    bring_home(dv, g.dv, p.dtype, s.entry, kv_head, s.k_row, s.Sk, p.Dv);
  }

  static void clear(const Matrix& m, int64_t n, int64_t dim) {
    for (int64_t r = 0; r < n; ++r)
      for (int64_t d = 0; d < dim; d += W) store(m.data + r * m.ld + d, f32v{});
  }
};

}  // namespace
}  // namespace genfast::cpu
