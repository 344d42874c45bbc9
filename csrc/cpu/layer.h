// Forward and backward of a layer on the CPU, between the operators and the time loops.
#pragma once

#include "cpu/tensors.h"
#include "ops/layer_states.h"

namespace lstm_ext::cpu {

struct LayerTensors {
  Tensor output, hy, cy, gates, c_before;  // the last two undefined in inference
  Tensor cells;                            // like the output; undefined if not asked for
};
// What is made beside output, hy and cy.
struct LayerExtras {
  bool training = false;  // gates and c_before
  bool cells = false;
};

// Both matrices as PackedGates, one behind the other; or null.
struct PackedWeights {
  const void* data = nullptr;
  WeightType type = WeightType::kWhole;
};

// in need not have the matrices where they are packed.
LayerTensors layer_forward(const StatesInputs& in, const LayerExtras& extras,
                           const PackedWeights& packed = {});
StatesGradients layer_backward(const StatesOutputGradients& grads, const StatesInputs& in,
                               const LayerResults& results, const StatesWanted& wanted);

}  // namespace lstm_ext::cpu
