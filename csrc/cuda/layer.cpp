// The layer's operators on a GPU: tensors in, launches out.
#include "ops/layer.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <vector>

#include "core/sequence.h"
#include "cuda/kernels.h"
#include "cuda/tensors.h"
#include "ops/composite.h"

namespace lstm_ext::cuda {
namespace {

bool has_kernel(const LayerInputs& in) { return fusable(in) && launchers_know(in); }

// A sequence for the kernels, and its tensors on the device for as long as they may read them.
struct SequenceOnDevice {
  SequenceOnDevice(const LayerInputs& in, const Sequence& of_host) : reset(dense(in.reset)) {
    sequence.L = of_host.L();
    sequence.N = of_host.N();
    sequence.reverse = of_host.reverse();
    sequence.reset = read<bool>(reset);
    if (!defined(in.batch_sizes)) return;
    offsets = at::empty({of_host.L() + 1}, in.hx.options().dtype(at::kLong));
    check_launch(copy_numbers(of_host.offsets().data(), of_host.L() + 1, write<int64_t>(offsets),
                              current_stream()));
    sequence.offsets = read<int64_t>(offsets);
  }

  DeviceSequence sequence = {};
  Tensor reset, offsets;
};

// Which way a whole sequence goes.
enum class Way { kOneLaunch, kDoesNotFit, kRefused };

// kernels: those of a launch that ran.
void log_way(const char* operation, const LayerInputs& in, Way way, LayerWay kernels) {
  if (!verbose()) return;
  log_path(operation, in.input, in.hx,
           way == Way::kOneLaunch    ? kernels == LayerWay::kSmall ? "one launch, w_hh in registers"
                                       : kernels == LayerWay::kCluster
                                           ? "one launch, w_hh in clusters of blocks"
                                           : "one launch, w_hh in shared memory"
           : way == Way::kDoesNotFit ? "step by step: w_hh does not fit on the chip"
                                     : "step by step: the device refused blocks that wait for "
                                       "each other");
}

struct Results {
  Tensor output, hy, cy, gates, c_before;  // the last two where they are kept
};

// One library product and one launch a step.
void run_steps(const LayerInputs& in, const Sequence& steps, const Tensor& products,
               const Tensor& w_hh, Results& out) {
  const int64_t H = in.hx.size(1);
  out.hy = in.hx.clone(at::MemoryFormat::Contiguous);
  out.cy = in.cx.clone(at::MemoryFormat::Contiguous);
  const Tensor b_ih = dense(in.b_ih), b_hh = dense(in.b_hh), unit_weights = dense(in.unit_weights);
  const cudaStream_t stream = current_stream();
  for (int64_t step = 0; step < steps.L(); ++step) {
    const int64_t t = steps.time(step), n = steps.rows(t);
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
      CellForward<T> cell = {};
      cell.cx = read<T>(c);
      cell.b_ih = read<T>(b_ih);
      cell.b_hh = read<T>(b_hh);
      cell.hy = write<T>(h);
      cell.cy = write<T>(c);
      cell.gates = out.gates.defined() ? write<T>(pre) : nullptr;
      cell.N = n;
      cell.H = static_cast<int>(H);
      cell.variant = static_cast<int>(in.variant);
      cell.unit_weights = read<T>(unit_weights);
      check_launch(cell_finish(cell, read<T>(pre), stream));
    });
    steps.of(out.output, t).copy_(h);
  }
}

Results forward(const LayerInputs& in, bool keeps) {
  check_sequence(in);
  const OnDevice guard(in.hx);
  const LayerPrecision precision(in.hx);
  const Sequence steps(in);
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
  const Tensor hx = dense(in.hx), cx = dense(in.cx), b_ih = dense(in.b_ih), b_hh = dense(in.b_hh),
               unit_weights = dense(in.unit_weights);
  const Tensor h_buffers = empty({2, N, H}, hx);
  const SequenceOnDevice on_device(in, steps);
  const Device device = describe_device(hx, at::Float32Op::RNN);
  LayerWay kernels = LayerWay::kNone;
  const Way way = with_type(hx.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    LayerForward<T> layer = {};
    layer.sequence = on_device.sequence;
    layer.H = static_cast<int>(H);
    layer.variant = static_cast<int>(in.variant);
    kernels = layer_forward_way(layer, device);
    if (kernels == LayerWay::kNone) return Way::kDoesNotFit;
    out.hy = empty({N, H}, hx);
    out.cy = empty({N, H}, hx);
    layer.products = read<T>(products);
    layer.hx = read<T>(hx);
    layer.cx = read<T>(cx);
    layer.w_hh = read<T>(w_hh);
    layer.b_ih = read<T>(b_ih);
    layer.b_hh = read<T>(b_hh);
    layer.unit_weights = read<T>(unit_weights);
    layer.output = write<T>(out.output);
    layer.hy = write<T>(out.hy);
    layer.cy = write<T>(out.cy);
    layer.gates = write<T>(out.gates);
    layer.c_before = write<T>(out.c_before);
    layer.h_buffers = write<T>(h_buffers);
    const auto runs = [&] {
      return check_cooperative_launch(layer_forward(layer, device, kernels, current_stream()));
    };
    if (runs()) return Way::kOneLaunch;
    // A cluster that the device refuses may still do without.
    if (kernels == LayerWay::kCluster && layer_forward_shared_fits(layer, device)) {
      kernels = LayerWay::kShared;
      if (runs()) return Way::kOneLaunch;
    }
    return Way::kRefused;
  });
  log_way(keeps ? "lstm_layer_forward" : "lstm_layer", in, way, kernels);
  if (way != Way::kOneLaunch) run_steps(in, steps, products, w_hh, out);
  if (!defined(in.batch_sizes)) out.output = out.output.view({L, N, H});
  return out;
}

