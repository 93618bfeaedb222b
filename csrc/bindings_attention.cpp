// Entry points of attention: forward and backward (dense and packed sequences), the key/value
// cache. `false` means "not handled here"; values that would send a kernel out of bounds raise
// ValueError.
#include <cmath>
#include <cstring>

#include "api/attention.h"
#include "binding.h"

namespace genfast {
namespace {

constexpr int64_t kMaxHeadDim = 512;

std::string shape_text(const TensorView& t) {
  std::string text = "(";
  for (int i = 0; i < t.ndim; ++i) text += (i ? ", " : "") + std::to_string(t.shape[i]);
  return text + ")";
}

[[noreturn]] void refuse(const std::string& text) { throw py::value_error(text); }

// The last dimension lies side by side.
bool unit_rows(const TensorView& t) {
  return t.numel == 0 || t.shape[t.ndim - 1] == 1 || t.strides[t.ndim - 1] == 1;
}

// (B, H, S, X), or (T, H, X) for packed sequences.
AttentionRows rows_of(const TensorView& t) {
  if (t.ndim == 4) return {t.data, t.strides[0], t.strides[1], t.strides[2]};
  return {t.data, 0, t.strides[1], t.strides[0]};
}

// (B, H, S), or (H, T) for packed sequences.
AttentionStats stats_of(const TensorView& t) {
  auto* data = static_cast<float*>(t.data);
  if (t.ndim == 3) return {data, t.strides[0], t.strides[1], t.strides[2]};
  return {data, 0, t.strides[0], t.strides[1]};
}

bool indices(const TensorView& t, int64_t n) {
  return !t.defined() || (t.ndim == 1 && vector_of(t, Dtype::i32, n));
}
const int32_t* integers_of(const TensorView& t) { return static_cast<const int32_t*>(t.data); }

// A mask of up to four dimensions, aligned at the last; each is 1 or that of (B, Hq, Sq, Sk).
bool mask_of(const TensorView& t, const AttentionParams& p, AttentionMask& m) {
  if (!t.defined()) return true;
  const int64_t full[4] = {p.B, p.Hq, p.Sq, p.Sk};
  int64_t strides[4] = {};
  if (t.ndim > 4 || !(t.dtype == Dtype::b8 || is_float(t.dtype))) return false;
  for (int i = 0; i < t.ndim; ++i) {
    const int at = 4 - t.ndim + i;
    if (t.shape[i] != 1 && t.shape[i] != full[at]) return false;
    strides[at] = t.shape[i] == 1 ? 0 : t.strides[i];
  }
  m = {t.data,     strides[0], strides[1],
       strides[2], strides[3], t.dtype == Dtype::b8 ? MaskKind::boolean : MaskKind::additive,
       t.dtype};
  return true;
}

// What every score goes through, in Python's order.
struct Options {
  TensorArgument &alibi, &sinks, &seeds;
  py::handle scale, seed, stream;
  float softcap;
  int64_t left, right;
  bool bottom_right;
  double dropout_p;

