// The CPU kernels for whatever the compiler targets by default: SSE2 on
// x86-64, NEON on 64-bit Arm.
#include "cpu/kernels.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define LSTM_EXT_VECTOR_BYTES 16
#define LSTM_EXT_TILE_ROWS 3
#define LSTM_EXT_DOT_ROWS 8
#define LSTM_EXT_STREAM_ROWS 12
#define LSTM_EXT_STREAM_DEPTH 16
#include "cpu/kernels_impl.h"

namespace lstm_ext::cpu {
// In the order of Dtype.
const Kernels kKernelsDefault[kDtypes] = {table<float>(), table<double>(), table<BFloat16>(),
                                          table<Half>()};
}  // namespace lstm_ext::cpu
