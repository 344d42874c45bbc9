// What the cells of cell_math.h are over where their values are tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tanh.h>

#include "core/cell_math.h"

namespace lstm_ext::composite {

struct TensorMath {
  static at::Tensor sigmoid(const at::Tensor& x) { return x.sigmoid(); }
  static at::Tensor tanh(const at::Tensor& x) { return x.tanh(); }
};

using TensorGates = Gates<at::Tensor>;

// Of [N, 4H]: four times [N, H].
inline TensorGates quarters(const at::Tensor& gates) {
  const auto quarter = gates.chunk(4, 1);
  return {quarter[0], quarter[1], quarter[2], quarter[3]};
}
inline at::Tensor join(const TensorGates& gates) {
  return at::cat({gates.i, gates.f, gates.g, gates.o}, 1);
}

}  // namespace lstm_ext::composite