  bool fill(AttentionParams& p) const {
    const double default_scale = 1.0 / std::sqrt(static_cast<double>(p.D > 0 ? p.D : 1));
    const double given = scale.is_none() ? default_scale : py::cast<double>(scale);
    if (!std::isfinite(given) || !std::isfinite(softcap)) return false;
    p.scale = static_cast<float>(given);
    p.softcap = softcap;
    p.window_left = left, p.window_right = right, p.bottom_right = bottom_right;
    p.threads = g_gate.threads();
    if (!(softcap >= 0.0f) || !(dropout_p >= 0.0 && dropout_p <= 1.0)) return false;
    if (alibi.defined()) {
      const bool batched = alibi.ndim == 2 && alibi.shape[0] == p.B && alibi.shape[1] == p.Hq;
      if (!batched && !(alibi.ndim == 1 && alibi.shape[0] == p.Hq)) return false;
      if (alibi.dtype != Dtype::f32 || !is_contiguous(alibi)) return false;
      p.alibi_slopes = static_cast<const float*>(alibi.data);
      p.alibi_b_stride = batched ? p.Hq : 0;
    }
    if (!vector_of(sinks, Dtype::f32, p.Hq)) return false;
    p.sinks = static_cast<const float*>(sinks.data);
    if (dropout_p > 0.0) {
      p.dropout = true;
      const double threshold = std::floor(dropout_p * 4294967296.0 + 0.5);
      p.dropout_threshold =
          threshold >= 4294967295.0 ? 0xFFFFFFFFu : static_cast<uint32_t>(threshold);
      p.dropout_scale = dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - dropout_p)) : 0.0f;
      p.seed = NoiseArgument::word("seed", seed);
      p.stream = NoiseArgument::word("stream", stream);
      if (seeds.defined()) {
        if (seeds.dtype != Dtype::i64 || seeds.numel != 1) return false;
        p.seeds = static_cast<const int64_t*>(seeds.data);
        if (seeds.is_cpu()) p.seed = static_cast<uint64_t>(*p.seeds);
      }
    }
    return true;
  }
};

// Checks first rows of packed sequences and returns the longest of them.
int64_t longest_of(const char* name, const TensorView& cu, int64_t total) {
  const int32_t* first = integers_of(cu);
  int64_t longest = 0;
  if (first[0] < 0)
    refuse(std::string(name) + ": expected the first entry >= 0, got " + std::to_string(first[0]));
  for (int64_t b = 0; b + 1 < cu.numel; ++b) {
    const int64_t n = int64_t{first[b + 1]} - first[b];
    if (n < 0)
      refuse(std::string(name) + ": expected entries that never fall, got " +
             std::to_string(first[b]) + " before " + std::to_string(first[b + 1]));
    longest = n > longest ? n : longest;
  }
  if (first[cu.numel - 1] > total)
    refuse(std::string(name) + ": expected the last entry <= the " + std::to_string(total) +
           " packed rows, got " + std::to_string(first[cu.numel - 1]));
  return longest;
}

// Rows of a packed tensor (T, H, X) that belong to no sequence become 0.
void clear_rest(const TensorView& t, const TensorView& cu) {
  if (!t.defined() || t.numel == 0 || !t.is_cpu()) return;  // on a device Python has done it
  const int32_t begin = integers_of(cu)[0], end = integers_of(cu)[cu.numel - 1];
  const int64_t bytes = t.dtype == Dtype::f32 ? 4 : 2;
  for (int64_t row = 0; row < t.shape[0]; ++row) {
    if (row == begin && end > begin) row = end;
    if (row >= t.shape[0]) break;
    for (int64_t h = 0; h < t.shape[1]; ++h)
      std::memset(static_cast<char*>(t.data) + (row * t.strides[0] + h * t.strides[1]) * bytes, 0,
                  t.shape[2] * bytes);
  }
}

void clear_rest_of_stats(const TensorView& t, const TensorView& cu) {
  if (!t.defined() || !t.is_cpu()) return;
  const int32_t begin = integers_of(cu)[0], end = integers_of(cu)[cu.numel - 1];
  auto* data = static_cast<float*>(t.data);
  for (int64_t h = 0; h < t.shape[0]; ++h)
    for (int64_t row = 0; row < t.shape[1]; ++row)
      if (row < begin || row >= end) data[h * t.strides[0] + row * t.strides[1]] = -INFINITY;
}

// The operands that forward and backward share.
struct Operands {
  TensorArgument &q, &k, &v, &out, &lse, &mask, &cu_q, &cu_k;
  int64_t max_q, max_k;  // of packed sequences: sizes of the dropout noise
  const Options& options;

  bool packed() const { return cu_q.defined(); }

