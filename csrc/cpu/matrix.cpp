// Levels amx and bf16 are v4 with a matrix unit, or with AVX512-BF16, for attention of bf16: the
// one thing that gains by it. Compiled once for each; every other kernel of the levels is v4's.
#include "cpu/attention/call.h"
#include "cpu/kernels.h"

namespace genfast::cpu::GENFAST_ISA {
namespace {

// The unit takes weights rounded to bf16, so a wider result is v4's.
bool fits(const AttentionParams& p) { return p.dtype == Dtype::bf16 && p.out_dtype == Dtype::bf16; }

}  // namespace

// Decoding reads each key once: bound by memory, and by vectors from where it lies.
void attention_forward(const AttentionParams& p) {
  const Forward<VectorUnit> f(p);
  const bool matrix = fits(p) && !f.in_place && f.longest_k >= kMatrixKeys;
  return matrix ? forward<MatrixUnit>(p) : v4::table().attention_forward(p);
}

// A mask's gradient needs the fp32 dS.
void attention_backward(const AttentionGradParams& g) {
  const bool matrix =
      fits(g.p) && g.dmask.data == nullptr && Backward<VectorUnit>(g).longest_k >= kMatrixKeys;
  return matrix ? backward<MatrixUnit>(g) : v4::table().attention_backward(g);
}

// Made when the level is chosen: at load, code of this level would run on any processor.
const Kernels& table() {
  static const Kernels kernels = [] {
    Kernels made = v4::table();
    made.attention_forward = attention_forward;
    made.attention_backward = attention_backward;
    return made;
  }();
  return kernels;
}

}  // namespace genfast::cpu::GENFAST_ISA
