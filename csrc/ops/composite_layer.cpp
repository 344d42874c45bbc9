// The layer in plain tensor operations, step by step.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <vector>

#include "core/sequence.h"
#include "ops/composite.h"
#include "ops/projected.h"

namespace lstm_ext::composite {

namespace {

// Which of n rows time t starts anew, [n, 1].
at::Tensor reset_rows(const LayerInputs& in, int64_t t, int64_t n) {
  return in.reset->select(0, t).narrow(0, 0, n).unsqueeze(1);
}

}  // namespace

at::Tensor reset_to(const std::optional<at::Tensor>& value, const at::Tensor& state,
                    const LayerInputs& in, int64_t t) {
  if (!defined(in.reset)) return state;
  const int64_t n = state.size(0);
  const at::Tensor to = !defined(value)        ? at::zeros_like(state)
                        : reset_by_step(value) ? value->select(0, t).narrow(0, 0, n)
                                               : value->narrow(0, 0, n);
  return at::where(reset_rows(in, t, n), to, state);
}

// first, and below it the rows of whole that it leaves out.
at::Tensor over(const at::Tensor& first, const at::Tensor& whole) {
  const int64_t n = first.size(0), N = whole.size(0);
  return n == N ? first : at::cat({first, whole.narrow(0, n, N - n)});
}

at::Tensor reset_to_zero(const at::Tensor& state, const LayerInputs& in, int64_t t) {
  return reset_to(std::nullopt, state, in, t);
}

namespace {

// What the forward computed, step by step.
struct Steps {
  Sequence sequence;
  at::Tensor rows;  // the input [S, I]
  std::vector<at::Tensor> h_before, c_before, gates, output, cells;
  std::vector<at::Tensor> r;  // where h is projected
  at::Tensor h, c;            // in the end

  // What a step was computed from.
  CellInputs cell(const LayerInputs& in, const at::Tensor& input, int64_t t) const {
    return {input,   h_before[t], c_before[t],     in.w_ih,   in.w_hh,
            in.b_ih, in.b_hh,     in.unit_weights, in.variant};
  }
};

// w_hr: undefined where h is not projected.
Steps run(const StatesInputs& in, const at::Tensor& w_hr) {
  const bool projects = w_hr.defined();
  check_states(in, projects);
  check_variant(in, in.cx.size(1));
  TORCH_CHECK(sizes_fit(in, projects), "expected weights (4H, I) and (4H, ", projects ? "P" : "H",
              "), and biases (4H) or None, with H ", in.cx.size(1), " and I ", in.input.size(-1),
              "; got weights of shape ", in.w_ih.sizes(), " and ", in.w_hh.sizes());
  Steps steps = {Sequence(in), {}, {}, {}, {}, {}, {}, {}, in.hx, in.cx};
  const Sequence& sequence = steps.sequence;
  const int64_t L = sequence.L();
  steps.rows = in.input.reshape({sequence.S(), in.input.size(-1)});
  for (auto* list : {&steps.h_before, &steps.c_before, &steps.gates, &steps.output, &steps.cells})
    list->resize(L);
  if (projects) steps.r.resize(L);
  for (int64_t step = 0; step < L; ++step) {
    const int64_t t = sequence.time(step), n = sequence.rows(t);
    steps.h_before[t] = reset_to(in.reset_hx, steps.h.narrow(0, 0, n), in, t);
    steps.c_before[t] = reset_to(in.reset_cx, steps.c.narrow(0, 0, n), in, t);
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
    steps.cells[t] = std::move(c);
    steps.gates[t] = std::move(gates);
  }
  return steps;
}

at::Tensor sum_of(const at::Tensor& sum, const at::Tensor& term) {
  return sum.defined() && term.defined() ? sum + term : sum.defined() ? sum : term;
}

// Of all steps, [S, columns].
at::Tensor join(const std::vector<at::Tensor>& parts, int64_t columns, const LayerInputs& in) {
  return parts.empty() ? in.hx.new_empty({0, columns}) : at::cat(parts);
}
// The same of h or c, as the input is laid out.
at::Tensor join_states(const Steps& steps, const std::vector<at::Tensor>& parts,
                       const LayerInputs& in) {
  const at::Tensor rows = join(parts, in.hx.size(1), in);
  if (defined(in.batch_sizes)) return rows;
  return rows.view({steps.sequence.L(), in.hx.size(0), in.hx.size(1)});
}

// The gradient of a state that resets set: what they cut off of that of the state before a step.
class CutOff {
 public:
  CutOff(bool wanted, const std::optional<at::Tensor>& state, const LayerInputs& in)
      : wanted_(wanted), state_(state), in_(in), none_(at::zeros_like(in.hx)), sum_(none_) {
    if (wanted && reset_by_step(state)) steps_.assign(state->size(0), none_);
  }
  // of_state: the first rows' at time t.
  void add(int64_t t, const at::Tensor& of_state) {
    if (!wanted_ || !defined(in_.reset)) return;
    const int64_t n = of_state.size(0);
    const at::Tensor cut = at::where(reset_rows(in_, t, n), of_state, at::zeros_like(of_state));
    if (reset_by_step(state_))
      steps_[t] = over(cut, none_);
    else
      sum_ = over(sum_.narrow(0, 0, n) + cut, sum_);
  }
  at::Tensor result() const {
    if (!wanted_) return {};
    if (!reset_by_step(state_)) return sum_;
    return steps_.empty() ? at::zeros_like(*state_) : at::stack(steps_);
  }

