// Forward and backward of a layer on the CPU, between the operators and the time loops.
#pragma once

#include "cpu/tensors.h"
#include "ops/layer.h"

namespace lstm_ext::cpu {

struct LayerTensors {
  Tensor output, hy, cy, gates, c_before;  // the last two undefined in inference
};

// packed: both matrices as PackedGates, which in then need not have; or null.
LayerTensors layer_forward(const LayerInputs& in, bool training, const void* packed = nullptr);
Gradients layer_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                         const LayerResults& results, const Wanted& wanted);

}  // namespace lstm_ext::cpu
