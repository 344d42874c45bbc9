// Forward and backward of a layer on the CPU, between the operators and the time loops.
#pragma once

#include "cpu/tensors.h"
#include "ops/layer_states.h"
#include "ops/projected.h"

namespace lstm_ext::cpu {

struct LayerTensors {
  Tensor output, hy, cy, gates, c_before;  // the last two undefined in inference
  Tensor cells;                            // like the output; undefined if not asked for
  Tensor r;  // of a projected layer's training: h before the projection
};
// What is made beside output, hy and cy.
struct LayerExtras {
  bool training = false;  // gates and c_before, and r of a projected layer
  bool cells = false;
};

// Both matrices as PackedGates, one behind the other; or null. And W_hr^T as PackedColumns, or
// null.
struct PackedWeights {
  const void* data = nullptr;
  const void* projection = nullptr;
  WeightType type = WeightType::kWhole;
};

// in need not have the matrices where they are packed. With w_hr [P, H], or its panels, h is
// projected; then states to be reset to are not taken.
LayerTensors layer_forward(const StatesInputs& in, const LayerExtras& extras,
                           const PackedWeights& packed = {}, const Tensor& w_hr = {});
StatesGradients layer_backward(const StatesOutputGradients& grads, const StatesInputs& in,
                               const LayerResults& results, const StatesWanted& wanted);
ProjectedGradients projected_backward(const LayerOutputGradients& grads, const ProjectedInputs& in,
                                      const ProjectedResults& results,
                                      const ProjectedWanted& wanted);

}  // namespace lstm_ext::cpu
