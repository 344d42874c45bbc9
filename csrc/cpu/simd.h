// A vector of LSTM_EXT_VECTOR_BYTES over the compiler's vector extensions: the
// kernels are written once and compiled for each instruction set. Everything is
// in an anonymous namespace and always inlined (see kernels_avx2.cpp).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/cell_math.h"

namespace lstm_ext::cpu {
namespace {

// Storage types of the two halves; arithmetic on them happens in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class S>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

template <class T>
struct Vector {  // T is float or double
  static constexpr int kWidth = LSTM_EXT_VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(LSTM_EXT_VECTOR_BYTES)));
};
template <class S>
using ComputeType = typename Compute<S>::type;
template <class S>
using VectorOf = typename Vector<ComputeType<S>>::type;
template <class S>
constexpr int kWidthOf = Vector<ComputeType<S>>::kWidth;

typedef uint32_t UInt32s __attribute__((vector_size(LSTM_EXT_VECTOR_BYTES)));
typedef uint16_t UInt16s __attribute__((vector_size(LSTM_EXT_VECTOR_BYTES / 2)));
using Floats = Vector<float>::type;
using Doubles = Vector<double>::type;

template <class To, class From>
LSTM_EXT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V>
LSTM_EXT_INLINE V zeros() {
  return V{};
}

