// From pre-activations to the new states: what ends every forward, of a cell and of a time step.
#pragma once

#include "core/cells.h"
#include "cpu/activations.h"
#include "cpu/cell_kernels.h"
#include "cpu/panel.h"

namespace lstm_ext::cpu {
namespace {

constexpr int kGates = 4;
static_assert(kGates == kPanelVectors);

// Pre-activations of some rows: [row][gate][unit].
template <class S>
using Sums = ComputeType<S> (*)[kGates][kWidthOf<S>];

// How the four gates of a task's units lie in a panel's sums: one vector each, or, when all units
// fill half a vector at most, one behind the other, so that no lane goes to waste.
struct GateLayout {
  bool dense;
  int vectors;
  int64_t gate_stride;  // from one gate's sums to the next one's
};
template <class S>
LSTM_EXT_INLINE GateLayout gate_layout(int64_t H) {
  constexpr int width = kWidthOf<S>;
  if (2 * H > width) return {false, kGates, width};
  return {true, static_cast<int>(blocks(kGates * H, width)), H};
}

// The weights of a vector of units, in the compute type.
template <class S, class Cell>
struct UnitWeights {
  VectorOf<S> at[Cell::kUnitWeights > 0 ? Cell::kUnitWeights : 1] = {};

  UnitWeights(const void* unit_weights, int64_t H, int64_t unit, int64_t units) {
    const S* weights = static_cast<const S*>(unit_weights) + unit;
    for (int p = 0; p < Cell::kUnitWeights; ++p) at[p] = load(weights + p * H, units);
  }
};

// Where the states of some rows lie; each pointer is to the first of them. The biases and the
// last seven may be null.
template <class S>
struct CellRows {
  int64_t H;
  const S *b_ih, *b_hh;  // [4H]
  CellKind cell;
  const S* cx;                  // [rows, H]; may be cy
  S* cy;                        // [rows, H]
  S* hy;                        // [rows, H]
  FactorElement<S>* h_factors;  // [rows, factor_row(H)]
  S* gates;                     // [rows, 4H], activated
  S* c_before;                  // a copy of cx
  S* cells;                     // a copy of c'
  const bool* reset_next;       // rows whose cy and h_factors shall be reset
  const S *reset_h, *reset_c;   // [rows, H], to this; null for zero
  bool projects;                // h_factors are not reset
};

// One vector of hidden units.
template <class S, class Cell>
void finish_cells_of(const CellRows<S>& cells, int64_t rows, int64_t unit, int units,
                     int64_t gate_stride, const ComputeType<S>* sums) {
  using T = ComputeType<S>;
  using V = VectorOf<S>;
  const int64_t H = cells.H;
  V bias[kGates] = {};
  for (int gate = 0; gate < kGates; ++gate) {
    const int64_t offset = gate * H + unit;
    if (cells.b_ih) bias[gate] += load(cells.b_ih + offset, units);
    if (cells.b_hh) bias[gate] += load(cells.b_hh + offset, units);
  }
  const UnitWeights<S, Cell> weights(cells.cell.unit_weights, H, unit, units);
  for (int64_t r = 0; r < rows; ++r, sums += kGates * kWidthOf<S>) {
    const int64_t state = r * H + unit;
    const Gates<V> pre = {load(sums, units) + bias[0], load(sums + gate_stride, units) + bias[1],
                          load(sums + 2 * gate_stride, units) + bias[2],
                          load(sums + 3 * gate_stride, units) + bias[3]};
    V c_next, h_next;
    const V c = load(cells.cx + state, units);
    const Gates<V> gate =
        Cell::template forward<Activations<T>>(pre, c, weights.at, c_next, h_next);
    if (cells.c_before) store(cells.c_before + state, c, units);
    store(cells.hy + state, h_next, units);
    if (cells.gates) store_gates(cells.gates + r * kGates * H + unit, H, gate, units);
    if (cells.cells) store(cells.cells + state, c_next, units);
    if (cells.reset_next && cells.reset_next[r]) {
      if (!cells.projects) h_next = cells.reset_h ? load(cells.reset_h + state, units) : zeros<V>();
      c_next = cells.reset_c ? load(cells.reset_c + state, units) : zeros<V>();
    }
    store(cells.cy + state, c_next, units);
    if (cells.h_factors) store(cells.h_factors + r * factor_row<S>(H) + unit, h_next, units);
  }
}

template <class S, class... Cell>
void finish_cells(CellList<Cell...> /*cells*/, const CellRows<S>& cells, int64_t rows, int64_t unit,
                  int units, int64_t gate_stride, const ComputeType<S>* sums) {
  // By its name, so that what the caller leaves null is known in it.
  if (cells.cell.variant == kPlainCell)
    return finish_cells_of<S, PlainCell>(cells, rows, unit, units, gate_stride, sums);
  static constexpr decltype(&finish_cells_of<S, PlainCell>) kOfCell[] = {
      finish_cells_of<S, Cell>...};
  kOfCell[cells.cell.variant](cells, rows, unit, units, gate_stride, sums);
}

}  // namespace
}  // namespace lstm_ext::cpu
