// Short sequences: all keys of a head in one block, scores transposed, a vector holds W queries.
//
//   forward:   S^T = K Q^T,  P^T = 2^(S^T - max),  l = sum P^T,  O = P V / l
//   backward:  S^T = K Q^T,  dP^T = V dO^T,  P^T = 2^(S^T - LSE),  delta = sum P^T dP^T - dLSE,
//              dS^T = P^T (dP^T - delta),  dV = P^T dO,  dK = dS^T Q,  dQ = dS K
//
// At 16 queries and keys of 32 the products of a head take 0.3 us forward; packing its operands,
// the horizontal maxima and sums of its rows and the running maximum took 0.8 us beside them.
// Transposed, the softmax is element by element and needs one pass, only Q and dO are packed, and
// every result is complete when it leaves the registers.
#pragma once
#include "cpu/attention/score.h"
#include "math/rng.h"

namespace genfast::cpu {
namespace {

// A head's rows in fp32, whole vectors of them readable.
struct Matrix {
  float* data;
  int64_t ld;
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

// c (m x columns) = factor[row] * a b, or factor[0] for all rows. b has whole vectors.
template <bool Transposed, bool ByRow>
inline void product(int m, int64_t columns, int64_t depth, const float* a, int64_t lda,
                    const Matrix& b, const Matrix& c, const float* factor) {
  const float all = factor[0];
  for (int64_t d = 0; d < columns; d += NR)
    multiply<Transposed>(m, static_cast<int>(columns - d < NR ? columns - d : NR), depth, a, lda,
                         b.data + d, b.ld, [&](int row0, auto& acc) {
                           constexpr int M = sizeof(acc) / sizeof(acc[0]);
                           constexpr int N = sizeof(acc[0]) / sizeof(f32v);
                           float* to = c.data + row0 * c.ld + d;
#pragma GCC unroll 16
                           for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
                             for (int n = 0; n < N; ++n)
                               store(to + i * c.ld + n * W,
                                     acc[i][n] * (ByRow ? factor[row0 + i] : all));
                         });
}

// The keys that W queries from i on see, relative to the first key; every: all of them, each.
struct Visible {
  i32v lo, hi;
  bool every;
};
inline Visible visible_of(const AttentionParams& p, const Sequence& s, int64_t i) {
  Visible v{{}, {}, true};
  if (p.window_left < 0 && p.window_right < 0) return v;
  for (int lane = 0; lane < W; ++lane) {
    const int64_t at = i + lane < s.Sq ? i + lane : s.Sq - 1;
    const KeyRange r = visible_keys(p, s, at);
    v.lo[lane] = static_cast<int32_t>(r.lo), v.hi[lane] = static_cast<int32_t>(r.hi);
    v.every &= r.lo == 0 && r.hi == s.Sk;
  }
  return v;
}

// Queries of a forward task, and the most queries and keys of a backward one.
constexpr int64_t kShortRows = 96;

struct Short {
  const AttentionParams& p;
  int64_t longest_q = 0, longest_k = 0;

  explicit Short(const AttentionParams& params) : p(params) {
    for (int64_t b = 0; b < p.B; ++b) {
      const Sequence s = sequence_of(p, b);
      if (s.Sq > longest_q) longest_q = s.Sq;
      if (s.Sk > longest_k) longest_k = s.Sk;
    }
  }

  // No option touches the scores, and vectors of queries are mostly full.
  bool fits(int64_t most_keys) const {
    return !has_score_options(p) && !p.dropout && p.block_table == nullptr && p.scale > 0.0f &&
           longest_k <= most_keys && longest_q >= W / 2;
  }
  int64_t chunks() const { return (longest_q + kShortRows - 1) / kShortRows; }
  float log_scale() const { return p.scale * kLog2e; }
};

struct ShortForward : Short {
  using Short::Short;

  struct Scratch {
    const char** rows;
    float *k, *v, *q, *scores, *out;
  };
  Scratch lay_out(Arena& a) const {
    Scratch x;
    x.rows = a.take<const char*>(NR);
    x.k = a.take<float>(in_place(p.dtype, p.D) ? 0 : longest_k * round_up(p.D, W));
    x.v = a.take<float>(in_place(p.dtype, p.Dv) ? 0 : longest_k * round_up(p.Dv, W));
    x.q = a.take<float>(NR * round_up(p.D, W));
    x.scores = a.take<float>(longest_k * NR);
    x.out = a.take<float>(in_place(p.out_dtype, p.Dv) ? 0 : NR * round_up(p.Dv, W));
    return x;
  }
  int64_t tasks() const { return p.B * p.Hq * chunks(); }