// The h that each step started from, [S, H].
Tensor h_before(const LayerInputs& in, const Sequence& steps, const Tensor& output) {
  const int64_t N = in.hx.size(0), others = steps.S() - N;
  if (!defined(in.batch_sizes) && !defined(in.reset) && steps.L() > 0)
    return in.reverse ? at::cat({output.narrow(0, N, others), in.hx})
                      : at::cat({in.hx, output.narrow(0, 0, others)});
  std::vector<Tensor> parts(steps.L());
  for (int64_t step = 0; step < steps.L(); ++step) {
    const int64_t t = steps.time(step), n = steps.rows(t);
    // Sequences that begin here, in reverse, start from their own states.
    const int64_t going = steps.rows_going_on(step);
    Tensor h = in.hx.narrow(0, 0, std::min(n, N));
    if (going > 0) {
      h = steps.of(output, steps.time(step - 1)).narrow(0, 0, going);
      if (going < n) h = at::cat({h, in.hx.narrow(0, going, n - going)});
    }
    parts[t] = composite::reset_to_zero(h, in, t);
  }
  return at::cat(parts);
}

// What backward starts from, all dense; and what becomes of it.
struct StepGradients {
  Tensor of_output;     // [S, H] or undefined: zero
  Tensor of_hy, of_cy;  // [N, H] or undefined: zero
  Tensor gates, c_before;
  Tensor of_gates;      // [S, 4H], to be written
  Tensor of_hx, of_cx;  // [N, H]
  Tensor bias_sums;     // [.., 4H]: partial sums of of_gates, where they were made
};

// One launch and one library product a step. Writes the gradients of h and c if they are wanted or
// not, for steps hand them on.
void run_steps_back(const LayerInputs& in, const Sequence& steps, const Tensor& w_hh, bool want_hx,
                    StepGradients& grads) {
  const auto start = [&](const Tensor& grad) {
    return grad.defined() ? grad.clone() : at::zeros_like(in.hx, at::MemoryFormat::Contiguous);
  };
  grads.of_hx = start(grads.of_hy);
  grads.of_cx = start(grads.of_cy);
  const Tensor unit_weights = dense(in.unit_weights);
  const cudaStream_t stream = current_stream();
  for (int64_t step = steps.L() - 1; step >= 0; --step) {
    const int64_t t = steps.time(step), n = steps.rows(t);
    Tensor h = grads.of_hx.narrow(0, 0, n), c = grads.of_cx.narrow(0, 0, n);
    if (grads.of_output.defined()) h.add_(steps.of(grads.of_output, t));
    const Tensor of_gates = steps.of(grads.of_gates, t), gates = steps.of(grads.gates, t),
                 before = steps.of(grads.c_before, t);
    with_type(h.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      CellBackward<T> cell = {};
      cell.grad_hy = read<T>(h);
      cell.grad_cy = read<T>(c);
      cell.cx = read<T>(before);
      cell.gates = read<T>(gates);
      cell.grad_gates = write<T>(of_gates);
      cell.grad_cx = write<T>(c);  // each thread reads its own before
      cell.N = n;
      cell.H = static_cast<int>(h.size(1));
      cell.variant = static_cast<int>(in.variant);
      cell.unit_weights = read<T>(unit_weights);
      check_launch(cell_backward(cell, stream));
    });
    // Of the first step, they are those of hx.
    if (step > 0 || want_hx) at::mm_out(h, of_gates, w_hh);
    if (defined(in.reset)) {
      h.copy_(composite::reset_to_zero(h, in, t));
      c.copy_(composite::reset_to_zero(c, in, t));
    }
  }
}