 private:
  const bool wanted_;
  const std::optional<at::Tensor>& state_;
  const LayerInputs& in_;
  const at::Tensor none_;
  at::Tensor sum_;
  std::vector<at::Tensor> steps_;
};

}  // namespace

LayerTrainingOutputs layer_forward(const LayerInputs& in) {
  const Steps steps = run(StatesInputs::plain(in), {});
  const int64_t H = in.hx.size(1);
  return {join_states(steps, steps.output, in), steps.h.clone(), steps.c.clone(),
          join(steps.gates, 4 * H, in), join(steps.c_before, H, in)};
}

StatesTrainingOutputs layer_states_forward(const StatesInputs& in) {
  const Steps steps = run(in, {});
  const int64_t H = in.hx.size(1);
  return {join_states(steps, steps.output, in),
          steps.h.clone(),
          steps.c.clone(),
          join_states(steps, steps.cells, in),
          join(steps.gates, 4 * H, in),
          join(steps.c_before, H, in)};
}

StatesOutputs layer_states(const StatesInputs& in) {
  auto [output, hy, cy, cells, gates, before] = layer_states_forward(in);
  return {std::move(output), std::move(hy), std::move(cy), std::move(cells)};
}

namespace {

void check_w_hr(const ProjectedInputs& in) {
  const auto& w = in.w_hr;
  TORCH_CHECK(in.hx.dim() == 2 && in.cx.dim() == 2 && w.dim() == 2 && w.size(0) == in.hx.size(1) &&
                  w.size(1) == in.cx.size(1),
              "expected states (N, P) and (N, H) and w_hr (P, H); got states of ", in.hx.sizes(),
              " and ", in.cx.sizes(), ", w_hr of ", w.sizes());
}

}  // namespace

ProjectedTrainingOutputs projected_forward(const ProjectedInputs& in) {
  check_w_hr(in);
  const Steps steps = run(StatesInputs::plain(in), in.w_hr);
  const int64_t H = in.cx.size(1);
  return {join_states(steps, steps.output, in),
          steps.h.clone(),
          steps.c.clone(),
          join(steps.gates, 4 * H, in),
          join(steps.c_before, H, in),
          join(steps.r, H, in)};
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
StatesGradients backward(const StatesOutputGradients& grads, const StatesInputs& in,
                         const StatesWanted& wanted, const at::Tensor& w_hr,
                         at::Tensor* grad_w_hr) {
  const Steps steps = run(in, w_hr);
  const Sequence& sequence = steps.sequence;
  const int64_t L = sequence.L();
  at::Tensor grad_h = defined(grads.hy) ? *grads.hy : at::zeros_like(in.hx);
  at::Tensor grad_c = defined(grads.cy) ? *grads.cy : at::zeros_like(in.cx);
  const auto rows_of = [&](const std::optional<at::Tensor>& grad) {
    return defined(grad) ? grad->reshape({sequence.S(), in.hx.size(1)}) : at::Tensor();
  };
  const at::Tensor grad_output = rows_of(grads.output), grad_cells = rows_of(grads.cells);
  std::vector<at::Tensor> grad_rows(L);
  StatesGradients sum;
  CutOff of_reset_hx(wanted.reset_hx, in.reset_hx, in);
  CutOff of_reset_cx(wanted.reset_cx, in.reset_cx, in);
  Wanted of_step = wanted;
  of_step.hx = of_step.cx = true;
  for (int64_t step = L - 1; step >= 0; --step) {
    const int64_t t = sequence.time(step), n = sequence.rows(t);
    at::Tensor grad = grad_h.narrow(0, 0, n), of_c = grad_c.narrow(0, 0, n);
    if (grad_output.defined()) grad = grad + sequence.of(grad_output, t);
    if (grad_cells.defined()) of_c = of_c + sequence.of(grad_cells, t);
    if (grad_w_hr) *grad_w_hr = sum_of(*grad_w_hr, grad.t().mm(steps.r[t]));
    if (w_hr.defined()) grad = grad.mm(w_hr);
    const auto of_cell = w_hr.defined() ? projected_cell_backward : cell_backward;
    Gradients found = of_cell({grad, of_c}, steps.cell(in, sequence.of(steps.rows, t), t),
                              {steps.gates[t]}, of_step);
    grad_rows[t] = std::move(found.input);
    sum.w_ih = sum_of(sum.w_ih, found.w_ih);
    sum.w_hh = sum_of(sum.w_hh, found.w_hh);
    sum.b_ih = sum_of(sum.b_ih, found.b_ih);
    sum.b_hh = sum_of(sum.b_hh, found.b_hh);
    sum.unit_weights = sum_of(sum.unit_weights, found.unit_weights);
    of_reset_hx.add(t, found.hx);
    of_reset_cx.add(t, found.cx);
    grad_h = over(reset_to_zero(found.hx, in, t), grad_h);
    grad_c = over(reset_to_zero(found.cx, in, t), grad_c);
  }
  if (wanted.input)
    sum.input = L > 0 ? at::cat(grad_rows).view_as(in.input) : at::zeros_like(in.input);
  sum.reset_hx = of_reset_hx.result();
  sum.reset_cx = of_reset_cx.result();
  if (wanted.hx) sum.hx = grad_h;
  if (wanted.cx) sum.cx = grad_c;
  return sum;
}

}  // namespace

Gradients layer_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                         const LayerResults& results, const Wanted& wanted) {
  return layer_states_backward(StatesOutputGradients::plain(grads), StatesInputs::plain(in),
                               results, {wanted, false, false});
}

