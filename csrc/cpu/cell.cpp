// The operators on the CPU: tensors in, kernels over raw pointers out.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/cell_kernels.h"
#include "ops.h"

namespace lstm_ext::cpu {
namespace {

using at::Tensor;

// Multiplications and additions, in their thousands, below which a second thread costs more
// than it brings.
constexpr int64_t kForkWork = 64 * 1024;

Dtype kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return Dtype::kFloat;
    case at::kDouble:
      return Dtype::kDouble;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      return Dtype::kHalf;
  }
}

// A tensor that is dense and outlives the call: itself, or its copy.
class Dense {
 public:
  explicit Dense(const Tensor& tensor) : tensor_(tensor.expect_contiguous()) {}
  explicit Dense(const std::optional<Tensor>& tensor) {
    if (defined(tensor)) tensor_ = tensor->expect_contiguous();
  }
  const void* data() const { return tensor_->defined() ? tensor_->const_data_ptr() : nullptr; }

 private:
  c10::MaybeOwned<Tensor> tensor_ = c10::MaybeOwned<Tensor>::owned(Tensor());
};

template <class Kernel>
void run(int64_t tasks, int64_t work, const Kernel& kernel) {
  const int64_t work_per_task = std::max<int64_t>(1, work / std::max<int64_t>(1, tasks));
  const int64_t grain = std::max<int64_t>(1, kForkWork / work_per_task);
  at::parallel_for(0, tasks, grain, kernel);
}

void forward(const CellInputs& in, Tensor& hy, Tensor& cy, Tensor* gates) {
  const int64_t N = in.input.size(0), I = in.input.size(1), H = in.hx.size(1);
  hy = at::empty({N, H}, in.input.options());
  cy = at::empty({N, H}, in.input.options());
  if (gates) *gates = at::empty({N, 4 * H}, in.input.options());
  if (hy.numel() == 0) return;
  const Dense input(in.input), hx(in.hx), cx(in.cx), w_ih(in.w_ih), w_hh(in.w_hh), b_ih(in.b_ih),
      b_hh(in.b_hh);
  const CellForwardArgs args = {N,
                                I,
                                H,
                                input.data(),
                                hx.data(),
                                cx.data(),
                                w_ih.data(),
                                w_hh.data(),
                                b_ih.data(),
                                b_hh.data(),
                                hy.mutable_data_ptr(),
                                cy.mutable_data_ptr(),
                                gates ? gates->mutable_data_ptr() : nullptr};
  const CellKernels& kernels = cell_kernels(kernel_dtype(in.input.scalar_type()));
  run(kernels.forward_tasks(N, H), N * 4 * H * (I + H + 16),
      [&](int64_t first, int64_t last) { kernels.forward(args, first, last); });
}

CellOutputs lstm_cell(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& w_ih,
                      const Tensor& w_hh, const std::optional<Tensor>& b_ih,
                      const std::optional<Tensor>& b_hh) {
  const CellInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh};
  if (!fusable(in)) return torch_lstm_cell(in);
  Tensor hy, cy;
  forward(in, hy, cy, nullptr);
  return {std::move(hy), std::move(cy)};
}

CellTrainingOutputs lstm_cell_forward(const Tensor& input, const Tensor& hx, const Tensor& cx,
                                      const Tensor& w_ih, const Tensor& w_hh,
                                      const std::optional<Tensor>& b_ih,
                                      const std::optional<Tensor>& b_hh) {
  const CellInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh};
  if (!fusable(in)) {
    torch_lstm_cell(in);  // raises torch's error, if torch rejects them
    return composite::cell_forward(in);
  }
  Tensor hy, cy, gates;
  forward(in, hy, cy, &gates);
  return {std::move(hy), std::move(cy), std::move(gates)};
}

