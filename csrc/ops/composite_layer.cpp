// The layer in plain tensor operations, step by step.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <vector>

#include "core/sequence.h"
#include "ops/composite.h"
#include "ops/projected.h"

namespace lstm_ext::composite {

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
  std::vector<at::Tensor> r;  // where h is projected
  at::Tensor h, c;            // in the end

  // What a step was computed from.
  CellInputs cell(const LayerInputs& in, const at::Tensor& input, int64_t t) const {
    return {input,   h_before[t], c_before[t],     in.w_ih,   in.w_hh,
            in.b_ih, in.b_hh,     in.unit_weights, in.variant};
  }
};

// first, and below it the rows of whole that it leaves out.
at::Tensor over(const at::Tensor& first, const at::Tensor& whole) {
  const int64_t n = first.size(0), N = whole.size(0);
  return n == N ? first : at::cat({first, whole.narrow(0, n, N - n)});
}

// w_hr: undefined where h is not projected.
Steps run(const LayerInputs& in, const at::Tensor& w_hr) {
  const bool projects = w_hr.defined();
  check_sequence(in, projects);
  check_variant(in, in.cx.size(1));
  TORCH_CHECK(sizes_fit(in, projects), "expected weights (4H, I) and (4H, ", projects ? "P" : "H",
              "), and biases (4H) or None, with H ", in.cx.size(1), " and I ", in.input.size(-1),
              "; got weights of shape ", in.w_ih.sizes(), " and ", in.w_hh.sizes());
  Steps steps = {Sequence(in), {}, {}, {}, {}, {}, {}, in.hx, in.cx};
  const Sequence& sequence = steps.sequence;
  const int64_t L = sequence.L();
  steps.rows = in.input.reshape({sequence.S(), in.input.size(-1)});
  for (auto* list : {&steps.h_before, &steps.c_before, &steps.gates, &steps.output})
    list->resize(L);
  if (projects) steps.r.resize(L);
  for (int64_t step = 0; step < L; ++step) {
    const int64_t t = sequence.time(step), n = sequence.rows(t);
    steps.h_before[t] = reset_to_zero(steps.h.narrow(0, 0, n), in, t);
    steps.c_before[t] = reset_to_zero(steps.c.narrow(0, 0, n), in, t);
    const at::Tensor input = sequence.of(steps.rows, t);
    const CellInputs cell = steps.cell(in, input, t);
    auto [h, c, gates] = projects ? projected_cell_forward(cell) : cell_forward(cell);
    if (projects) {
      steps.r[t] = h;
      h = at::linear(h, w_hr);
    }
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

namespace {

ProjectedTrainingOutputs forward(const LayerInputs& in, const at::Tensor& w_hr) {
  const Steps steps = run(in, w_hr);
  const int64_t N = in.hx.size(0), H = in.cx.size(1), P = in.hx.size(1);
  const auto join = [&](const std::vector<at::Tensor>& parts, int64_t columns) {
    return parts.empty() ? in.hx.new_empty({0, columns}) : at::cat(parts);
  };
  at::Tensor output = join(steps.output, P);
  if (!defined(in.batch_sizes)) output = output.view({steps.sequence.L(), N, P});
  return {output,
          steps.h.clone(),
          steps.c.clone(),
          join(steps.gates, 4 * H),
          join(steps.c_before, H),
          w_hr.defined() ? join(steps.r, H) : at::Tensor()};
}

void check_w_hr(const ProjectedInputs& in) {
  const auto& w = in.w_hr;
  TORCH_CHECK(in.hx.dim() == 2 && in.cx.dim() == 2 && w.dim() == 2 && w.size(0) == in.hx.size(1) &&
                  w.size(1) == in.cx.size(1),
              "expected states (N, P) and (N, H) and w_hr (P, H); got states of ", in.hx.sizes(),
              " and ", in.cx.sizes(), ", w_hr of ", w.sizes());
}

}  // namespace

LayerTrainingOutputs layer_forward(const LayerInputs& in) {
  auto [output, hy, cy, gates, before, none] = forward(in, {});
  return {std::move(output), std::move(hy), std::move(cy), std::move(gates), std::move(before)};
}

ProjectedTrainingOutputs projected_forward(const ProjectedInputs& in) {
  check_w_hr(in);
  return forward(in, in.w_hr);
}

LayerOutputs projected(const ProjectedInputs& in) {
  auto [output, hy, cy, gates, before, r] = projected_forward(in);
  return {std::move(output), std::move(hy), std::move(cy)};
}

LayerOutputs layer(const LayerInputs& in) {
  auto [output, hy, cy, gates, before] = layer_forward(in);
  return {std::move(output), std::move(hy), std::move(cy)};
}

namespace {

// w_hr and grad_w_hr: where h is projected.
Gradients backward(const LayerOutputGradients& grads, const LayerInputs& in, const Wanted& wanted,
                   const at::Tensor& w_hr, at::Tensor* grad_w_hr) {
  const Steps steps = run(in, w_hr);
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
    if (grad_w_hr) *grad_w_hr = sum_of(*grad_w_hr, grad.t().mm(steps.r[t]));
    if (w_hr.defined()) grad = grad.mm(w_hr);
    const auto of_cell = w_hr.defined() ? projected_cell_backward : cell_backward;
    Gradients found =
        of_cell({grad, grad_c.narrow(0, 0, n)}, steps.cell(in, sequence.of(steps.rows, t), t),
                {steps.gates[t]}, of_step);
    grad_rows[t] = std::move(found.input);
    sum.w_ih = sum_of(sum.w_ih, found.w_ih);
    sum.w_hh = sum_of(sum.w_hh, found.w_hh);
    sum.b_ih = sum_of(sum.b_ih, found.b_ih);
    sum.b_hh = sum_of(sum.b_hh, found.b_hh);
    sum.unit_weights = sum_of(sum.unit_weights, found.unit_weights);
    grad_h = over(reset_to_zero(found.hx, in, t), grad_h);
    grad_c = over(reset_to_zero(found.cx, in, t), grad_c);
  }
  if (wanted.input)
    sum.input = L > 0 ? at::cat(grad_rows).view_as(in.input) : at::zeros_like(in.input);
  if (wanted.hx) sum.hx = grad_h;
  if (wanted.cx) sum.cx = grad_c;
  return sum;
}

}  // namespace

Gradients layer_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                         const LayerResults& results, const Wanted& wanted) {
  check_sequence(in);
  check_backward_sizes(grads, in, results);
  return backward(grads, in, wanted, {}, nullptr);
}

