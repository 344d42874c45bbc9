// What the layer's operators check, and the layer in tensor operations.
#include "layer_ops.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <vector>

#include "sequence.h"

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

bool fusable(const LayerInputs& in) { return all_alike(in) && sizes_fit(in); }

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

void check_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                    const LayerResults& results) {
  check_sequence(in);
  check_backward_sizes(grads, in, results);
  for_each_tensor(
      [&](const at::Tensor& grad) {
        TORCH_CHECK(alike(grad, in.hx), "lstm_layer_backward: a gradient must have the states' ",
                    "dtype ", in.hx.scalar_type(), " and device ", in.hx.device());
      },
      grads);
  TORCH_CHECK(!any_tensor([&](const at::Tensor& t) { return !alike(t, in.hx); }, results),
              "lstm_layer_backward: output, gates and c_before must be those of "
              "lstm_layer_forward");
}

Sequence::Sequence(const LayerInputs& in) : N_(in.hx.size(0)), reverse_(in.reverse) {
  const bool packed = defined(in.batch_sizes);
  const int64_t L = packed ? in.batch_sizes->size(0) : in.input.size(0);
  const auto* sizes = packed ? in.batch_sizes->const_data_ptr<int64_t>() : nullptr;
  offset_.assign(L + 1, 0);
  for (int64_t t = 0; t < L; ++t)
    offset_[t + 1] = offset_[t] + (packed ? sizes[t * in.batch_sizes->stride(0)] : N_);
}

namespace composite {

at::Tensor reset_to_zero(const at::Tensor& state, const LayerInputs& in, int64_t t) {
  if (!defined(in.reset)) return state;
  const at::Tensor reset = in.reset->select(0, t).narrow(0, 0, state.size(0)).unsqueeze(1);
  return at::where(reset, at::zeros_like(state), state);
}

namespace {

// What the forward computed, step by step.
struct Steps {
  Sequence sequence;
  at::Tensor rows;  // the input [S, I]
  std::vector<at::Tensor> h_before, c_before, gates, output;
  at::Tensor h, c;  // in the end

  // What a step was computed from.
  CellInputs cell(const LayerInputs& in, const at::Tensor& input, int64_t t) const {
    return {input, h_before[t], c_before[t], in.w_ih, in.w_hh, in.b_ih, in.b_hh};
  }
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
  Steps steps = {Sequence(in), {}, {}, {}, {}, {}, in.hx, in.cx};
  const Sequence& sequence = steps.sequence;
  const int64_t L = sequence.L();
  steps.rows = in.input.reshape({sequence.S(), in.input.size(-1)});
  for (auto* list : {&steps.h_before, &steps.c_before, &steps.gates, &steps.output})
    list->resize(L);
  for (int64_t step = 0; step < L; ++step) {
    const int64_t t = sequence.time(step), n = sequence.rows(t);
    steps.h_before[t] = reset_to_zero(steps.h.narrow(0, 0, n), in, t);
    steps.c_before[t] = reset_to_zero(steps.c.narrow(0, 0, n), in, t);
    auto [h, c, gates] = cell_forward(steps.cell(in, sequence.of(steps.rows, t), t));
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
  if (!defined(in.batch_sizes)) output = output.view({steps.sequence.L(), N, H});
  return {output, steps.h.clone(), steps.c.clone(), join(steps.gates, 4 * H),
          join(steps.c_before, H)};
}

LayerOutputs layer(const LayerInputs& in) {
  auto [output, hy, cy, gates, before] = layer_forward(in);
  return {std::move(output), std::move(hy), std::move(cy)};
}

Gradients layer_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                         const LayerResults& results, const Wanted& wanted) {
  check_sequence(in);
  check_backward_sizes(grads, in, results);
  const Steps steps = run(in);
  const Sequence& sequence = steps.sequence;
  const int64_t L = sequence.L();
  at::Tensor grad_h = defined(grads.hy) ? *grads.hy : at::zeros_like(in.hx);
  at::Tensor grad_c = defined(grads.cy) ? *grads.cy : at::zeros_like(in.cx);
  const at::Tensor grad_output =
      defined(grads.output) ? grads.output->reshape({sequence.S(), in.hx.size(1)}) : at::Tensor();
  std::vector<at::Tensor> grad_rows(L);
  Gradients sum;
  Wanted of_step = wanted;
  of_step.hx = of_step.cx = true;
  for (int64_t step = L - 1; step >= 0; --step) {
    const int64_t t = sequence.time(step), n = sequence.rows(t);
    at::Tensor grad = grad_h.narrow(0, 0, n);
    if (grad_output.defined()) grad = grad + sequence.of(grad_output, t);
    Gradients found =
        cell_backward({grad, grad_c.narrow(0, 0, n)}, steps.cell(in, sequence.of(steps.rows, t), t),
                      {steps.gates[t]}, of_step);
    grad_rows[t] = std::move(found.input);
    sum.w_ih = sum_of(sum.w_ih, found.w_ih);
    sum.w_hh = sum_of(sum.w_hh, found.w_hh);
    sum.b_ih = sum_of(sum.b_ih, found.b_ih);
    sum.b_hh = sum_of(sum.b_hh, found.b_hh);
    grad_h = over(reset_to_zero(found.hx, in, t), grad_h);
    grad_c = over(reset_to_zero(found.cx, in, t), grad_c);
  }
  if (wanted.input)
    sum.input = L > 0 ? at::cat(grad_rows).view_as(in.input) : at::zeros_like(in.input);
  if (wanted.hx) sum.hx = grad_h;
  if (wanted.cx) sum.cx = grad_c;
  return sum;
}

}  // namespace composite

TORCH_LIBRARY_FRAGMENT(lstm_ext, m) {
  define<ops::lstm_layer, ops::lstm_layer_forward, ops::lstm_layer_backward, ops::lstm_layer_pack,
         ops::lstm_layer_packed>(m);
}

TORCH_LIBRARY_IMPL(lstm_ext, CompositeExplicitAutograd, m) {
  ops::lstm_layer::implement<composite::layer>(m);
  ops::lstm_layer_forward::implement<composite::layer_forward>(m);
  ops::lstm_layer_backward::implement<composite::layer_backward>(m);
}

}  // namespace lstm_ext
