// The cell in plain tensor operations: for every device, differentiable any number of times.
// The formulas are those of cell_math.h (and of lstm_ext/reference.py, which explains them).
#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <vector>

#include "core/path_log.h"
#include "ops/cell.h"
#include "ops/composite.h"

namespace lstm_ext {
namespace composite {
namespace {

// Python's None comes as an undefined tensor, where the schema has a Tensor.
void check_given(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.defined(), "Expected a proper Tensor but got None for argument ", name);
}

// All there, all on meta or none, and no size that operations would broadcast or find too late.
void check_inputs(const CellInputs& in) {
  check_given(in.input, "input");
  check_given(in.hx, "hx");
  check_given(in.cx, "cx");
  check_given(in.w_ih, "w_ih");
  check_given(in.w_hh, "w_hh");
  check_one_device(in);
  TORCH_CHECK(sizes_fit(in),
              "expected an input (N, I), states (N, H), weights (4H, I) and (4H, H), and biases "
              "(4H) or None; got an input of shape ",
              in.input.sym_sizes(), ", states of ", in.hx.sym_sizes(), " and ", in.cx.sym_sizes(),
              ", weights of ", in.w_ih.sym_sizes(), " and ", in.w_hh.sym_sizes(),
              defined(in.b_ih) || defined(in.b_hh) ? ", with biases" : ", without biases");
  // torch's operations would read on beyond a storage that has been made smaller.
  const auto has_memory = [](const at::Tensor& t) {
    return t.layout() == at::kStrided && !at::isTensorSubclassLike(t);
  };
  for_each_tensor(
      [&](const at::Tensor& t) {
        if (has_memory(t)) check_allocated(t);
      },
      in);
}

// Of [N, 4H]: four times [N, H].
std::vector<at::Tensor> quarters(const at::Tensor& gates) { return gates.chunk(4, 1); }

}  // namespace

at::Tensor cell_gates(const CellInputs& in) {
  check_inputs(in);
  const auto quarter =
      quarters(at::linear(in.input, in.w_ih, in.b_ih) + at::linear(in.hx, in.w_hh, in.b_hh));
  return at::cat(
      {quarter[0].sigmoid(), quarter[1].sigmoid(), quarter[2].tanh(), quarter[3].sigmoid()}, 1);
}

CellTrainingOutputs cell_forward(const CellInputs& in) {
  if (verbose()) log_path("lstm_cell", in.input, in.hx, "plain tensor operations");
  at::Tensor gates = cell_gates(in);
  const auto quarter = quarters(gates);
  const at::Tensor &i = quarter[0], &f = quarter[1], &g = quarter[2], &o = quarter[3];
  at::Tensor cy = f * in.cx + i * g;
  at::Tensor hy = o * cy.tanh();
  return {std::move(hy), std::move(cy), std::move(gates)};
}

Gradients cell_backward(const CellOutputGradients& grads, const CellInputs& in,
                        const CellResults& results, const Wanted& wanted) {
  check_inputs(in);
  check_given(results.gates, "gates");
  check_backward_sizes(grads, in.hx, results);
  const auto quarter = quarters(results.gates);
  const at::Tensor &i = quarter[0], &f = quarter[1], &g = quarter[2], &o = quarter[3];
  const at::Tensor tanh_c = (f * in.cx + i * g).tanh();
  const at::Tensor grad_h = defined(grads.hy) ? *grads.hy : at::zeros_like(tanh_c);
  at::Tensor grad_state = grad_h * o * (1 - tanh_c * tanh_c);
  if (defined(grads.cy)) grad_state = grad_state + *grads.cy;
  const at::Tensor grad_gates =
      at::cat({grad_state * g * i * (1 - i), grad_state * in.cx * f * (1 - f),
               grad_state * i * (1 - g * g), grad_h * tanh_c * o * (1 - o)},
              1);
  Gradients to;
  if (wanted.input) to.input = grad_gates.mm(in.w_ih);
  if (wanted.hx) to.hx = grad_gates.mm(in.w_hh);
  if (wanted.cx) to.cx = grad_state * f;
  if (wanted.w_ih) to.w_ih = grad_gates.t().mm(in.input);
  if (wanted.w_hh) to.w_hh = grad_gates.t().mm(in.hx);
  if (wanted.b_ih) to.b_ih = grad_gates.sum(0);
  if (wanted.b_hh) to.b_hh = grad_gates.sum(0);
  return to;
}

}  // namespace composite

// Every backend that has no kernel of its own.
TORCH_LIBRARY_IMPL(lstm_ext, CompositeExplicitAutograd, m) {
  ops::lstm_cell::implement<torch_lstm_cell>(m);
  ops::lstm_cell_forward::implement<composite::cell_forward>(m);
  ops::lstm_cell_backward::implement<composite::cell_backward>(m);
}

}  // namespace lstm_ext
