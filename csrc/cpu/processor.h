// What the processor and the system run. CPUID and XGETBV are asked directly:
// __builtin_cpu_supports with a level name is always false under clang.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace genfast::cpu {

#if defined(__x86_64__)
// "GenuineIntel", "AuthenticAMD", ... in 13 bytes.
inline void vendor(char* name) {
  unsigned a = 0, words[3] = {};
  __get_cpuid(0, &a, &words[0], &words[2], &words[1]);
  __builtin_memcpy(name, words, 12);
  name[12] = 0;
}

inline bool has_bits(unsigned value, unsigned mask) { return (value & mask) == mask; }

inline int x86_level() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const unsigned sse = 1u << 0 | 1u << 9 | 1u << 13 | 1u << 19 | 1u << 20 | 1u << 23;  // …POPCNT
  const unsigned avx = 1u << 12 | 1u << 22 | 1u << 27 | 1u << 28 | 1u << 29;           // FMA…F16C
  if (!has_bits(c, sse | avx)) return 0;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if (!has_bits(low, 0x6u) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  const unsigned leaf7 = b;
  if (!has_bits(leaf7, 1u << 3 | 1u << 5 | 1u << 8)) return 0;
  unsigned extended = 0;
  if (!__get_cpuid(0x80000001u, &a, &b, &extended, &d) || !(extended & 1u << 5)) return 0;
  const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;
  return has_bits(low, 0xE6u) && has_bits(leaf7, avx512) ? 4 : 3;
}

inline bool has_bf16_products() {
  unsigned a, b, c, d;
  return x86_level() == 4 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && has_bits(a, 1u << 5);
}

// Whether this is an AMD processor that multiplies 512-bit vectors in one pass, as Zen 5 (family
// 26) does but for its mobile chips; Zen 4 takes two. Bit 3 of leaf 8000001A tells; KVM hides it
// from its guests, for which the family has to do.
inline bool amd_has_512_bit_unit() {
  unsigned a, b, c, d;
  char name[13];
  vendor(name);
  if (__builtin_strcmp(name, "AuthenticAMD") != 0 || !__get_cpuid(1, &a, &b, &c, &d)) return false;
  const bool guest = has_bits(c, 1u << 31), zen5 = (a >> 8 & 0xF) + (a >> 20 & 0xFF) >= 26;
  const bool told = __get_cpuid(0x8000001Au, &a, &b, &c, &d) && has_bits(a, 1u << 3);
  return zen5 && (guest || told);
}

// Matrix unit with bf16, AVX512-BF16 beside it, and the system's leave to use its 8 KiB of state:
// the process asks once (threads and forked children inherit it), or its first use would be fatal.
inline bool has_matrix_unit() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a, b, c, d, low, high;
  if (!has_bf16_products() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!has_bits(d, 1u << 22 | 1u << 24)) return false;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return has_bits(low, 3u << 17) && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

// Does this processor run an ISA level?
inline bool runs(const char* level) {
  if (level[0] == 'a') return has_matrix_unit();
  if (level[1] == 'f') return has_bf16_products();
  return x86_level() >= (level[0] == 'v' ? level[1] - '0' : 0);
}
#else
inline void vendor(char* name) { name[0] = 0; }
inline bool amd_has_512_bit_unit() { return false; }
inline bool runs(const char*) { return true; }
#endif

}  // namespace genfast::cpu
