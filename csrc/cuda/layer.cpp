// The layer's operators on a GPU: tensors in, launches out.
#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "cuda/kernels.h"
#include "cuda/tensors.h"
#include "layer_ops.h"

namespace lstm_ext::cuda {
namespace {

using Optional = const std::optional<Tensor>&;

bool has_kernel(const LayerInputs& in) { return layer_fusable(in) && fits(in.w_ih, in.w_hh); }

// Where the steps' rows lie, known to the host without asking the device.
struct Steps {
  int64_t L() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t S() const { return offsets.back(); }
  int64_t rows(int64_t t) const { return offsets[t + 1] - offsets[t]; }
  // The time of the step'th step.
  int64_t time(int64_t step, bool reverse) const { return reverse ? L() - 1 - step : step; }
  Tensor of(const Tensor& rows_of_all, int64_t t) const {
    return rows_of_all.narrow(0, offsets[t], rows(t));
  }

  std::vector<int64_t> offsets;
};

struct Results {
  Tensor output, hy, cy, gates, c_before;  // the last two where they are kept
};

// One library product and one launch a step.
void run_steps(const LayerInputs& in, const Steps& steps, const Tensor& products,
               const Tensor& w_hh, Results& out) {
  const int64_t H = in.hx.size(1);
  out.hy = in.hx.clone(at::MemoryFormat::Contiguous);
  out.cy = in.cx.clone(at::MemoryFormat::Contiguous);
  const Tensor b_ih = dense(in.b_ih), b_hh = dense(in.b_hh);
  const cudaStream_t stream = current_stream();
  for (int64_t step = 0; step < steps.L(); ++step) {
    const int64_t t = steps.time(step, in.reverse), n = steps.rows(t);
    Tensor h = out.hy.narrow(0, 0, n), c = out.cy.narrow(0, 0, n);
    if (defined(in.reset)) {
      h.copy_(composite::reset_to_zero(h, in, t));
      c.copy_(composite::reset_to_zero(c, in, t));
    }
    if (out.c_before.defined()) steps.of(out.c_before, t).copy_(c);
    Tensor pre = steps.of(products, t);
    at::addmm_out(pre, pre, h, w_hh.t());
    with_type(h.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      const CellForward<T> cell = {nullptr,
                                   nullptr,
                                   read<T>(c),
                                   nullptr,
                                   nullptr,
                                   read<T>(b_ih),
                                   read<T>(b_hh),
                                   write<T>(h),
                                   write<T>(c),
                                   out.gates.defined() ? write<T>(pre) : nullptr,
                                   n,
                                   0,
                                   static_cast<int>(H)};
      check_launch(cell_finish(cell, read<T>(pre), stream));
    });
    steps.of(out.output, t).copy_(h);
  }
}

Results forward(const LayerInputs& in, bool keeps) {
  check_sequence(in);
  const OnDevice guard(in.hx);
  const Steps steps = {step_offsets(in)};
  const int64_t L = steps.L(), N = in.hx.size(0), H = in.hx.size(1), S = steps.S();
  const Tensor rows = in.input.reshape({S, in.input.size(-1)}), w_hh = dense(in.w_hh);
  Results out;
  out.output = empty({S, H}, in.hx);
  if (keeps) out.c_before = empty({S, H}, in.hx);
  const Tensor products = at::mm(rows, in.w_ih.t());
  if (keeps) out.gates = products;  // in their place
  if (L == 0 || N == 0 || H == 0) {
    out.hy = in.hx.clone();
    out.cy = in.cx.clone();
    return out;
  }
  const Tensor hx = dense(in.hx), cx = dense(in.cx), b_ih = dense(in.b_ih), b_hh = dense(in.b_hh);
  const Tensor reset = dense(in.reset), h_buffers = empty({2, N, H}, hx);
  const Device device = describe_device(hx);
  const bool done = with_type(hx.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    LayerForward<T> layer = {};
    layer.L = L;
    layer.N = N;
    layer.H = static_cast<int>(H);
    layer.reverse = in.reverse;
    if (!layer_forward_fits(layer, device)) return false;
    Tensor offsets;
    if (defined(in.batch_sizes)) {
      offsets = at::empty({L + 1}, at::kLong);
      std::copy(steps.offsets.begin(), steps.offsets.end(), offsets.mutable_data_ptr<int64_t>());
      offsets = offsets.to(hx.device(), /*non_blocking=*/true);
    }
    out.hy = empty({N, H}, hx);
    out.cy = empty({N, H}, hx);
    layer.products = read<T>(products);
    layer.hx = read<T>(hx);
    layer.cx = read<T>(cx);
    layer.w_hh = read<T>(w_hh);
    layer.b_ih = read<T>(b_ih);
    layer.b_hh = read<T>(b_hh);
    layer.offsets = read<int64_t>(offsets);
    layer.reset = read<bool>(reset);
    layer.output = write<T>(out.output);
    layer.hy = write<T>(out.hy);
    layer.cy = write<T>(out.cy);
    layer.gates = write<T>(out.gates);
    layer.c_before = write<T>(out.c_before);
    layer.h_buffers = write<T>(h_buffers);
    check_launch(layer_forward(layer, device, current_stream()));
    return true;
  });
  if (!done) run_steps(in, steps, products, w_hh, out);
  if (!defined(in.batch_sizes)) out.output = out.output.view({L, N, H});
  return out;
}

