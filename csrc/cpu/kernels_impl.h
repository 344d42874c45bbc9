// The CPU kernels of the LSTM over the vector type of simd.h. Included once by each
// kernels_*.cpp, which names the instruction set by these macros:
//   LSTM_EXT_VECTOR_BYTES  width of a vector
//   LSTM_EXT_TILE_ROWS     rows of a register tile: 4 vectors x rows accumulators
//   LSTM_EXT_DOT_ROWS      most rows for which the forward leaves the weights unpacked
//   LSTM_EXT_STREAM_ROWS   most rows for which a backward product streams
//   LSTM_EXT_STREAM_DEPTH  greatest depth for which one of many rows does
//   LSTM_EXT_HAS_BF16_PRODUCT  defined where the processor multiplies bfloat16
#pragma once

#include "cpu/cell_backward.h"
#include "cpu/cell_forward.h"
#include "cpu/layer_backward.h"
#include "cpu/layer_forward.h"

namespace lstm_ext::cpu {
namespace {

template <class S>
constexpr auto pairing() -> decltype(CellKernels::pair_rows) {
  if constexpr (kPaired<S>)
    return pair_rows<S>;
  else
    return nullptr;
}

template <class S>
constexpr CellKernels cell_table() {
  return {forward_packs<S>,  forward_tasks<S>, forward<S>,       gate_gradient_tasks<S>,
          gate_gradients<S>, add_up<S>,        product_packs<S>, product_parts<S>,
          product_tasks<S>,  product<S>,       pairing<S>()};
}

template <class S>
constexpr LayerKernels layer_table() {
  return {unit_blocks<S>,    column_blocks<S>, sums_per_row<S>,       packed_gates<S>,
          packed_columns<S>, pack_gates<S>,    pack_state_columns<S>, gate_product<S>,
          step<S>,           step_gradient<S>, state_gradient<S>,     block_sums<S>};
}

template <class S>
constexpr Kernels table() {
  return {cell_table<S>(), layer_table<S>()};
}

}  // namespace
}  // namespace lstm_ext::cpu
