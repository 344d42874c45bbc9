// The CPU kernels for weights in 8 bits with AVX-512 and its extension AVX512_VNNI.
#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

// Everything included from here on is ours and has internal linkage: no code for
// the newer instruction set can leak into what the linker shares between files.
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif
#define LSTM_EXT_VECTOR_BYTES 64
#define LSTM_EXT_HAS_INT8_PRODUCT
#define LSTM_EXT_TILE_ROWS 6
#include "cpu/integer_weights.h"

namespace lstm_ext::cpu {
// In the order of WeightType.
const WeightKernels kIntegersAVX512VNNI[kIntegerTypes] = {
    integer_weights<UInt8Quad, Int8Activations>(), integer_weights<Int16Pair, Int16Activations>()};
}  // namespace lstm_ext::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