LSTM_EXT_INLINE Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
LSTM_EXT_INLINE void store(float* p, Floats v) { std::memcpy(p, &v, sizeof(v)); }
LSTM_EXT_INLINE Doubles load(const double* p) {
  Doubles v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
LSTM_EXT_INLINE void store(double* p, Doubles v) { std::memcpy(p, &v, sizeof(v)); }

// No more, and no less, than a bound; NaN stays NaN. (As a comparison and a choice, these were two
// instructions.)
LSTM_EXT_INLINE Floats at_most(Floats v, float bound) {
#if LSTM_EXT_VECTOR_BYTES == 32
  return bit_cast<Floats>(_mm256_min_ps(_mm256_set1_ps(bound), bit_cast<__m256>(v)));
#else
  return v > bound ? zeros<Floats>() + bound : v;
#endif
}
LSTM_EXT_INLINE Floats at_least(Floats v, float bound) {
#if LSTM_EXT_VECTOR_BYTES == 32
  return bit_cast<Floats>(_mm256_max_ps(_mm256_set1_ps(bound), bit_cast<__m256>(v)));
#else
  return v < bound ? zeros<Floats>() + bound : v;
#endif
}
LSTM_EXT_INLINE Doubles at_most(Doubles v, double bound) {
  return v > bound ? zeros<Doubles>() + bound : v;
}
LSTM_EXT_INLINE Doubles at_least(Doubles v, double bound) {
  return v < bound ? zeros<Doubles>() + bound : v;
}

// The result of a multiplication that is not to become one instruction with an addition: where a
// compiler does that depends on the code around, and not every processor can.
LSTM_EXT_INLINE Floats apart(Floats v) {
#if defined(__x86_64__) && LSTM_EXT_VECTOR_BYTES == 64
  __asm__("" : "+v"(v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

// The two halves, a vector of their bits at a time.
LSTM_EXT_INLINE Floats widen(UInt16s bits, BFloat16) {
  return bit_cast<Floats>(__builtin_convertvector(bits, UInt32s) << 16);
}
LSTM_EXT_INLINE UInt16s narrow(Floats v, BFloat16) {
  const UInt32s bits = bit_cast<UInt32s>(v);
  // Round to nearest even; a NaN stays one.
  const UInt32s rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UInt32s is_nan = bit_cast<UInt32s>(v != v);
  return __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), UInt16s);
}

#if LSTM_EXT_VECTOR_BYTES == 64
// (The unmasked form reads an uninitialised register by design, and GCC warns of it.)
LSTM_EXT_INLINE Floats widen(UInt16s bits, Half) {
  return bit_cast<Floats>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits)));
}
LSTM_EXT_INLINE UInt16s narrow(Floats v, Half) {
  return bit_cast<UInt16s>(
      _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif LSTM_EXT_VECTOR_BYTES == 32
LSTM_EXT_INLINE Floats widen(UInt16s bits, Half) {
  return bit_cast<Floats>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
}
LSTM_EXT_INLINE UInt16s narrow(Floats v, Half) {
  return bit_cast<UInt16s>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
LSTM_EXT_INLINE Floats widen(UInt16s half, Half) {
  const UInt32s bits = __builtin_convertvector(half, UInt32s);
  const UInt32s magnitude = bits & 0x7fffu;
  // Normal numbers: move exponent and mantissa into place and rebias by 112.
  // Infinity and NaN: another 112, which fills the exponent. Subnormals: with
  // 0.5's exponent in front the mantissa counts in units of 2^-24.
  const UInt32s special = bit_cast<UInt32s>(magnitude >= 0x7c00u);
  const UInt32s normal = (magnitude << 13) + (112u << 23) + (special & (112u << 23));
  const Floats small = bit_cast<Floats>(magnitude + (126u << 23)) - 0.5f;
  const UInt32s is_small = bit_cast<UInt32s>(magnitude < 0x0400u);
  const UInt32s value = (is_small & bit_cast<UInt32s>(small)) | (~is_small & normal);
  return bit_cast<Floats>(value | ((bits & 0x8000u) << 16));
}
LSTM_EXT_INLINE UInt16s narrow(Floats v, Half) {
  const UInt32s bits = bit_cast<UInt32s>(v);
  const UInt32s sign = (bits >> 16) & 0x8000u;
  const UInt32s magnitude = bits & 0x7fffffffu;
  // Normal results: rebias, round to nearest even. Too large: infinity, NaN: NaN.
  // Small ones: adding 0.5 leaves the mantissa in units of 2^-24, rounded.
  const UInt32s normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const UInt32s small = bit_cast<UInt32s>(bit_cast<Floats>(magnitude) + 0.5f) - (126u << 23);
  const UInt32s is_small = bit_cast<UInt32s>(magnitude < (113u << 23));
  const UInt32s is_large = bit_cast<UInt32s>(magnitude >= 0x477ff000u);
  const UInt32s is_nan = bit_cast<UInt32s>(magnitude > 0x7f800000u);
  UInt32s result = (is_small & small) | (~is_small & normal);
  result = (is_large & 0x7c00u) | (~is_large & result);
  result = (is_nan & 0x7e00u) | (~is_nan & result);
  return __builtin_convertvector(result | sign, UInt16s);
}
#endif

template <class S>
LSTM_EXT_INLINE Floats load(const S* p) {
  UInt16s bits;
  std::memcpy(&bits, p, sizeof(bits));
  return widen(bits, S{});
}
template <class S>
LSTM_EXT_INLINE void store(S* p, Floats v) {
  const UInt16s bits = narrow(v, S{});
  std::memcpy(p, &bits, sizeof(bits));
}

#if LSTM_EXT_VECTOR_BYTES == 32
// A mask of whose elements the first n are set.
LSTM_EXT_INLINE __m256i first_lanes(int64_t n, float) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
LSTM_EXT_INLINE __m256i first_lanes(int64_t n, double) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
#endif

// The first n elements, zero in the other lanes; n may be 0, the width or more.
template <class S>
LSTM_EXT_INLINE VectorOf<S> load(const S* p, int64_t n) {
  if (n >= kWidthOf<S>) return load(p);
#if LSTM_EXT_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<S, float>)
    return bit_cast<Floats>(_mm512_maskz_loadu_ps((1u << n) - 1, p));
  else if constexpr (std::is_same_v<S, double>)
    return bit_cast<Doubles>(_mm512_maskz_loadu_pd((1u << n) - 1, p));
  else
    return widen(bit_cast<UInt16s>(_mm256_maskz_loadu_epi16((1u << n) - 1, p)), S{});
#elif LSTM_EXT_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<S, float>)
    return bit_cast<Floats>(_mm256_maskload_ps(p, first_lanes(n, 0.0f)));
  if constexpr (std::is_same_v<S, double>)
    return bit_cast<Doubles>(_mm256_maskload_pd(p, first_lanes(n, 0.0)));
#endif
  S buffer[kWidthOf<S>] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class S>
LSTM_EXT_INLINE void store(S* p, VectorOf<S> v, int64_t n) {
  if (n >= kWidthOf<S>) return store(p, v);
#if LSTM_EXT_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<S, float>)
    return _mm512_mask_storeu_ps(p, (1u << n) - 1, bit_cast<__m512>(v));
  else if constexpr (std::is_same_v<S, double>)
    return _mm512_mask_storeu_pd(p, (1u << n) - 1, bit_cast<__m512d>(v));
  else
    return _mm256_mask_storeu_epi16(p, (1u << n) - 1, bit_cast<__m256i>(narrow(v, S{})));
#elif LSTM_EXT_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<S, float>)
    return _mm256_maskstore_ps(p, first_lanes(n, 0.0f), bit_cast<__m256>(v));
  if constexpr (std::is_same_v<S, double>)
    return _mm256_maskstore_pd(p, first_lanes(n, 0.0), bit_cast<__m256d>(v));
#endif
  S buffer[kWidthOf<S>];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

// *p = v, or *p += v.
template <class S>
LSTM_EXT_INLINE void store_result(S* p, VectorOf<S> v, int64_t n, bool accumulate) {
  if (accumulate) v += load(p, n);
  store(p, v, n);
}

// The four gates of one vector of hidden units lie H apart.
template <class S>
LSTM_EXT_INLINE Gates<VectorOf<S>> load_gates(const S* p, int64_t H, int64_t n) {
  return {load(p, n), load(p + H, n), load(p + 2 * H, n), load(p + 3 * H, n)};
}
template <class S>
LSTM_EXT_INLINE void store_gates(S* p, int64_t H, const Gates<VectorOf<S>>& gate, int64_t n) {
  store(p, gate.i, n);
  store(p + H, gate.f, n);
  store(p + 2 * H, gate.g, n);
  store(p + 3 * H, gate.o, n);
}

template <class S>
LSTM_EXT_INLINE ComputeType<S> to_compute(S value) {
  if constexpr (std::is_same_v<S, ComputeType<S>>)
    return value;
  else
    return load(&value, 1)[0];
}

// [a0 b0 a1 b1 ..], from the lower (First = 0) or upper half of a and b.
template <class V, int First, int... I>
LSTM_EXT_INLINE V interleave(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int width = sizeof...(I);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (I % 2 * width + First + I / 2)...);
#else
  using Int = std::conditional_t<sizeof(V{}[0]) == 4, int32_t, int64_t>;
  typedef Int IntV __attribute__((vector_size(LSTM_EXT_VECTOR_BYTES)));
  return __builtin_shuffle(a, b, IntV{(I % 2 * width + First + I / 2)...});
#endif
}
template <class V>
constexpr auto kLanes = std::make_integer_sequence<int, sizeof(V) / sizeof(V{}[0])>{};
template <class V>
LSTM_EXT_INLINE V interleave_lower(V a, V b) {
  return interleave<V, 0>(a, b, kLanes<V>);
}
template <class V>
LSTM_EXT_INLINE V interleave_upper(V a, V b) {
  return interleave<V, sizeof(V) / sizeof(V{}[0]) / 2>(a, b, kLanes<V>);
}
template <class V>
LSTM_EXT_INLINE V interleaved_sum(V a, V b) {
  return interleave_lower(a, b) + interleave_upper(a, b);
}

// The sums over the lanes of each of the four vectors, in a fixed order. With two lanes a vector
// has none to spare for the second round; they are added one by one.
template <class T>
LSTM_EXT_INLINE void horizontal_sums(const typename Vector<T>::type (&v)[4], T (&out)[4]) {
  constexpr int width = Vector<T>::kWidth;
  if constexpr (width < 4) {
    for (int i = 0; i < 4; ++i) out[i] = v[i][0] + v[i][1];
  } else {
    // Lanes: a c b d, a c b d, ..
    T lane[width];
    store(lane, interleaved_sum(interleaved_sum(v[0], v[1]), interleaved_sum(v[2], v[3])));
    for (int n = width / 2; n >= 4; n /= 2)
      for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
    out[0] = lane[0];
    out[1] = lane[2];
    out[2] = lane[1];
    out[3] = lane[3];
  }
}

}  // namespace
}  // namespace lstm_ext::cpu