// The gradients of the gates' pre-activations and of cx, and the bias sums, in one pass.
Tensor gate_gradients(const std::optional<Tensor>& grad_hy, const std::optional<Tensor>& grad_cy,
                      const Tensor& cx, const Tensor& gates, Tensor* grad_cx, Tensor* grad_b_ih,
                      Tensor* grad_b_hh) {
  const int64_t N = cx.size(0), H = cx.size(1);
  const Dtype dtype = kernel_dtype(cx.scalar_type());
  Tensor grad_gates = at::empty({N, 4 * H}, cx.options());
  const Dense grad_h(grad_hy), grad_c(grad_cy), c(cx), g(gates);
  if (grad_cx) *grad_cx = at::empty({N, H}, cx.options());
  Tensor bias_sums;
  if (grad_b_ih || grad_b_hh)
    bias_sums = at::empty({backward_row_blocks(N), 4 * H},
                          cx.options().dtype(dtype == Dtype::kDouble ? at::kDouble : at::kFloat));
  const CellBackwardArgs args = {N,
                                 H,
                                 grad_h.data(),
                                 grad_c.data(),
                                 c.data(),
                                 g.data(),
                                 grad_gates.mutable_data_ptr(),
                                 grad_cx ? grad_cx->mutable_data_ptr() : nullptr,
                                 bias_sums.defined() ? bias_sums.mutable_data_ptr() : nullptr};
  const CellKernels& kernels = cell_kernels(dtype);
  run(kernels.backward_tasks(N, H), N * H * 64,
      [&](int64_t first, int64_t last) { kernels.backward(args, first, last); });
  if (bias_sums.defined()) {
    if (grad_b_ih) *grad_b_ih = at::empty({4 * H}, cx.options());
    if (grad_b_hh) *grad_b_hh = at::empty({4 * H}, cx.options());
    kernels.reduce_bias(bias_sums.const_data_ptr(), backward_row_blocks(N), H,
                        grad_b_ih ? grad_b_ih->mutable_data_ptr() : nullptr,
                        grad_b_hh ? grad_b_hh->mutable_data_ptr() : nullptr);
  }
  return grad_gates;
}

CellGradients lstm_cell_backward(const std::optional<Tensor>& grad_hy,
                                 const std::optional<Tensor>& grad_cy, const Tensor& input,
                                 const Tensor& hx, const Tensor& cx, const Tensor& w_ih,
                                 const Tensor& w_hh, const std::optional<Tensor>& b_ih,
                                 const std::optional<Tensor>& b_hh, const Tensor& gates,
                                 CellGradientMask mask) {
  const CellInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh};
  if (!fusable(in)) return composite::cell_backward(grad_hy, grad_cy, in, gates, mask);
  TORCH_CHECK(gates.dim() == 2 && gates.size(0) == hx.size(0) && gates.size(1) == 4 * hx.size(1) &&
                  gates.scalar_type() == hx.scalar_type(),
              "lstm_cell_backward: gates must be the third result of lstm_cell_forward");
  for (const auto* grad : {&grad_hy, &grad_cy})
    TORCH_CHECK(!defined(*grad) || ((*grad)->sizes() == hx.sizes() &&
                                    (*grad)->scalar_type() == hx.scalar_type()),
                "lstm_cell_backward: a gradient must have the state's shape ", hx.sizes(),
                " and dtype ", hx.scalar_type());
  const auto [want_input, want_hx, want_cx, want_w_ih, want_w_hh, want_b_ih, want_b_hh] = mask;
  Tensor d_input, d_hx, d_cx, d_w_ih, d_w_hh, d_b_ih, d_b_hh;
  const Tensor grad_gates =
      gate_gradients(grad_hy, grad_cy, cx, gates, want_cx ? &d_cx : nullptr,
                     want_b_ih ? &d_b_ih : nullptr, want_b_hh ? &d_b_hh : nullptr);
  if (want_input) d_input = grad_gates.mm(w_ih);
  if (want_hx) d_hx = grad_gates.mm(w_hh);
  if (want_w_ih) d_w_ih = grad_gates.t().mm(input);
  if (want_w_hh) d_w_hh = grad_gates.t().mm(hx);
  return {d_input, d_hx, d_cx, d_w_ih, d_w_hh, d_b_ih, d_b_hh};
}

}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, CPU, m) {
  m.impl("lstm_cell", lstm_cell);
  m.impl("lstm_cell_forward", lstm_cell_forward);
  m.impl("lstm_cell_backward", lstm_cell_backward);
}

}  // namespace lstm_ext::cpu
