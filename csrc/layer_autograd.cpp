// Differentiation of the layer's operators; see autograd.cpp for why the node is our own.
#include <ATen/ops/clone.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <mutex>

#include "layer_ops.h"
#include "node_compat.h"
#include "recorded_node.h"

namespace lstm_ext {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Optional = const std::optional<Tensor>&;

// Keeps the inputs, batch_sizes and reset, the output, the gates and the c before each step: 5 S H
// numbers beyond inputs and outputs.
struct LSTMLayerBackward : public RecordedNode<LSTMLayerBackward, kCellInputs + 5> {
  std::string name() const override { return "LSTMLayerBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return gradients(grads, unpack(), wanted(), reverse);
  }

  static variable_list gradients(const variable_list& grads, const Kept& kept,
                                 CellGradientMask mask, bool reverse) {
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined())
      return variable_list(kCellInputs);
    return as_list(
        call_lstm_layer_backward({or_none(grads[0]), or_none(grads[1]), or_none(grads[2])},
                                 {*kept[0], *kept[1], *kept[2], *kept[3], *kept[4], kept[5],
                                  kept[6], kept[7], kept[8], reverse},
                                 {*kept[9], *kept[10], *kept[11]}, mask));
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
  const Tensor b_ih = in.b_ih.value_or(Tensor()), b_hh = in.b_hh.value_or(Tensor());
  node->set_next_edges(
      torch::autograd::collect_next_edges(in.input, in.hx, in.cx, in.w_ih, in.w_hh, b_ih, b_hh));
  LayerTrainingOutputs out;
  Tensor kept_output;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = call_lstm_layer_forward(in);
    kept_output = is_kept_as_it_is(in) ? std::get<0>(out) : std::get<0>(out).clone();
  }
  auto& [output, hy, cy, gates, c_before] = out;
  // Detached: the node shall not own itself. A change in place is noticed all the same.
  if (kept_output.is_same(output)) kept_output = output.detach();
  node->saved = {SavedVariable(in.input, false),
                 SavedVariable(in.hx, false),
                 SavedVariable(in.cx, false),
                 SavedVariable(in.w_ih, false),
                 SavedVariable(in.w_hh, false),
                 SavedVariable(b_ih, false),
                 SavedVariable(b_hh, false),
                 SavedVariable(in.batch_sizes.value_or(Tensor()), false),
                 SavedVariable(in.reset.value_or(Tensor()), false),
                 SavedVariable(kept_output, false),
                 SavedVariable(gates, false),
                 SavedVariable(c_before, false)};
  node->biases = {b_ih, b_hh};
  node->reverse = in.reverse;
  torch::autograd::set_history(output, node);
  torch::autograd::set_history(hy, node);
  torch::autograd::set_history(cy, node);
  return out;
}

LayerOutputs lstm_layer(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& w_ih,
                        const Tensor& w_hh, Optional b_ih, Optional b_hh, Optional batch_sizes,
                        Optional reset, bool reverse) {
  const LayerInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse};
  const bool forward_ad = has_forward_grad(in);
  if (!forward_ad && !requires_grad(in)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_lstm_layer(in);
  }
  // What the kernels do not take is differentiated operation by operation.
  auto [output, hy, cy, gates, c_before] =
      forward_ad || !layer_fusable(in) ? composite::layer_forward(in) : forward_with_graph(in);
  return {std::move(output), std::move(hy), std::move(cy)};
}

LayerTrainingOutputs lstm_layer_forward(const Tensor& input, const Tensor& hx, const Tensor& cx,
                                        const Tensor& w_ih, const Tensor& w_hh, Optional b_ih,
                                        Optional b_hh, Optional batch_sizes, Optional reset,
                                        bool reverse) {
  const LayerInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse};
  if (has_forward_grad(in)) return composite::layer_forward(in);
  if (requires_grad(in))
    return layer_fusable(in) ? forward_with_graph(in) : composite::layer_forward(in);
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_lstm_layer_forward(in);
}

CellGradients lstm_layer_backward(Optional grad_output, Optional grad_hy, Optional grad_cy,
                                  const Tensor& input, const Tensor& hx, const Tensor& cx,
                                  const Tensor& w_ih, const Tensor& w_hh, Optional b_ih,
                                  Optional b_hh, Optional batch_sizes, Optional reset, bool reverse,
                                  const Tensor& output, const Tensor& gates, const Tensor& c_before,
                                  CellGradientMask mask) {
  using torch::autograd::isFwGradDefined;
  const LayerInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse};
  const LayerOutputGradients grads = {grad_output, grad_hy, grad_cy};
  const bool differentiable =
      requires_grad(in) || torch::autograd::compute_requires_grad(grad_output, grad_hy, grad_cy) ||
      has_forward_grad(in) || isFwGradDefined(grad_output) || isFwGradDefined(grad_hy) ||
      isFwGradDefined(grad_cy);
  const LayerResults results = {output, gates, c_before};
  if (differentiable) return composite::layer_backward(grads, in, results, mask);
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_lstm_layer_backward(grads, in, results, mask);
}

Tensor lstm_layer_pack(const Tensor& w_ih, const Tensor& w_hh) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_lstm_layer_pack(w_ih, w_hh);
}

LayerOutputs lstm_layer_packed(const Tensor& input, const Tensor& hx, const Tensor& cx,
                               const Tensor& packed, Optional b_ih, Optional b_hh,
                               Optional batch_sizes, Optional reset, bool reverse) {
  using torch::autograd::isFwGradDefined;
  TORCH_CHECK(!torch::autograd::compute_requires_grad(input, hx, cx, b_ih, b_hh) &&
                  !isFwGradDefined(input) && !isFwGradDefined(hx) && !isFwGradDefined(cx),
              "packed (frozen) weights are for inference: nothing can be differentiated through "
              "them. Use torch.no_grad(), or the module that was frozen (lstm_ext.unfreeze)");
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_lstm_layer_packed(input, hx, cx, packed, {b_ih, b_hh, batch_sizes, reset, reverse});
}

}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, Autograd, m) {
  m.impl("lstm_layer_pack", lstm_layer_pack);
  m.impl("lstm_layer_packed", lstm_layer_packed);
  m.impl("lstm_layer", lstm_layer);
  m.impl("lstm_layer_forward", lstm_layer_forward);
  m.impl("lstm_layer_backward", lstm_layer_backward);
}

}  // namespace lstm_ext
