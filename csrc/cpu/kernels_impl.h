// The CPU kernels of the LSTM over the vector type of simd.h. Included once by each
// kernels_*.cpp, which names the instruction set by these macros:
//   LSTM_EXT_VECTOR_BYTES  width of a vector
//   LSTM_EXT_TILE_ROWS     rows of a register tile: 4 vectors x rows accumulators
//   LSTM_EXT_DOT_ROWS      most rows for which the forward leaves the weights unpacked
//   LSTM_EXT_STREAM_ROWS   most rows for which a backward product streams
//   LSTM_EXT_STREAM_DEPTH  greatest depth for which one of many rows does
//   LSTM_EXT_HAS_BF16_PRODUCT  defined where the processor multiplies bfloat16
//   LSTM_EXT_HAS_INT8_PRODUCT  defined where it multiplies 8-bit integers (kernels_*vnni.cpp)
#pragma once

#include "cpu/cell_backward.h"
#include "cpu/cell_forward.h"
#include "cpu/integer_weights.h"
#include "cpu/layer_backward.h"
#include "cpu/layer_forward.h"
#include "cpu/product.h"
#include "cpu/projection.h"
#include "cpu/recurrence.h"

namespace lstm_ext::cpu {
namespace {

template <class S>
constexpr auto pairing() -> decltype(ProductKernels::pair_rows) {
  if constexpr (kPaired<S>)
    return pair_rows<S>;
  else
    return nullptr;
}

template <class S>
constexpr CellKernels cell_table() {
  CellKernels table = {};
  table.forward_packs = forward_packs<S>;
  table.forward_tasks = forward_tasks<S>;
  table.forward = forward<S>;
  table.gate_gradient_tasks = gate_gradient_tasks<S>;
  table.gate_gradients = gate_gradients<S>;
  table.unit_gradients = unit_gradients<S>;
  return table;
}

template <class S>
constexpr ProductKernels product_table() {
  ProductKernels table = {};
  table.packs = product_packs<S>;
  table.parts = product_parts<S>;
  table.tasks = product_tasks<S>;
  table.run = product<S>;
  table.add_up = add_up<S>;
  table.pair_rows = pairing<S>();
  return table;
}

template <class S, class... W>
constexpr void set_weights(WeightTypes<W...> /*types*/, WeightKernels (&kernels)[kWeightTypes]) {
  int type = 0;
  ((kernels[type++] = {block_bytes<S, W>, nullptr, nullptr, pack_gates<S, W>, gate_product<S, W>}),
   ...);
}

template <class S>
constexpr LayerKernels layer_table() {
  LayerKernels table = {};
  table.unit_blocks = unit_blocks<S>;
  table.sums_per_row = sums_per_row<S>;
  table.panel_elements = block_size<S>;
  table.pack_columns = pack_column_panels<S>;
  table.pack_rows = pack_row_panels<S>;
  set_weights<S>(typename WeightTypesOf<S>::Type(), table.weights);
  if constexpr (std::is_same_v<S, float>) {
    table.weights[static_cast<int>(WeightType::kInt8)] =
        integer_weights<ByteFactor, Int8Activations>();
    table.weights[static_cast<int>(WeightType::kInt8Int16)] =
        integer_weights<Int16Pair, Int16Activations>();
  }
  table.step = step<S>;
  table.step_gradient = step_gradient<S>;
  table.state_gradient = state_gradient<S>;
  table.project = project<S>;
  table.multiply_columns = multiply_columns<S>;
  table.output_gradient = output_gradient<S>;
  table.block_sums = block_sums<S>;
  return table;
}

template <class S>
constexpr Kernels table() {
  return {cell_table<S>(), layer_table<S>(), product_table<S>(), recurrence_table<S>()};
}

}  // namespace
}  // namespace lstm_ext::cpu
