// What autograd asks of the tensors that an operator takes.
#pragma once

#include <torch/csrc/autograd/functions/utils.h>

#include <optional>
#include <utility>

#include "ops/cell.h"

namespace lstm_ext {

inline std::optional<at::Tensor> or_none(at::Tensor tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(std::move(tensor)) : std::nullopt;
}

template <class AnyGradients>
torch::autograd::variable_list as_list(AnyGradients&& gradients) {
  return std::apply(
      [](auto&&... gradient) { return torch::autograd::variable_list{std::move(gradient)...}; },
      gradients.results());
}

template <class... Parts>
bool has_forward_grad(const Parts&... parts) {
  return any_tensor([](const at::Tensor& t) { return torch::autograd::isFwGradDefined(t); },
                    parts...);
}

template <class... Parts>
bool requires_grad(const Parts&... parts) {
  return at::GradMode::is_enabled() &&
         any_tensor([](const at::Tensor& t) { return t.defined() && t.requires_grad(); }, parts...);
}

// Edges to the tensors of the inputs, in their order: what a node of ours has gradients of.
template <class Inputs>
torch::autograd::edge_list edges_to(const Inputs& in) {
  return std::apply(
      [](const auto&... field) {
        return torch::autograd::collect_next_edges(or_undefined(field)...);
      },
      in.tensors());
}

}  // namespace lstm_ext
