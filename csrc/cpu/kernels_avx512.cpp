// The CPU kernels for AVX-512 (F, BW, DQ, VL).
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
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define LSTM_EXT_VECTOR_BYTES 64
#define LSTM_EXT_TILE_ROWS 6
#define LSTM_EXT_DOT_ROWS 8
#define LSTM_EXT_STREAM_ROWS 12
#define LSTM_EXT_STREAM_DEPTH 24
#include "cpu/kernels_impl.h"

namespace lstm_ext::cpu {
// In the order of Dtype.
const Kernels kKernelsAVX512[kDtypes] = {table<float>(), table<double>(), table<BFloat16>(),
                                         table<Half>()};
}  // namespace lstm_ext::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
