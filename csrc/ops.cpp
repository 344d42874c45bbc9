// Operator schemas, the check at the door, and the way out for what is not fusable.
#include "ops.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/lstm_cell.h>
#include <torch/library.h>

#include "path_log.h"

namespace lstm_ext {

bool fused_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

bool alike(const at::Tensor& tensor, const at::Tensor& other) {
  return tensor.scalar_type() == other.scalar_type() && tensor.device() == other.device() &&
         tensor.layout() == at::kStrided;
}

bool bias_fits(const std::optional<at::Tensor>& bias, const c10::SymInt& size) {
  return !defined(bias) || (bias->dim() == 1 && bias->sym_size(0) == size);
}

bool sizes_fit(const CellInputs& in) {
  for (const at::Tensor* t : {&in.input, &in.hx, &in.cx, &in.w_ih, &in.w_hh})
    if (t->dim() != 2) return false;
  const c10::SymInt N = in.input.sym_size(0), I = in.input.sym_size(1), H = in.w_hh.sym_size(1);
  const c10::SymInt gates = H * 4;
  return in.hx.sym_size(0) == N && in.hx.sym_size(1) == H && in.cx.sym_size(0) == N &&
         in.cx.sym_size(1) == H && in.w_ih.sym_size(0) == gates && in.w_ih.sym_size(1) == I &&
         in.w_hh.sym_size(0) == gates && bias_fits(in.b_ih, gates) && bias_fits(in.b_hh, gates);
}

bool all_alike(const CellInputs& in) {
  if (!fused_dtype(in.input.scalar_type())) return false;
  for (const at::Tensor* t : {&in.input, &in.hx, &in.cx, &in.w_ih, &in.w_hh})
    if (!alike(*t, in.input)) return false;
  for (const auto* bias : {&in.b_ih, &in.b_hh})
    if (defined(*bias) && !alike(**bias, in.input)) return false;
  return true;
}

bool fusable(const CellInputs& in) { return all_alike(in) && sizes_fit(in); }

namespace {

// Bytes from a tensor's first number to its last.
size_t extent(const at::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor.nbytes()
                                : at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(),
                                                                   tensor.element_size());
}

}  // namespace

MemoryRange memory_of(const at::Tensor& tensor) {
  const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
  return {begin, begin + extent(tensor)};
}

void check_allocated(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.numel() == 0) return;
  const size_t end = tensor.storage_offset() * tensor.element_size() + extent(tensor);
  TORCH_CHECK(tensor.storage().nbytes() >= end,
              "The tensor has a non-zero number of elements, but its data is not allocated: shape ",
              tensor.sizes(), " in a storage of ", tensor.storage().nbytes(), " bytes");
}

void check_backward_sizes(const std::optional<at::Tensor>& grad_hy,
                          const std::optional<at::Tensor>& grad_cy, const at::Tensor& hx,
                          const at::Tensor& gates) {
  TORCH_CHECK(gates.dim() == 2 && gates.sym_size(0) == hx.sym_size(0) &&
                  gates.sym_size(1) == hx.sym_size(1) * 4,
              "lstm_cell_backward: gates must be the third result of lstm_cell_forward");
  for (const auto* grad : {&grad_hy, &grad_cy})
    TORCH_CHECK(!defined(*grad) || (*grad)->sym_sizes() == hx.sym_sizes(),
                "lstm_cell_backward: a gradient must have the state's shape ", hx.sym_sizes());
}

void check_cell_backward(const std::optional<at::Tensor>& grad_hy,
                         const std::optional<at::Tensor>& grad_cy, const at::Tensor& hx,
                         const at::Tensor& gates) {
  check_backward_sizes(grad_hy, grad_cy, hx, gates);
  TORCH_CHECK(alike(gates, hx),
              "lstm_cell_backward: gates must be the third result of lstm_cell_forward");
  for (const auto* grad : {&grad_hy, &grad_cy})
    TORCH_CHECK(!defined(*grad) || alike(**grad, hx),
                "lstm_cell_backward: a gradient must be strided, of the state's dtype ",
                hx.scalar_type(), " and device ", hx.device());
}

void check_one_device(const CellInputs& in) {
  const auto check = [&](const at::Tensor& tensor) {
    TORCH_CHECK(!tensor.defined() || !in.hx.defined() || tensor.device() == in.hx.device(),
                "Expected all tensors to be on the same device, but found at least two devices, ",
                in.hx.device(), " and ", tensor.device(), "!");
  };
  for (const at::Tensor* tensor : {&in.input, &in.cx, &in.w_ih, &in.w_hh}) check(*tensor);
  for (const auto* bias : {&in.b_ih, &in.b_hh})
    if (defined(*bias)) check(**bias);
}

