// The cells of core/cells.h in kernels: which one a launch is for, and its units' own weights.
#pragma once

#include "cuda/kernels.h"
#include "cuda/numbers.cuh"

namespace lstm_ext::cuda {

// The weights of one unit.
template <class Cell, class S>
struct UnitWeights {
  S at[Cell::kUnitWeights > 0 ? Cell::kUnitWeights : 1];
};

// Out of rows that lie stride numbers apart.
template <class Cell, class T>
__device__ inline UnitWeights<Cell, Sum<T>> unit_weights(const T* rows, int stride, int unit) {
  UnitWeights<Cell, Sum<T>> weights = {};
#pragma unroll
  for (int p = 0; p < Cell::kUnitWeights; ++p) weights.at[p] = widen(rows[p * stride + unit]);
  return weights;
}

// body(cell), with a value of the cell's type, or an error where it is not compiled for T.
template <class T, class Body>
cudaError_t with_cell_of(int variant, const Body& body) {
  if (!has_cell<T>(variant)) return cudaErrorNotSupported;
  return with_cell(variant, [&](auto cell) {
    if constexpr (std::is_same_v<decltype(cell), PlainCell> || !std::is_same_v<T, __half>)
      return body(cell);
    else
      return cudaErrorNotSupported;
  });
}

}  // namespace lstm_ext::cuda
