// What the operators check, and where the cell goes that is not fusable.
#include "ops/cell.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/lstm_cell.h>
#include <torch/library.h>

#include "core/cells.h"
#include "core/path_log.h"
#include "ops/composite.h"

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

bool variant_fits(const CellInputs& in, const c10::SymInt& H) {
  if (!is_cell(in.variant)) return false;
  const int wanted = unit_weights_of(in.variant);
  if (wanted == 0) return !defined(in.unit_weights);
  return defined(in.unit_weights) && in.unit_weights->dim() == 2 &&
         in.unit_weights->sym_size(0) == wanted && in.unit_weights->sym_size(1) == H;
}

void check_variant(const CellInputs& in, const c10::SymInt& H) {
  TORCH_CHECK(is_cell(in.variant), "there is no cell of variant ", in.variant);
  const int wanted = unit_weights_of(in.variant);
  TORCH_CHECK(wanted > 0 || !defined(in.unit_weights), "a cell of variant ", in.variant,
              " has no unit_weights");
  TORCH_CHECK(variant_fits(in, H), "a cell of variant ", in.variant, " has unit_weights of shape (",
              wanted, ", ", H, "), got ",
              defined(in.unit_weights) ? c10::str(in.unit_weights->sym_sizes()) : "none");
}

bool sizes_fit(const CellInputs& in, bool projected) {
  for (const at::Tensor* t : {&in.input, &in.hx, &in.cx, &in.w_ih, &in.w_hh})
    if (t->dim() != 2) return false;
  const c10::SymInt N = in.input.sym_size(0), I = in.input.sym_size(1), P = in.w_hh.sym_size(1);
  const c10::SymInt H = projected ? in.cx.sym_size(1) : P;
  const c10::SymInt gates = H * 4;
  return in.hx.sym_size(0) == N && in.hx.sym_size(1) == P && in.cx.sym_size(0) == N &&
         in.cx.sym_size(1) == H && in.w_ih.sym_size(0) == gates && in.w_ih.sym_size(1) == I &&
         in.w_hh.sym_size(0) == gates && bias_fits(in.b_ih, gates) && bias_fits(in.b_hh, gates) &&
         variant_fits(in, H);
}

bool all_alike(const CellInputs& in) {
  return fused_dtype(in.input.scalar_type()) &&
         !any_tensor([&](const at::Tensor& tensor) { return !alike(tensor, in.input); }, in);
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

void check_backward_sizes(const CellOutputGradients& grads, const at::Tensor& hx,
                          const CellResults& results) {
  const at::Tensor& gates = results.gates;
  TORCH_CHECK(gates.dim() == 2 && gates.sym_size(0) == hx.sym_size(0) &&
                  gates.sym_size(1) == hx.sym_size(1) * 4,
              "lstm_cell_backward: gates must be the third result of lstm_cell_forward");
  for_each_tensor(
      [&](const at::Tensor& grad) {
        TORCH_CHECK(grad.sym_sizes() == hx.sym_sizes(),
                    "lstm_cell_backward: a gradient must have the state's shape ", hx.sym_sizes());
      },
      grads);
}

void check_backward(const CellOutputGradients& grads, const at::Tensor& hx,
                    const CellResults& results) {
  check_backward_sizes(grads, hx, results);
  TORCH_CHECK(alike(results.gates, hx),
              "lstm_cell_backward: gates must be the third result of lstm_cell_forward");
  for_each_tensor(
      [&](const at::Tensor& grad) {
        TORCH_CHECK(alike(grad, hx),
                    "lstm_cell_backward: a gradient must be strided, of the state's dtype ",
                    hx.scalar_type(), " and device ", hx.device());
      },
      grads);
}

void check_one_device(const CellInputs& in) {
  if (!in.hx.defined()) return;
  for_each_tensor(
      [&](const at::Tensor& tensor) {
        TORCH_CHECK(!tensor.defined() || tensor.device() == in.hx.device(),
                    "Expected all tensors to be on the same device, but found at least two "
                    "devices, ",
                    in.hx.device(), " and ", tensor.device(), "!");
      },
      in);
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

CellOutputs unfused_lstm_cell(const CellInputs& in) {
  if (in.variant == kPlainCell && !defined(in.unit_weights)) return torch_lstm_cell(in);
  auto [hy, cy, gates] = composite::cell_forward(in);
  return {std::move(hy), std::move(cy)};
}

TORCH_LIBRARY(lstm_ext, m) {
  // Tells PyTorch's error messages which import brings the fake kernels.
  m.set_python_module("lstm_ext._ops");
  define<ops::lstm_cell, ops::lstm_cell_forward, ops::lstm_cell_backward,
         ops::lstm_cell_backward_accumulate>(m);
}

}  // namespace lstm_ext
