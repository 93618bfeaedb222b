// Every attention kernel of one ISA level on drawn cases (head dims, lengths, strides, masks,
// caches), against plain double loops; and the same bits for every number of threads.
#include "harness.h"

#include <algorithm>
#include <deque>
#include <thread>

#include "math/rng.h"

namespace {

using namespace genfast;
using namespace genfast::test;
using Matrix = std::vector<std::vector<double>>;
using Places = std::vector<std::pair<int64_t, int64_t>>;  // (batch entry or page, row)

const cpu::Kernels& kernels() { return cpu::GENFAST_ISA::table(); }

// Below, at and beside whole vectors, whole panels, and the 64 of a summed block.
constexpr int64_t kDims[] = {1,  2,  3,  5,  7,  8,  9,  12,  15,  16,  17,  24,  31,  32, 33,
                             40, 48, 63, 64, 65, 80, 96, 100, 128, 129, 160, 192, 257, 300};
constexpr int kDimCount = sizeof(kDims) / sizeof(kDims[0]);

AttentionRows rows_of(const TensorView& t) {  // (B, H, S, X), or packed (T, H, X)
  if (t.ndim == 4) return {t.data, t.strides[0], t.strides[1], t.strides[2]};
  return {t.data, 0, t.strides[1], t.strides[0]};
}
AttentionStats stats_of(const TensorView& t) {  // (B, H, S), or packed (H, T)
  float* data = static_cast<float*>(t.data);
  if (t.ndim == 3) return {data, t.strides[0], t.strides[1], t.strides[2]};
  return {data, 0, t.strides[0], t.strides[1]};
}

Matrix gather(const AttentionRows& t, Dtype dtype, const Places& places, int64_t h, int64_t X) {
  Matrix m;
  std::vector<float> row(X);
  for (const auto& [entry, s] : places) {
    const int64_t at = entry * t.b_stride + h * t.h_stride + s * t.s_stride;
    cpu::gather_f32(static_cast<char*>(t.data) + at * cpu::dtype_bytes(dtype), dtype, 1,
                    static_cast<int>(X), row.data());
    m.emplace_back(row.begin(), row.end());
  }
  return m;
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  const double *x = a.data(), *y = b.data();
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += x[i] * y[i];
  return sum;
}
void add(std::vector<double>& to, const std::vector<double>& from, double factor) {
  double* y = to.data();
  for (size_t i = 0; i < to.size(); ++i) y[i] += factor * from[i];
}
// Levels amx and bf16 multiply weights and score gradients that are rounded to bf16 as well; the
// terms of a gradient may be ten times their sum.
double slack(Dtype dtype, double vector, double matrix) {
  const char* level = GENFAST_TEXT(GENFAST_ISA);
  const bool rounds = std::strcmp(level, "amx") == 0 || std::strcmp(level, "bf16") == 0;
  return rounds && dtype == Dtype::bf16 ? matrix : vector;
}
bool matches(const Matrix& got, const Matrix& want, Dtype dtype, double slack) {
  if (got.size() != want.size()) return false;
  for (size_t i = 0; i < got.size(); ++i)
    for (size_t d = 0; d < want[i].size(); ++d)
      if (!close(got[i][d], want[i][d], dtype, slack)) return false;
  return true;
}
void check(const Matrix& got, const Matrix& want, Dtype dtype, double slack) {
  CHECK(matches(got, want, dtype, slack));
}
// Either of two truths will do, but one of them for the whole.
void check(const Matrix& got, const Matrix (&want)[2], Dtype dtype, double slack) {
  CHECK(matches(got, want[0], dtype, slack) || matches(got, want[1], dtype, slack));
}

struct Case {
  Pick pick;
  AttentionGradParams g;
  AttentionParams& p = g.p;
  std::deque<Tensor> kept;
  Tensor *out = nullptr, *lse = nullptr;
  bool packed = false;
  int64_t rows_q = 0, rows_k = 0;  // of all sequences together

  explicit Case(int number) : pick(number) {
    p.D = kDims[number % kDimCount];
    p.Dv = pick.one_in(2) ? p.D : kDims[pick.below(kDimCount)];
    p.dtype = pick.of({Dtype::f32, Dtype::f16, Dtype::bf16});
    p.out_dtype = p.dtype;
  }
  Case(const Case&) = delete;