ProjectedGradients projected_backward(const LayerOutputGradients& grads, const ProjectedInputs& in,
                                      const ProjectedResults& results,
                                      const ProjectedWanted& wanted) {
  check_w_hr(in);
  check_sequence(in, /*projected=*/true);
  check_backward_sizes(grads, in, results);
  ProjectedGradients out;
  at::Tensor* grad_w_hr = wanted.w_hr ? &out.w_hr : nullptr;
  static_cast<Gradients&>(out) = backward(grads, in, wanted.layer, in.w_hr, grad_w_hr);
  if (grad_w_hr && !out.w_hr.defined()) out.w_hr = at::zeros_like(in.w_hr);
  return out;
}

}  // namespace lstm_ext::composite

namespace lstm_ext {

TORCH_LIBRARY_IMPL(lstm_ext, CompositeExplicitAutograd, m) {
  ops::lstm_layer::implement<composite::layer>(m);
  ops::lstm_layer_forward::implement<composite::layer_forward>(m);
  ops::lstm_layer_backward::implement<composite::layer_backward>(m);
  ops::lstm_layer_projected::implement<composite::projected>(m);
  ops::lstm_layer_projected_forward::implement<composite::projected_forward>(m);
  ops::lstm_layer_projected_backward::implement<composite::projected_backward>(m);
}

}  // namespace lstm_ext
