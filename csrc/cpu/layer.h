// Forward and backward of a layer on the CPU, between the operators and the time loops.
#pragma once

#include "cpu/tensors.h"
#include "ops/layer.h"
#include "ops/projected.h"

namespace lstm_ext::cpu {

struct LayerTensors {
  Tensor output, hy, cy, gates, c_before;  // the last two undefined in inference
  Tensor r;  // of a projected layer's training: h before the projection
};

// Both matrices as PackedGates, one behind the other; or null. And W_hr^T as PackedColumns, or
// null.
struct PackedWeights {
  const void* data = nullptr;
  const void* projection = nullptr;
  WeightType type = WeightType::kWhole;
};

// in need not have the matrices where they are packed. With w_hr [P, H], or its panels, h is
// projected.
LayerTensors layer_forward(const LayerInputs& in, bool training, const PackedWeights& packed = {},
                           const Tensor& w_hr = {});
Gradients layer_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                         const LayerResults& results, const Wanted& wanted);
ProjectedGradients projected_backward(const LayerOutputGradients& grads, const ProjectedInputs& in,
                                      const ProjectedResults& results,
                                      const ProjectedWanted& wanted);

}  // namespace lstm_ext::cpu
