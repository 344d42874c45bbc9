// The CPU kernels of one LSTM cell over the vector type of simd.h. Included once by each
// cell_kernels_*.cpp, which names the instruction set by these macros:
//   LSTM_EXT_VECTOR_BYTES  width of a vector
//   LSTM_EXT_TILE_ROWS     rows of a register tile: 4 vectors x rows accumulators
//   LSTM_EXT_DOT_ROWS      most rows for which the forward leaves the weights unpacked
//   LSTM_EXT_STREAM_ROWS   most rows for which a backward product streams
//   LSTM_EXT_STREAM_DEPTH  greatest depth for which one of many rows does
//   LSTM_EXT_TABLE         the table to define
#pragma once

#include "cpu/cell_backward.h"
#include "cpu/cell_forward.h"

namespace lstm_ext::cpu {
namespace {

template <class S>
constexpr CellKernels table() {
  return {forward_packs<S>,  forward_tasks<S>, forward<S>,       gate_gradient_tasks<S>,
          gate_gradients<S>, reduce_bias<S>,   product_tasks<S>, product<S>};
}

}  // namespace

// In the order of Dtype.
const CellKernels LSTM_EXT_TABLE[kDtypes] = {table<float>(), table<double>(), table<BFloat16>(),
                                             table<Half>()};

}  // namespace lstm_ext::cpu