  Tensor& keep(std::vector<int64_t> sizes, Dtype dtype, Layout layout = Layout::dense) {
    kept.emplace_back(std::move(sizes), dtype, layout);
    pick.fill(kept.back());
    return kept.back();
  }
  const int32_t* integers(const std::vector<int64_t>& v) {
    Tensor& t = keep({static_cast<int64_t>(v.size())}, Dtype::i32);
    for (size_t i = 0; i < v.size(); ++i) t.set(static_cast<int64_t>(i), static_cast<double>(v[i]));
    return t.as<int32_t>();
  }
  // (B, H, S, X), or (T, H, X) for packed sequences: S is T then.
  Tensor& rows(int64_t H, int64_t S, int64_t X, Dtype dtype) {
    if (packed) return keep({S, H, X}, dtype, pick.of({Layout::dense, Layout::padded}));
    return keep({p.B, H, S, X}, dtype, pick.of({Layout::dense, Layout::padded, Layout::swapped}));
  }
  Tensor& stats(int64_t S) {
    const Layout layout = pick.of({Layout::dense, Layout::padded, Layout::reversed});
    return packed ? keep({p.Hq, S}, Dtype::f32, layout) : keep({p.B, p.Hq, S}, Dtype::f32, layout);
  }
  int64_t group() const { return p.Hq / p.Hkv; }

  void heads() {
    static constexpr int64_t pairs[][2] = {{1, 1}, {2, 2}, {3, 1}, {4, 2}, {6, 2}, {8, 1}, {3, 3}};
    const auto& pair = pairs[pick.below(7)];
    p.Hq = pair[0], p.Hkv = pair[1];
    p.B = pick.of<int64_t>({1, 2, 3});
  }
  int64_t work(int64_t Sq, int64_t Sk) const { return p.B * p.Hq * Sq * Sk * (p.D + p.Dv); }

  // What every score goes through, and windows.
  void options(bool may_drop) {
    p.scale = pick.one_in(4) ? 0.3f : 1.0f / std::sqrt(static_cast<float>(p.D));
    switch (pick.below(5)) {
      case 0:
        p.window_right = 0;  // causal
        break;
      case 1:
        p.window_left = pick.below(40), p.window_right = pick.below(20);
        break;
      case 2:
        p.window_left = pick.below(5), p.window_right = 0;
    }
    p.bottom_right = pick.one_in(2);
    if (pick.one_in(4)) p.softcap = 2.0f;
    if (pick.one_in(4)) {
      const bool batched = pick.one_in(2);
      p.alibi_slopes = keep({batched ? p.B * p.Hq : p.Hq}, Dtype::f32).as<float>();
      p.alibi_b_stride = batched ? p.Hq : 0;
    }
    if (pick.one_in(4)) p.sinks = keep({p.Hq}, Dtype::f32).as<float>();
    if (may_drop && pick.one_in(4)) {
      p.dropout = true;
      const double drop = pick.of({0.25, 0.75, 1.0});
      p.dropout_threshold = static_cast<uint32_t>(std::min(drop * 0x1p32, 0x1p32 - 1));
      p.dropout_scale = drop < 1 ? static_cast<float>(1 / (1 - drop)) : 0.0f;
      p.seed = pick.below(~0u), p.stream = uint64_t{1} << 35;
    }
  }
  void mask() {
    if (packed || pick.one_in(2)) return;
    std::vector<int64_t> sizes = {p.B, p.Hq, p.Sq, p.Sk};
    for (int64_t& n : sizes)
      if (pick.one_in(3)) n = 1;
    const bool boolean = pick.one_in(2);
    const Dtype dtype = boolean ? Dtype::b8 : pick.of({Dtype::f32, Dtype::f16, Dtype::bf16});
    const Layout layout = pick.of({Layout::dense, Layout::padded, Layout::reversed});
    Tensor& t = keep(sizes, dtype, layout);
    const bool hides = pick.one_in(2);
    for (int64_t i = 0; i < t.elements; ++i) {
      if (boolean)
        t.set(i, !pick.one_in(3));
      else if (hides && pick.one_in(3))
        t.set(i, -INFINITY);
    }
    p.mask = mask_of(t, boolean ? MaskKind::boolean : MaskKind::additive);
    if (boolean || !pick.one_in(2)) return;
    dmask = &keep(sizes, pick.of({dtype, Dtype::f32}));
    g.dmask = mask_of(*dmask, MaskKind::additive);
  }
  static AttentionMask mask_of(const Tensor& t, MaskKind kind) {
    int64_t s[4];
    for (int d = 0; d < 4; ++d) s[d] = t.shape[d] == 1 ? 0 : t.strides[d];
    return {t.data, s[0], s[1], s[2], s[3], kind, t.dtype};
  }
  Tensor* dmask = nullptr;

