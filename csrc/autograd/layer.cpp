// Differentiation of the layer's operators; see autograd.cpp for why the node is our own.
#include "ops/layer.h"

#include <ATen/ops/clone.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <mutex>

#include "autograd/node_compat.h"
#include "autograd/recorded_node.h"
#include "ops/composite.h"
#include "ops/layer_states.h"

namespace lstm_ext {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

// Keeps the inputs, batch_sizes and reset, the output, the gates and the c before each step: 5 S H
// numbers beyond inputs and outputs.
struct LSTMLayerBackward : public RecordedNode<LSTMLayerBackward, LayerInputs, LayerResults> {
  std::string name() const override { return "LSTMLayerBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return gradients(grads, unpack(), wanted());
  }

  static variable_list gradients(const variable_list& grads, const Kept& kept,
                                 const Wanted& wanted) {
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined())
      return variable_list(kCellTensors);
    return as_list(
        ops::lstm_layer_backward::call({or_none(grads[0]), or_none(grads[1]), or_none(grads[2])},
                                       kept.inputs(), kept.results(), wanted));
  }
};

// Whether backward keeps the output that the user gets, which may then not be changed in place
// before it. So it is with torch's LSTM in float32 with padded input; elsewhere a copy is kept.
bool is_kept_as_it_is(const LayerInputs& in) {
  const bool kept_by_torch = in.input.scalar_type() == at::kFloat && !defined(in.batch_sizes);
  return kept_by_torch || OutputStaysInside::now();
}

LayerTrainingOutputs forward_with_graph(const LayerInputs& in) {
  auto node = make_node<LSTMLayerBackward>();
  node->set_next_edges(edges_to(in));
  LayerTrainingOutputs out;
  Tensor kept_output;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = ops::lstm_layer_forward::call(in);
    kept_output = is_kept_as_it_is(in) ? std::get<0>(out) : std::get<0>(out).clone();
  }
  auto& [output, hy, cy, gates, c_before] = out;
  // Detached: the node shall not own itself. A change in place is noticed all the same.
  if (kept_output.is_same(output)) kept_output = output.detach();
  node->keep(in, {kept_output, gates, c_before});
  torch::autograd::set_history(output, node);
  torch::autograd::set_history(hy, node);
  torch::autograd::set_history(cy, node);
  return out;
}

LayerOutputs lstm_layer(const LayerInputs& in) {
  const bool forward_ad = has_forward_grad(in);
  if (!forward_ad && !requires_grad(in)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ops::lstm_layer::call(in);
  }
  // What the kernels do not take is differentiated operation by operation.
  if (forward_ad || !fusable(in)) return composite::layer(in);
  auto [output, hy, cy, gates, c_before] = forward_with_graph(in);
  return {std::move(output), std::move(hy), std::move(cy)};
}

LayerTrainingOutputs lstm_layer_forward(const LayerInputs& in) {
  if (has_forward_grad(in)) return composite::layer_forward(in);
  if (requires_grad(in)) return fusable(in) ? forward_with_graph(in) : composite::layer_forward(in);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::lstm_layer_forward::call(in);
}

Gradients lstm_layer_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                              const LayerResults& results, const Wanted& wanted) {
  if (requires_grad(in, grads) || has_forward_grad(in, grads))
    return composite::layer_backward(grads, in, results, wanted);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::lstm_layer_backward::call(grads, in, results, wanted);
}

// With the states of all steps: the same node, for one more output and the states of resets.
struct LSTMLayerStatesBackward
    : public RecordedNode<LSTMLayerStatesBackward, StatesInputs, LayerResults, StatesWanted> {
  std::string name() const override { return "LSTMLayerStatesBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return gradients(grads, unpack(), wanted());
  }

  static variable_list gradients(const variable_list& grads, const Kept& kept,
                                 const StatesWanted& wanted) {
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined() && !grads[3].defined())
      return variable_list(kStatesTensors);
    return as_list(ops::lstm_layer_states_backward::call(
        {{or_none(grads[0]), or_none(grads[1]), or_none(grads[2])}, or_none(grads[3])},
        kept.inputs(), kept.results(), wanted));
  }
};

StatesTrainingOutputs states_with_graph(const StatesInputs& in) {
  auto node = make_node<LSTMLayerStatesBackward>();
  node->set_next_edges(edges_to(in));
  StatesTrainingOutputs out;
  Tensor kept_output;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = ops::lstm_layer_states_forward::call(in);
    kept_output = is_kept_as_it_is(in) ? std::get<0>(out) : std::get<0>(out).clone();
  }
  auto& [output, hy, cy, cells, gates, c_before] = out;
  if (kept_output.is_same(output)) kept_output = output.detach();
  node->keep(in, {kept_output, gates, c_before});
  for (Tensor* of_node : {&output, &hy, &cy, &cells}) torch::autograd::set_history(*of_node, node);
  return out;
}

StatesOutputs lstm_layer_states(const StatesInputs& in) {
  const bool forward_ad = has_forward_grad(in);
  if (!forward_ad && !requires_grad(in)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ops::lstm_layer_states::call(in);
  }
  if (forward_ad || !fusable(in)) return composite::layer_states(in);
  auto [output, hy, cy, cells, gates, c_before] = states_with_graph(in);
  return {std::move(output), std::move(hy), std::move(cy), std::move(cells)};
}

StatesTrainingOutputs lstm_layer_states_forward(const StatesInputs& in) {
  if (has_forward_grad(in)) return composite::layer_states_forward(in);
  if (requires_grad(in))
    return fusable(in) ? states_with_graph(in) : composite::layer_states_forward(in);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::lstm_layer_states_forward::call(in);
}

StatesGradients lstm_layer_states_backward(const StatesOutputGradients& grads,
                                           const StatesInputs& in, const LayerResults& results,
                                           const StatesWanted& wanted) {
  if (requires_grad(in, grads) || has_forward_grad(in, grads))
    return composite::layer_states_backward(grads, in, results, wanted);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::lstm_layer_states_backward::call(grads, in, results, wanted);
}

Tensor lstm_layer_pack(const Tensor& w_ih, const Tensor& w_hh, int64_t weights,
                       const std::optional<Tensor>& w_hr) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::lstm_layer_pack::call(w_ih, w_hh, weights, w_hr);
}

LayerOutputs lstm_layer_packed(const PackedLayerInputs& in) {
  TORCH_CHECK(!requires_grad(in) && !has_forward_grad(in),
              "packed (frozen) weights are for inference: nothing can be differentiated through "
              "them. Use torch.no_grad(), or the module that was frozen (lstm_ext.unfreeze)");
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::lstm_layer_packed::call(in);
}

}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, Autograd, m) {
  ops::lstm_layer::implement<lstm_layer>(m);
  ops::lstm_layer_forward::implement<lstm_layer_forward>(m);
  ops::lstm_layer_backward::implement<lstm_layer_backward>(m);
  ops::lstm_layer_states::implement<lstm_layer_states>(m);
  ops::lstm_layer_states_forward::implement<lstm_layer_states_forward>(m);
  ops::lstm_layer_states_backward::implement<lstm_layer_states_backward>(m);
  ops::lstm_layer_pack::implement<lstm_layer_pack>(m);
  ops::lstm_layer_packed::implement<lstm_layer_packed>(m);
}

}  // namespace lstm_ext