  bool fill(AttentionParams& p) const {
    if (!given({&q, &k, &v, &out}) || !floats({&q, &k, &v, &out})) return false;
    if (!same_device({&q, &k, &v, &out, &lse, &mask, &cu_q, &cu_k, &options.alibi, &options.sinks,
                      &options.seeds}))
      return false;
    const int n = packed() ? 3 : 4;
    if (packed() != cu_k.defined() || q.ndim != n || k.ndim != n || v.ndim != n || out.ndim != n)
      return false;
    if (q.dtype != k.dtype || q.dtype != v.dtype ||
        (out.dtype != q.dtype && out.dtype != Dtype::f32))
      return false;
    if (!unit_rows(q) || !unit_rows(k) || !unit_rows(v) || !unit_rows(out)) return false;
    const int h = 1, s = packed() ? 0 : 2, x = n - 1;
    p.Hq = q.shape[h], p.Hkv = k.shape[h], p.Sq = q.shape[s], p.Sk = k.shape[s];
    p.D = q.shape[x], p.Dv = v.shape[x];
    p.B = packed() ? cu_q.numel - 1 : q.shape[0];
    if (k.shape[x] != p.D || v.shape[h] != p.Hkv || v.shape[s] != p.Sk || out.shape[x] != p.Dv ||
        out.shape[h] != p.Hq || out.shape[s] != p.Sq)
      return false;
    if (p.D < 1 || p.D > kMaxHeadDim || p.Dv < 1 || p.Dv > kMaxHeadDim) return false;
    if (p.Hkv < 1 || p.Hq % p.Hkv != 0 || p.B < 0) return false;
    if (!packed() && (k.shape[0] != p.B || v.shape[0] != p.B || out.shape[0] != p.B)) return false;
    if (lse.defined()) {
      const bool fits = packed() ? lse.ndim == 2 && lse.shape[0] == p.Hq && lse.shape[1] == p.Sq
                                 : lse.ndim == 3 && lse.shape[0] == p.B && lse.shape[1] == p.Hq &&
                                       lse.shape[2] == p.Sq;
      if (!fits || lse.dtype != Dtype::f32) return false;
      p.lse = stats_of(lse);
    }
    p.dtype = q.dtype, p.out_dtype = out.dtype;
    p.q = rows_of(q), p.k = rows_of(k), p.v = rows_of(v), p.out = rows_of(out);
    p.noise_Sq = p.Sq, p.noise_Sk = p.Sk;
    if (packed()) {
      if (mask.defined() || cu_k.numel != cu_q.numel || !indices(cu_q, cu_q.numel) ||
          !indices(cu_k, cu_k.numel))
        return false;
      p.total_q = q.shape[0], p.total_k = k.shape[0];
      // On a device nobody looks at the lengths: kernels clamp them, and the caller's maxima hold.
      p.Sq = q.is_cpu() ? longest_of("cu_seqlens_q", cu_q, p.total_q) : max_q;
      p.Sk = q.is_cpu() ? longest_of("cu_seqlens_k", cu_k, p.total_k) : max_k;
      if (max_q < p.Sq)
        refuse("max_seqlen_q: expected at least the longest sequence, " + std::to_string(p.Sq) +
               ", got " + std::to_string(max_q));
      if (max_k < p.Sk)
        refuse("max_seqlen_k: expected at least the longest sequence, " + std::to_string(p.Sk) +
               ", got " + std::to_string(max_k));
      p.cu_seqlens_q = integers_of(cu_q), p.cu_seqlens_k = integers_of(cu_k);
      p.noise_Sq = max_q, p.noise_Sk = max_k;
    }
    return mask_of(mask, p, p.mask) && options.fill(p);
  }
};

bool room_in(const TensorView& scratch, const TensorView& q) {
  return vector_of(scratch, Dtype::f32, scratch.numel) && same_device({&q, &scratch});
}
AttentionPlace place_of(const TensorView& q, const TensorView& scratch) {
  return {q.device, q.stream, static_cast<float*>(scratch.data),
          scratch.defined() ? scratch.numel : 0};
}

// `run` keeps the GIL for a small tensor.
const TensorView& larger(const TensorView& a, const TensorView& b) {
  return a.numel > b.numel ? a : b;
}

