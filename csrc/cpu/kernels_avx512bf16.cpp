// The CPU kernels for bfloat16 with AVX-512 and its extension AVX512_BF16.
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
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif
#define LSTM_EXT_VECTOR_BYTES 64
#define LSTM_EXT_HAS_BF16_PRODUCT
#define LSTM_EXT_TILE_ROWS 6
#define LSTM_EXT_DOT_ROWS 8
#define LSTM_EXT_STREAM_ROWS 4
#define LSTM_EXT_STREAM_DEPTH 4
#include "cpu/kernels_impl.h"

namespace lstm_ext::cpu {
const Kernels kKernelsAVX512BF16 = table<BFloat16>();
}  // namespace lstm_ext::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
