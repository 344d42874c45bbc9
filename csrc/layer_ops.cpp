// Schemas of the layer's operators, the check at the door, and the layer in tensor operations.
#include "layer_ops.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <vector>

namespace lstm_ext {

namespace {

// Whether the input is a batch, padded or packed, of as many sequences as there are states.
bool states_fit(const LayerInputs& in) {
  const bool packed = defined(in.batch_sizes);
  return in.input.dim() == (packed ? 2 : 3) && in.hx.dim() == 2 && in.cx.dim() == 2 &&
         in.hx.sym_sizes() == in.cx.sym_sizes() &&
         (packed || in.input.sym_size(1) == in.hx.sym_size(0));
}

// And the weights and biases, whatever the number of steps.
bool sizes_fit(const LayerInputs& in) {
  const CellInputs recurrent = {in.hx, in.hx, in.cx, in.w_hh, in.w_hh, in.b_ih, in.b_hh};
  return states_fit(in) && lstm_ext::sizes_fit(recurrent) && in.w_ih.dim() == 2 &&
         in.w_ih.sym_size(0) == in.w_hh.sym_size(0) && in.w_ih.sym_size(1) == in.input.sym_size(-1);
}

}  // namespace

bool layer_fusable(const LayerInputs& in) {
  return all_alike({in.input, in.hx, in.cx, in.w_ih, in.w_hh, in.b_ih, in.b_hh}) && sizes_fit(in);
}

void check_sequence(const LayerInputs& in) {
  TORCH_CHECK(states_fit(in), "input and states do not fit each other: got an input of shape ",
              in.input.sizes(), ", states of ", in.hx.sizes(), " and ", in.cx.sizes());
  if (defined(in.batch_sizes)) {
    const at::Tensor& sizes = *in.batch_sizes;
    TORCH_CHECK(sizes.dim() == 1 && sizes.scalar_type() == at::kLong && sizes.is_cpu(),
                "batch_sizes should be a 1-D int64 tensor on the CPU");
    TORCH_CHECK(sizes.numel() <= in.input.size(0),
                "a packed input must have as many rows as batch_sizes adds up to, at least ",
                sizes.numel(), ", got shape ", in.input.sizes());
    const at::Tensor dense = sizes.contiguous();
    const auto* size = dense.const_data_ptr<int64_t>();
    int64_t sum = 0;
    for (int64_t t = 0; t < dense.numel(); ++t) {
      TORCH_CHECK(size[t] > 0 && (t == 0 || size[t] <= size[t - 1]),
                  "batch_sizes should be positive and in descending order");
      sum += size[t];
    }
    TORCH_CHECK(in.input.dim() == 2 && in.input.size(0) == sum,
                "a packed input must have as many rows as batch_sizes adds up to, ", sum,
                ", got shape ", in.input.sizes());
    TORCH_CHECK(dense.numel() > 0 && in.hx.size(0) == size[0],
                "Expected hidden[0] to have a batch of batch_sizes[0]");
  }
  if (defined(in.reset)) {
    const int64_t L = defined(in.batch_sizes) ? in.batch_sizes->size(0) : in.input.size(0);
    TORCH_CHECK(in.reset->scalar_type() == at::kBool && in.reset->dim() == 2 &&
                    in.reset->size(0) == L && in.reset->size(1) == in.hx.size(0) &&
                    in.reset->device() == in.hx.device() && in.reset->layout() == at::kStrided,
                "reset must be a bool tensor of shape (L, N) = (", L, ", ", in.hx.size(0), ") on ",
                in.hx.device(), ", got ", in.reset->scalar_type(), " of shape ", in.reset->sizes(),
                " on ", in.reset->device());
  }
}

void check_packed_inputs(const LayerInputs& in) {
  const at::Tensor &input = in.input, &hx = in.hx, &cx = in.cx;
  bool fits = fused_dtype(input.scalar_type()) && states_fit(in);
  for (const at::Tensor* t : {&input, &hx, &cx}) fits = fits && alike(*t, input);
  for (const auto* bias : {&in.b_ih, &in.b_hh})
    fits = fits && bias_fits(*bias, 4 * hx.size(1)) && (!defined(*bias) || alike(**bias, input));
  TORCH_CHECK(fits,
              "lstm_layer_packed: input, states and biases do not fit each other: got an input of ",
              "shape ", input.sizes(), ", states of ", hx.sizes(), " and ", cx.sizes());
}

void check_backward_sizes(const LayerOutputGradients& grads, const LayerInputs& in,
                          const LayerResults& results) {
  std::vector<int64_t> output = in.input.sizes().vec();
  output.back() = in.hx.size(1);
  const auto check = [](const std::optional<at::Tensor>& grad, at::IntArrayRef sizes) {
    TORCH_CHECK(!defined(grad) || grad->sizes() == sizes,
                "lstm_layer_backward: a gradient must have its tensor's shape ", sizes);
  };
  check(grads.output, output);
  check(grads.hy, in.hx.sizes());
  check(grads.cy, in.cx.sizes());
  const int64_t H = in.hx.size(1),
                S = in.input.size(0) * (defined(in.batch_sizes) ? 1 : in.input.size(1));
  const auto has = [](const at::Tensor& tensor, int64_t rows, int64_t columns) {
    return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns;
  };
  TORCH_CHECK(has(results.gates, S, 4 * H) && has(results.c_before, S, H) &&
                  results.output.sizes() == output,
              "lstm_layer_backward: output, gates and c_before must be those of "
              "lstm_layer_forward");
}

void check_layer_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                          const LayerResults& results) {
  check_sequence(in);
  check_backward_sizes(grads, in, results);
  for (const auto* grad : {&grads.output, &grads.hy, &grads.cy})
    TORCH_CHECK(!defined(*grad) || alike(**grad, in.hx),
                "lstm_layer_backward: a gradient must have the states' dtype ", in.hx.scalar_type(),
                " and device ", in.hx.device());
  for (const at::Tensor* result : {&results.output, &results.gates, &results.c_before})
    TORCH_CHECK(alike(*result, in.hx),
                "lstm_layer_backward: output, gates and c_before must be those of "
                "lstm_layer_forward");
}

