// The kernels of AVX-VNNI where the processor has none: its two instructions by what they are
// documented to do, so that all but the instructions themselves is checked on any x86-64.
#include "vnni_by_hand.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace {

// sum + the products of each lane's terms
template <class A, class B>
__m256i dot(__m256i sum, __m256i a, __m256i b) {
  constexpr int kTerms = 4 / sizeof(A);
  int32_t sums[8];
  A left[8 * kTerms];
  B right[8 * kTerms];
  std::memcpy(sums, &sum, sizeof(sums));
  std::memcpy(left, &a, sizeof(left));
  std::memcpy(right, &b, sizeof(right));
  for (int lane = 0; lane < 8; ++lane)
    for (int k = 0; k < kTerms; ++k)
      sums[lane] += int32_t{left[lane * kTerms + k]} * right[lane * kTerms + k];
  std::memcpy(&sum, sums, sizeof(sums));
  return sum;
}

}  // namespace

#define _mm256_dpbusd_avx_epi32 dot<uint8_t, int8_t>
#define _mm256_dpwssd_avx_epi32 dot<int16_t, int16_t>
#define LSTM_EXT_VECTOR_BYTES 32
#define LSTM_EXT_HAS_INT8_PRODUCT
#define LSTM_EXT_TILE_ROWS 3
#include "cpu/integer_weights.h"

namespace lstm_ext::cpu {
const WeightKernels kIntegersByHand[kIntegerTypes] = {
    integer_weights<UInt8Quad, Int8Activations>(), integer_weights<Int16Pair, Int16Activations>()};
}  // namespace lstm_ext::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
