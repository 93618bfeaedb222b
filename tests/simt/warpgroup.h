// Bodies of csrc/cuda/warpgroup.cuh on the host. A product is made where it is asked for; panels
// are read as the hardware does: by the address, whose bits 7 to 9 permute bits 4 to 6.
#pragma once
#include "simt/ptx.h"

namespace genfast::cuda {

constexpr bool kWarpgroups = true;

struct Operand {
  uintptr_t at;
  int panel;  // bytes

  Operand(const void* p, int height) : at(shared_address(p)), panel(height * 128) {
    if (at % 1024 != 0) simt::fail("a panel that does not start at a multiple of 1024 bytes");
  }
  Operand operator+(int bytes) const {
    if (bytes % 16 != 0) simt::fail("an operand moved by %d bytes, not a multiple of 16", bytes);
    Operand o = *this;
    o.at += static_cast<uintptr_t>(bytes);
    return o;
  }
  // Element (i, k), k inner. Across: i runs along the rows of the panel's memory.
  template <bool kBf16, bool kAcross>
  float read(int i, int k) const {
    uintptr_t p = at + static_cast<uintptr_t>(kAcross ? i / 64 * panel + k * 128 + i % 64 * 2
                                                      : i * 128 + k * 2);
    p ^= (p >> 7 & 7) << 4;
    const uint16_t h = *reinterpret_cast<const uint16_t*>(p);
    return kBf16 ? f32_of_bf16(h) : f32_of_f16(h);
  }
};

inline void together(simt::Site site) { simt::ballot(~0u, true, site); }
inline void warpgroup_begin(simt::Site site = simt::Site::here()) { together(site); }
inline void warpgroup_commit(simt::Site site = simt::Site::here()) { together(site); }
template <int kKeep>
void warpgroup_wait(simt::Site site = simt::Site::here()) {
  together(site);
}
inline void share() {}

struct Signal {
  uint32_t phase;  // its parity is that of the phase under way
  uint16_t wanted, arrived;

  void init(int count) { phase = 0, wanted = static_cast<uint16_t>(count), arrived = 0; }
  void arrive() {
    if (wanted == 0) simt::fail("an arrival at a signal that nobody set up");
    if (++arrived == wanted) arrived = 0, ++phase;
  }
  void arrive_after_copies() {  // they land here, or landed at once
    simt::copy_commit();
    simt::copy_wait(0);
    arrive();
  }
  void wait(int parity, simt::Site site = simt::Site::here()) {
    while ((phase & 1) == static_cast<uint32_t>(parity)) simt::wait(&phase, site);
    simt::ballot(~0u, true, site);
  }
};
template <int kCount>
void give_registers() {}
template <int kCount>
void take_registers() {}

template <int kN>
void hold(float (&)[kN][4]) {}

inline void add_to(float* p, const float (&v)[4]) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) simt::fail("four sums at no multiple of 16 bytes");
  for (int e = 0; e < 4; ++e) p[e] += v[e];
}

// rows: two rows of a, of this lane.
template <bool kBf16, bool kAcrossB, int kN>
void multiply(float (*c)[4], const float (&rows)[2][16], Operand b, bool add) {
  const int t = static_cast<int>(simt::self->lane % 4);
  simt::options.products += simt::self->lane == 0;
  for (int n = 0; n < kN; ++n)
    for (int e = 0; e < 4; ++e) {
      float sum = add ? c[n][e] : 0.0f;
      for (int k = 0; k < 16; ++k)
        sum += rows[e / 2][k] * b.template read<kBf16, kAcrossB>(8 * n + 2 * t + e % 2, k);
      c[n][e] = sum;
    }
}

template <bool kBf16, bool kAcrossA, bool kAcrossB, int kN>
void product(float (*c)[4], Operand a, Operand b, bool add, simt::Site site = simt::Site::here()) {
  together(site);
  const int row = static_cast<int>(simt::self->warp % 4 * 16 + simt::self->lane / 4);
  float rows[2][16];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k)
      rows[half][k] = a.template read<kBf16, kAcrossA>(row + 8 * half, k);
  multiply<kBf16, kAcrossB, kN>(c, rows, b, add);
}

template <bool kBf16, bool kAcrossB, int kN>
void product(float (*c)[4], const uint32_t (&a)[4], Operand b, bool add,
             simt::Site site = simt::Site::here()) {
  uint16_t mine[2][16];  // the four lanes of a row bring a quarter each
  simt::meet(
      ~0u, a, sizeof a, mine, sizeof mine,
      [](const unsigned char (*in)[simt::kSlot], unsigned char (*out)[simt::kSlot], uint32_t,
         const void*) {
        for (int lane = 0; lane < 32; ++lane)
          for (int half = 0; half < 2; ++half)
            for (int k = 0; k < 16; ++k)
              memcpy(out[lane] + 32 * half + 2 * k,
                     in[lane / 4 * 4 + k % 8 / 2] + 4 * (half + k / 8 * 2) + k % 2 * 2, 2);
      },
      nullptr, site);
  float rows[2][16];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k)
      rows[half][k] = kBf16 ? f32_of_bf16(mine[half][k]) : f32_of_f16(mine[half][k]);
  multiply<kBf16, kAcrossB, kN>(c, rows, b, add);
}

}  // namespace genfast::cuda