std::vector<int64_t> step_offsets(const LayerInputs& in) {
  const bool packed = defined(in.batch_sizes);
  const int64_t L = packed ? in.batch_sizes->size(0) : in.input.size(0);
  std::vector<int64_t> offsets(L + 1, 0);
  for (int64_t t = 0; t < L; ++t)
    offsets[t + 1] =
        offsets[t] + (packed
                          ? in.batch_sizes->const_data_ptr<int64_t>()[t * in.batch_sizes->stride(0)]
                          : in.hx.size(0));
  return offsets;
}

namespace composite {

at::Tensor reset_to_zero(const at::Tensor& state, const LayerInputs& in, int64_t t) {
  if (!defined(in.reset)) return state;
  const at::Tensor reset = in.reset->select(0, t).narrow(0, 0, state.size(0)).unsqueeze(1);
  return at::where(reset, at::zeros_like(state), state);
}

namespace {

// The forward, step by step.
struct Steps {
  std::vector<int64_t> size, offset;  // rows of each step, and where they begin in a packed tensor
  at::Tensor rows;                    // the input [S, I]
  std::vector<at::Tensor> h_before, c_before, gates, output;
  at::Tensor h, c;  // in the end
  int64_t L() const { return static_cast<int64_t>(size.size()); }
};

// first, and below it the rows of whole that it leaves out.
at::Tensor over(const at::Tensor& first, const at::Tensor& whole) {
  const int64_t n = first.size(0), N = whole.size(0);
  return n == N ? first : at::cat({first, whole.narrow(0, n, N - n)});
}

Steps run(const LayerInputs& in) {
  check_sequence(in);
  TORCH_CHECK(sizes_fit(in),
              "expected weights (4H, I) and (4H, H), and biases (4H) or None, with H ",
              in.hx.size(1), " and I ", in.input.size(-1), "; got weights of shape ",
              in.w_ih.sizes(), " and ", in.w_hh.sizes());
  Steps steps;
  steps.offset = step_offsets(in);
  const auto L = static_cast<int64_t>(steps.offset.size()) - 1;
  for (int64_t t = 0; t < L; ++t) steps.size.push_back(steps.offset[t + 1] - steps.offset[t]);
  steps.rows = in.input.reshape({steps.offset[L], in.input.size(-1)});
  steps.h = in.hx;
  steps.c = in.cx;
  for (auto* list : {&steps.h_before, &steps.c_before, &steps.gates, &steps.output})
    list->resize(L);
  for (int64_t s = 0; s < L; ++s) {
    const int64_t t = in.reverse ? L - 1 - s : s, n = steps.size[t];
    steps.h_before[t] = reset_to_zero(steps.h.narrow(0, 0, n), in, t);
    steps.c_before[t] = reset_to_zero(steps.c.narrow(0, 0, n), in, t);
    auto [h, c, gates] = cell_forward({steps.rows.narrow(0, steps.offset[t], n), steps.h_before[t],
                                       steps.c_before[t], in.w_ih, in.w_hh, in.b_ih, in.b_hh});
    // Sequences that have ended, or in reverse not begun, keep their states.
    steps.h = over(h, steps.h);
    steps.c = over(c, steps.c);
    steps.output[t] = std::move(h);
    steps.gates[t] = std::move(gates);
  }
  return steps;
}

at::Tensor sum_of(const at::Tensor& sum, const at::Tensor& term) {
  return sum.defined() && term.defined() ? sum + term : sum.defined() ? sum : term;
}

}  // namespace

LayerTrainingOutputs layer_forward(const LayerInputs& in) {
  const Steps steps = run(in);
  const int64_t N = in.hx.size(0), H = in.hx.size(1);
  const auto join = [&](const std::vector<at::Tensor>& parts, int64_t columns) {
    return parts.empty() ? in.hx.new_empty({0, columns}) : at::cat(parts);
  };
  at::Tensor output = join(steps.output, H);
  if (!defined(in.batch_sizes)) output = output.view({steps.L(), N, H});
  return {output, steps.h.clone(), steps.c.clone(), join(steps.gates, 4 * H),
          join(steps.c_before, H)};
}

CellGradients layer_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                             const LayerResults& results, CellGradientMask mask) {
  check_sequence(in);
  check_backward_sizes(grads, in, results);
  const Steps steps = run(in);
  const int64_t L = steps.L();
  at::Tensor grad_h = defined(grads.hy) ? *grads.hy : at::zeros_like(in.hx);
  at::Tensor grad_c = defined(grads.cy) ? *grads.cy : at::zeros_like(in.cx);
  const at::Tensor grad_output = defined(grads.output)
                                     ? grads.output->reshape({steps.offset[L], in.hx.size(1)})
                                     : at::Tensor();
  std::vector<at::Tensor> grad_rows(L);
  std::array<at::Tensor, kCellInputs> sum;
  CellGradientMask step_mask = mask;
  step_mask[1] = step_mask[2] = true;
  for (int64_t s = L - 1; s >= 0; --s) {
    const int64_t t = in.reverse ? L - 1 - s : s, n = steps.size[t], row = steps.offset[t];
    at::Tensor grad = grad_h.narrow(0, 0, n);
    if (grad_output.defined()) grad = grad + grad_output.narrow(0, row, n);
    const auto [d_input, d_h, d_c, d_w_ih, d_w_hh, d_b_ih, d_b_hh] =
        cell_backward(grad, grad_c.narrow(0, 0, n),
                      {steps.rows.narrow(0, row, n), steps.h_before[t], steps.c_before[t], in.w_ih,
                       in.w_hh, in.b_ih, in.b_hh},
                      steps.gates[t], step_mask);
    grad_rows[t] = d_input;
    const at::Tensor parameters[] = {d_w_ih, d_w_hh, d_b_ih, d_b_hh};
    for (int k = 0; k < kCellParameters; ++k) sum[3 + k] = sum_of(sum[3 + k], parameters[k]);
    grad_h = over(reset_to_zero(d_h, in, t), grad_h);
    grad_c = over(reset_to_zero(d_c, in, t), grad_c);
  }
  if (mask[0]) sum[0] = L > 0 ? at::cat(grad_rows).view_as(in.input) : at::zeros_like(in.input);
  if (mask[1]) sum[1] = grad_h;
  if (mask[2]) sum[2] = grad_c;
  return {sum[0], sum[1], sum[2], sum[3], sum[4], sum[5], sum[6]};
}

