// Differentiation of the operators. A node of our own rather than torch::autograd::Function:
// the latter is refused under every torch.func transform and costs more per call
// (docs/architecture.md has the figures).
#include "ops/cell.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <mutex>
#include <typeinfo>

#include "autograd/node_compat.h"
#include "autograd/recorded_node.h"
#include "ops/composite.h"

namespace lstm_ext {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// The mutex of another node, by which AccumulateGrad too guards the .grad that it writes.
struct NodeMutex : public torch::autograd::Node {
  static std::mutex& of(torch::autograd::Node& node) { return node.*(&NodeMutex::mutex_); }
};

bool plain_cpu_tensor(const Tensor& tensor) {
  const auto backend = tensor.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView -
                       c10::autocast_dispatch_keyset;
  return backend == c10::DispatchKeySet(c10::DispatchKey::CPU);
}

// The .grad tensors of the four parameters, where .backward() would add to them and do nothing
// else: all exist, no hook wants to see the gradient first, none is asked for by name, no graph of
// the backward is recorded, and anomaly mode does not look for NaN in what a node returns. Not in
// bfloat16 and float16: there autograd adds the steps up before it adds them to .grad, in which
// the term of one step can be too small to count.
class ExistingGradients {
 public:
  // edges: those of w_ih, w_hh, b_ih and b_hh.
  ExistingGradients(const torch::autograd::Edge* edges, const bool* wanted) {
    if (at::GradMode::is_enabled() || torch::autograd::AnomalyMode::is_enabled()) return;
    const auto* asked_by_name = torch::autograd::get_current_graph_task_exec_info();
    if (asked_by_name == nullptr || !asked_by_name->empty()) return;
    for (int k = 0; k < kCellParameters; ++k) {
      if (!wanted[k]) continue;
      any_ = true;
      torch::autograd::Node* node = edges[k].function.get();
      if (typeid(*node) != typeid(torch::autograd::AccumulateGrad)) return;
      auto* accumulate = static_cast<torch::autograd::AccumulateGrad*>(node);
      if (!accumulate->pre_hooks().empty() || !accumulate->post_hooks().empty() ||
          !accumulate->tensor_pre_hooks().empty() || accumulate->tensor_post_acc_grad_hooks())
        return;
      const Tensor& variable = accumulate->variable;
      const Tensor& grad = variable.grad();
      if (!grad.defined() || !grad.is_contiguous() || grad.requires_grad() ||
          grad.scalar_type() != variable.scalar_type() ||
          at::isReducedFloatingType(grad.scalar_type()) || grad.sizes() != variable.sizes() ||
          !plain_cpu_tensor(grad))
        return;
      // One parameter in two places, or two with one .grad, would be written twice at a time.
      for (int other = 0; other < k; ++other)
        if (defined(tensors_[other]) &&
            (nodes_[other] == node || memory_of(*tensors_[other]).overlaps(memory_of(grad))))
          return;
      tensors_[k] = grad;
      nodes_[k] = node;
    }
    usable_ = any_;
  }

  bool usable() const { return usable_; }

  // No kernel may read what another writes: not usable with a tensor in the same memory.
  void keep_apart_from(const Tensor& read) {
    if (!usable_ || !read.defined() || !read.has_storage()) return;
    const MemoryRange memory = memory_of(read);
    for (const auto& tensor : tensors_)
      if (defined(tensor) && memory.overlaps(memory_of(*tensor))) usable_ = false;
  }
  ParameterGradients tensors() const {
    return {tensors_[0], tensors_[1], tensors_[2], tensors_[3]};
  }

  // Runs write() while no other thread writes these .grad tensors, and marks them as changed.
  template <class Write>
  void update(const Write& write) {
    std::array<std::unique_lock<std::mutex>, kCellParameters> locks;
    for (int k = 0; k < kCellParameters; ++k)
      locks[k] = nodes_[k] ? std::unique_lock(NodeMutex::of(*nodes_[k]), std::defer_lock)
                           : std::unique_lock(unused_[k], std::defer_lock);
    std::lock(locks[0], locks[1], locks[2], locks[3]);
    write();
    for (const auto& tensor : tensors_)
      if (defined(tensor)) tensor->unsafeGetTensorImpl()->bump_version();
  }