void backward(const LayerInputs& in, const Sequence& steps, const Wanted& wanted,
              StepGradients& grads) {
  const int64_t N = in.hx.size(0), H = in.hx.size(1);
  const Tensor w_hh = dense(in.w_hh), unit_weights = dense(in.unit_weights);
  const Device device = describe_device(in.hx, at::Float32Op::RNN);
  if (steps.L() == 0 || N == 0 || H == 0) return run_steps_back(in, steps, w_hh, wanted.hx, grads);
  LayerWay kernels = LayerWay::kNone;
  const Way way = with_type(in.hx.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const SequenceOnDevice on_device(in, steps);
    LayerBackward<T> layer = {};
    layer.sequence = on_device.sequence;
    layer.H = static_cast<int>(H);
    layer.variant = static_cast<int>(in.variant);
    kernels = layer_backward_way(layer, device);
    if (kernels == LayerWay::kNone) return Way::kDoesNotFit;
    grads.of_hx = wanted.hx ? empty({N, H}, in.hx) : Tensor();
    grads.of_cx = empty({N, H}, in.hx);
    layer.grad_output = read<T>(grads.of_output);
    layer.grad_hy = read<T>(grads.of_hy);
    layer.grad_cy = read<T>(grads.of_cy);
    layer.gates = read<T>(grads.gates);
    layer.c_before = read<T>(grads.c_before);
    layer.w_hh = read<T>(w_hh);
    layer.unit_weights = read<T>(unit_weights);
    layer.grad_gates = write<T>(grads.of_gates);
    layer.grad_hx = write<T>(grads.of_hx);
    layer.grad_cx = write<T>(grads.of_cx);
    const auto runs = [&] {
      const int64_t rows = layer_backward_sums(layer, device, kernels);
      grads.bias_sums = rows > 0 && (wanted.b_ih || wanted.b_hh)
                            ? at::empty({rows, 4 * H}, in.hx.options().dtype(at::kFloat))
                            : Tensor();
      layer.bias_sums = write<float>(grads.bias_sums);
      return check_cooperative_launch(layer_backward(layer, device, kernels, current_stream()));
    };
    if (runs()) return Way::kOneLaunch;
    // A cluster that the device refuses may still do without.
    if (kernels == LayerWay::kCluster && layer_backward_shared_fits(layer, device)) {
      kernels = LayerWay::kShared;
      if (runs()) return Way::kOneLaunch;
    }
    return Way::kRefused;
  });
  log_way("lstm_layer_backward", in, way, kernels);
  if (way == Way::kOneLaunch) return;
  grads.bias_sums = Tensor();
  run_steps_back(in, steps, w_hh, wanted.hx, grads);
}

Tensor bias_gradient(const StepGradients& grads) {
  if (!grads.bias_sums.defined()) return grads.of_gates.sum(0);
  return grads.bias_sums.sum(0).to(grads.of_gates.scalar_type());
}

LayerOutputs lstm_layer(const LayerInputs& in) {
  if (!has_kernel(in)) return composite::layer(in);
  check_all_allocated(in);
  Results out = forward(in, false);
  return {std::move(out.output), std::move(out.hy), std::move(out.cy)};
}

LayerTrainingOutputs lstm_layer_forward(const LayerInputs& in) {
  if (!has_kernel(in)) return composite::layer_forward(in);
  check_all_allocated(in);
  Results out = forward(in, true);
  return {std::move(out.output), std::move(out.hy), std::move(out.cy), std::move(out.gates),
          std::move(out.c_before)};
}

Gradients lstm_layer_backward(const LayerOutputGradients& of_outputs, const LayerInputs& in,
                              const LayerResults& results, const Wanted& wanted) {
  if (!has_kernel(in)) return composite::layer_backward(of_outputs, in, results, wanted);
  check_allocated_for_backward(in);
  check_all_allocated(in.batch_sizes, in.reset, of_outputs, results);
  check_backward(of_outputs, in, results);
  const Tensor& hx = in.hx;
  const OnDevice guard(hx);
  const LayerPrecision precision(hx);
  const Sequence steps(in);
  const int64_t H = hx.size(1), S = steps.S();
  StepGradients grads;
  if (defined(of_outputs.output)) grads.of_output = of_outputs.output->reshape({S, H}).contiguous();
  grads.of_hy = dense(of_outputs.hy);
  grads.of_cy = dense(of_outputs.cy);
  grads.gates = dense(results.gates);
  grads.c_before = dense(results.c_before);
  grads.of_gates = empty({S, 4 * H}, hx);
  backward(in, steps, wanted, grads);
  const Tensor& grad_gates = grads.of_gates;
  const Tensor rows = in.input.reshape({S, in.input.size(-1)});
  Gradients to;
  if (wanted.input) to.input = at::mm(grad_gates, in.w_ih).view_as(in.input);
  if (wanted.hx) to.hx = grads.of_hx;
  if (wanted.cx) to.cx = grads.of_cx;
  if (wanted.w_ih) to.w_ih = weight_gradient(grad_gates, rows);
  if (wanted.w_hh)
    to.w_hh = S > 0
                  ? weight_gradient(grad_gates, h_before(in, steps, results.output.reshape({S, H})))
                  : at::zeros({4 * H, H}, hx.options());
  if (wanted.b_ih) to.b_ih = bias_gradient(grads);
  if (wanted.b_hh) to.b_hh = wanted.b_ih ? to.b_ih.clone() : bias_gradient(grads);
  if (wanted.unit_weights)
    to.unit_weights =
        composite::unit_gradients(in.variant, results.gates, results.c_before, grad_gates);
  return to;
}

}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, LSTM_EXT_CUDA_KEY, m) {
  ops::lstm_layer::implement<lstm_layer>(m);
  ops::lstm_layer_forward::implement<lstm_layer_forward>(m);
  ops::lstm_layer_backward::implement<lstm_layer_backward>(m);
}

}  // namespace lstm_ext::cuda
