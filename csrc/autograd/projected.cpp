// Differentiation of the projected layer's operators, as of the others in layer.cpp.
#include "ops/projected.h"

#include <ATen/ops/clone.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <mutex>

#include "autograd/node_compat.h"
#include "autograd/recorded_node.h"
#include "ops/composite.h"

namespace lstm_ext {
namespace projected_autograd {

using at::Tensor;
using torch::autograd::variable_list;

// Keeps what LSTMLayerBackward does, and r: 6 S H numbers beyond inputs and outputs.
struct LSTMProjectedBackward : public RecordedNode<LSTMProjectedBackward, ProjectedInputs,
                                                   ProjectedResults, ProjectedWanted> {
  std::string name() const override { return "LSTMProjectedBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return gradients(grads, unpack(), wanted());
  }

  static variable_list gradients(const variable_list& grads, const Kept& kept,
                                 const ProjectedWanted& wanted) {
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined())
      return variable_list(ProjectedWanted::Mask().size());
    return as_list(ops::lstm_layer_projected_backward::call(
        {or_none(grads[0]), or_none(grads[1]), or_none(grads[2])}, kept.inputs(), kept.results(),
        wanted));
  }
};

ProjectedTrainingOutputs forward_with_graph(const ProjectedInputs& in) {
  auto node = make_node<LSTMProjectedBackward>();
  node->set_next_edges(edges_to(in));
  ProjectedTrainingOutputs out;
  Tensor kept_output;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = ops::lstm_layer_projected_forward::call(in);
    // torch lets a user change the output in place before backward.
    kept_output = OutputStaysInside::now() ? std::get<0>(out).detach() : std::get<0>(out).clone();
  }
  auto& [output, hy, cy, gates, c_before, r] = out;
  node->keep(in, {{kept_output, gates, c_before}, r});
  torch::autograd::set_history(output, node);
  torch::autograd::set_history(hy, node);
  torch::autograd::set_history(cy, node);
  return out;
}

LayerOutputs layer(const ProjectedInputs& in) {
  const bool forward_ad = has_forward_grad(in);
  if (!forward_ad && !requires_grad(in)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ops::lstm_layer_projected::call(in);
  }
  if (forward_ad || !fusable(in)) return composite::projected(in);
  auto [output, hy, cy, gates, c_before, r] = forward_with_graph(in);
  return {std::move(output), std::move(hy), std::move(cy)};
}

ProjectedTrainingOutputs forward(const ProjectedInputs& in) {
  const bool forward_ad = has_forward_grad(in);
  if (!forward_ad && !requires_grad(in)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ops::lstm_layer_projected_forward::call(in);
  }
  return forward_ad || !fusable(in) ? composite::projected_forward(in) : forward_with_graph(in);
}

ProjectedGradients backward(const LayerOutputGradients& grads, const ProjectedInputs& in,
                            const ProjectedResults& results, const ProjectedWanted& wanted) {
  if (requires_grad(in, grads) || has_forward_grad(in, grads))
    return composite::projected_backward(grads, in, results, wanted);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::lstm_layer_projected_backward::call(grads, in, results, wanted);
}

}  // namespace projected_autograd

TORCH_LIBRARY_IMPL(lstm_ext, Autograd, m) {
  ops::lstm_layer_projected::implement<projected_autograd::layer>(m);
  ops::lstm_layer_projected_forward::implement<projected_autograd::forward>(m);
  ops::lstm_layer_projected_backward::implement<projected_autograd::backward>(m);
}

}  // namespace lstm_ext
