// The cells of cell_math.h in plain tensor operations: for every device, differentiable any number
// of times. (lstm_ext/reference.py explains the formulas.)
#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/unbind.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <vector>

#include "core/cells.h"
#include "core/path_log.h"
#include "ops/cell.h"
#include "ops/composite.h"
#include "ops/tensor_cell.h"

namespace lstm_ext {
namespace composite {
namespace {

// Python's None comes as an undefined tensor, where the schema has a Tensor.
void check_given(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.defined(), "Expected a proper Tensor but got None for argument ", name);
}

// All there, all on meta or none, and no size that operations would broadcast or find too late.
void check_inputs(const CellInputs& in, bool projected) {
  check_given(in.input, "input");
  check_given(in.hx, "hx");
  check_given(in.cx, "cx");
  check_given(in.w_ih, "w_ih");
  check_given(in.w_hh, "w_hh");
  check_one_device(in);
  const at::Tensor& of_size_H = projected ? in.cx : in.w_hh;
  check_variant(in, of_size_H.dim() == 2 ? of_size_H.sym_size(1) : c10::SymInt(0));
  TORCH_CHECK(sizes_fit(in, projected),
              "expected an input (N, I), states (N, H), weights (4H, I) and (4H, H), and biases "
              "(4H) or None; got an input of shape ",
              in.input.sym_sizes(), ", states of ", in.hx.sym_sizes(), " and ", in.cx.sym_sizes(),
              ", weights of ", in.w_ih.sym_sizes(), " and ", in.w_hh.sym_sizes(),
              defined(in.b_ih) || defined(in.b_hh) ? ", with biases" : ", without biases");
  // Other operations than products would take it for a number of a wider type.
  TORCH_CHECK(!defined(in.unit_weights) || in.unit_weights->scalar_type() == in.w_hh.scalar_type(),
              "unit_weights must have the dtype of w_hh, ", in.w_hh.scalar_type());
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

// Of each of the weights of the units: [H].
std::vector<at::Tensor> rows_of(const std::optional<at::Tensor>& unit_weights) {
  return defined(unit_weights) ? unit_weights->unbind(0) : std::vector<at::Tensor>();
}

struct Activated {
  TensorGates gates;
  at::Tensor cy, hy;
};

Activated activate(const CellInputs& in, bool projected) {
  check_inputs(in, projected);
  const TensorGates pre =
      quarters(at::linear(in.input, in.w_ih, in.b_ih) + at::linear(in.hx, in.w_hh, in.b_hh));
  const auto weights = rows_of(in.unit_weights);
  Activated out;
  with_cell(in.variant, [&](auto cell) {
    out.gates =
        decltype(cell)::template forward<TensorMath>(pre, in.cx, weights.data(), out.cy, out.hy);
  });
  return out;
}

}  // namespace

at::Tensor cell_gates(const CellInputs& in) { return join(activate(in, false).gates); }

CellTrainingOutputs cell_forward(const CellInputs& in) {
  if (verbose()) log_path("lstm_cell", in.input, in.hx, "plain tensor operations");
  Activated out = activate(in, false);
  return {std::move(out.hy), std::move(out.cy), join(out.gates)};
}

CellTrainingOutputs projected_cell_forward(const CellInputs& in) {
  Activated out = activate(in, true);
  return {std::move(out.hy), std::move(out.cy), join(out.gates)};
}

at::Tensor unit_gradients(int64_t variant, const at::Tensor& gates, const at::Tensor& cx,
                          const at::Tensor& grad_gates) {
  TORCH_CHECK(unit_weights_of(variant) > 0, "a cell of variant ", variant, " has no unit_weights");
  // As kernels sum: the halves in float32.
  const at::ScalarType compute =
      at::isReducedFloatingType(cx.scalar_type()) ? at::kFloat : cx.scalar_type();
  const at::Tensor c = cx.to(compute);
  std::vector<at::Tensor> sums(unit_weights_of(variant), at::zeros_like(c));
  with_cell(variant, [&](auto cell) {
    decltype(cell)::add_unit_gradients(quarters(gates.to(compute)), c,
                                       quarters(grad_gates.to(compute)), sums.data());
  });
  return at::stack(sums).sum(1).to(cx.scalar_type());
}

namespace {

Gradients backward(const CellOutputGradients& grads, const CellInputs& in,
                   const CellResults& results, const Wanted& wanted, bool projected) {
  check_inputs(in, projected);
  check_given(results.gates, "gates");
  check_backward_sizes(grads, in.cx, results);
  const TensorGates gates = quarters(results.gates);
  const at::Tensor grad_hy = defined(grads.hy) ? *grads.hy : at::zeros_like(in.cx);
  // To add -0 changes nothing, the sign of a zero neither.
  const at::Tensor grad_cy = defined(grads.cy) ? *grads.cy : at::zeros_like(in.cx).neg();
  const auto weights = rows_of(in.unit_weights);
  at::Tensor grad_cx, grad_gates;
  with_cell(in.variant, [&](auto cell) {
    using Cell = decltype(cell);
    const TensorGates found = Cell::template backward<TensorMath>(gates, in.cx, weights.data(),
                                                                  grad_hy, grad_cy, grad_cx);
    grad_gates = join(found);
  });
  Gradients to;
  if (wanted.input) to.input = grad_gates.mm(in.w_ih);
  if (wanted.hx) to.hx = grad_gates.mm(in.w_hh);
  if (wanted.cx) to.cx = grad_cx;
  if (wanted.w_ih) to.w_ih = grad_gates.t().mm(in.input);
  if (wanted.w_hh) to.w_hh = grad_gates.t().mm(in.hx);
  if (wanted.b_ih) to.b_ih = grad_gates.sum(0);
  if (wanted.b_hh) to.b_hh = grad_gates.sum(0);
  if (wanted.unit_weights)
    to.unit_weights = unit_gradients(in.variant, results.gates, in.cx, grad_gates);
  return to;
}

}  // namespace

Gradients cell_backward(const CellOutputGradients& grads, const CellInputs& in,
                        const CellResults& results, const Wanted& wanted) {
  return backward(grads, in, results, wanted, false);
}

Gradients projected_cell_backward(const CellOutputGradients& grads, const CellInputs& in,
                                  const CellResults& results, const Wanted& wanted) {
  return backward(grads, in, results, wanted, true);
}

}  // namespace composite

// Every backend that has no kernel of its own.
TORCH_LIBRARY_IMPL(lstm_ext, CompositeExplicitAutograd, m) {
  ops::lstm_cell::implement<unfused_lstm_cell>(m);
  ops::lstm_cell_forward::implement<composite::cell_forward>(m);
  ops::lstm_cell_backward::implement<composite::cell_backward>(m);
}

}  // namespace lstm_ext
