// What autograd asks of the seven tensors that a cell and a layer have in common.
#pragma once

#include <torch/csrc/autograd/functions/utils.h>

#include <optional>
#include <utility>

#include "ops.h"

namespace lstm_ext {

inline std::optional<at::Tensor> or_none(at::Tensor tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(std::move(tensor)) : std::nullopt;
}

inline torch::autograd::variable_list as_list(CellGradients&& gradients) {
  return std::apply(
      [](auto&&... gradient) { return torch::autograd::variable_list{std::move(gradient)...}; },
      std::move(gradients));
}

template <class Inputs>  // CellInputs or LayerInputs
bool has_forward_grad(const Inputs& in) {
  using torch::autograd::isFwGradDefined;
  return isFwGradDefined(in.input) || isFwGradDefined(in.hx) || isFwGradDefined(in.cx) ||
         isFwGradDefined(in.w_ih) || isFwGradDefined(in.w_hh) || isFwGradDefined(in.b_ih) ||
         isFwGradDefined(in.b_hh);
}

template <class Inputs>
bool requires_grad(const Inputs& in) {
  return torch::autograd::compute_requires_grad(in.input, in.hx, in.cx, in.w_ih, in.w_hh, in.b_ih,
                                                in.b_hh);
}

}  // namespace lstm_ext
