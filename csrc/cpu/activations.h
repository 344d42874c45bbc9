// sigmoid and tanh of a vector, inline: no call, so nothing is spilled.
//
// Both rest on expm1(x) = 2^n (e^r - 1) + (2^n - 1) with x = n ln2 + r and
// |r| <= ln2 / 2, where e^r - 1 is its Taylor series. tanh(x) = m / (m + 2) with
// m = expm1(2x) keeps full relative accuracy near 0, where 1 - 2 / (e^2x + 1)
// would cancel. Largest errors, tests/test_activations.py: 2 units in the last
// place for tanh, 2 for sigmoid (absolute error below 1 unit of 1.0).
// +-inf give the limits, NaN stays NaN.
#pragma once

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
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr int kMantissaBits = 52, kBias = 1023, kTerms = 14;
  static constexpr double kMin = -708.0, kMax = 709.0;
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
    V power;
    const V reduced = reduced_expm1(limit(x + x), power);
    const V m = power * reduced + (power - T(1));
    return m / (m + T(2));
  }

 private:
  // tanh is 1 to the last bit beyond |2x| = 40; stopping there keeps m finite.
  static LSTM_EXT_INLINE V limit(V x) {
    x = x < T(-40) ? zeros<V>() - T(40) : x;
    return x > T(40) ? zeros<V>() + T(40) : x;
  }
};

}  // namespace
}  // namespace lstm_ext::cpu
