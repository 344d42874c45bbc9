// Backward of one LSTM cell: the gate gradients with the bias sums in one pass. The matrix products
// that spread them to inputs and weights: product.h.
#pragma once

#include "cpu/activations.h"
#include "cpu/cell_kernels.h"
#include "cpu/panel.h"

namespace lstm_ext::cpu {
namespace {

template <class S>
LSTM_EXT_INLINE VectorOf<S> load_or_zero(const void* p, int64_t offset, int64_t n) {
  return p ? load(static_cast<const S*>(p) + offset, n) : zeros<VectorOf<S>>();
}

template <class S>
int64_t gate_gradient_tasks(int64_t N, int64_t H) {
  return bias_blocks(N) * blocks(H, kWidthOf<S>);
}

// A task: one vector of hidden units for the rows of one block of bias_sums.
template <class S>
void gate_gradient_task(const GateGradientArgs& args, int64_t row_block, int64_t unit) {
  using T = ComputeType<S>;
  using V = VectorOf<S>;
  const int64_t H = args.H;
  const int64_t row_begin = row_block * kBiasBlockRows;
  const int64_t row_end = at_most(row_begin + kBiasBlockRows, args.N);
  const int64_t units = at_most(kWidthOf<S>, H - unit);
  Gates<V> bias = {};
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t state = row * H + unit;
    const S* gates = static_cast<const S*>(args.gates) + row * 4 * H + unit;
    const Gates<V> gate = load_gates(gates, H, units);
    V grad_c;
    const V c = load(static_cast<const S*>(args.cx) + state, units);
    const Gates<V> grad =
        cell_backward<Activations<T>>(gate, c, load_or_zero<S>(args.grad_hy, state, units),
                                      load_or_zero<S>(args.grad_cy, state, units), grad_c);
    store_gates(static_cast<T*>(args.grad_gates) + row * 4 * H + unit, H, grad, units);
    if (args.grad_cx) store(static_cast<S*>(args.grad_cx) + state, grad_c, units);
    bias.i += grad.i;
    bias.f += grad.f;
    bias.g += grad.g;
    bias.o += grad.o;
  }
  if (args.bias_sums)
    store_gates(static_cast<T*>(args.bias_sums) + row_block * 4 * H + unit, H, bias, units);
}

template <class S>
void gate_gradients(const GateGradientArgs& args, int64_t first_task, int64_t last_task) {
  const int64_t row_blocks = bias_blocks(args.N);
  for (int64_t task = first_task; task < last_task; ++task)
    gate_gradient_task<S>(args, task % row_blocks, task / row_blocks * kWidthOf<S>);
}

}  // namespace
}  // namespace lstm_ext::cpu