  void dense() {
    do {
      heads();
      if (pick.one_in(16)) p.B = 0;
      if (pick.one_in(32)) p.Hq = 0;
      p.Sq = pick.of<int64_t>({0, 1, 2, 3, 5, 7, 13, 33, 64, 95, 97, 100, 200});
      p.Sk = pick.of<int64_t>({0, 1, 2, 3, 8, 15, 17, 63, 65, 96, 97, 130, 255, 257, 300});
      if (pick.one_in(3)) {  // decoding: read in place, keys split
        p.Sq = pick.of<int64_t>({1, 2});
        p.Sk = pick.of<int64_t>({64, 65, 100, 257, 513, 700, 1100});
      }
    } while (work(p.Sq, p.Sk) > kMostWork);
    if (pick.one_in(4)) p.out_dtype = Dtype::f32;
    rows_q = p.B * p.Sq, rows_k = p.B * p.Sk;
    p.noise_Sq = p.Sq, p.noise_Sk = p.Sk;
    options(true);
    mask();
    operands(p.Sq, p.Sk);
    if (pick.one_in(8) && p.B > 1) {  // one cache for the whole batch, expanded
      const int64_t B = p.B;
      p.B = 1;
      p.k = rows_of(rows(p.Hkv, p.Sk, p.D, p.dtype)), p.k.b_stride = 0;
      p.B = B;
    }
  }
  void sequences() {
    packed = true;
    std::vector<int64_t> q, k;
    do {
      heads();
      q.assign(1, pick.below(3)), k.assign(1, pick.below(3));  // rows before the first sequence
      p.Sq = p.Sk = 0;
      for (int64_t b = 0; b < p.B; ++b) {
        const int64_t n = pick.of<int64_t>({0, 1, 2, 9, 31, 64, 97, 130});
        const int64_t m = pick.of<int64_t>({0, 1, 3, 17, 64, 96, 130, 257});
        q.push_back(q.back() + n), k.push_back(k.back() + m);
        p.Sq = std::max(p.Sq, n), p.Sk = std::max(p.Sk, m);
      }
    } while (work(p.Sq, p.Sk) > kMostWork);
    rows_q = q.back() - q[0], rows_k = k.back() - k[0];
    p.cu_seqlens_q = integers(q), p.cu_seqlens_k = integers(k);
    p.noise_Sq = p.Sq + pick.below(3), p.noise_Sk = p.Sk + pick.below(3);
    options(true);
    p.total_q = q.back() + pick.below(3), p.total_k = k.back() + pick.below(3);
    operands(p.total_q, p.total_k);
  }
  void operands(int64_t Tq, int64_t Tk) {
    p.q = rows_of(rows(p.Hq, Tq, p.D, p.dtype));
    p.k = rows_of(rows(p.Hkv, Tk, p.D, p.dtype));
    p.v = rows_of(rows(p.Hkv, Tk, p.Dv, p.dtype));
    out = &rows(p.Hq, Tq, p.Dv, p.out_dtype), lse = &stats(Tq);
    p.out = rows_of(*out), p.lse = stats_of(*lse);
    g.dout = rows_of(rows(p.Hq, Tq, p.Dv, p.out_dtype));
    if (pick.one_in(3)) g.dlse = stats_of(stats(Tq));
    dq = &rows(p.Hq, Tq, p.D, p.dtype);
    dk = &rows(p.Hkv, Tk, p.D, p.dtype), dv = &rows(p.Hkv, Tk, p.Dv, p.dtype);
    g.dq = rows_of(*dq), g.dk = rows_of(*dk), g.dv = rows_of(*dv);
    if (p.sinks != nullptr && pick.one_in(2)) dsinks = &keep({p.Hq}, Dtype::f32);
    if (dsinks != nullptr) g.dsinks = dsinks->as<float>();
  }
  Tensor *dq = nullptr, *dk = nullptr, *dv = nullptr, *dsinks = nullptr;