// The h that each step started from, [S, H].
Tensor h_before(const LayerInputs& in, const Steps& steps, const Tensor& output) {
  const int64_t N = in.hx.size(0);
  std::vector<Tensor> parts(steps.L());
  for (int64_t step = 0; step < steps.L(); ++step) {
    const int64_t t = steps.time(step, in.reverse), n = steps.rows(t);
    const int64_t before = step == 0 ? 0 : steps.rows(steps.time(step - 1, in.reverse));
    // Sequences that begin here, in reverse, start from their own states.
    const int64_t going = std::min(n, before);
    Tensor h = in.hx.narrow(0, 0, std::min(n, N));
    if (going > 0) {
      h = steps.of(output, steps.time(step - 1, in.reverse)).narrow(0, 0, going);
      if (going < n) h = at::cat({h, in.hx.narrow(0, going, n - going)});
    }
    parts[t] = composite::reset_to_zero(h, in, t);
  }
  return at::cat(parts);
}

LayerOutputs lstm_layer(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& w_ih,
                        const Tensor& w_hh, Optional b_ih, Optional b_hh, Optional batch_sizes,
                        Optional reset, bool reverse) {
  const LayerInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse};
  if (!has_kernel(in)) {
    auto [output, hy, cy, gates, before] = composite::layer_forward(in);
    return {std::move(output), std::move(hy), std::move(cy)};
  }
  Results out = forward(in, false);
  return {std::move(out.output), std::move(out.hy), std::move(out.cy)};
}

LayerTrainingOutputs lstm_layer_forward(const Tensor& input, const Tensor& hx, const Tensor& cx,
                                        const Tensor& w_ih, const Tensor& w_hh, Optional b_ih,
                                        Optional b_hh, Optional batch_sizes, Optional reset,
                                        bool reverse) {
  const LayerInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse};
  if (!has_kernel(in)) return composite::layer_forward(in);
  Results out = forward(in, true);
  return {std::move(out.output), std::move(out.hy), std::move(out.cy), std::move(out.gates),
          std::move(out.c_before)};
}