bool attention_forward(TensorArgument& q, TensorArgument& k, TensorArgument& v, TensorArgument& out,
                       TensorArgument& lse, TensorArgument& mask, TensorArgument& cu_q,
                       TensorArgument& cu_k, int64_t max_q, int64_t max_k, TensorArgument& alibi,
                       TensorArgument& sinks, py::handle seed, TensorArgument& seeds,
                       py::handle stream, py::handle scale, float softcap, int64_t left,
                       int64_t right, bool bottom_right, double dropout_p,
                       TensorArgument& scratch) {
  const Options options{alibi,   sinks, seeds, scale,        seed,     stream,
                        softcap, left,  right, bottom_right, dropout_p};
  AttentionParams p;
  if (!Operands{q, k, v, out, lse, mask, cu_q, cu_k, max_q, max_k, options}.fill(p) ||
      !room_in(scratch, q))
    return false;
  if (cu_q.defined()) clear_rest(out, cu_q), clear_rest_of_stats(lse, cu_q);
  p.place = place_of(q, scratch);
  return run(p, larger(q, k), GENFAST_KERNEL(attention_forward));
}

bool attention_backward(TensorArgument& dout, TensorArgument& dlse, TensorArgument& dq,
                        TensorArgument& dk, TensorArgument& dv, TensorArgument& dmask,
                        TensorArgument& dsinks, TensorArgument& q, TensorArgument& k,
                        TensorArgument& v, TensorArgument& out, TensorArgument& lse,
                        TensorArgument& mask, TensorArgument& cu_q, TensorArgument& cu_k,
                        int64_t max_q, int64_t max_k, TensorArgument& alibi, TensorArgument& sinks,
                        py::handle seed, TensorArgument& seeds, py::handle stream, py::handle scale,
                        float softcap, int64_t left, int64_t right, bool bottom_right,
                        double dropout_p, TensorArgument& scratch) {
  const Options options{alibi,   sinks, seeds, scale,        seed,     stream,
                        softcap, left,  right, bottom_right, dropout_p};
  AttentionGradParams g;
  AttentionParams& p = g.p;
  if (!given({&lse, &dout, &dq, &dk, &dv}) || !room_in(scratch, q) ||
      !same_device({&q, &dout, &dlse, &dq, &dk, &dv}) || !same_device({&q, &dmask, &dsinks}) ||
      !Operands{q, k, v, out, lse, mask, cu_q, cu_k, max_q, max_k, options}.fill(p))
    return false;
  if (!same_shapes({&out, &dout}) || !same_shapes({&q, &dq}) || !same_shapes({&k, &dk}) ||
      !same_shapes({&v, &dv}) || !same_shapes({&lse, &dlse}))
    return false;
  if (dout.dtype != out.dtype || dq.dtype != q.dtype || dk.dtype != q.dtype ||
      dv.dtype != q.dtype || !unit_rows(dout) || !unit_rows(dq) || !unit_rows(dk) ||
      !unit_rows(dv) || (dlse.defined() && dlse.dtype != Dtype::f32))
    return false;
  if (dmask.defined() && (p.mask.kind != MaskKind::additive || !is_float(dmask.dtype) ||
                          !same_shape(mask, dmask) || !mask_of(dmask, p, g.dmask)))
    return false;
  if (dsinks.defined() && (!sinks.defined() || !vector_of(dsinks, Dtype::f32, p.Hq))) return false;
  g.dout = rows_of(dout), g.dq = rows_of(dq), g.dk = rows_of(dk), g.dv = rows_of(dv);
  if (dlse.defined()) g.dlse = stats_of(dlse);
  g.dsinks = static_cast<float*>(dsinks.data);
  if (cu_q.defined()) clear_rest(dq, cu_q), clear_rest(dk, cu_k), clear_rest(dv, cu_k);
  p.place = place_of(q, scratch);
  if (!q.is_cpu() && p.place.scratch_size < 2 * p.B * p.Hq * p.Sq) return false;
  return run(g, larger(q, k), GENFAST_KERNEL(attention_backward));
}

// The cache: (entries, Hkv, capacity, X), or pages (pages, Hkv, page_size, X) and a table of them.
struct Cache {
  TensorArgument &k, &v, &lengths, &leftpad, &batch_idx, &block_table;