  // ---- the truth --------------------------------------------------------------------------------
  Places queries(int64_t b) const {
    Places at;
    const int64_t first = packed ? p.cu_seqlens_q[b] : 0;
    const int64_t n = packed ? p.cu_seqlens_q[b + 1] - first : p.Sq;
    for (int64_t i = 0; i < n; ++i) at.emplace_back(b, first + i);
    return at;
  }
  Places keys(int64_t b) const {
    int64_t first = packed ? p.cu_seqlens_k[b] : 0, end = packed ? p.cu_seqlens_k[b + 1] : p.Sk;
    if (p.seqlens_k != nullptr) end = p.seqlens_k[b] + p.added_k;
    if (p.leftpad_k != nullptr) first = p.leftpad_k[b];
    return cached(b, first, end);
  }
  Places cached(int64_t b, int64_t first, int64_t end) const {
    Places at;
    for (int64_t j = first; j < end; ++j)
      if (p.block_table != nullptr)
        at.emplace_back(p.block_table[b * p.block_table_stride + j / p.page_size], j % p.page_size);
      else
        at.emplace_back(p.cache_batch_idx != nullptr ? p.cache_batch_idx[b] : b, j);
    return at;
  }
  double mask_at(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const AttentionMask& m = p.mask;
    if (m.kind == MaskKind::none) return 0;
    const int64_t at = b * m.b_stride + h * m.h_stride + i * m.i_stride + j * m.j_stride;
    const char* data = static_cast<const char*>(m.data);
    if (m.kind == MaskKind::boolean) return data[at] != 0 ? 0.0 : -INFINITY;
    float x;
    cpu::gather_f32(data + at * cpu::dtype_bytes(m.dtype), m.dtype, 1, 1, &x);
    return x;
  }
  double kept_factor(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (!p.dropout) return 1;
    const uint64_t e = ((b * p.Hq + h) * p.noise_Sq + i) * p.noise_Sk + j;
    const auto w = philox4x32_10<uint32_t>(
        static_cast<uint32_t>(e >> 2), static_cast<uint32_t>(e >> 34),
        static_cast<uint32_t>(p.stream), static_cast<uint32_t>(p.stream >> 32),
        static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32));
    const uint32_t words[] = {w.w0, w.w1, w.w2, w.w3};
    return words[e & 3] >= p.dropout_threshold ? p.dropout_scale : 0.0;
  }
  struct Truth {
    Matrix q, k, v, P, kept, slope, O;
    std::vector<double> lse;
  };
  Truth truth(int64_t b, int64_t h) const {
    Truth t;
    t.q = gather(p.q, p.dtype, queries(b), h, p.D);
    t.k = gather(p.k, p.dtype, keys(b), h / group(), p.D);
    t.v = gather(p.v, p.dtype, keys(b), h / group(), p.Dv);
    const int64_t Sq = t.q.size(), Sk = t.k.size(), offset = p.bottom_right ? Sk - Sq : 0;
    t.P.assign(Sq, std::vector<double>(Sk)), t.slope = t.kept = t.P;
    t.O.assign(Sq, std::vector<double>(p.Dv)), t.lse.assign(Sq, 0.0);
    const double slope = p.alibi_slopes != nullptr ? p.alibi_slopes[b * p.alibi_b_stride + h] : 0;
    for (int64_t i = 0; i < Sq; ++i) {
      double top = p.sinks != nullptr ? double{p.sinks[h]} : -INFINITY;
      for (int64_t j = 0; j < Sk; ++j) {
        const int64_t d = j - (i + offset);
        const bool seen = (p.window_left < 0 || d >= -p.window_left) &&
                          (p.window_right < 0 || d <= p.window_right);
        double s = -INFINITY;
        if (seen) {
          s = p.scale * dot(t.q[i], t.k[j]);
          t.slope[i][j] = 1;
          if (p.softcap > 0) {
            const double th = std::tanh(s / p.softcap);
            s = p.softcap * th, t.slope[i][j] = 1 - th * th;
          }
          s += mask_at(b, h, i, j) - slope * std::fabs(static_cast<double>(d));
        }
        t.P[i][j] = s;
        top = std::max(top, s);
      }
      double sum = p.sinks != nullptr ? std::exp(p.sinks[h] - top) : 0;
      for (double s : t.P[i]) sum += top == -INFINITY ? 0 : std::exp(s - top);
      t.lse[i] = top + std::log(sum);
      for (int64_t j = 0; j < Sk; ++j) {
        t.P[i][j] = top == -INFINITY ? 0 : std::exp(t.P[i][j] - t.lse[i]);
        t.kept[i][j] = kept_factor(b, h, i, j);
        if (t.P[i][j] > 0) add(t.O[i], t.v[j], t.P[i][j] * t.kept[i][j]);
      }
      if (top == -INFINITY) t.lse[i] = -INFINITY;
    }
    return t;
  }
  double stat(const AttentionStats& t, int64_t b, int64_t h, int64_t row) const {
    return t.data[b * t.b_stride + h * t.h_stride + row * t.s_stride];
  }

