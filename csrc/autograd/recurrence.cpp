// Differentiation of the recurrence's operators, as of the layer's in layer.cpp.
#include "ops/recurrence.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <mutex>

#include "autograd/node_compat.h"
#include "autograd/recorded_node.h"
#include "ops/composite.h"

namespace lstm_ext {
namespace recurrence_autograd {

using at::Tensor;
using torch::autograd::variable_list;

// Keeps the inputs and RecurrenceKept: 6 S H numbers beyond inputs and outputs, 10 S H with a norm.
struct LSTMRecurrenceBackward : public RecordedNode<LSTMRecurrenceBackward, RecurrenceInputs,
                                                    RecurrenceResults, RecurrenceWanted> {
  std::string name() const override { return "LSTMRecurrenceBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return gradients(grads, unpack(), wanted());
  }

  static variable_list gradients(const variable_list& grads, const Kept& kept,
                                 const RecurrenceWanted& wanted) {
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined())
      return variable_list(RecurrenceWanted::Mask().size());
    return as_list(ops::lstm_recurrence_backward::call(
        {or_none(grads[0]), or_none(grads[1]), or_none(grads[2])}, kept.inputs(), kept.results(),
        wanted));
  }
};

// What the kernels have no gradient of.
bool masks_require_grad(const RecurrenceInputs& in) {
  return at::GradMode::is_enabled() &&
         std::apply(
             [](const auto&... mask) { return ((defined(mask) && mask->requires_grad()) || ...); },
             in.masks());
}

RecurrenceTrainingOutputs forward_with_graph(const RecurrenceInputs& in) {
  auto node = make_node<LSTMRecurrenceBackward>();
  node->set_next_edges(edges_to(in));
  RecurrenceTrainingOutputs out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = ops::lstm_recurrence_forward::call(in);
  }
  const RecurrenceKept& kept = out.kept;
  node->keep(in, {kept.gates, kept.c_before, kept.h_before, kept.normalized, kept.scale, kept.r,
                  kept.projected});
  torch::autograd::set_history(out.output, node);
  torch::autograd::set_history(out.hy, node);
  torch::autograd::set_history(out.cy, node);
  return out;
}

LayerOutputs recurrence(const RecurrenceInputs& in) {
  const bool forward_ad = has_forward_grad(in);
  if (!forward_ad && !requires_grad(in)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ops::lstm_recurrence::call(in);
  }
  if (forward_ad || masks_require_grad(in) || !fusable(in)) return composite::recurrence(in);
  RecurrenceTrainingOutputs out = forward_with_graph(in);
  return {std::move(out.output), std::move(out.hy), std::move(out.cy)};
}

RecurrenceTrainingOutputs forward(const RecurrenceInputs& in) {
  const bool forward_ad = has_forward_grad(in);
  if (!forward_ad && !requires_grad(in)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ops::lstm_recurrence_forward::call(in);
  }
  if (forward_ad || masks_require_grad(in) || !fusable(in))
    return composite::recurrence_forward(in);
  return forward_with_graph(in);
}

RecurrenceGradients backward(const LayerOutputGradients& grads, const RecurrenceInputs& in,
                             const RecurrenceResults& results, const RecurrenceWanted& wanted) {
  if (requires_grad(in, grads) || has_forward_grad(in, grads))
    return composite::recurrence_backward(grads, in, results, wanted);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::lstm_recurrence_backward::call(grads, in, results, wanted);
}

}  // namespace recurrence_autograd

TORCH_LIBRARY_IMPL(lstm_ext, Autograd, m) {
  ops::lstm_recurrence::implement<recurrence_autograd::recurrence>(m);
  ops::lstm_recurrence_forward::implement<recurrence_autograd::forward>(m);
  ops::lstm_recurrence_backward::implement<recurrence_autograd::backward>(m);
}

}  // namespace lstm_ext