  bool fits(int64_t B, int64_t Hkv, int64_t D, Dtype dtype) const {
    if (!given({&k, &v, &lengths}) ||
        !same_device({&k, &v, &lengths, &leftpad, &batch_idx, &block_table}))
      return false;
    if (k.ndim != 4 || v.ndim != 4 || k.dtype != dtype || v.dtype != dtype || !unit_rows(k) ||
        !unit_rows(v))
      return false;
    for (int i = 0; i < 3; ++i)
      if (k.shape[i] != v.shape[i]) return false;
    if (k.shape[1] != Hkv || k.shape[3] != D || v.shape[3] < 1 || v.shape[3] > kMaxHeadDim)
      return false;
    if (block_table.defined() &&
        (block_table.ndim != 2 || block_table.shape[0] != B || block_table.dtype != Dtype::i32 ||
         (block_table.shape[1] > 1 && block_table.strides[1] != 1) || k.shape[2] < 1))
      return false;
    // Without indices row b is entry b. Python says so, on a GPU too, where nothing would clamp it.
    if (!block_table.defined() && !batch_idx.defined() && k.shape[0] < B) return false;
    return indices(lengths, B) && indices(leftpad, B) && indices(batch_idx, B);
  }

  int64_t capacity() const {
    return block_table.defined() ? block_table.shape[1] * k.shape[2] : k.shape[2];
  }

  // Every row the kernels will touch exists.
  void check(int64_t B, int64_t added) const {
    if (!k.is_cpu()) return;  // kernels clamp, or leave such rows out
    for (int64_t b = 0; b < B; ++b) {
      const int64_t n = integers_of(lengths)[b];
      const std::string at = "[" + std::to_string(b) + "]";
      if (n < 0 || n + added > capacity())
        refuse("cache_seqlens" + at + ": expected 0 <= length, and length + " +
               std::to_string(added) + " new rows <= the capacity of " +
               std::to_string(capacity()) + ", got " + std::to_string(n));
      if (leftpad.defined()) {
        const int64_t pad = integers_of(leftpad)[b];
        if (pad < 0 || pad > n)
          refuse("cache_leftpad" + at + ": expected 0 <= padding <= cache_seqlens, " +
                 std::to_string(n) + ", got " + std::to_string(pad));
      }
      if (batch_idx.defined()) {
        const int64_t entry = integers_of(batch_idx)[b];
        if (entry < 0 || entry >= k.shape[0])
          refuse("cache_batch_idx" + at + ": expected an entry of the cache of " +
                 std::to_string(k.shape[0]) + ", got " + std::to_string(entry));
      }
      if (block_table.defined()) {
        const int32_t* pages = integers_of(block_table) + b * block_table.strides[0];
        for (int64_t i = 0; i * k.shape[2] < n + added; ++i)
          if (pages[i] < 0 || pages[i] >= k.shape[0])
            refuse("block_table" + at + ": expected pages below " + std::to_string(k.shape[0]) +
                   ", got " + std::to_string(pages[i]) + " for block " + std::to_string(i));
      }
    }
  }

  template <class Params>
  void fill(Params& p) const {
    p.seqlens_k = integers_of(lengths);
    p.leftpad_k = integers_of(leftpad);
    p.cache_batch_idx = integers_of(batch_idx);
    p.entries = k.shape[0];
    if (!block_table.defined()) return;
    p.block_table = integers_of(block_table);
    p.block_table_stride = block_table.strides[0];
    p.page_size = k.shape[2];
  }
};

