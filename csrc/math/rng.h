// The noise contract, version 1: word → uniform → exponential / normal / Gumbel / logistic.
// Only IEEE add, mul, sqrt and integer operations in a fixed order, compiled without contraction,
// so every backend gives the same bits. genfast/reference/rng.py repeats each line in numpy.
//
// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32-10).
// Box & Muller, "A note on the generation of random normal deviates", 1958.
#pragma once
#include "math/lane.h"

namespace genfast {

template <class U>
struct Words {  // one Philox block; word w of block b is element 4 b + w
  U w0, w1, w2, w3;
};

// counter = (block as 64 bit, stream as 64 bit), key = seed, all little end first. K: uint32_t, or
// U for a key per lane.
template <class U, class K>
GENFAST_FN Words<U> philox4x32_10(U c0, U c1, U c2, U c3, K k0, K k1) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const U h0 = multiply_high(c0, 0xD2511F53u), l0 = c0 * 0xD2511F53u;
    const U h1 = multiply_high(c2, 0xCD9E8D57u), l1 = c2 * 0xCD9E8D57u;
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// [0, 1): the top 24 bits.
template <class F, class U>
GENFAST_FN F uniform(U w) {
  return to_float(as_signed(w >> 8)) * 0x1p-24f;
}

// (0, 1]: all 32 bits, finest near 0 (2^-33), so that tails reach 6.7 sigma.
template <class F, class U>
GENFAST_FN F uniform_positive(U w) {
  return word_to_float(w) * 0x1p-32f + 0x1p-33f;
}

// e ln2 + log1p(f) for f in [sqrt(1/2) - 1, sqrt(2) - 1].
template <class F>
GENFAST_FN F log_of_parts(F e, F f) {
  F p = -0.07634499669075012f * f + 0.127615824341774f;
  p = p * f + -0.13160184025764465f;
  p = p * f + 0.14201757311820984f;
  p = p * f + -0.16623356938362122f;
  p = p * f + 0.20001226663589478f;
  p = p * f + -0.2500081956386566f;
  p = p * f + 0.3333333134651184f;
  const F f2 = f * f;
  F y = p * (f2 * f) + e * -2.12194440e-4f;  // ln2 = 0.693359375 - 2.12194440e-4
  y = y + f2 * -0.5f;
  return e * 0.693359375f + (f + y);
}

// ln x for normal x in [2^-126, 2^128): error <= 0.9 ulp (0.86 over all x in [0.7, 1.42]).
template <class F>
GENFAST_FN F log_positive(F x) {
  const auto b = bits(x);
  const auto e = as_signed(b - 0x3F3504F3u) >> 23;  // x = 2^e m, m in [sqrt(1/2), sqrt(2))
  const F m = from_bits(b - (as_unsigned(e) << 23));
  return log_of_parts<F>(to_float(e), m - 1.0f);
}

// -ln(1 - v) for v in [2^-33, 1]: exact in the small v that make the large Gumbel values;
// v = 1 counts as 1 - 2^-25. Error <= 0.8 ulp below 0.29 and above 0.6, 2.5 ulp between, where
// 1 - v is rounded.
template <class F>
GENFAST_FN F exponential(F v) {
  const F rest = maximum(1.0f - v, F{} + 0x1p-25f);
  const auto b = bits(rest);
  const auto e = as_signed(b - 0x3F3504F3u) >> 23;
  const F m = from_bits(b - (as_unsigned(e) << 23));
  const F f = select(v < 0.29f, -v, m - 1.0f);  // below 0.29 the exponent e is 0
  return -log_of_parts<F>(to_float(e), f);
}

// Standard exponential and Gumbel(0, 1) of a word.
template <class F, class U>
GENFAST_FN F exponential_noise(U w) {
  return exponential<F>(uniform_positive<F>(w));
}
template <class F, class U>
GENFAST_FN F gumbel_noise(U w) {
  return -log_positive<F>(exponential_noise<F>(w));
}
// Logistic(0, 1): log u - log(1 - u).
template <class F, class U>
GENFAST_FN F logistic_noise(U w) {
  const F u = uniform_positive<F>(w);
  return log_positive<F>(u) + exponential<F>(u);
}

// sin and cos of 2 pi w / 2^32. The quadrant is split off in integers, so nothing is lost.
// Error <= 2.5 ulp, 1.1e-7 absolute.
template <class F, class U>
GENFAST_FN void sincos_turn(U w, F& s, F& c) {
  const U q = (w + 0x20000000u) >> 30;                        // nearest quadrant
  const F y = to_float(as_signed(w - (q << 30))) * 0x1p-29f;  // [-1, 1): eighths of a turn
  const F t = y * y;
  F a = -3.595450834836811e-05f * t + 0.002490007085725665f;
  a = a * t + -0.08074543625116348f;
  a = (a * t + 0.7853981852531433f) * y;
  F b = 3.5313346415932756e-06f * t + -0.00032594200456514955f;
  b = b * t + 0.015854327008128166f;
  b = b * t + -0.3084251284599304f;
  b = b * t + 1.0f;
  const auto odd = (q & 1u) != 0u;
  const F sine = select(odd, b, a), cosine = select(odd, a, b);
  s = from_bits(bits(sine) ^ ((q & 2u) << 30));
  c = from_bits(bits(cosine) ^ (((q + 1u) & 2u) << 30));
}

// Two standard normals of two words.
template <class F, class U>
GENFAST_FN void box_muller(U a, U b, F& n0, F& n1) {
  const F r = square_root(maximum(log_positive<F>(uniform_positive<F>(a)) * -2.0f, F{}));
  F s, c;
  sincos_turn<F>(b, s, c);
  n0 = r * c;
  n1 = r * s;
}

}  // namespace genfast
