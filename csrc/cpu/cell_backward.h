// Backward of one LSTM cell: the gate gradients with the bias sums in one pass, then the matrix
// products that spread them to inputs and weights.
#pragma once

#include "cpu/activations.h"
#include "cpu/cell_kernels.h"
#include "cpu/panel.h"
#include "cpu/stream.h"

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

template <class S>
void reduce_bias(const void* bias_sums, int64_t row_blocks, int64_t H, void* out, bool accumulate) {
  const auto* sums = static_cast<const ComputeType<S>*>(bias_sums);
  for (int64_t j = 0; j < 4 * H; j += kWidthOf<S>) {
    const int64_t n = at_most(kWidthOf<S>, 4 * H - j);
    // Four running sums: a quarter of the roundings in a row.
    VectorOf<S> part[4] = {};
    for (int64_t block = 0; block < row_blocks; ++block)
      part[block % 4] += load(sums + block * 4 * H + j, n);
    store_result(static_cast<S*>(out) + j, (part[0] + part[1]) + (part[2] + part[3]), n,
                 accumulate);
  }
}

template <class S>
int64_t product_tasks(int64_t rows, int64_t depth, int64_t columns) {
  if (rows == 0 || columns == 0) return 0;
  if (streams(rows, depth)) {
    const StreamBlock block = stream_block(rows, columns);
    return blocks(rows, block.rows) * blocks(columns, block.columns);
  }
  return blocks(rows, kPanelRows) * blocks(columns, Panel<ComputeType<S>>::kColumns);
}

// A task: one panel of columns for up to kPanelRows rows.
template <class S>
void panel_task(const ProductArgs& args, int64_t row, int64_t column,
                Panel<ComputeType<S>>& panel) {
  using T = ComputeType<S>;
  constexpr int width = kWidthOf<S>;
  const int64_t rows = at_most(kPanelRows, args.rows - row);
  const int64_t columns = at_most(Panel<T>::kColumns, args.columns - column);
  const int vectors = static_cast<int>(blocks(columns, width));
  const T* a = static_cast<const T*>(args.a) + row * args.a_row_stride;
  const S* b = static_cast<const S*>(args.b) + column;
  std::memset(panel.sums, 0, rows * sizeof(panel.sums[0]));
  for (int64_t k = 0; k < args.depth; k += kPanelDepth) {
    const int64_t depth = at_most(kPanelDepth, args.depth - k);
    pack_columns<S>(b + k * args.columns, args.columns, columns, depth, panel.b);
    panel_product<T>(rows, {a + k * args.a_k_stride, args.a_row_stride, args.a_k_stride}, panel,
                     depth, vectors, panel.sums);
  }
  for (int64_t r = 0; r < rows; ++r) {
    S* c = static_cast<S*>(args.c) + (row + r) * args.columns + column;
    for (int v = 0; v < vectors; ++v)
      store_result(c + v * width, load(panel.sums[r][v]), columns - v * width, args.accumulate);
  }
}

template <class S>
void product_panels(const ProductArgs& args, int64_t first_task, int64_t last_task) {
  const int64_t row_blocks = blocks(args.rows, kPanelRows);
  Panel<ComputeType<S>> panel;
  for (int64_t task = first_task; task < last_task; ++task)
    panel_task<S>(args, task % row_blocks * kPanelRows,
                  task / row_blocks * Panel<ComputeType<S>>::kColumns, panel);
}

template <class S>
void product(const ProductArgs& args, int64_t first_task, int64_t last_task) {
  if (!streams(args.rows, args.depth)) return product_panels<S>(args, first_task, last_task);
  const StreamBlock block = stream_block(args.rows, args.columns);
  const int64_t row_blocks = blocks(args.rows, block.rows);
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t row = task % row_blocks * block.rows;
    const int64_t column = task / row_blocks * block.columns;
    stream_task<S>(args, row, at_most(block.rows, args.rows - row), column,
                   at_most(block.columns, args.columns - column));
  }
}

}  // namespace
}  // namespace lstm_ext::cpu