// q (B, Hq, Sq, D) over rows leftpad[b] ... lengths[b] + added of the cache.
bool attention_cached(TensorArgument& q, TensorArgument& k_cache, TensorArgument& v_cache,
                      TensorArgument& out, TensorArgument& lse, TensorArgument& lengths,
                      int64_t added, TensorArgument& leftpad, TensorArgument& batch_idx,
                      TensorArgument& block_table, TensorArgument& alibi, TensorArgument& sinks,
                      py::handle scale, float softcap, int64_t left, int64_t right,
                      TensorArgument& scratch) {
  if (!given({&q, &out}) || !same_device({&q, &k_cache, &out, &lse, &alibi, &sinks}) ||
      !room_in(scratch, q) || !is_float(q.dtype) || q.ndim != 4 || out.ndim != 4 || !unit_rows(q) ||
      !unit_rows(out) || k_cache.ndim != 4)
    return false;
  AttentionParams p;
  p.B = q.shape[0], p.Hq = q.shape[1], p.Hkv = k_cache.shape[1], p.Sq = q.shape[2];
  p.D = q.shape[3], p.dtype = q.dtype, p.out_dtype = out.dtype;
  const Cache cache{k_cache, v_cache, lengths, leftpad, batch_idx, block_table};
  if (!cache.fits(p.B, p.Hkv, p.D, q.dtype) || p.D < 1 || p.D > kMaxHeadDim || p.Hkv < 1 ||
      p.Hq % p.Hkv != 0)
    return false;
  p.Dv = v_cache.shape[3], p.Sk = cache.capacity();
  if (out.dtype != q.dtype || out.shape[0] != p.B || out.shape[1] != p.Hq || out.shape[2] != p.Sq ||
      out.shape[3] != p.Dv)
    return false;
  if (lse.defined()) {
    if (lse.ndim != 3 || lse.dtype != Dtype::f32 || lse.shape[0] != p.B || lse.shape[1] != p.Hq ||
        lse.shape[2] != p.Sq)
      return false;
    p.lse = stats_of(lse);
  }
  TensorArgument none;
  const py::int_ zero(0);
  if (!Options{alibi, sinks, none, scale, zero, zero, softcap, left, right, true, 0.0}.fill(p))
    return false;
  cache.check(p.B, added);
  cache.fill(p);
  p.added_k = added;
  p.q = rows_of(q), p.k = rows_of(k_cache), p.v = rows_of(v_cache), p.out = rows_of(out);
  p.place = place_of(q, scratch);
  return run(p, k_cache, GENFAST_KERNEL(attention_forward));
}

// The elements of a dimension are one in memory: not to be written.
bool shared(const TensorView& t, int dim) { return t.shape[dim] > 1 && t.strides[dim] == 0; }

