// What the bindings link against beside the kernels: this module has none for the CPU.
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace genfast::cpu {
const Kernels& kernels() {
  static const Kernels none{};
  return none;
}
const char* isa_name() { return "none"; }
const char* const* isa_usable() {
  static const char* const none[] = {nullptr};
  return none;
}
const char* thread_runtime() { return "none"; }
}  // namespace genfast::cpu
