// What the matrix products multiply, a vector at a time, and how they sum it.
//
// A factor is an element in the compute type, one k a lane; or, in as many bits as a lane has,
// several neighbouring k's: two of bfloat16 where the processor multiplies those, and integers of
// 16 or 8 bits (integer_weights.h).
#pragma once

#include "cpu/simd.h"

namespace lstm_ext::cpu {
namespace {

struct BFloat16Pair {
  BFloat16 k[2];
};
template <>
struct Vector<BFloat16Pair> {
  static constexpr int kWidth = LSTM_EXT_VECTOR_BYTES / sizeof(BFloat16Pair);
  using type = UInt32s;
};
template <class S>
struct Factor {
  using type = ComputeType<S>;
};
#if defined(LSTM_EXT_HAS_BF16_PRODUCT)
template <>
struct Factor<BFloat16> {
  using type = BFloat16Pair;
};
#endif
template <class S>
using FactorType = typename Factor<S>::type;
template <class S>
using FactorVectorOf = typename Vector<FactorType<S>>::type;
template <class S>
constexpr bool kPaired = std::is_same_v<FactorType<S>, BFloat16Pair>;
template <class S>
constexpr int kDepthOfFactor = kPaired<S> ? 2 : 1;  // k's in one factor
// A row of K factors as elements: padded to whole pairs where they are pairs.
template <class S>
using FactorElement = std::conditional_t<kPaired<S>, S, ComputeType<S>>;
template <class S>
LSTM_EXT_INLINE int64_t factor_row(int64_t K) {
  return kPaired<S> ? (K + 1) / 2 * 2 : K;
}

// Integers: exact in 32 bits, in whatever order they are summed.
using Int32s = Vector<int32_t>::type;
template <class Number, int kNumbers>
struct Integers {
  Number k[kNumbers];
  static_assert(sizeof(k) == sizeof(int32_t));
};
using Int16Pair = Integers<int16_t, 2>;
using UInt8Quad = Integers<uint8_t, 4>;
using Int8Quad = Integers<int8_t, 4>;
template <class Number, int kNumbers>
struct Vector<Integers<Number, kNumbers>> : Vector<int32_t> {};

// The type in which products of factors are summed.
template <class F>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <class Number, int kNumbers>
struct SumOf<Integers<Number, kNumbers>> {
  using type = int32_t;
};
template <class F>
using SumTypeOf = typename SumOf<F>::type;

// The factors of the next n elements of a row, zero beyond them.
template <class S>
LSTM_EXT_INLINE FactorVectorOf<S> load_factors(const S* p, int64_t n) {
#if defined(LSTM_EXT_HAS_BF16_PRODUCT)
  if constexpr (kPaired<S>)
    return bit_cast<UInt32s>(n >= 32 ? _mm512_loadu_si512(p)
                                     : _mm512_maskz_loadu_epi16((uint32_t{1} << n) - 1, p));
  else
#endif
    return load(p, n);
}

LSTM_EXT_INLINE UInt32s load(const BFloat16Pair* p) {
  UInt32s v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
LSTM_EXT_INLINE void store(BFloat16Pair* p, UInt32s v) { std::memcpy(p, &v, sizeof(v)); }

LSTM_EXT_INLINE Int32s load(const int32_t* p) {
  Int32s v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// sum + a0 b0 + a1 b1
LSTM_EXT_INLINE Int32s add_pairs(Int32s sum, Int32s a, Int32s b) {
#if LSTM_EXT_VECTOR_BYTES == 64 && defined(LSTM_EXT_HAS_INT8_PRODUCT)
  return bit_cast<Int32s>(
      _mm512_dpwssd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif LSTM_EXT_VECTOR_BYTES == 32 && defined(LSTM_EXT_HAS_INT8_PRODUCT)
  return bit_cast<Int32s>(
      _mm256_dpwssd_avx_epi32(bit_cast<__m256i>(sum), bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif LSTM_EXT_VECTOR_BYTES == 64
  return sum + bit_cast<Int32s>(_mm512_madd_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif LSTM_EXT_VECTOR_BYTES == 32
  return sum + bit_cast<Int32s>(_mm256_madd_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return sum + bit_cast<Int32s>(_mm_madd_epi16(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#else
  const auto low = [](Int32s v) { return bit_cast<Int32s>(bit_cast<UInt32s>(v) << 16) >> 16; };
  return sum + low(a) * low(b) + (a >> 16) * (b >> 16);
#endif
}

// sum + a0 b0 + .. + a3 b3, for a without and b with a sign; or for both with one, none of them
// -128: the 8-bit product of AVX2 takes |a| and b with the sign of a b, and its sums of two then
// stay within 16 bits.
#if defined(LSTM_EXT_HAS_INT8_PRODUCT)
LSTM_EXT_INLINE Int32s add_quads(Int32s sum, Int32s a, Int32s b) {
#if LSTM_EXT_VECTOR_BYTES == 64
  return bit_cast<Int32s>(
      _mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#else
  return bit_cast<Int32s>(
      _mm256_dpbusd_avx_epi32(bit_cast<__m256i>(sum), bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#endif
}
#elif LSTM_EXT_VECTOR_BYTES == 32
LSTM_EXT_INLINE Int32s add_quads(Int32s sum, Int32s a, Int32s b) {
  const __m256i sign = bit_cast<__m256i>(a);
  const __m256i pairs =
      _mm256_maddubs_epi16(_mm256_abs_epi8(sign), _mm256_sign_epi8(bit_cast<__m256i>(b), sign));
  return sum + bit_cast<Int32s>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

// sum + a * b
template <class F, class V>
LSTM_EXT_INLINE V multiply_add(V sum, typename Vector<F>::type a, typename Vector<F>::type b) {
#if defined(LSTM_EXT_HAS_BF16_PRODUCT)
  if constexpr (std::is_same_v<F, BFloat16Pair>)
    return bit_cast<Floats>(
        _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
  else
#endif
#if defined(LSTM_EXT_HAS_INT8_PRODUCT) || LSTM_EXT_VECTOR_BYTES == 32
      if constexpr (std::is_same_v<F, UInt8Quad> || std::is_same_v<F, Int8Quad>)
    return add_quads(sum, a, b);
  else
#endif
      if constexpr (std::is_same_v<F, Int16Pair>)
    return add_pairs(sum, a, b);
  else
    return sum + a * b;
}

template <class F>
LSTM_EXT_INLINE typename Vector<F>::type broadcast(F value) {
  if constexpr (std::is_same_v<F, BFloat16Pair>)
    return bit_cast<uint32_t>(value) - UInt32s{};
  else if constexpr (std::is_same_v<SumTypeOf<F>, int32_t>)
    return bit_cast<int32_t>(value) - Int32s{};
  else
    return value - typename Vector<F>::type{};  // (0 + value would lose the sign of -0)
}

}  // namespace
}  // namespace lstm_ext::cpu
