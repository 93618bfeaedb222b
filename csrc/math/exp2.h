// 2^x, for the families that are compiled with fused multiply-adds.
#pragma once
#include "math/lane.h"

namespace genfast {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// 2^x for x <= 126; relative error <= 1.4e-7 for x in [-126, 126], exactly 0 for x <= -127 (and
// -inf), exactly 1 at 0, NaN at NaN. The polynomial alone (degree 5, 1 at 0) is good to 9.2e-8:
// degree 4 would lose five bits, degree 6 gains nothing in float32.
template <class F>
GENFAST_FN F exp2_nonpositive(F x) {
  const F magic = F{} + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are round(x)
  x = maximum(F{} - 127.0f, x);       // this order of arguments keeps a NaN
  const F z = x + magic;
  const F f = x - (z - magic);
  F p = fused_multiply_add(F{} + 0.001326465280726552f, f, F{} + 0.009671511128544807f);
  p = fused_multiply_add(p, f, F{} + 0.05550733953714371f);
  p = fused_multiply_add(p, f, F{} + 0.24022242426872253f);
  p = fused_multiply_add(p, f, F{} + 0.6931470036506653f);
  p = fused_multiply_add(p, f, F{} + 1.0f);
  // Times 2^z, not z added to the exponent: of a NaN whose low bits are set, as a GPU's are, that
  // would make a finite number.
  return p * from_bits((bits(z) << 23) + 0x3F800000u);
}

}  // namespace genfast
