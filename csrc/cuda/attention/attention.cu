// Which kernel a call of attention takes, and the key/value cache.
#include "cuda/attention/gradient.cuh"

namespace genfast::cuda {

const char* mma_forward_f16(const AttentionParams& p);
const char* mma_forward_bf16(const AttentionParams& p);
const char* mma_decode_any(const AttentionParams& p);
const char* exact_forward_any(const AttentionParams& p);
const char* exact_decode_any(const AttentionParams& p);
const char* attention_merge(const AttentionParams& p);
const char* attention_row_stats(const AttentionGradParams& g);
const char* mma_backward_f16(const AttentionGradParams& g, bool whole, bool options);
const char* mma_backward_bf16(const AttentionGradParams& g, bool whole, bool options);
const char* hopper_forward_f16(const AttentionParams& p);
const char* hopper_forward_bf16(const AttentionParams& p);
const char* hopper_backward_f16(const AttentionGradParams& g);
const char* hopper_backward_bf16(const AttentionGradParams& g);
const char* exact_backward_any(const AttentionGradParams& g);
const char* exact_backward_rest(const AttentionGradParams& g);

namespace {

// Warpgroups: code for sm_90a was built, and this is one.
bool has_warpgroups(const AttentionParams& p) {
#if GENFAST_WARPGROUPS
  return generation(p.place.device) == 9;
#else
  return p.B < 0;
#endif
}

const char* forward_of(const AttentionParams& p) {
  const bool few = p.Sq * group_of(p) <= 16, narrow = p.D <= 256 && p.Dv <= 256;
  if (p.dtype == Dtype::f32) {
    const bool whole = whole_rows(p.q, p.D) && whole_rows(p.k, p.D) && whole_rows(p.v, p.Dv);
    return few && narrow && whole ? exact_decode_any(p) : exact_forward_any(p);
  }
  if (!narrow) return exact_forward_any(p);
  if (few) return mma_decode_any(p);
  // A mask beside 256 columns has no registers left.
  const Extras most = p.D <= 128 && p.Dv <= 128 ? Extras::mask : Extras::none;
  if (extras_of(p) <= most && Walk(p, 1, 1).splits == 1 && has_warpgroups(p) && plain_rows(p, 128))
    return p.dtype == Dtype::f16 ? hopper_forward_f16(p) : hopper_forward_bf16(p);
  return p.dtype == Dtype::f16 ? mma_forward_f16(p) : mma_forward_bf16(p);
}

const char* backward_of(const AttentionGradParams& g) {
  const AttentionParams& p = g.p;
  if (p.dtype == Dtype::f32 || p.out_dtype != p.dtype || p.D > 128 || p.Dv > 128)
    return exact_backward_any(g);
  const bool whole = whole_rows(p.q, p.D) && whole_rows(p.k, p.D) && whole_rows(g.dq, p.D) &&
                     whole_rows(g.dk, p.D) && whole_rows(p.v, p.Dv) && whole_rows(g.dv, p.Dv) &&
                     whole_rows(g.dout, p.Dv);
  const Extras extras = extras_of(p);
  const bool options = extras != Extras::none;
  if (whole && extras != Extras::all && has_warpgroups(p) && QuerySums::fit(p))
    return p.dtype == Dtype::f16 ? hopper_backward_f16(g) : hopper_backward_bf16(g);
  return p.dtype == Dtype::f16 ? mma_backward_f16(g, whole, options)
                               : mma_backward_bf16(g, whole, options);
}

// ---- the cache ----------------------------------------------------------------------------------

// A warp owns one row of queries, or one new row of keys and of values. Pairs (x0, x1) of a rotated
// row become (x0 cos - x1 sin, x0 sin + x1 cos) (Su et al. 2021).
struct Append {
  AttentionAppendParams a;