CellOutputs torch_lstm_cell(const CellInputs& in) {
  // Where torch would speak of a dimension out of range.
  TORCH_CHECK_INDEX(in.input.dim() > 1, "input must be 2-D (batch, input_size), got ",
                    in.input.dim(), "-D");
  TORCH_CHECK_INDEX(in.w_ih.dim() > 1, "weight_ih must be 2-D (4 * hidden_size, input_size), got ",
                    in.w_ih.dim(), "-D");
  TORCH_CHECK_INDEX(in.w_hh.dim() > 1, "weight_hh must be 2-D (4 * hidden_size, hidden_size), got ",
                    in.w_hh.dim(), "-D");
  // Where torch's own checks pass, but its cell (2.13) would read beyond its four gates.
  const auto passes = [&](const at::Tensor& tensor, const at::Tensor& weight) {
    return tensor.dim() > 1 && tensor.sym_size(1) == weight.sym_size(1);
  };
  const auto refuse = [](bool passed, const at::Tensor& tensor, const char* name) {
    TORCH_CHECK(!passed || tensor.dim() <= 2, name, " must be 2-D, got ", tensor.dim(), "-D");
  };
  refuse(passes(in.input, in.w_ih), in.input, "input");
  refuse(passes(in.input, in.w_ih), in.w_ih, "weight_ih");
  refuse(passes(in.hx, in.w_hh), in.hx, "hidden0");
  refuse(passes(in.hx, in.w_hh), in.w_hh, "weight_hh");
  refuse(passes(in.cx, in.w_hh), in.cx, "hidden1");
  if (verbose())
    log_path("lstm_cell", in.input, in.hx,
             "torch's own cell, for what the kernels do not take: a dtype, layout, size or device");
  CellOutputs out = at::lstm_cell(in.input, {in.hx, in.cx}, in.w_ih, in.w_hh, in.b_ih, in.b_hh);
  check_one_device(in);  // torch's own error first, where it has one
  return out;
}

CellOutputs call_lstm_cell(const CellInputs& in) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("lstm_ext::lstm_cell", "")
          .typed<CellOutputs(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                             const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                             const std::optional<at::Tensor>&)>();
  return op.call(in.input, in.hx, in.cx, in.w_ih, in.w_hh, in.b_ih, in.b_hh);
}

CellTrainingOutputs call_lstm_cell_forward(const CellInputs& in) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("lstm_ext::lstm_cell_forward", "")
          .typed<CellTrainingOutputs(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                     const at::Tensor&, const at::Tensor&,
                                     const std::optional<at::Tensor>&,
                                     const std::optional<at::Tensor>&)>();
  return op.call(in.input, in.hx, in.cx, in.w_ih, in.w_hh, in.b_ih, in.b_hh);
}

CellGradients call_lstm_cell_backward(const std::optional<at::Tensor>& grad_hy,
                                      const std::optional<at::Tensor>& grad_cy,
                                      const CellInputs& in, const at::Tensor& gates,
                                      CellGradientMask mask) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("lstm_ext::lstm_cell_backward", "")
          .typed<CellGradients(const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                               const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               const at::Tensor&, const at::Tensor&,
                               const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                               const at::Tensor&, CellGradientMask)>();
  return op.call(grad_hy, grad_cy, in.input, in.hx, in.cx, in.w_ih, in.w_hh, in.b_ih, in.b_hh,
                 gates, mask);
}

CellStateGradients call_lstm_cell_backward_accumulate(const std::optional<at::Tensor>& grad_hy,
                                                      const std::optional<at::Tensor>& grad_cy,
                                                      const CellInputs& in, const at::Tensor& gates,
                                                      const CellParameterGradients& parameters,
                                                      CellStateGradientMask mask) {
  using Optional = const std::optional<at::Tensor>&;
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("lstm_ext::lstm_cell_backward_accumulate", "")
          .typed<CellStateGradients(Optional, Optional, const at::Tensor&, const at::Tensor&,
                                    const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                    Optional, Optional, const at::Tensor&, Optional, Optional,
                                    Optional, Optional, CellStateGradientMask)>();
  return op.call(grad_hy, grad_cy, in.input, in.hx, in.cx, in.w_ih, in.w_hh, in.b_ih, in.b_hh,
                 gates, parameters[0], parameters[1], parameters[2], parameters[3], mask);
}

TORCH_LIBRARY(lstm_ext, m) {
  // Tells PyTorch's error messages which import brings the fake kernels.
  m.set_python_module("lstm_ext._ops");
  // The cell: h', c'.
  m.def(
      "lstm_cell(Tensor input, Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, "
      "Tensor? b_ih=None, Tensor? b_hh=None) -> (Tensor, Tensor)");
  // The cell and what its backward needs: h', c', the activated gates.
  m.def(
      "lstm_cell_forward(Tensor input, Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, "
      "Tensor? b_ih=None, Tensor? b_hh=None) -> (Tensor, Tensor, Tensor)");
  // Gradients of the seven inputs; those that output_mask leaves out are not computed (None).
  // The biases are here for the second derivative, which needs the gates as a function of them.
  m.def(
      "lstm_cell_backward(Tensor? grad_hy, Tensor? grad_cy, Tensor input, Tensor hx, Tensor cx, "
      "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor gates, bool[7] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The same, with the parameters' gradients added into tensors that exist, None for not wanted:
  // what .backward() does with .grad, in the same pass. Returns the gradients of input, hx and cx.
  m.def(
      "lstm_cell_backward_accumulate(Tensor? grad_hy, Tensor? grad_cy, Tensor input, Tensor hx, "
      "Tensor cx, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor gates, "
      "Tensor(a!)? grad_w_ih, Tensor(b!)? grad_w_hh, Tensor(c!)? grad_b_ih, "
      "Tensor(d!)? grad_b_hh, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
}

}  // namespace lstm_ext
