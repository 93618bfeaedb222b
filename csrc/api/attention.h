// Fused attention: what crosses from the binding to the kernels. Plain structs, a shape on every
// field.
//
//   S = scale * Q K^T                                  (B, Hq, Sq, Sk); query head h reads
//   key/value head h / (Hq / Hkv) S = softcap * tanh(S / softcap)                    when softcap >
//   0 S = S - slope * |i + offset - j| + mask            ALiBi, then the additive (or boolean) mask
//   key j is visible to query i when  -left <= j - (i + offset) <= right;  a negative side is
//   unbounded LSE = log(sum_j exp(S_ij) + exp(sink_h))           natural log; -inf for a row that
//   sees no key and has no sink P = exp(S - LSE),  O = dropout(P) V                a row that sees
//   no key gives O = 0 and zero gradients
//
// offset is 0 (diagonal from the top-left corner) or Sk_b - Sq_b (ending in the bottom-right
// corner). Everything is accumulated in float32. Results never depend on the number of threads.
#pragma once

#include <cstdint>

#include "api/tensor.h"

namespace genfast {

// A (B, H, S, X) operand: element (b, h, s, x) at data[b*b_stride + h*h_stride + s*s_stride + x].
// Packed sequences (T, H, X): b_stride = 0 and the first row of sequence b is cu_seqlens[b].
// Pages (pages, page_size, H, X): b_stride is the stride between pages.
struct AttentionRows {
  void* data = nullptr;
  int64_t b_stride = 0, h_stride = 0, s_stride = 0;  // in elements
};

// Float32 per-row statistics (B, Hq, Sq), or (Hq, T) for packed sequences with b_stride = 0.
struct AttentionStats {
  float* data = nullptr;
  int64_t b_stride = 0, h_stride = 0, s_stride = 0;  // in elements
};

enum class MaskKind : uint8_t { none, boolean, additive };  // boolean: 1 byte, true = visible

struct AttentionMask {
  void* data = nullptr;  // (B|1, Hq|1, Sq|1, Sk|1)
  int64_t b_stride = 0, h_stride = 0, i_stride = 0,
          j_stride = 0;  // in elements; 0 on a broadcast dimension
  MaskKind kind = MaskKind::none;
  Dtype dtype = Dtype::f32;  // of an additive mask: f32, f16 or bf16
};

// Where a CUDA call runs. Forward splits the keys as often as the scratch has room for, f32
// [splits][B][Hq][Sq][Dv + 2] (a row's sum, maximum and denominator), from two times on; backward
// needs f32 [2][B][Hq][Sq]. Sizes come from shapes alone, so results do not depend on the GPU.
struct AttentionPlace {
  int device = 0;
  void* stream = nullptr;
  float* scratch = nullptr;
  int64_t scratch_size = 0;
};

struct AttentionParams {
  int64_t B = 0, Hq = 0, Hkv = 0;  // Hq a multiple of Hkv
  int64_t Sq = 0,
          Sk = 0;  // lengths; the longest when sequences are packed; cache capacity with seqlens_k
  int64_t D = 0, Dv = 0;         // 1 ... 512
  Dtype dtype = Dtype::f32;      // of q, k, v: f32, f16, bf16
  Dtype out_dtype = Dtype::f32;  // of out (and dout): the same, or f32

  AttentionRows q;     // (B, Hq, Sq, D)
  AttentionRows k;     // (B, Hkv, Sk, D)
  AttentionRows v;     // (B, Hkv, Sk, Dv)
  AttentionRows out;   // (B, Hq, Sq, Dv)
  AttentionStats lse;  // (B, Hq, Sq); data may be null in forward

  // Lengths and places of the sequences; each may be null.
  const int32_t* cu_seqlens_q = nullptr;     // (B + 1) first row of each packed query sequence
  const int32_t* cu_seqlens_k = nullptr;     // (B + 1) first row of each packed key sequence
  const int32_t* seqlens_k = nullptr;        // (B) end of the valid rows of the cache
  int64_t added_k = 0;                       // added to every seqlens_k (rows appended just before)
  const int32_t* leftpad_k = nullptr;        // (B) first valid row of the cache
  const int32_t* cache_batch_idx = nullptr;  // (B) cache entry of batch b
  const int32_t* block_table =
      nullptr;                     // (B, blocks) page of rows [page_size * n, page_size * (n + 1))
  int64_t block_table_stride = 0;  // elements between the rows of block_table
  int64_t page_size = 0;
  // What the values above may reach: nobody can check them on a device, so kernels clamp.
  int64_t total_q = 0, total_k = 0;  // rows of packed tensors
  int64_t entries = 0;               // of the cache: entries or pages