  // P^T in place of S^T, in units of log2: column vector c of a panel; returns sum and maximum.
  void softmax(const Scratch& x, const Sequence& s, int64_t i, int c, f32v most, f32v& l,
               f32v& m) const {
    const int keys = static_cast<int>(s.Sk);
    float* scores = x.scores + c * W;
    const Visible seen = visible_of(p, s, i + c * W);
    if (!seen.every) {
      most = f32v{} - kInf;
      for (int j = 0; j < keys; ++j) {
        const i32v at = i32v{} + j;
        const f32v v =
            select((at >= seen.lo) & (at < seen.hi), load(scores + j * NR), f32v{} - kInf);
        store(scores + j * NR, v);
        most = maximum(most, v);
      }
    }
    const f32v factor = splat(log_scale());
    m = most * factor;
    const f32v minus = select(m == -kInf, f32v{}, f32v{} - m);
    f32v sum = f32v{};
    for (int j = 0; j < keys; ++j) {
      const f32v e =
          exp2_nonpositive<f32v>(fused_multiply_add(load(scores + j * NR), factor, minus));
      store(scores + j * NR, e);
      sum += e;
    }
    l = sum;
  }

  // out = O / l, LSE = ln 2 m + ln l, with the sink in the denominator.
  void panel(const Scratch& x, const Sequence& s, int64_t head, int64_t i, int n, const Matrix& k,
             const Matrix& v) const {
    for (int r = 0; r < n; ++r) x.rows[r] = row_at(p.q, p.dtype, s.b, head, s.q_row + i + r);
    pack_columns<VectorUnit>(x.rows, n, p.dtype, static_cast<int>(p.D), x.q);
    f32v most[NV];
    for (f32v& top : most) top = f32v{} - kInf;
    multiply<false>(static_cast<int>(s.Sk), n, p.D, k.data, k.ld, x.q, NR,
                    [&](int row0, auto& acc) {
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
    alignas(64) float factor[NR], lse[NR];
    for (int c = 0; c * W < n; ++c) {
      f32v l, m;
      softmax(x, s, i, c, most[c], l, m);
      f32v down = f32v{} + 1.0f;
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
    const Matrix out = target_of(p.out, p.out_dtype, s.b, head, s.q_row + i, p.Dv, x.out);
    product<true, true>(n, p.Dv, s.Sk, x.scores, NR, v, out, factor);
    bring_home(out, p.out, p.out_dtype, s.b, head, s.q_row + i, n, p.Dv);
    for (int r = 0; r < n && p.lse.data != nullptr; ++r)
      stat_at(p.lse, s.b, head, s.q_row + i + r) = lse[r];
  }

  void run_task(int64_t task, const Scratch& x) const {
    const int64_t chunk = task % chunks(), head = task / chunks() % p.Hq;
    const Sequence s = sequence_of(p, task / chunks() / p.Hq);
    const int64_t kv_head = head / (p.Hq / p.Hkv);
    const Matrix k = matrix_of(p.k, p.dtype, s.entry, kv_head, s.k_row, s.Sk, p.D, x.k);
    const Matrix v = matrix_of(p.v, p.dtype, s.entry, kv_head, s.k_row, s.Sk, p.Dv, x.v);
    const int64_t end = (chunk + 1) * kShortRows < s.Sq ? (chunk + 1) * kShortRows : s.Sq;
    for (int64_t i = chunk * kShortRows; i < end; i += NR)
      panel(x, s, head, i, static_cast<int>(end - i < NR ? end - i : NR), k, v);
  }
};

struct ShortBackward : Short {
  const AttentionGradParams& g;
  explicit ShortBackward(const AttentionGradParams& grad) : Short(grad.p), g(grad) {}

  bool fits() const {
    return Short::fits(kShortRows) && longest_q <= kShortRows && p.Hq == p.Hkv &&
           p.sinks == nullptr && g.dmask.data == nullptr;
  }

  struct Scratch {
    const char** rows;
    float *q, *k, *v, *dout;  // fp32 copies
    float *qt, *dt;           // Q and dO by columns
    float *P, *dS;            // [Sk][lds]
    float* out;
  };
  int64_t lds() const { return odd_lines(round_up(longest_q, W)); }
  Scratch lay_out(Arena& a) const {
    Scratch x;
    const int64_t D = round_up(p.D, W), Dv = round_up(p.Dv, W), wide = D > Dv ? D : Dv;
    const int64_t most = longest_q > longest_k ? longest_q : longest_k;
    const bool copies = !in_place(p.dtype, p.D) || !in_place(p.dtype, p.Dv) ||
                        !in_place(p.out_dtype, p.Dv);
    x.rows = a.take<const char*>(longest_q);
    x.q = a.take<float>(copies ? longest_q * D : 0);
    x.k = a.take<float>(copies ? longest_k * D : 0);
    x.v = a.take<float>(copies ? longest_k * Dv : 0);
    x.dout = a.take<float>(copies ? longest_q * Dv : 0);
    x.out = a.take<float>(copies ? most * wide : 0);
    x.qt = a.take<float>(round_up(longest_q, NR) * D);
    x.dt = a.take<float>(round_up(longest_q, NR) * Dv);
    x.P = a.take<float>(longest_k * lds());
    x.dS = a.take<float>(longest_k * lds());
    return x;
  }
  int64_t tasks() const { return p.B * p.Hq; }

  // to = a b^T by key rows of a: columns are queries.
  void transposed(const Sequence& s, int64_t dim, const Matrix& a, const float* b,
                  float* to) const {
    const int64_t depth = round_up(dim, W);
    for (int64_t i = 0; i < s.Sq; i += NR)
      multiply<false>(static_cast<int>(s.Sk), static_cast<int>(s.Sq - i < NR ? s.Sq - i : NR), dim,
                      a.data, a.ld, b + i * depth, NR, [&](int row0, auto& acc) {
                        constexpr int M = sizeof(acc) / sizeof(acc[0]);
                        constexpr int N = sizeof(acc[0]) / sizeof(f32v);
                        float* at = to + row0 * lds() + i;
#pragma GCC unroll 16
                        for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
                          for (int c = 0; c < N; ++c) store(at + r * lds() + c * W, acc[r][c]);
                      });
  }

  // S^T and dP^T of W queries from i on -> P^T and dS^T.
  void weigh(const Scratch& x, const Sequence& s, int64_t head, int64_t i) const {
    const int keys = static_cast<int>(s.Sk);
    const int64_t step = lds();
    float *P = x.P + i, *dS = x.dS + i;
    f32v minus = f32v{} - kInf, delta = f32v{};
    for (int r = 0; r < W && i + r < s.Sq; ++r) {
      const float lse = stat_at(p.lse, s.b, head, s.q_row + i + r);
      minus[r] = lse == -kInf ? -kInf : -lse * kLog2e;
      if (g.dlse.data != nullptr) delta[r] = -stat_at(g.dlse, s.b, head, s.q_row + i + r);
    }
    const Visible seen = visible_of(p, s, i);
    const f32v factor = splat(log_scale());
    for (int j = 0; j < keys; ++j) {
      f32v e = fused_multiply_add(load(P + j * step), factor, minus);
      if (!seen.every) {
        const i32v at = i32v{} + j;
        e = select((at >= seen.lo) & (at < seen.hi), e, f32v{} - kInf);
      }
      e = exp2_nonpositive<f32v>(e);
      store(P + j * step, e);
      delta = fused_multiply_add(e, load(dS + j * step), delta);
    }
    for (int j = 0; j < keys; ++j)
      store(dS + j * step, load(P + j * step) * (load(dS + j * step) - delta));
  }

  void run_task(int64_t task, const Scratch& x) const {
    const int64_t h = task % p.Hq, b = task / p.Hq;
    const Sequence s = sequence_of(p, b);
    const int Sq = static_cast<int>(s.Sq), Sk = static_cast<int>(s.Sk);
    const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
    const Matrix q = matrix_of(p.q, p.dtype, b, h, s.q_row, Sq, D, x.q);
    const Matrix k = matrix_of(p.k, p.dtype, s.entry, h, s.k_row, Sk, D, x.k);
    const Matrix v = matrix_of(p.v, p.dtype, s.entry, h, s.k_row, Sk, Dv, x.v);
    const Matrix dout = matrix_of(g.dout, p.out_dtype, b, h, s.q_row, Sq, Dv, x.dout);
    const auto by_columns = [&](const Matrix& m, int dim, float* to) {
      for (int i = 0; i < Sq; ++i) x.rows[i] = reinterpret_cast<const char*>(m.data + i * m.ld);
      pack_columns<VectorUnit>(x.rows, Sq, Dtype::f32, dim, to);
    };
    by_columns(q, static_cast<int>(round_up(D, W)), x.qt);
    by_columns(dout, static_cast<int>(round_up(Dv, W)), x.dt);
    transposed(s, D, k, x.qt, x.P);
    transposed(s, Dv, v, x.dt, x.dS);
    for (int64_t i = 0; i < Sq; i += W) weigh(x, s, h, i);
    const float one = 1.0f;
    const Matrix dv = target_of(g.dv, p.dtype, s.entry, h, s.k_row, Dv, x.out);
    product<false, false>(Sk, Dv, Sq, x.P, lds(), dout, dv, &one);
    bring_home(dv, g.dv, p.dtype, s.entry, h, s.k_row, Sk, Dv);
    const Matrix dk = target_of(g.dk, p.dtype, s.entry, h, s.k_row, D, x.out);
    product<false, false>(Sk, D, Sq, x.dS, lds(), q, dk, &p.scale);
    bring_home(dk, g.dk, p.dtype, s.entry, h, s.k_row, Sk, D);
    const Matrix dq = target_of(g.dq, p.dtype, b, h, s.q_row, D, x.out);
    product<true, false>(Sq, D, Sk, x.dS, lds(), k, dq, &p.scale);
    bring_home(dq, g.dq, p.dtype, b, h, s.q_row, Sq, D);
  }
};

}  // namespace
}  // namespace genfast::cpu
