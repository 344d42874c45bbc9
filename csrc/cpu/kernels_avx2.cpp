// The CPU kernels for AVX2 with FMA and F16C.
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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LSTM_EXT_VECTOR_BYTES 32
#define LSTM_EXT_TILE_ROWS 3
#define LSTM_EXT_DOT_ROWS 8
#define LSTM_EXT_STREAM_ROWS 12
#define LSTM_EXT_STREAM_DEPTH 16
#include "cpu/kernels_impl.h"

namespace lstm_ext::cpu {
// In the order of Dtype.
const Kernels kKernelsAVX2[kDtypes] = {table<float>(), table<double>(), table<BFloat16>(),
                                       table<Half>()};
}  // namespace lstm_ext::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
