// The operators on a GPU: tensors in, launches out.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "cuda/kernels.h"
#include "cuda/tensors.h"
#include "ops.h"

namespace lstm_ext::cuda {
namespace {

using at::Tensor;

bool has_kernel(const CellInputs& in) { return fusable(in) && fits(in.w_ih, in.w_hh); }

void forward(const CellInputs& in, Tensor& hy, Tensor& cy, Tensor* gates) {
  const OnDevice guard(in.hx);
  const int64_t N = in.hx.size(0), I = in.input.size(1), H = in.hx.size(1);
  const Tensor input = dense(in.input), hx = dense(in.hx), cx = dense(in.cx), w_ih = dense(in.w_ih),
               w_hh = dense(in.w_hh), b_ih = dense(in.b_ih), b_hh = dense(in.b_hh);
  hy = empty({N, H}, hx);
  cy = empty({N, H}, hx);
  if (gates != nullptr) *gates = empty({N, 4 * H}, hx);
  if (hy.numel() == 0) return;
  const Device device = describe_device(hx, at::Float32Op::MATMUL);
  const cudaStream_t stream = current_stream();
  with_type(hx.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const CellForward<T> cell = {read<T>(input),
                                 read<T>(hx),
                                 read<T>(cx),
                                 read<T>(w_ih),
                                 read<T>(w_hh),
                                 read<T>(b_ih),
                                 read<T>(b_hh),
                                 write<T>(hy),
                                 write<T>(cy),
                                 gates != nullptr ? write<T>(*gates) : nullptr,
                                 N,
                                 static_cast<int>(I),
                                 static_cast<int>(H)};
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

CellOutputs lstm_cell(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& w_ih,
                      const Tensor& w_hh, const std::optional<Tensor>& b_ih,
                      const std::optional<Tensor>& b_hh) {
  const CellInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh};
  if (!has_kernel(in)) return torch_lstm_cell(in);
  check_allocated(in);
  Tensor hy, cy;
  forward(in, hy, cy, nullptr);
  return {std::move(hy), std::move(cy)};
}

CellTrainingOutputs lstm_cell_forward(const Tensor& input, const Tensor& hx, const Tensor& cx,
                                      const Tensor& w_ih, const Tensor& w_hh,
                                      const std::optional<Tensor>& b_ih,
                                      const std::optional<Tensor>& b_hh) {
  const CellInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh};
  if (!has_kernel(in)) {
    torch_lstm_cell(in);  // raises torch's error, if torch rejects them
    return composite::cell_forward(in);
  }
  check_allocated(in);
  Tensor hy, cy, gates;
  forward(in, hy, cy, &gates);
  return {std::move(hy), std::move(cy), std::move(gates)};
}

CellGradients lstm_cell_backward(const std::optional<Tensor>& grad_hy,
                                 const std::optional<Tensor>& grad_cy, const Tensor& input,
                                 const Tensor& hx, const Tensor& cx, const Tensor& w_ih,
                                 const Tensor& w_hh, const std::optional<Tensor>& b_ih,
                                 const std::optional<Tensor>& b_hh, const Tensor& gates,
                                 CellGradientMask mask) {
  const CellInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh};
  if (!has_kernel(in)) return composite::cell_backward(grad_hy, grad_cy, in, gates, mask);
  check_cell_backward(grad_hy, grad_cy, hx, gates);
  check_all_allocated(input, hx, cx, w_ih, w_hh, grad_hy, grad_cy, gates);
  const OnDevice guard(hx);
  const int64_t N = hx.size(0), H = hx.size(1);
  const auto [want_input, want_hx, want_cx, want_w_ih, want_w_hh, want_b_ih, want_b_hh] = mask;
  const Tensor grad_h = dense(grad_hy), grad_c = dense(grad_cy), c = dense(cx), g = dense(gates);
  const Tensor grad_gates = empty({N, 4 * H}, hx);
  Tensor grad_input, grad_hx, grad_cx, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh;
  if (want_cx) grad_cx = empty({N, H}, hx);
  if (want_b_ih) grad_b_ih = empty({4 * H}, hx);
  if (want_b_hh) grad_b_hh = empty({4 * H}, hx);
  with_type(hx.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    CellBackward<T> cell = {read<T>(grad_h),
                            read<T>(grad_c),
                            read<T>(c),
                            read<T>(g),
                            write<T>(grad_gates),
                            write<T>(grad_cx),
                            write<T>(grad_b_ih),
                            write<T>(grad_b_hh),
                            nullptr,
                            N,
                            static_cast<int>(H)};
    const auto bytes = static_cast<int64_t>(cell_backward_workspace(cell));
    const Tensor workspace = at::empty({bytes}, hx.options().dtype(at::kByte));
    cell.partial_sums = write<void>(workspace);
    check_launch(cell_backward(cell, current_stream()));
  });
  // The weights are two tensors: one product for both would have to copy them side by side first.
  if (want_input) grad_input = at::mm(grad_gates, w_ih);
  if (want_hx) grad_hx = at::mm(grad_gates, w_hh);
  if (want_w_ih) grad_w_ih = at::mm(grad_gates.t(), input);
  if (want_w_hh) grad_w_hh = at::mm(grad_gates.t(), hx);
  return {grad_input, grad_hx, grad_cx, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh};
}

}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, LSTM_EXT_CUDA_KEY, m) {
  m.impl("lstm_cell", lstm_cell);
  m.impl("lstm_cell_forward", lstm_cell_forward);
  m.impl("lstm_cell_backward", lstm_cell_backward);
}

}  // namespace lstm_ext::cuda