  // ---- the checks -------------------------------------------------------------------------------
  void forward(int threads) {
    p.threads = threads;
    kernels().attention_forward(p);
  }
  void check_forward() {
    std::vector<Tensor*> outputs = {out};
    if (p.lse.data != nullptr) outputs.push_back(lse);
    same_bits(outputs, [&](int threads) { forward(threads); });
    CHECK(out->written() == rows_q * p.Hq * p.Dv);
    CHECK(p.lse.data == nullptr || lse->written() == rows_q * p.Hq);
    for (int64_t b = 0; b < p.B; ++b)
      for (int64_t h = 0; h < p.Hq; ++h) {
        const Truth t = truth(b, h);
        const Places at = queries(b);
        check(gather(p.out, p.out_dtype, at, h, p.Dv), t.O, p.out_dtype,
              slack(p.out_dtype, 3e-5, 8e-3));
        for (size_t i = 0; i < at.size() && p.lse.data != nullptr; ++i) {
          const double got = stat(p.lse, b, h, at[i].second);
          CHECK(std::isfinite(t.lse[i]) ? close(got, t.lse[i], Dtype::f32, 3e-5) : got == t.lse[i]);
        }
      }
  }
  void check_backward() {
    std::vector<Tensor*> outputs = {dq, dk, dv};
    if (dmask != nullptr) outputs.push_back(dmask);
    if (dsinks != nullptr) outputs.push_back(dsinks);
    same_bits(outputs, [&](int threads) {
      p.threads = threads;
      kernels().attention_backward(g);
    });
    CHECK(dq->written() == rows_q * p.Hq * p.D && dk->written() == rows_k * p.Hkv * p.D);
    CHECK(dv->written() == rows_k * p.Hkv * p.Dv);
    std::vector<double> of_mask(dmask != nullptr ? dmask->elements : 0), of_sinks(p.Hq);
    for (int64_t b = 0; b < p.B; ++b) {
      const Places qs = queries(b), ks = keys(b);
      // delta = dO O comes from O as it was rounded, or from P and dP: two truths of dQ and dK.
      Matrix wanted_k[2], wanted_v;
      for (int64_t h = 0; h < p.Hq; ++h) {
        const Truth t = truth(b, h);
        if (h % group() == 0) {
          for (Matrix& m : wanted_k) m.assign(ks.size(), std::vector<double>(p.D));
          wanted_v.assign(ks.size(), std::vector<double>(p.Dv));
        }
        Matrix wanted_q[2];
        for (Matrix& m : wanted_q) m.assign(qs.size(), std::vector<double>(p.D));
        const Matrix dO = gather(g.dout, p.out_dtype, qs, h, p.Dv);
        const Matrix O = gather(p.out, p.out_dtype, qs, h, p.Dv);
        for (size_t i = 0; i < qs.size(); ++i) {
          const double of_lse = g.dlse.data != nullptr ? stat(g.dlse, b, h, qs[i].second) : 0;
          const double delta[] = {dot(dO[i], O[i]) - of_lse, dot(dO[i], t.O[i]) - of_lse};
          if (p.sinks != nullptr) of_sinks[h] -= std::exp(p.sinks[h] - t.lse[i]) * delta[0];
          for (size_t j = 0; j < ks.size(); ++j) {
            const double P = t.P[i][j];
            if (P == 0) continue;
            const double dP = t.kept[i][j] * dot(dO[i], t.v[j]);
            if (dmask != nullptr)
              of_mask[b * g.dmask.b_stride + h * g.dmask.h_stride + i * g.dmask.i_stride +
                      j * g.dmask.j_stride] += P * (dP - delta[0]);
            for (int way : {0, 1}) {
              const double dS = p.scale * t.slope[i][j] * P * (dP - delta[way]);
              add(wanted_q[way][i], t.k[j], dS);
              add(wanted_k[way][j], t.q[i], dS);
            }
            add(wanted_v[j], dO[i], P * t.kept[i][j]);
          }
        }
        const double allowed = slack(p.dtype, 1e-4, 5e-2);
        check(gather(g.dq, p.dtype, qs, h, p.D), wanted_q, p.dtype, allowed);
        if ((h + 1) % group() != 0) continue;
        check(gather(g.dk, p.dtype, ks, h / group(), p.D), wanted_k, p.dtype, allowed);
        check(gather(g.dv, p.dtype, ks, h / group(), p.Dv), wanted_v, p.dtype, allowed);
      }
    }
    if (dmask != nullptr) {
      const auto got = values(*dmask);  // dense: logical order is memory order
      for (size_t i = 0; i < got.size(); ++i) CHECK(close(got[i], of_mask[i], dmask->dtype, 1e-4));
    }
    for (int64_t h = 0; h < p.Hq && dsinks != nullptr; ++h)
      CHECK(close(dsinks->as<float>()[h], of_sinks[h], Dtype::f32, 1e-4));
  }

