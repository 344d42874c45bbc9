// Forward and backward of a layer on the CPU, between the operators and the time loops.
#pragma once

#include "cpu/tensors.h"
#include "ops/layer.h"

namespace lstm_ext::cpu {

struct LayerTensors {
  Tensor output, hy, cy, gates, c_before;  // the last two undefined in inference
};

// Both matrices as PackedGates, one behind the other; or null.
struct PackedWeights {
  const void* data = nullptr;
  WeightType type = WeightType::kWhole;
};

// in need not have the matrices where they are packed.
LayerTensors layer_forward(const LayerInputs& in, bool training, const PackedWeights& packed = {});
Gradients layer_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                         const LayerResults& results, const Wanted& wanted);

}  // namespace lstm_ext::cpu