namespace {

using Optional = const std::optional<at::Tensor>&;

LayerOutputs lstm_layer(const at::Tensor& input, const at::Tensor& hx, const at::Tensor& cx,
                        const at::Tensor& w_ih, const at::Tensor& w_hh, Optional b_ih,
                        Optional b_hh, Optional batch_sizes, Optional reset, bool reverse) {
  auto [output, hy, cy, gates, before] =
      layer_forward({input, hx, cx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse});
  return {std::move(output), std::move(hy), std::move(cy)};
}

LayerTrainingOutputs lstm_layer_forward(const at::Tensor& input, const at::Tensor& hx,
                                        const at::Tensor& cx, const at::Tensor& w_ih,
                                        const at::Tensor& w_hh, Optional b_ih, Optional b_hh,
                                        Optional batch_sizes, Optional reset, bool reverse) {
  return layer_forward({input, hx, cx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse});
}

CellGradients lstm_layer_backward(Optional grad_output, Optional grad_hy, Optional grad_cy,
                                  const at::Tensor& input, const at::Tensor& hx,
                                  const at::Tensor& cx, const at::Tensor& w_ih,
                                  const at::Tensor& w_hh, Optional b_ih, Optional b_hh,
                                  Optional batch_sizes, Optional reset, bool reverse,
                                  const at::Tensor& output, const at::Tensor& gates,
                                  const at::Tensor& c_before, CellGradientMask mask) {
  return layer_backward({grad_output, grad_hy, grad_cy},
                        {input, hx, cx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse},
                        {output, gates, c_before}, mask);
}

}  // namespace
}  // namespace composite