  // ---- the cache --------------------------------------------------------------------------------
  // New rows behind the old ones, then attention over all of them.
  void cache() {
    const bool paged = pick.one_in(2);
    int64_t S_new, capacity;
    do {
      heads();
      S_new = pick.of<int64_t>({0, 1, 1, 2, 5, 40});
      p.Sq = pick.of<int64_t>({1, 1, 2, 3, 40});
      capacity = S_new + pick.of<int64_t>({1, 7, 64, 100, 259, 600, 1100});
      p.page_size = pick.of<int64_t>({1, 3, 16, 64});
    } while (work(p.Sq, capacity) > kMostWork);
    const int64_t blocks = (capacity + p.page_size - 1) / p.page_size;
    if (paged) capacity = blocks * p.page_size;
    std::vector<int64_t> lengths, pads, entries;
    for (int64_t b = 0; b < p.B; ++b) {
      lengths.push_back(b == 0 ? capacity - S_new : pick.below(capacity - S_new + 1));
      pads.push_back(pick.below(lengths[b] + 1) / 2);
      entries.push_back(p.B - b);  // entry 0 belongs to nobody
    }
    p.seqlens_k = integers(lengths), p.added_k = S_new, p.Sk = capacity, p.bottom_right = true;
    if (pick.one_in(3)) p.leftpad_k = integers(pads);
    if (!p.leftpad_k) pads.assign(p.B, 0);
    const Layout layout = pick.of({Layout::dense, Layout::padded, Layout::swapped});
    Tensor *k, *v;
    if (paged) {
      const int64_t pages = p.B * blocks + 1;
      Tensor& table = keep({p.B, blocks}, Dtype::i32, pick.of({Layout::dense, Layout::padded}));
      for (int64_t b = 0; b < p.B; ++b)
        for (int64_t n = 0; n < blocks; ++n)  // what no row needs leads far away
          table.as<int32_t>()[b * table.strides[0] + n] =
              n * p.page_size < lengths[b] + S_new ? static_cast<int32_t>(pages - 1 - (n * p.B + b))
                                                   : 1 << 30;
      p.block_table = table.as<int32_t>(), p.block_table_stride = table.strides[0];
      k = &keep({pages, p.Hkv, p.page_size, p.D}, p.dtype, layout);
      v = &keep({pages, p.Hkv, p.page_size, p.Dv}, p.dtype, layout);
    } else {
      const bool mapped = pick.one_in(2);
      if (mapped) p.cache_batch_idx = integers(entries);
      k = &keep({p.B + mapped, p.Hkv, capacity, p.D}, p.dtype, layout);
      v = &keep({p.B + mapped, p.Hkv, capacity, p.Dv}, p.dtype, layout);
    }
    p.k = rows_of(*k), p.v = rows_of(*v);
    p.q = rows_of(rows(p.Hq, p.Sq, p.D, p.dtype));
    append(*k, *v, S_new, lengths, pads);
    options(false);
    p.bottom_right = true;
    rows_q = p.B * p.Sq;
    out = &rows(p.Hq, p.Sq, p.Dv, p.dtype), lse = &stats(p.Sq);
    p.out = rows_of(*out);
    if (pick.one_in(2)) p.lse = stats_of(*lse);
    check_forward();
  }
  void append(Tensor& k, Tensor& v, int64_t S_new, const std::vector<int64_t>& lengths,
              const std::vector<int64_t>& pads) {
    AttentionAppendParams a;
    a.B = p.B, a.Hq = p.Hq, a.Hkv = p.Hkv, a.Sq = p.Sq, a.S_new = S_new, a.D = p.D, a.Dv = p.Dv;
    a.dtype = p.dtype, a.capacity = p.Sk;
    a.k_new = rows_of(rows(p.Hkv, S_new, p.D, p.dtype));
    a.v_new = rows_of(rows(p.Hkv, S_new, p.Dv, p.dtype));
    a.k_cache = p.k, a.v_cache = p.v, a.seqlens_k = p.seqlens_k, a.leftpad_k = p.leftpad_k;
    a.cache_batch_idx = p.cache_batch_idx, a.block_table = p.block_table;
    a.block_table_stride = p.block_table_stride, a.page_size = p.page_size;
    const bool rotary = p.D > 1 && pick.one_in(2);
    Tensor* turned = nullptr;
    if (rotary) {
      const int64_t half = 1 + pick.below(static_cast<uint32_t>(p.D / 2));
      a.q_same_position = pick.one_in(2), a.rotary_interleaved = pick.one_in(2);
      int64_t positions = 0;
      for (int64_t b = 0; b < p.B; ++b)
        positions = std::max(positions,
                             lengths[b] - pads[b] + std::max(S_new, a.q_same_position ? 1 : p.Sq));
      a.rotary_dtype = pick.of({p.dtype, Dtype::f32});
      a.cos = keep({positions, half}, a.rotary_dtype).data;
      a.sin = keep({positions, half}, a.rotary_dtype).data;
      a.rotary_dim = 2 * half, a.rotary_stride = half;
      turned = &rows(p.Hq, p.Sq, p.D, p.dtype);
      a.q = p.q, a.q_out = rows_of(*turned);
    }
    const std::vector<char> old_k(k.as<char>(), k.as<char>() + k.bytes());
    const std::vector<char> old_v(v.as<char>(), v.as<char>() + v.bytes());
    std::vector<char> new_k, new_v;
    const auto call = [&](int threads) {
      std::copy(old_k.begin(), old_k.end(), k.as<char>());
      std::copy(old_v.begin(), old_v.end(), v.as<char>());
      a.threads = threads;
      kernels().attention_append(a);
      const std::vector<char> now_k(k.as<char>(), k.as<char>() + k.bytes());
      const std::vector<char> now_v(v.as<char>(), v.as<char>() + v.bytes());
      if (threads == 1) new_k = now_k, new_v = now_v;
      CHECK(now_k == new_k && now_v == new_v);
    };
    std::vector<Tensor*> outputs;
    if (rotary) outputs.push_back(turned);
    same_bits(outputs, call);
    CHECK(!rotary || turned->written() == turned->numel);

    // The new rows are right, and with the old rows put back over them nothing else has changed.
    const auto rotated = [&](Matrix m, int64_t first, bool same) {
      const int64_t half = a.rotary_dim / 2;
      const int64_t step = a.rotary_interleaved ? 2 : 1, other = a.rotary_interleaved ? 1 : half;
      const AttentionRows tables[] = {{const_cast<void*>(a.cos), 0, 0, half},
                                      {const_cast<void*>(a.sin), 0, 0, half}};
      for (size_t i = 0; i < m.size() && rotary; ++i) {
        const int64_t at = first + (same ? 0 : static_cast<int64_t>(i));
        const auto c = gather(tables[0], a.rotary_dtype, {{0, at}}, 0, half)[0];
        const auto s = gather(tables[1], a.rotary_dtype, {{0, at}}, 0, half)[0];
        for (int64_t r = 0; r < half; ++r) {
          double &x0 = m[i][r * step], &x1 = m[i][r * step + other];
          const double y0 = x0 * c[r] - x1 * s[r], y1 = x0 * s[r] + x1 * c[r];
          x0 = y0, x1 = y1;
        }
      }
      return m;
    };
    const int size = cpu::dtype_bytes(p.dtype);
    for (int64_t b = 0; b < p.B; ++b) {
      const Places to = cached(b, lengths[b], lengths[b] + S_new);
      Places from, qs;
      for (int64_t i = 0; i < S_new; ++i) from.emplace_back(b, i);
      for (int64_t i = 0; i < p.Sq; ++i) qs.emplace_back(b, i);
      const int64_t first = lengths[b] - pads[b];
      for (int64_t h = 0; h < p.Hkv; ++h) {
        check(gather(p.k, p.dtype, to, h, p.D),
              rotated(gather(a.k_new, p.dtype, from, h, p.D), first, false), p.dtype, 1e-5);
        check(gather(p.v, p.dtype, to, h, p.Dv), gather(a.v_new, p.dtype, from, h, p.Dv),
              Dtype::f32, 0.0);
        for (const auto& [entry, row] : to) {
          const auto offset = [&](const AttentionRows& t) {
            return (entry * t.b_stride + h * t.h_stride + row * t.s_stride) * size;
          };
          std::copy_n(old_k.begin() + offset(p.k), p.D * size, new_k.begin() + offset(p.k));
          std::copy_n(old_v.begin() + offset(p.v), p.Dv * size, new_v.begin() + offset(p.v));
        }
      }
      for (int64_t h = 0; h < p.Hq && rotary; ++h)
        check(gather(a.q_out, p.dtype, qs, h, p.D),
              rotated(gather(a.q, p.dtype, qs, h, p.D), first, a.q_same_position), p.dtype, 1e-5);
    }
    CHECK(new_k == old_k && new_v == old_v);
    if (rotary) p.q = a.q_out;
  }