  float scale = 1.0f;
  int64_t window_left = -1, window_right = -1;  // causal is (-1, 0)
  bool bottom_right = false;                    // offset = Sk_b - Sq_b instead of 0
  AttentionMask mask;
  const float* alibi_slopes = nullptr;  // (Hq), or (B, Hq) with alibi_b_stride = Hq
  int64_t alibi_b_stride = 0;
  float softcap = 0.0f;          // 0: none
  const float* sinks = nullptr;  // (Hq) logits that join the denominator only

  // Dropout: element ((b*Hq + h)*noise_Sq + i)*noise_Sk + j of the noise contract's words under
  // (seed, stream); kept when word >= threshold = round(p * 2^32); kept values are multiplied by
  // dropout_scale = 1 / (1 - p).
  bool dropout = false;
  uint32_t dropout_threshold = 0;
  float dropout_scale = 1.0f;  // 0 for p = 1
  uint64_t seed = 0, stream = 0;
  const int64_t* seeds = nullptr;  // (1) on a device: replaces seed
  int64_t noise_Sq = 0, noise_Sk = 0;

  int threads = 1;  // 0: all
  AttentionPlace place;
};

// Forward fields of `p` as above (out and lse are inputs now). Gradients are overwritten, not added
// to.
struct AttentionGradParams {
  AttentionParams p;
  AttentionRows dout;   // (B, Hq, Sq, Dv), dtype out_dtype
  AttentionStats dlse;  // (B, Hq, Sq); data may be null
  AttentionRows dq;     // (B, Hq, Sq, D), dtype of q
  AttentionRows dk;     // (B, Hkv, Sk, D)
  AttentionRows dv;     // (B, Hkv, Sk, Dv)
  AttentionMask
      dmask;  // shape of mask, summed over dimensions of stride 0; data null when not wanted
  float* dsinks = nullptr;  // (Hq), null when not wanted
};

// Writes k_new, v_new at rows seqlens_k[b] ... seqlens_k[b] + S_new of the cache, rotated when cos
// is given; rotates q into q_out at positions seqlens_k[b] + i (i = 0 for every row when
// q_same_position).
struct AttentionAppendParams {
  int64_t B = 0, Hq = 0, Hkv = 0, Sq = 0, S_new = 0, D = 0, Dv = 0;
  Dtype dtype = Dtype::f32;            // of everything but cos and sin
  AttentionRows q, q_out;              // (B, Hq, Sq, D); null without rotary
  AttentionRows k_new, v_new;          // (B, Hkv, S_new, D | Dv); may be null
  AttentionRows k_cache, v_cache;      // (B_cache, Hkv, capacity, D | Dv) or pages
  int64_t capacity = 0;                // rows per cache entry; rows beyond it are refused by the op
  const int32_t* seqlens_k = nullptr;  // (B); null: 0
  const int32_t* leftpad_k = nullptr;  // (B); rotary positions count from it
  const int32_t* cache_batch_idx = nullptr;
  const int32_t* block_table = nullptr;
  int64_t block_table_stride = 0, page_size = 0;
  const void* cos = nullptr;  // (positions, rotary_dim / 2) rows of cos_stride elements
  const void* sin = nullptr;
  Dtype rotary_dtype = Dtype::f32;
  int64_t rotary_dim = 0, rotary_stride = 0;
  bool rotary_interleaved =
      false;  // true: pairs (0, 1), (2, 3) ...; false: (0, r/2), (1, r/2 + 1) ...
  bool q_same_position = false;
  int64_t entries = 0, positions = 0;  // of the cache and of cos: bounds, as above
  int threads = 1;
  AttentionPlace place;
};

namespace cuda {  // null, or an error text
const char* attention_forward(const AttentionParams& p);
const char* attention_backward(const AttentionGradParams& g);
const char* attention_append(const AttentionAppendParams& a);
}  // namespace cuda

}  // namespace genfast
