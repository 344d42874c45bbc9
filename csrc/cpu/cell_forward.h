// Forward of one LSTM cell: the gate product into a small scratch, then activations and states
// from there while it is still in the first-level cache.
#pragma once

#include "cpu/cell_finish.h"
#include "cpu/cell_kernels.h"
#include "cpu/panel.h"

namespace lstm_ext::cpu {
namespace {

// Up to this many rows, dot products on the weights as they lie beat packing them.
constexpr int kDotRows = LSTM_EXT_DOT_ROWS;

// (No lambdas here: GCC compiles them for the file's own target, not the pragma's.)

// sum += the products of one vector along K, or of its first n elements.
template <class S, int Rows, bool Whole>
LSTM_EXT_INLINE void dot_step(const S* x, const S* w, int64_t K, int64_t H, int64_t n,
                              VectorOf<S> (&sum)[Rows][kGates]) {
  if (Whole) n = kWidthOf<S> * kDepthOfFactor<S>;
  FactorVectorOf<S> x_k[Rows];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) x_k[r] = load_factors<S>(x + r * K, n);
#pragma GCC unroll 4
  for (int gate = 0; gate < kGates; ++gate) {
    const FactorVectorOf<S> w_k = load_factors<S>(w + gate * H * K, n);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
      sum[r][gate] = multiply_add<FactorType<S>>(sum[r][gate], x_k[r], w_k);
  }
}

// Dot products of Rows rows of x [*, K] with the four gate rows of a hidden unit, weights as they
// lie: w [4H, K]. One result is summed in the same order whatever the tile.
template <class S, int Rows>
LSTM_EXT_INLINE void dot_products(const S* x, const S* w, int64_t K, int64_t H,
                                  VectorOf<S> (&sum)[Rows][kGates]) {
  constexpr int step = kWidthOf<S> * kDepthOfFactor<S>;
  int64_t k = 0;
  for (; k + step <= K; k += step) dot_step<S, Rows, true>(x + k, w + k, K, H, step, sum);
  if (k < K) dot_step<S, Rows, false>(x + k, w + k, K, H, K - k, sum);
}

// Rows rows of every unit of the task.
template <class S, int Rows>
void dot_rows(const CellForwardArgs& args, int64_t row, int64_t unit, int units, Sums<S> sums) {
  const S* input = static_cast<const S*>(args.input) + row * args.I;
  const S* hx = static_cast<const S*>(args.hx) + row * args.H;
  const S* w_ih = static_cast<const S*>(args.w_ih) + unit * args.I;
  const S* w_hh = static_cast<const S*>(args.w_hh) + unit * args.H;
  for (int u = 0; u < units; ++u, w_ih += args.I, w_hh += args.H) {
    VectorOf<S> sum[Rows][kGates] = {};
    dot_products<S, Rows>(input, w_ih, args.I, args.H, sum);
    dot_products<S, Rows>(hx, w_hh, args.H, args.H, sum);
    for (int r = 0; r < Rows; ++r) {
      ComputeType<S> total[kGates];
      horizontal_sums<ComputeType<S>>(sum[r], total);
      for (int gate = 0; gate < kGates; ++gate) sums[r][gate][u] = total[gate];
    }
  }
}

// The product for few rows, as many at a time as leave their sums in registers. (Fewer streams of
// weights read slower from memory, more of them slower from the caches.)
template <class S>
void gate_product_dots(const CellForwardArgs& args, int64_t row, int64_t rows, int64_t unit,
                       int units, Sums<S> sums) {
  int64_t r = 0;
  for (; r + 3 <= rows; r += 3) dot_rows<S, 3>(args, row + r, unit, units, sums + r);
  if (rows - r == 2) dot_rows<S, 2>(args, row + r, unit, units, sums + r);
  if (rows - r == 1) dot_rows<S, 1>(args, row + r, unit, units, sums + r);
}

// The product for many rows: the four gates of the task's units as a panel.
// x is [N, K] in factors; the first product replaces the panel's sums, others add to them.
template <class S>
void gate_product_panel(const FactorType<S>* x, const S* w, int64_t K, int64_t H, int64_t row,
                        int64_t rows, int64_t unit, int units, bool first,
                        Panel<FactorType<S>>& panel) {
  const int64_t ldx = blocks(K, kDepthOfFactor<S>);
  constexpr int width = kWidthOf<S>;
  const GateLayout layout = gate_layout<S>(H);
  int64_t lanes[kPanelVectors];
  for (int v = 0; v < kPanelVectors; ++v)
    lanes[v] = layout.dense ? at_most(width, kGates * H - v * width) : units;
  for (int64_t k = 0; k < K; k += kPanelStep<S>) {
    const int64_t depth = pack_transposed<S>(w + unit * K + k, K, layout.dense ? width * K : H * K,
                                             lanes, at_most(kPanelStep<S>, K - k), panel.b);
    panel_product<FactorType<S>>(rows, {x + row * ldx + k / kDepthOfFactor<S>, ldx, 1},
                                 panel.b[0][0], depth, layout.vectors,
                                 panel_sums(panel, first && k == 0));
  }
}

template <class S>
int64_t forward_tasks(int64_t N, int64_t H) {
  return row_blocks(N).count * blocks(H, kWidthOf<S>);
}

template <class S>
bool forward_packs(int64_t N) {
  return N > kDotRows;
}

// A task: one vector of hidden units for up to kPanelRows rows.
struct ForwardTask {
  int64_t row, rows, unit;
  int units;
};
template <class S>
LSTM_EXT_INLINE ForwardTask forward_task(const CellForwardArgs& args, int64_t task) {
  const RowBlocks cut = row_blocks(args.N);
  const int64_t row = task % cut.count * cut.rows, unit = task / cut.count * kWidthOf<S>;
  return {row, at_most(cut.rows, args.N - row), unit,
          static_cast<int>(at_most(kWidthOf<S>, args.H - unit))};
}

template <class S>
LSTM_EXT_INLINE CellRows<S> cell_rows(const CellForwardArgs& args, int64_t row) {
  const int64_t H = args.H;
  CellRows<S> cells = {};
  cells.H = H;
  cells.b_ih = static_cast<const S*>(args.b_ih);
  cells.b_hh = static_cast<const S*>(args.b_hh);
  cells.cell = args.cell;
  cells.cx = static_cast<const S*>(args.cx) + row * H;
  cells.cy = static_cast<S*>(args.cy) + row * H;
  cells.hy = static_cast<S*>(args.hy) + row * H;
  cells.gates = args.gates ? static_cast<S*>(args.gates) + row * kGates * H : nullptr;
  return cells;
}

template <class S>
void forward_panels(const CellForwardArgs& args, int64_t first_task, int64_t last_task) {
  using F = FactorType<S>;
  const F* input = static_cast<const F*>(args.input_factors);
  const F* hx = static_cast<const F*>(args.hx_factors);
  const S* w_ih = static_cast<const S*>(args.w_ih);
  const S* w_hh = static_cast<const S*>(args.w_hh);
  Panel<F> panel;
  for (int64_t task = first_task; task < last_task; ++task) {
    const auto [row, rows, unit, units] = forward_task<S>(args, task);
    gate_product_panel<S>(hx, w_hh, args.H, args.H, row, rows, unit, units, true, panel);
    gate_product_panel<S>(input, w_ih, args.I, args.H, row, rows, unit, units, false, panel);
    finish_cells<S>(Cells(), cell_rows<S>(args, row), rows, unit, units,
                    gate_layout<S>(args.H).gate_stride, panel.sums[0][0]);
  }
}

template <class S>
void forward_dots(const CellForwardArgs& args, int64_t first_task, int64_t last_task) {
  alignas(64) ComputeType<S> sums[kDotRows][kGates][kWidthOf<S>];
  for (int64_t task = first_task; task < last_task; ++task) {
    const auto [row, rows, unit, units] = forward_task<S>(args, task);
    gate_product_dots<S>(args, row, rows, unit, units, sums);
    finish_cells<S>(Cells(), cell_rows<S>(args, row), rows, unit, units, kWidthOf<S>, sums[0][0]);
  }
}

template <class S>
void forward(const CellForwardArgs& args, int64_t first_task, int64_t last_task) {
  if (forward_packs<S>(args.N))
    forward_panels<S>(args, first_task, last_task);
  else
    forward_dots<S>(args, first_task, last_task);
}

}  // namespace
}  // namespace lstm_ext::cpu