 private:
  std::array<std::optional<Tensor>, kCellParameters> tensors_;
  std::array<torch::autograd::Node*, kCellParameters> nodes_ = {};
  std::array<std::mutex, kCellParameters> unused_;
  bool any_ = false, usable_ = false;
};

// Whether torch.compile or its like records the backward, and the gradients of the weights are
// large: made by one operator a step, all of a loop's would be alive until their sum. As products
// of their own, a compiler lets each add to the one before.
bool products_apart(const CellInputs& in) {
  constexpr int64_t large = int64_t{1} << 17;
  // With a graph of the backward, the operator alone has the right one.
  if (at::GradMode::is_enabled() || !c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
  const auto numbers = (in.w_ih.sym_numel() + in.w_hh.sym_numel()).maybe_as_int();
  return numbers.has_value() && *numbers >= large;
}

Gradients backward_with_products_apart(const CellOutputGradients& grads, const CellInputs& in,
                                       const CellResults& results, const Wanted& wanted) {
  Wanted states = wanted, parameters = wanted;
  states.w_ih = states.w_hh = states.b_ih = states.b_hh = false;
  parameters.input = parameters.hx = parameters.cx = false;
  Gradients out = composite::cell_backward(grads, in, results, parameters);
  Gradients of_states = ops::lstm_cell_backward::call(grads, in, results, states);
  out.input = std::move(of_states.input);
  out.hx = std::move(of_states.hx);
  out.cx = std::move(of_states.cx);
  return out;
}

// Keeps the inputs and the activated gates; c' is computed anew, so that it may be changed in
// place after the call, as with torch.nn.LSTMCell.
struct LSTMCellBackward : public RecordedNode<LSTMCellBackward, CellInputs, CellResults> {
  std::string name() const override { return "LSTMCellBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(kCellInputs);
    const Kept kept = unpack();
    const CellInputs in = kept.inputs();
    const Wanted asked = wanted();

    const bool parameters[] = {asked.w_ih, asked.w_hh, asked.b_ih, asked.b_hh};
    ExistingGradients existing(&next_edges()[kFirstParameter], parameters);
    for (const Tensor* read : {&in.input, &in.hx, &in.cx, &in.w_ih, &in.w_hh})
      existing.keep_apart_from(*read);
    for (const Tensor& grad : grads) existing.keep_apart_from(grad);
    if (!existing.usable()) return gradients(grads, kept, asked);
    CellStateGradients state;
    existing.update([&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      state = ops::lstm_cell_backward_accumulate::call({or_none(grads[0]), or_none(grads[1])}, in,
                                                       kept.results(), existing.tensors(),
                                                       {asked.input, asked.hx, asked.cx});
    });
    auto& [d_input, d_hx, d_cx] = state;
    return {std::move(d_input), std::move(d_hx), std::move(d_cx), {}, {}, {}, {}};
  }

  static variable_list gradients(const variable_list& grads, const Kept& kept,
                                 const Wanted& wanted) {
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(kCellInputs);
    const CellInputs in = kept.inputs();
    const std::optional<Tensor> hy = or_none(grads[0]), cy = or_none(grads[1]);
    const auto backward =
        products_apart(in) ? backward_with_products_apart : ops::lstm_cell_backward::call;
    return as_list(backward({hy, cy}, in, kept.results(), wanted));
  }
};

CellTrainingOutputs forward_with_graph(const CellInputs& in) {
  auto node = make_node<LSTMCellBackward>();
  node->set_next_edges(edges_to(in));
  CellTrainingOutputs out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = ops::lstm_cell_forward::call(in);
  }
  auto& [hy, cy, gates] = out;
  node->keep(in, {gates});
  torch::autograd::set_history(hy, node);
  torch::autograd::set_history(cy, node);
  return out;
}

CellOutputs lstm_cell(const CellInputs& in) {
  const bool forward_ad = has_forward_grad(in);
  if (!forward_ad && !requires_grad(in)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ops::lstm_cell::call(in);
  }
  if (!fusable(in)) return torch_lstm_cell(in);
  auto [hy, cy, gates] = forward_ad ? composite::cell_forward(in) : forward_with_graph(in);
  return {std::move(hy), std::move(cy)};
}

CellTrainingOutputs lstm_cell_forward(const CellInputs& in) {
  if (has_forward_grad(in)) return composite::cell_forward(in);
  if (requires_grad(in)) return forward_with_graph(in);
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::lstm_cell_forward::call(in);
}

// Double backward and forward-over-reverse: the backward in plain operations, with the gates
// computed anew from the inputs so that they are differentiable too.
Gradients lstm_cell_backward(const CellOutputGradients& grads, const CellInputs& in,
                             const CellResults& results, const Wanted& wanted) {
  if (requires_grad(in, grads) || has_forward_grad(in, grads)) {
    check_backward_sizes(grads, in.hx, results);
    return composite::cell_backward(grads, in, {composite::cell_gates(in)}, wanted);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::lstm_cell_backward::call(grads, in, results, wanted);
}

}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, Autograd, m) {
  ops::lstm_cell::implement<lstm_cell>(m);
  ops::lstm_cell_forward::implement<lstm_cell_forward>(m);
  ops::lstm_cell_backward::implement<lstm_cell_backward>(m);
}

}  // namespace lstm_ext
