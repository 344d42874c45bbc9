// Backward of an LSTM layer: the gradients that travel from step to step. Those of weights and
// inputs are large products over all steps afterwards (product.h).
#pragma once

#include "cpu/activations.h"
#include "cpu/cell_backward.h"
#include "cpu/layer_forward.h"
#include "cpu/layer_kernels.h"
#include "cpu/product.h"
#include "cpu/projection.h"

namespace lstm_ext::cpu {
namespace {

static_assert(kUnitBlocks == kPanelVectors);

template <class S, class Cell>
void step_gradient_of(const StepGradientArgs& args, int64_t first_block, int64_t last_block) {
  using T = ComputeType<S>;
  using V = VectorOf<S>;
  const int64_t H = args.H;
  for (int64_t unit = first_block * kWidthOf<S>; unit < at_most(H, last_block * kWidthOf<S>);
       unit += kWidthOf<S>) {
    const int64_t units = at_most(kWidthOf<S>, H - unit);
    const UnitWeights<S, Cell> weights(args.cell.unit_weights, H, unit, units);
    for (int64_t r = 0; r < args.rows; ++r) {
      const int64_t state = r * H + unit, gates = r * 4 * H + unit;
      T* grad_c = static_cast<T*>(args.grad_c) + state;
      const V grad_h = load(static_cast<const T*>(args.grad_h) + state, units) +
                       load_or_zero<S>(args.grad_output, state, units);
      V grad_c_before;
      const Gates<V> grad = Cell::template backward<Activations<T>>(
          load_gates(static_cast<const S*>(args.gates) + gates, H, units),
          load(static_cast<const S*>(args.c_before) + state, units), weights.at, grad_h,
          load(grad_c, units) + load_or_zero<S>(args.grad_cells, state, units), grad_c_before);
      store_gates(static_cast<T*>(args.grad_gates) + gates, H, grad, units);
      if (args.grad_gates_factors)
        store_gates(static_cast<S*>(args.grad_gates_factors) + gates, H, grad, units);
      if (args.reset && args.reset[r]) {
        if (T* sum = static_cast<T*>(args.grad_reset_c))
          store(sum + state, load(sum + state, units) + grad_c_before, units);
        grad_c_before = zeros<V>();
      }
      store(grad_c, grad_c_before, units);
    }
  }
}

template <class S, class... Cell>
void step_gradient(CellList<Cell...> /*cells*/, const StepGradientArgs& args, int64_t first_block,
                   int64_t last_block) {
  static constexpr decltype(&step_gradient_of<S, PlainCell>) kOfCell[] = {
      step_gradient_of<S, Cell>...};
  kOfCell[args.cell.variant](args, first_block, last_block);
}
template <class S>
void step_gradient(const StepGradientArgs& args, int64_t first_block, int64_t last_block) {
  step_gradient<S>(Cells(), args, first_block, last_block);
}

template <class S>
void state_gradient(const StateGradientArgs& args, int64_t first_block, int64_t last_block) {
  using T = ComputeType<S>;
  const PanelColumns own = panel_columns<S>(args.panels, first_block, last_block);
  column_product<S>(args.panels, args.rows, args.grad_gates, args.packed, args.grad_h,
                    args.panels.columns, first_block, last_block);
  const int64_t columns = args.panels.columns;
  for (int64_t r = 0; args.reset && r < args.rows; ++r) {
    if (!args.reset[r]) continue;
    T* of_row = static_cast<T*>(args.grad_h) + r * columns + own.first;
    if (args.grad_reset_h) {
      T* sum = static_cast<T*>(args.grad_reset_h) + r * columns + own.first;
      for (int64_t k = 0; k < own.count; ++k) sum[k] += of_row[k];
    }
    std::memset(of_row, 0, own.count * sizeof(T));
  }
}

template <class S>
void block_sums(const void* m, int64_t rows, int64_t columns, void* sums, int64_t first,
                int64_t last) {
  using T = ComputeType<S>;
  for (int64_t block = first; block < last; ++block)
    add_up<T>(static_cast<const T*>(m) + block * kBiasBlockRows * columns,
              at_most(kBiasBlockRows, rows - block * kBiasBlockRows), columns,
              static_cast<T*>(sums) + block * columns, false);
}

}  // namespace
}  // namespace lstm_ext::cpu
