// The operators on a GPU: tensors in, launches out.
#include "ops/cell.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "cuda/kernels.h"
#include "cuda/tensors.h"
#include "ops/composite.h"

namespace lstm_ext::cuda {
namespace {

using at::Tensor;

bool has_kernel(const CellInputs& in) { return fusable(in) && launchers_know(in); }

void forward(const CellInputs& in, Tensor& hy, Tensor& cy, Tensor* gates) {
  const OnDevice guard(in.hx);
  const int64_t N = in.hx.size(0), I = in.input.size(1), H = in.hx.size(1);
  const Tensor input = dense(in.input), hx = dense(in.hx), cx = dense(in.cx), w_ih = dense(in.w_ih),
               w_hh = dense(in.w_hh), b_ih = dense(in.b_ih), b_hh = dense(in.b_hh),
               unit_weights = dense(in.unit_weights);
  hy = empty({N, H}, hx);
  cy = empty({N, H}, hx);
  if (gates != nullptr) *gates = empty({N, 4 * H}, hx);
  if (hy.numel() == 0) return;
  const Device device = describe_device(hx, at::Float32Op::MATMUL);
  const cudaStream_t stream = current_stream();
  with_type(hx.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    CellForward<T> cell = {};
    cell.input = read<T>(input);
    cell.hx = read<T>(hx);
    cell.cx = read<T>(cx);
    cell.w_ih = read<T>(w_ih);
    cell.w_hh = read<T>(w_hh);
    cell.b_ih = read<T>(b_ih);
    cell.b_hh = read<T>(b_hh);
    cell.hy = write<T>(hy);
    cell.cy = write<T>(cy);
    cell.gates = gates != nullptr ? write<T>(*gates) : nullptr;
    cell.N = N;
    cell.I = static_cast<int>(I);
    cell.H = static_cast<int>(H);
    cell.variant = static_cast<int>(in.variant);
    cell.unit_weights = read<T>(unit_weights);
    const bool pays = cell_forward_pays(cell, device);
    if (verbose())
      log_path(
          "lstm_cell", input, hx,
          pays ? "one launch" : "library products and one launch, which such a batch makes faster");
    if (pays) {
      check_launch(cell_forward(cell, device, stream));
      return;
    }
    Tensor products = gates != nullptr ? *gates : empty({N, 4 * H}, hx);
    at::mm_out(products, input, w_ih.t());
    at::addmm_out(products, products, hx, w_hh.t());
    check_launch(cell_finish(cell, read<T>(products), stream));
  });
}

CellOutputs lstm_cell(const CellInputs& in) {
  if (!has_kernel(in)) return unfused_lstm_cell(in);
  check_all_allocated(in);
  Tensor hy, cy;
  forward(in, hy, cy, nullptr);
  return {std::move(hy), std::move(cy)};
}

CellTrainingOutputs lstm_cell_forward(const CellInputs& in) {
  if (!has_kernel(in)) {
    unfused_lstm_cell(in);  // raises torch's error, if torch rejects them
    return composite::cell_forward(in);
  }
  check_all_allocated(in);
  Tensor hy, cy, gates;
  forward(in, hy, cy, &gates);
  return {std::move(hy), std::move(cy), std::move(gates)};
}

Gradients lstm_cell_backward(const CellOutputGradients& grads, const CellInputs& in,
                             const CellResults& results, const Wanted& wanted) {
  if (!has_kernel(in)) return composite::cell_backward(grads, in, results, wanted);
  check_backward(grads, in.hx, results);
  check_allocated_for_backward(in);
  check_all_allocated(grads, results);
  const Tensor& hx = in.hx;
  const OnDevice guard(hx);
  const int64_t N = hx.size(0), H = hx.size(1);
  const Tensor grad_h = dense(grads.hy), grad_c = dense(grads.cy), c = dense(in.cx),
               g = dense(results.gates), unit_weights = dense(in.unit_weights);
  const Tensor grad_gates = empty({N, 4 * H}, hx);
  Gradients to;
  if (wanted.cx) to.cx = empty({N, H}, hx);
  if (wanted.b_ih) to.b_ih = empty({4 * H}, hx);
  if (wanted.b_hh) to.b_hh = empty({4 * H}, hx);
  with_type(hx.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    CellBackward<T> cell = {};
    cell.grad_hy = read<T>(grad_h);
    cell.grad_cy = read<T>(grad_c);
    cell.cx = read<T>(c);
    cell.gates = read<T>(g);
    cell.grad_gates = write<T>(grad_gates);
    cell.grad_cx = write<T>(to.cx);
    cell.grad_b_ih = write<T>(to.b_ih);
    cell.grad_b_hh = write<T>(to.b_hh);
    cell.N = N;
    cell.H = static_cast<int>(H);
    cell.variant = static_cast<int>(in.variant);
    cell.unit_weights = read<T>(unit_weights);
    const auto bytes = static_cast<int64_t>(cell_backward_workspace(cell));
    const Tensor workspace = at::empty({bytes}, hx.options().dtype(at::kByte));
    cell.partial_sums = write<void>(workspace);
    check_launch(cell_backward(cell, current_stream()));
  });
  // The weights are two tensors: one product for both would have to copy them side by side first.
  if (wanted.input) to.input = at::mm(grad_gates, in.w_ih);
  if (wanted.hx) to.hx = at::mm(grad_gates, in.w_hh);
  if (wanted.w_ih) to.w_ih = at::mm(grad_gates.t(), in.input);
  if (wanted.w_hh) to.w_hh = at::mm(grad_gates.t(), hx);
  if (wanted.unit_weights)
    to.unit_weights = composite::unit_gradients(in.variant, results.gates, in.cx, grad_gates);
  return to;
}

}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, LSTM_EXT_CUDA_KEY, m) {
  ops::lstm_cell::implement<lstm_cell>(m);
  ops::lstm_cell_forward::implement<lstm_cell_forward>(m);
  ops::lstm_cell_backward::implement<lstm_cell_backward>(m);
}

}  // namespace lstm_ext::cuda