StatesGradients layer_states_backward(const StatesOutputGradients& grads, const StatesInputs& in,
                                      const LayerResults& results, const StatesWanted& wanted) {
  check_states(in);
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
  static_cast<Gradients&>(out) =
      backward(StatesOutputGradients::plain(grads), StatesInputs::plain(in),
               {wanted.layer, false, false}, in.w_hr, grad_w_hr);
  if (grad_w_hr && !out.w_hr.defined()) out.w_hr = at::zeros_like(in.w_hr);
  return out;
}

}  // namespace lstm_ext::composite

namespace lstm_ext {

TORCH_LIBRARY_IMPL(lstm_ext, CompositeExplicitAutograd, m) {
  ops::lstm_layer::implement<composite::layer>(m);
  ops::lstm_layer_forward::implement<composite::layer_forward>(m);
  ops::lstm_layer_backward::implement<composite::layer_backward>(m);
  ops::lstm_layer_states::implement<composite::layer_states>(m);
  ops::lstm_layer_states_forward::implement<composite::layer_states_forward>(m);
  ops::lstm_layer_states_backward::implement<composite::layer_states_backward>(m);
  ops::lstm_layer_projected::implement<composite::projected>(m);
  ops::lstm_layer_projected_forward::implement<composite::projected_forward>(m);
  ops::lstm_layer_projected_backward::implement<composite::projected_backward>(m);
}

}  // namespace lstm_ext