  static constexpr int64_t kMostWork = 2000000;
};

// Several callers at once: one has the pool, the others work alone, all with their usual bits.
void callers_at_once() {
  std::deque<Case> cases;
  std::vector<std::vector<char>> want;
  for (int i = 0; i < 3; ++i) {
    Case& c = cases.emplace_back(20 + i);
    c.p.B = 2, c.p.Hq = 4, c.p.Hkv = 2, c.p.Sq = 70 + i, c.p.Sk = 130;
    c.rows_q = c.p.B * c.p.Sq;
    c.options(false);
    c.operands(c.p.Sq, c.p.Sk);
    c.check_forward();
    want.emplace_back(c.out->as<char>(), c.out->as<char>() + c.out->bytes());
    c.out->blank();
  }
  std::vector<std::thread> callers;
  for (Case& c : cases)
    callers.emplace_back([&c] {
      for (int turn = 0; turn < 5; ++turn) c.forward(3);
    });
  for (std::thread& t : callers) t.join();
  for (int i = 0; i < 3; ++i)
    CHECK(std::equal(want[i].begin(), want[i].end(), cases[i].out->as<char>()));
}

}  // namespace

void genfast::test::run(bool quick) {
  const int rounds = quick ? 1 : 4;
  callers_at_once();
  for (g_case = 0; g_case < rounds * 2 * kDimCount; ++g_case) {
    Case c(g_case);
    c.dense();
    c.check_forward();
    c.check_backward();
  }
  for (; g_case < rounds * 3 * kDimCount; ++g_case) {
    Case c(g_case);
    c.sequences();
    c.check_forward();
    c.check_backward();
  }
  for (; g_case < rounds * 5 * kDimCount; ++g_case) {
    Case c(g_case);
    c.cache();
  }
}
