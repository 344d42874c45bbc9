// sigmoid and tanh of a vector, inline: no call, so nothing is spilled.
//
// e^x = 2^n (1 + (e^r - 1)) with x = n ln2 + r and |r| <= ln2 / 2, where e^r - 1 = r + r^2 Q(r), Q
// a near-minimax fit in float, the Taylor series in double. tanh(x) = 1 - 2 / (e^2x + 1) would
// cancel near 0: below kTanhSmall it is the odd polynomial x + x^3 P(x^2), P a near-minimax fit.
// (Fits: Chebyshev interpolation in 40 digits.) Largest errors, in units in the last place: 2.4
// for sigmoid, as torch.sigmoid, and 1.5 for tanh (tests/test_activations.py). +-inf give the
// limits, NaN stays NaN.
#pragma once

#include <limits>

#include "cpu/simd.h"

namespace lstm_ext::cpu {
namespace {

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Int = int32_t;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr int kMantissaBits = 23;
  static constexpr float kMin = -87.0f, kMax = 88.0f;  // e^x stays a normal number
};
template <>
struct ExpConstants<double> {
  using Int = int64_t;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93147180369123816490e-01,
                          kLn2Low = 1.90821492927058770002e-10;
  static constexpr int kMantissaBits = 52;
  static constexpr double kMin = -708.0, kMax = 709.0;
};

// P(z) of tanh on [0, kTanhSmall^2], from the constant term up.
constexpr double kTanhSmall = 0.5625;
template <class T>
struct TanhPolynomial;
template <>
struct TanhPolynomial<float> {
  static constexpr float kTerm[] = {-0.33333333284f, 0.13333322073f,    -0.053964063826f,
                                    0.021811902608f, -0.0084992478288f, 0.002487614648f};
};
template <>
struct TanhPolynomial<double> {
  static constexpr double kTerm[] = {
      -0.33333333333333332102,   0.13333333333332390931,     -0.053968253967059396515,
      0.021869488476962561362,   -0.0088632340215295135964,  0.0035921055321327687723,
      -0.0014556239774192677815, 0.00058875371118348039075,  -0.00023410556936672797301,
      0.00008426522203958066102, -0.000020026740085317684745};
};

// Q(r), from the constant term up.
template <class T>
struct ExpPolynomial;
template <>
struct ExpPolynomial<float> {
  static constexpr float kTerm[] = {0.5f, 0.16666577019f, 0.0416665546538f, 0.00836317418011f,
                                    0.0013926177501f};
};
template <>
struct ExpPolynomial<double> {
  static constexpr double kTerm[] = {
      1. / 2,         1. / 6,          1. / 24,         1. / 120,     1. / 720,
      1. / 5040,      1. / 40320,      1. / 362880,     1. / 3628800, 1. / 39916800,
      1. / 479001600, 1. / 6227020800, 1. / 87178291200};
};

// terms[0] + terms[1] x + ..
template <class V, class T, int kTerms>
LSTM_EXT_INLINE V polynomial(V x, const T (&terms)[kTerms]) {
  V sum = zeros<V>() + terms[kTerms - 1];
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; --k) sum = sum * x + terms[k];
  return sum;
}

template <class T>
struct Activations {
  using V = typename Vector<T>::type;
  using C = ExpConstants<T>;
  using Int = typename C::Int;
  typedef Int IntV __attribute__((vector_size(LSTM_EXT_VECTOR_BYTES)));

  // x = n ln2 + r: returns e^r - 1, and 2^n as what multiplying by it adds to a number's bits.
  static LSTM_EXT_INLINE V reduced_expm1(V x, IntV& power) {
    const V shifted = x * T(1.4426950408889634) + C::kRound;
    const V n = shifted - C::kRound;
    V r = x - n * C::kLn2High;
    r = r - n * C::kLn2Low;
    // (The bits of kRound itself are shifted out.)
    power = bit_cast<IntV>(shifted) << C::kMantissaBits;
    return r + r * r * polynomial(r, ExpPolynomial<T>::kTerm);
  }

  // e^x from what reduced_expm1 returns.
  static LSTM_EXT_INLINE V scaled(V expm1, IntV power) {
    return bit_cast<V>(bit_cast<IntV>(T(1) + expm1) + power);
  }

  // 1 / (1 + e^-x)
  static LSTM_EXT_INLINE V sigmoid(V x) {
    IntV power;
    const V m = reduced_expm1(at_least(at_most(-x, C::kMax), C::kMin), power);
    return T(1) / (T(1) + scaled(m, power));
  }

  static LSTM_EXT_INLINE V tanh(V x) {
    const V z = x * x;
    const V small = x + x * z * polynomial(z, TanhPolynomial<T>::kTerm);

    const IntV sign = bit_cast<IntV>(x) & kSign;
    const V magnitude = bit_cast<V>(bit_cast<IntV>(x) & ~kSign);
    IntV power;
    const V m = reduced_expm1(at_most(magnitude + magnitude, C::kMax), power);
    const V large = T(1) - T(2) / (T(1) + scaled(m, power));
    const V signed_large = bit_cast<V>(bit_cast<IntV>(large) | sign);
    // The comparison is false for NaN, which the large branch hands on.
    return magnitude < T(kTanhSmall) ? small : signed_large;
  }

 private:
  static constexpr Int kSign = std::numeric_limits<Int>::min();
};

}  // namespace
}  // namespace lstm_ext::cpu
