// Chooses the ISA level once.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/processor.h"

// Best first; CMakeLists.txt compiles the kernel files for the same list.
#if defined(__x86_64__)
#define GENFAST_FOR_EACH_ISA(X) X(amx) X(bf16) X(v4) X(v3) X(base)
#else
#define GENFAST_FOR_EACH_ISA(X) X(base)
#endif

namespace genfast::cpu {

#define GENFAST_LEVEL(name) \
  namespace name {          \
  const Kernels& table();   \
  }
GENFAST_FOR_EACH_ISA(GENFAST_LEVEL)
#undef GENFAST_LEVEL

namespace {

struct Level {
  const char* name;
  const Kernels& (*table)();
};

constexpr int kMaxLevels = 8;

struct Levels {
  Level usable[kMaxLevels] = {};
  const char* names[kMaxLevels + 1] = {};
  int chosen = 0;
  const Kernels* kernels = nullptr;

  Levels() {
    const Level built[] = {
#define GENFAST_LEVEL(name) {#name, name::table},
        GENFAST_FOR_EACH_ISA(GENFAST_LEVEL)
#undef GENFAST_LEVEL
    };
    int count = 0;
    for (const Level& level : built) {  // built is listed best first
      if (!runs(level.name)) continue;
      names[count] = level.name;
      usable[count++] = level;
    }
    if (const char* wanted = std::getenv("GENFAST_ISA"))
      for (int i = 0; i < count; ++i)
        if (std::strcmp(wanted, names[i]) == 0) chosen = i;
    kernels = &usable[chosen].table();  // code of the level, so of no other
  }
};

const Levels& levels() {
  static const Levels instance;
  return instance;
}

}  // namespace

const Kernels& kernels() { return *levels().kernels; }
const char* isa_name() { return levels().names[levels().chosen]; }
const char* const* isa_usable() { return levels().names; }

}  // namespace genfast::cpu