CellGradients lstm_layer_backward(Optional grad_output, Optional grad_hy, Optional grad_cy,
                                  const Tensor& input, const Tensor& hx, const Tensor& cx,
                                  const Tensor& w_ih, const Tensor& w_hh, Optional b_ih,
                                  Optional b_hh, Optional batch_sizes, Optional reset, bool reverse,
                                  const Tensor& output, const Tensor& gates, const Tensor& c_before,
                                  CellGradientMask mask) {
  const LayerInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse};
  if (!has_kernel(in)) return composite::layer_backward({grad_output, grad_hy, grad_cy}, in, mask);
  check_sequence(in);
  const OnDevice guard(hx);
  const Steps steps = {step_offsets(in)};
  const int64_t N = hx.size(0), H = hx.size(1), S = steps.S();
  TORCH_CHECK(gates.dim() == 2 && gates.size(0) == S && gates.size(1) == 4 * H &&
                  c_before.dim() == 2 && c_before.size(0) == S && c_before.size(1) == H &&
                  output.numel() == S * H,
              "lstm_layer_backward: the results must be those of lstm_layer_forward");
  const auto rows_of = [&](const Tensor& tensor) { return tensor.reshape({S, H}).contiguous(); };
  const Tensor of_output = defined(grad_output) ? rows_of(*grad_output) : Tensor();
  const Tensor kept_gates = dense(gates), kept_c = dense(c_before);
  const auto state = [&](Optional grad) {
    return defined(grad) ? grad->clone(at::MemoryFormat::Contiguous)
                         : at::zeros({N, H}, hx.options());
  };
  const auto [want_input, want_hx, want_cx, want_w_ih, want_w_hh, want_b_ih, want_b_hh] = mask;
  Tensor grad_h = state(grad_hy), grad_c = state(grad_cy);
  const Tensor grad_gates = empty({S, 4 * H}, hx);
  const cudaStream_t stream = current_stream();
  if (H > 0)
    for (int64_t step = steps.L() - 1; step >= 0; --step) {
      const int64_t t = steps.time(step, reverse), n = steps.rows(t);
      Tensor h = grad_h.narrow(0, 0, n), c = grad_c.narrow(0, 0, n);
      if (of_output.defined()) h.add_(steps.of(of_output, t));
      const Tensor of_gates = steps.of(grad_gates, t), g = steps.of(kept_gates, t),
                   before = steps.of(kept_c, t);
      with_type(hx.scalar_type(), [&](auto type) {
        using T = typename decltype(type)::type;
        // The gradient of c goes where that of c' was: each thread reads its own before.
        const CellBackward<T> cell = {
            read<T>(h), read<T>(c), read<T>(before), read<T>(g), write<T>(of_gates), write<T>(c),
            nullptr,    nullptr,    nullptr,         n,          static_cast<int>(H)};
        check_launch(cell_backward(cell, stream));
      });
      // Of the first step, they are those of hx.
      if (step > 0 || want_hx) at::mm_out(h, of_gates, w_hh);
      if (defined(reset)) {
        h.copy_(composite::reset_to_zero(h, in, t));
        c.copy_(composite::reset_to_zero(c, in, t));
      }
    }
  const Tensor rows = input.reshape({S, input.size(-1)});
  Tensor grad_input, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh;
  if (want_input) grad_input = at::mm(grad_gates, w_ih).view_as(input);
  if (want_w_ih) grad_w_ih = at::mm(grad_gates.t(), rows);
  if (want_w_hh)
    grad_w_hh = S > 0 ? at::mm(grad_gates.t(), h_before(in, steps, output.reshape({S, H})))
                      : at::zeros({4 * H, H}, hx.options());
  if (want_b_ih) grad_b_ih = grad_gates.sum(0);
  if (want_b_hh) grad_b_hh = want_b_ih ? grad_b_ih.clone() : grad_gates.sum(0);
  return {grad_input,
          want_hx ? grad_h : Tensor(),
          want_cx ? grad_c : Tensor(),
          grad_w_ih,
          grad_w_hh,
          grad_b_ih,
          grad_b_hh};
}

}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, LSTM_EXT_CUDA_KEY, m) {
  m.impl("lstm_layer", lstm_layer);
  m.impl("lstm_layer_forward", lstm_layer_forward);
  m.impl("lstm_layer_backward", lstm_layer_backward);
}

}  // namespace lstm_ext::cuda