// Writes k, v (B, Hkv, S_new, X) behind the cache's rows; with cos and sin also q, rotated, to
// q_out.
bool attention_append(TensorArgument& q, TensorArgument& q_out, TensorArgument& k,
                      TensorArgument& v, TensorArgument& k_cache, TensorArgument& v_cache,
                      TensorArgument& lengths, TensorArgument& leftpad, TensorArgument& batch_idx,
                      TensorArgument& block_table, TensorArgument& cos, TensorArgument& sin,
                      bool interleaved, bool q_same_position) {
  if (!same_device({&q, &q_out, &k, &v, &k_cache, &cos, &sin}) || !given({&q}) || q.ndim != 4 ||
      !is_float(q.dtype) || k_cache.ndim != 4 || k.defined() != v.defined() ||
      cos.defined() != sin.defined() || cos.defined() != q_out.defined())
    return false;
  AttentionAppendParams p;
  p.B = q.shape[0], p.Hq = q.shape[1], p.Sq = q.shape[2], p.D = q.shape[3];
  p.Hkv = k_cache.shape[1], p.dtype = q.dtype;
  const Cache cache{k_cache, v_cache, lengths, leftpad, batch_idx, block_table};
  if (!cache.fits(p.B, p.Hkv, p.D, q.dtype) || p.D < 1 || p.D > kMaxHeadDim) return false;
  p.Dv = v_cache.shape[3];
  if (k.defined()) {
    if (k.ndim != 4 || v.ndim != 4 || k.dtype != q.dtype || v.dtype != q.dtype || !unit_rows(k) ||
        !unit_rows(v) || k.shape[0] != p.B || k.shape[1] != p.Hkv || k.shape[3] != p.D ||
        v.shape[3] != p.Dv)
      return false;
    for (int i = 0; i < 3; ++i)
      if (k.shape[i] != v.shape[i] || shared(k_cache, i) || shared(v_cache, i)) return false;
    p.S_new = k.shape[2];
    p.k_new = rows_of(k), p.v_new = rows_of(v);
  }
  cache.check(p.B, p.S_new);
  cache.fill(p);
  if (cos.defined()) {
    if (!same_shapes({&cos, &sin}) || !same_shapes({&q, &q_out}) || q_out.dtype != q.dtype ||
        !unit_rows(q) || !unit_rows(q_out) || cos.ndim != 2 || cos.dtype != sin.dtype ||
        !is_float(cos.dtype) || !is_contiguous(cos) || !is_contiguous(sin) ||
        2 * cos.shape[1] > p.D || (cos.shape[0] < 1 && q.numel > 0))
      return false;
    const int64_t turned = q_same_position ? 1 : p.Sq;
    for (int64_t b = 0; q.is_cpu() && b < p.B; ++b) {
      const int64_t pad = leftpad.defined() ? integers_of(leftpad)[b] : 0;
      const int64_t last = integers_of(lengths)[b] - pad + (p.S_new > turned ? p.S_new : turned);
      if (last > cos.shape[0])
        refuse("rotary_cos: expected at least " + std::to_string(last) +
               " positions (rows), got shape " + shape_text(cos));
    }
    p.q = rows_of(q), p.q_out = rows_of(q_out);
    p.cos = cos.data, p.sin = sin.data, p.rotary_dtype = cos.dtype;
    p.rotary_dim = 2 * cos.shape[1], p.rotary_stride = cos.shape[1];
    p.positions = cos.shape[0];
    p.rotary_interleaved = interleaved, p.q_same_position = q_same_position;
  }
  p.k_cache = rows_of(k_cache), p.v_cache = rows_of(v_cache), p.capacity = cache.capacity();
  p.threads = g_gate.threads();
  p.place = place_of(q, TensorView());
  return run(p, larger(q, k), GENFAST_KERNEL(attention_append));
}

}  // namespace

void register_attention(py::module_& m) {
  // scratch is the CUDA kernels' alone
  const auto none = py::none();
  m.def("attention_forward", &attention_forward, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("out"), py::arg("lse"), py::arg("mask"), py::arg("cu_q"), py::arg("cu_k"),
        py::arg("max_q"), py::arg("max_k"), py::arg("alibi"), py::arg("sinks"), py::arg("seed"),
        py::arg("seeds"), py::arg("stream"), py::arg("scale"), py::arg("softcap"), py::arg("left"),
        py::arg("right"), py::arg("bottom_right"), py::arg("dropout_p"), py::arg("scratch") = none);
  m.def("attention_backward", &attention_backward, py::arg("dout"), py::arg("dlse"), py::arg("dq"),
        py::arg("dk"), py::arg("dv"), py::arg("dmask"), py::arg("dsinks"), py::arg("q"),
        py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("mask"),
        py::arg("cu_q"), py::arg("cu_k"), py::arg("max_q"), py::arg("max_k"), py::arg("alibi"),
        py::arg("sinks"), py::arg("seed"), py::arg("seeds"), py::arg("stream"), py::arg("scale"),
        py::arg("softcap"), py::arg("left"), py::arg("right"), py::arg("bottom_right"),
        py::arg("dropout_p"), py::arg("scratch") = none);
  m.def("attention_cached", &attention_cached, py::arg("q"), py::arg("k_cache"), py::arg("v_cache"),
        py::arg("out"), py::arg("lse"), py::arg("lengths"), py::arg("added"), py::arg("leftpad"),
        py::arg("batch_idx"), py::arg("block_table"), py::arg("alibi"), py::arg("sinks"),
        py::arg("scale"), py::arg("softcap"), py::arg("left"), py::arg("right"),
        py::arg("scratch") = none);
  m.def("attention_append", &attention_append);
}

}  // namespace genfast
