// Which cells there are: an operator's `variant` is the place of a cell in this list.
#pragma once

#include <cstdint>
#include <utility>

#include "core/cell_math.h"

namespace lstm_ext {

template <class... Cell>
struct CellList {
  static constexpr int kCount = sizeof...(Cell);
  static constexpr int kUnitWeights[] = {Cell::kUnitWeights...};
};
using Cells = CellList<PlainCell, PeepholeCell>;

inline constexpr int kPlainCell = 0;

inline bool is_cell(int64_t variant) { return variant >= 0 && variant < Cells::kCount; }
inline int unit_weights_of(int64_t variant) { return Cells::kUnitWeights[variant]; }

// run(cell), with a value of the cell's type; variant is one.
template <class Run, class First, class... Rest>
decltype(auto) with_cell(CellList<First, Rest...> /*cells*/, int64_t variant, const Run& run) {
  if constexpr (sizeof...(Rest) > 0)
    if (variant > 0) return with_cell(CellList<Rest...>(), variant - 1, run);
  return run(First());
}
template <class Run>
decltype(auto) with_cell(int64_t variant, const Run& run) {
  return with_cell(Cells(), variant, run);
}

}  // namespace lstm_ext
