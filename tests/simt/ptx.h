// Bodies of csrc/cuda/ptx.cuh on the host.
#pragma once
#include <cmath>

#include "cpu/convert.h"
#include "simt/simt.h"

namespace genfast::cuda {

using genfast::cpu::f32_of_bf16;
using genfast::cpu::f32_of_f16;

inline uint32_t pack_f16(float low, float high) {
  return cpu::f16_of_f32(low) | static_cast<uint32_t>(cpu::f16_of_f32(high)) << 16;
}
inline uint32_t pack_bf16(float low, float high) {
  return cpu::bf16_of_f32(low) | static_cast<uint32_t>(cpu::bf16_of_f32(high)) << 16;
}
inline float exp2_approx(float x) { return std::exp2(x); }

using SharedAddress = uintptr_t;
inline SharedAddress shared_address(const void* p) { return reinterpret_cast<SharedAddress>(p); }
inline void copy_async_16(SharedAddress to, const void* from, int bytes) {
  simt::copy_async(reinterpret_cast<void*>(to), from, bytes, 16);
}
inline void copy_commit() { simt::copy_commit(); }
template <int kKeep>
void copy_wait() {
  simt::copy_wait(kKeep);
}
inline void barrier_sync(int id, int count, simt::Site site = simt::Site::here()) {
  if (id == 0) simt::fail("barrier 0 belongs to __syncthreads");
  simt::barrier(id, count, 0, site);
}

// The rows of a matrix are read together: 16 bytes each, from eight groups of four banks.
inline void count_conflicts(const unsigned char (*in)[simt::kSlot]) {
  simt::options.matrices += 4;
  for (int m = 0; m < 4; ++m)
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < i; ++j) {
        uintptr_t a, b;
        memcpy(&a, in[8 * m + i], sizeof a);
        memcpy(&b, in[8 * m + j], sizeof b);
        simt::options.conflicts += a != b && a / 16 % 8 == b / 16 % 8;
      }
}

template <bool kTransposed>
void load_matrices(uint32_t (&r)[4], SharedAddress row, simt::Site site) {
  if (row % 16 != 0) simt::fail("ldmatrix row is not 16-byte aligned");
  simt::meet(
      ~0u, &row, sizeof row, r, sizeof r,
      [](const unsigned char (*in)[simt::kSlot], unsigned char (*out)[simt::kSlot], uint32_t,
         const void*) {
        count_conflicts(in);
        for (int lane = 0; lane < 32; ++lane)
          for (int m = 0; m < 4; ++m)
            for (int half = 0; half < 2; ++half) {
              int i = lane / 4, j = 2 * (lane % 4) + half;
              if (kTransposed) std::swap(i, j);
              const uint16_t* from;
              memcpy(&from, in[8 * m + i], sizeof from);
              memcpy(out[lane] + 4 * m + 2 * half, from + j, 2);
            }
      },
      nullptr, site);
}
inline void load_matrix(uint32_t (&r)[4], SharedAddress row, simt::Site site = simt::Site::here()) {
  load_matrices<false>(r, row, site);
}
inline void load_matrix_transposed(uint32_t (&r)[4], SharedAddress row,
                                   simt::Site site = simt::Site::here()) {
  load_matrices<true>(r, row, site);
}

template <bool kBf16>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, simt::Site site) {
  struct Fragment {
    float c[4];
    uint32_t a[4], b[2];
  } mine{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  simt::meet(
      ~0u, &mine, sizeof mine, c, sizeof c,
      [](const unsigned char (*in)[simt::kSlot], unsigned char (*out)[simt::kSlot], uint32_t,
         const void*) {
        const auto value = [](uint32_t pair, int half) {
          const auto h = static_cast<uint16_t>(pair >> (16 * half));
          return kBf16 ? f32_of_bf16(h) : f32_of_f16(h);
        };
        float A[16][16], B[16][8], C[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          Fragment f;
          memcpy(&f, in[lane], sizeof f);
          const int g = lane / 4, t = lane % 4;
          for (int h = 0; h < 2; ++h) {
            for (int q = 0; q < 4; ++q)
              A[g + 8 * (q & 1)][2 * t + 8 * (q >> 1) + h] = value(f.a[q], h);
            for (int q = 0; q < 2; ++q) B[2 * t + 8 * q + h][g] = value(f.b[q], h);
            C[g][2 * t + h] = f.c[h];
            C[g + 8][2 * t + h] = f.c[2 + h];
          }
        }
        for (int i = 0; i < 16; ++i)
          for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 8; ++j) C[i][j] += A[i][k] * B[k][j];
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          const float r[4] = {C[g][2 * t], C[g][2 * t + 1], C[g + 8][2 * t], C[g + 8][2 * t + 1]};
          memcpy(out[lane], r, sizeof r);
        }
      },
      nullptr, site);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                    simt::Site site = simt::Site::here()) {
  mma<false>(c, a, b0, b1, site);
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     simt::Site site = simt::Site::here()) {
  mma<true>(c, a, b0, b1, site);
}

}  // namespace genfast::cuda