namespace {
using Optional = const std::optional<at::Tensor>&;
using T = const at::Tensor&;
}  // namespace

namespace {

const auto& lstm_layer_handle() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("lstm_ext::lstm_layer", "")
          .typed<LayerOutputs(T, T, T, T, T, Optional, Optional, Optional, Optional, bool)>();
  return op;
}

}  // namespace

LayerOutputs call_lstm_layer(const LayerInputs& in) {
  return lstm_layer_handle().call(in.input, in.hx, in.cx, in.w_ih, in.w_hh, in.b_ih, in.b_hh,
                                  in.batch_sizes, in.reset, in.reverse);
}

LayerOutputs redispatch_lstm_layer(c10::DispatchKeySet keys, const LayerInputs& in) {
  return lstm_layer_handle().redispatch(keys, in.input, in.hx, in.cx, in.w_ih, in.w_hh, in.b_ih,
                                        in.b_hh, in.batch_sizes, in.reset, in.reverse);
}

at::Tensor call_lstm_layer_pack(const at::Tensor& w_ih, const at::Tensor& w_hh) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lstm_ext::lstm_layer_pack", "")
                             .typed<at::Tensor(T, T)>();
  return op.call(w_ih, w_hh);
}

LayerOutputs call_lstm_layer_packed(const at::Tensor& input, const at::Tensor& hx,
                                    const at::Tensor& cx, const at::Tensor& packed,
                                    const PackedLayerOptions& options) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("lstm_ext::lstm_layer_packed", "")
          .typed<LayerOutputs(T, T, T, T, Optional, Optional, Optional, Optional, bool)>();
  return op.call(input, hx, cx, packed, options.b_ih, options.b_hh, options.batch_sizes,
                 options.reset, options.reverse);
}

LayerTrainingOutputs call_lstm_layer_forward(const LayerInputs& in) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lstm_ext::lstm_layer_forward", "")
                             .typed<LayerTrainingOutputs(T, T, T, T, T, Optional, Optional,
                                                         Optional, Optional, bool)>();
  return op.call(in.input, in.hx, in.cx, in.w_ih, in.w_hh, in.b_ih, in.b_hh, in.batch_sizes,
                 in.reset, in.reverse);
}

CellGradients call_lstm_layer_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                                       const LayerResults& results, CellGradientMask mask) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("lstm_ext::lstm_layer_backward", "")
          .typed<CellGradients(Optional, Optional, Optional, T, T, T, T, T, Optional, Optional,
                               Optional, Optional, bool, T, T, T, CellGradientMask)>();
  return op.call(grads.output, grads.hy, grads.cy, in.input, in.hx, in.cx, in.w_ih, in.w_hh,
                 in.b_ih, in.b_hh, in.batch_sizes, in.reset, in.reverse, results.output,
                 results.gates, results.c_before, mask);
}

TORCH_LIBRARY_FRAGMENT(lstm_ext, m) {
  // The layer: output, h_n, c_n.
  m.def(
      "lstm_layer(Tensor input, Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, Tensor? b_ih, "
      "Tensor? b_hh, Tensor? batch_sizes, Tensor? reset, bool reverse) "
      "-> (Tensor, Tensor, Tensor)");
  // The same, and what its backward needs: gates, and the c that each step started from.
  m.def(
      "lstm_layer_forward(Tensor input, Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, "
      "Tensor? b_ih, Tensor? b_hh, Tensor? batch_sizes, Tensor? reset, bool reverse) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Inference over weights packed before: w_ih and w_hh in the layout of this processor's kernels.
  m.def("lstm_layer_pack(Tensor w_ih, Tensor w_hh) -> Tensor");
  m.def(
      "lstm_layer_packed(Tensor input, Tensor hx, Tensor cx, Tensor packed, Tensor? b_ih, "
      "Tensor? b_hh, Tensor? batch_sizes, Tensor? reset, bool reverse) "
      "-> (Tensor, Tensor, Tensor)");
  // Gradients of the first seven; those that output_mask leaves out are not computed (None).
  m.def(
      "lstm_layer_backward(Tensor? grad_output, Tensor? grad_hy, Tensor? grad_cy, Tensor input, "
      "Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor? batch_sizes, Tensor? reset, bool reverse, Tensor output, Tensor gates, "
      "Tensor c_before, bool[7] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lstm_ext, CompositeExplicitAutograd, m) {
  m.impl("lstm_layer", composite::lstm_layer);
  m.impl("lstm_layer_forward", composite::lstm_layer_forward);
  m.impl("lstm_layer_backward", composite::lstm_layer_backward);
}

}  // namespace lstm_ext