  __device__ __forceinline__ int64_t length(int64_t b) const {
    return a.seqlens_k != nullptr ? a.seqlens_k[b] : 0;
  }
  __device__ __forceinline__ int64_t position(int64_t b, int64_t i) const {
    return length(b) - (a.leftpad_k != nullptr ? a.leftpad_k[b] : 0) + i;
  }
  __device__ __forceinline__ void copy(const char* from, char* to, int64_t dim) const {
    for (int64_t d = threadIdx.x % 32; d < dim; d += 32)
      if (a.dtype == Dtype::f32)
        reinterpret_cast<float*>(to)[d] = reinterpret_cast<const float*>(from)[d];
      else
        reinterpret_cast<uint16_t*>(to)[d] = reinterpret_cast<const uint16_t*>(from)[d];
  }
  __device__ __forceinline__ void rotate(const char* from, char* to, int64_t at) const {
    const int64_t half = a.rotary_dim / 2, step = a.rotary_interleaved ? 2 : 1;
    const int64_t other = a.rotary_interleaved ? 1 : half;
    at = at < 0 ? 0 : at >= a.positions ? a.positions - 1 : at;
    for (int64_t r = threadIdx.x % 32; r < half; r += 32) {
      const float cos = load_any(a.cos, a.rotary_dtype, at * a.rotary_stride + r);
      const float sin = load_any(a.sin, a.rotary_dtype, at * a.rotary_stride + r);
      const float x0 = load_any(from, a.dtype, r * step);
      const float x1 = load_any(from, a.dtype, r * step + other);
      store_any(to, a.dtype, r * step, x0 * cos - x1 * sin);
      store_any(to, a.dtype, r * step + other, x0 * sin + x1 * cos);
    }
    const int64_t bytes = bytes_of(a.dtype), rest = a.rotary_dim;
    copy(from + rest * bytes, to + rest * bytes, a.D - rest);
  }
  __device__ __forceinline__ void operator()(int64_t task) const {
    const int64_t bytes = bytes_of(a.dtype);
    const int64_t turned = a.cos != nullptr && a.q.data != nullptr ? a.B * a.Hq * a.Sq : 0;
    if (task < turned) {
      const int64_t i = task % a.Sq, h = task / a.Sq % a.Hq, b = task / a.Sq / a.Hq;
      rotate(row_at(a.q, bytes, b, h, i), row_at(a.q_out, bytes, b, h, i),
             position(b, a.q_same_position ? 0 : i));
      return;
    }
    task -= turned;
    const int64_t i = task % a.S_new, h = task / a.S_new % a.Hkv, b = task / a.S_new / a.Hkv;
    int64_t row = length(b) + i;
    if (row < 0 || row >= a.capacity) return;
    int64_t entry = a.cache_batch_idx != nullptr ? a.cache_batch_idx[b] : b;
    if (a.block_table != nullptr) {
      entry = a.block_table[b * a.block_table_stride + row / a.page_size];
      row %= a.page_size;
    }
    if (entry < 0 || entry >= a.entries) return;  // never outside the cache
    const char* k = row_at(a.k_new, bytes, b, h, i);
    char* to = row_at(a.k_cache, bytes, entry, h, row);
    if (a.cos != nullptr)
      rotate(k, to, position(b, i));
    else
      copy(k, to, a.D);
    copy(row_at(a.v_new, bytes, b, h, i), row_at(a.v_cache, bytes, entry, h, row), a.Dv);
  }
};

__global__ void __launch_bounds__(256)
    append_rows(const __grid_constant__ Append op, int64_t tasks) {
  const int64_t task = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (task < tasks) op(task);
}

}  // namespace

const char* attention_forward(const AttentionParams& p) {
  if (p.B * p.Hq * p.Sq == 0) return nullptr;
  const char* error = forward_of(p);
  return error == nullptr && Walk(p, 1, 1).splits > 1 ? attention_merge(p) : error;
}

const char* attention_backward(const AttentionGradParams& g) {
  if (g.p.B * g.p.Hq == 0) return nullptr;
  const char* error = attention_row_stats(g);
  if (error == nullptr) error = backward_of(g);
  return error != nullptr ? error : exact_backward_rest(g);
}

const char* attention_append(const AttentionAppendParams& a) {
  const int64_t turned = a.cos != nullptr && a.q.data != nullptr ? a.B * a.Hq * a.Sq : 0;
  const int64_t tasks = turned + (a.k_new.data != nullptr ? a.B * a.Hkv * a.S_new : 0);
  if (tasks == 0) return nullptr;
  return launch(append_rows, blocks_for(tasks, 8), dim3(256), 0, on(a.place), Append{a}, tasks);
}

}  // namespace genfast::cuda
