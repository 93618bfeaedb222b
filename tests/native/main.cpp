// Every driver's main, compiled for the plainest processor: whether this one runs the level is
// asked before any of the level's code (an AVX-512 instruction in a main that asks would be the
// last).
#include "cpu/processor.h"

#include "harness.h"

int main(int argc, char**) {
  constexpr int kSkip = 77;  // CMakeLists.txt: SKIP_RETURN_CODE
  const char* level = GENFAST_TEXT(GENFAST_ISA);
  if (!genfast::cpu::runs(level)) return kSkip;
  genfast::test::run(argc > 1);
  CHECK(std::strcmp(genfast::cpu::thread_runtime(), "std::thread") == 0);
  std::printf("%s: every kernel ran clean\n", level);
}
