// sigmoid and tanh of a vector, inline: no call, so nothing is spilled.
//
// e^x = 2^n (1 + (e^r - 1)) with x = n ln2 + r and |r| <= ln2 / 2, where e^r - 1 is its Taylor
// series. tanh(x) = 1 - 2 / (e^2x + 1) would cancel near 0: below kTanhSmall it is the odd
// polynomial x + x^3 P(x^2), P a near-minimax fit (Chebyshev interpolation of
// (tanh x - x) / x^3 in 40 digits). Largest errors, in units in the last place: 2.3 for sigmoid,
// as torch.sigmoid, and 1.5 for tanh (tests/test_activations.py). +-inf give the limits, NaN
// stays NaN.
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
  static constexpr int kMantissaBits = 23, kBias = 127, kTerms = 8;
  static constexpr float kMin = -87.0f, kMax = 88.0f;  // e^x stays a normal number
};
template <>
struct ExpConstants<double> {
  using Int = int64_t;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93147180369123816490e-01,
                          kLn2Low = 1.90821492927058770002e-10;
  static constexpr int kMantissaBits = 52, kBias = 1023, kTerms = 14;
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

// 1 / k!
template <class T>
struct InverseFactorials {
  T of[16];
  constexpr InverseFactorials() : of{1} {
    T factorial = 1;
    for (int k = 1; k < 16; ++k) of[k] = T(1) / (factorial *= T(k));
  }
};

template <class T>
struct Activations {
  using V = typename Vector<T>::type;
  using C = ExpConstants<T>;
  using Int = typename C::Int;
  typedef Int IntV __attribute__((vector_size(LSTM_EXT_VECTOR_BYTES)));

  // x = n ln2 + r: returns e^r - 1 and 2^n.
  static LSTM_EXT_INLINE V reduced_expm1(V x, V& power) {
    // Comparisons with NaN are false: it passes through.
    x = x < C::kMin ? zeros<V>() + C::kMin : x;
    x = x > C::kMax ? zeros<V>() + C::kMax : x;
    const V shifted = x * T(1.4426950408889634) + C::kRound;
    const V n = shifted - C::kRound;
    V r = x - n * C::kLn2High;
    r = r - n * C::kLn2Low;
    // Horner's scheme on sum r^k / k!, k = 2 .. kTerms.
    constexpr InverseFactorials<T> inverse_factorial;
    V tail = zeros<V>() + inverse_factorial.of[C::kTerms];
#pragma GCC unroll 16
    for (int k = C::kTerms - 1; k >= 2; --k) tail = tail * r + inverse_factorial.of[k];
    const IntV exponent = bit_cast<IntV>(shifted) - bit_cast<IntV>(zeros<V>() + C::kRound);
    power = bit_cast<V>((exponent + C::kBias) << C::kMantissaBits);
    return r + r * r * tail;
  }

  // 1 / (1 + e^-x)
  static LSTM_EXT_INLINE V sigmoid(V x) {
    V power;
    const V m = reduced_expm1(-x, power);
    return T(1) / (T(1) + (power + power * m));
  }

  static LSTM_EXT_INLINE V tanh(V x) {
    constexpr auto& term = TanhPolynomial<T>::kTerm;
    constexpr int terms = sizeof(term) / sizeof(T);
    const V z = x * x;
    V p = zeros<V>() + term[terms - 1];
#pragma GCC unroll 16
    for (int k = terms - 2; k >= 0; --k) p = p * z + term[k];
    const V small = x + x * z * p;

    const IntV sign = bit_cast<IntV>(x) & kSign;
    const V magnitude = bit_cast<V>(bit_cast<IntV>(x) & ~kSign);
    V power;
    const V m = reduced_expm1(magnitude + magnitude, power);
    const V large = T(1) - T(2) / (power + power * m + T(1));
    const V signed_large = bit_cast<V>(bit_cast<IntV>(large) | sign);
    // The comparison is false for NaN, which the large branch hands on.
    return magnitude < T(kTanhSmall) ? small : signed_large;
  }

 private:
  static constexpr Int kSign = std::numeric_limits<Int>::min();
};

}  // namespace
}  // namespace lstm_ext::cpu
