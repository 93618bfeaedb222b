// Chooses the ISA level once. CPUID and XGETBV are asked directly: __builtin_cpu_supports with a
// level name is always false under clang.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

// Best first; CMakeLists.txt compiles the kernel files for the same list.
#if defined(__x86_64__)
#define GENFAST_FOR_EACH_ISA(X) X(v4) X(v3) X(v2) X(base)
#else
#define GENFAST_FOR_EACH_ISA(X) X(base)
#endif

namespace genfast::cpu {

#define GENFAST_LEVEL(name)   \
  namespace name {            \
  extern const Kernels table; \
  }
GENFAST_FOR_EACH_ISA(GENFAST_LEVEL)
#undef GENFAST_LEVEL

namespace {

#if defined(__x86_64__)
bool has_bits(unsigned value, unsigned mask) { return (value & mask) == mask; }

int x86_level() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const unsigned basic = c;
  if (!has_bits(basic, 1u << 0 | 1u << 9 | 1u << 13 | 1u << 19 | 1u << 20 | 1u << 23)) return 0;
  const unsigned avx = 1u << 12 | 1u << 22 | 1u << 27 | 1u << 28 | 1u << 29;  // FMA…F16C
  if (!has_bits(basic, avx)) return 2;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if (!has_bits(low, 0x6u) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 2;
  const unsigned leaf7 = b;
  if (!has_bits(leaf7, 1u << 3 | 1u << 5 | 1u << 8)) return 2;
  unsigned extended = 0;
  if (!__get_cpuid(0x80000001u, &a, &b, &extended, &d) || !(extended & 1u << 5)) return 2;
  const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;
  return has_bits(low, 0xE6u) && has_bits(leaf7, avx512) ? 4 : 3;
}
#endif

struct Level {
  const char* name;
  const Kernels* kernels;
};

constexpr int kMaxLevels = 8;

struct Levels {
  Level usable[kMaxLevels] = {};
  const char* names[kMaxLevels + 1] = {};
  int chosen = 0;

  Levels() {
    const Level built[] = {
#define GENFAST_LEVEL(name) {#name, &name::table},
        GENFAST_FOR_EACH_ISA(GENFAST_LEVEL)
#undef GENFAST_LEVEL
    };
    int count = 0;
    for (const Level& level : built) {  // built is listed best first
#if defined(__x86_64__)
      const int need = level.name[0] == 'v' ? level.name[1] - '0' : 0;
      if (need > x86_level()) continue;
#endif
      names[count] = level.name;
      usable[count++] = level;
    }
    if (const char* wanted = std::getenv("GENFAST_ISA"))
      for (int i = 0; i < count; ++i)
        if (std::strcmp(wanted, names[i]) == 0) chosen = i;
  }
};

const Levels& levels() {
  static const Levels instance;
  return instance;
}

}  // namespace

const Kernels& kernels() { return *levels().usable[levels().chosen].kernels; }
const char* isa_name() { return levels().names[levels().chosen]; }
const char* const* isa_usable() { return levels().names; }

}  // namespace genfast::cpu
