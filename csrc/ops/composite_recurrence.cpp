// The recurrence in plain tensor operations, step by step.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <vector>

#include "core/cell_math.h"
#include "core/sequence.h"
#include "ops/composite.h"
#include "ops/recurrence.h"
#include "ops/tensor_cell.h"

namespace lstm_ext::composite {
namespace {

using at::Tensor;
// A normalised row, and one over its deviation [.., 1].
struct Normalized {
  Tensor value, scale;
};
Normalized normalize(const Tensor& rows, double eps) {
  const Tensor centred = rows - rows.mean(-1, /*keepdim=*/true);
  const Tensor scale = ((centred * centred).mean(-1, /*keepdim=*/true) + eps).rsqrt();
  return {centred * scale, scale};
}
// The gradient of rows, from that of their normalised values.
Tensor normalize_backward(const Normalized& normalized, const Tensor& grad) {
  const Tensor& value = normalized.value;
  return (grad - grad.mean(-1, true) - value * (grad * value).mean(-1, true)) * normalized.scale;
}

Tensor clip(const Tensor& value, double limit) {
  return limit > 0 ? value.clamp(-limit, limit) : value;
}
Tensor clip_backward(const Tensor& before, double limit, const Tensor& grad) {
  if (limit <= 0) return grad;
  return at::where(before.abs().le(limit), grad, at::zeros_like(grad));
}

// The rows of a mask at time t, or undefined.
Tensor mask_at(const std::optional<Tensor>& mask, const RecurrenceInputs& in,
               const Sequence& sequence, int64_t t) {
  if (!defined(mask)) return {};
  switch (mask_rows(*mask, in)) {
    case MaskRows::kUnit:
      return *mask;
    case MaskRows::kSequence:
      return mask->narrow(0, 0, sequence.rows(t));
    default:
      return sequence.of(mask->reshape({sequence.S(), mask->size(-1)}), t);
  }
}
// update * next + (1 - update) * before.
Tensor mix(const Tensor& update, const Tensor& next, const Tensor& before) {
  return update.defined() ? update * next + (1 - update) * before : next;
}

// rows W_hh^T; or, of rows that are masked h for each gate side by side, each by its part of W_hh.
Tensor multiply_gates(const Tensor& rows, const Tensor& w_hh, int64_t h_masks) {
  if (h_masks == 1) return at::linear(rows, w_hh);
  const std::vector<Tensor> of_gate = rows.chunk(h_masks, -1), w = w_hh.chunk(h_masks);
  std::vector<Tensor> parts;
  for (int64_t k = 0; k < h_masks; ++k) parts.push_back(at::linear(of_gate[k], w[k]));
  return at::cat(parts, -1);
}
// The gradients of these rows and of W_hh.
Tensor rows_gradient(const Tensor& grad, const Tensor& w_hh, int64_t h_masks) {
  if (h_masks == 1) return grad.mm(w_hh);
  const std::vector<Tensor> of_gate = grad.chunk(h_masks, -1), w = w_hh.chunk(h_masks);
  std::vector<Tensor> parts;
  for (int64_t k = 0; k < h_masks; ++k) parts.push_back(of_gate[k].mm(w[k]));
  return at::cat(parts, -1);
}
Tensor gates_gradient(const Tensor& grad, const Tensor& rows, int64_t h_masks) {
  if (h_masks == 1) return grad.t().mm(rows);
  const std::vector<Tensor> of_gate = grad.chunk(h_masks, -1), of_rows = rows.chunk(h_masks, -1);
  std::vector<Tensor> parts;
  for (int64_t k = 0; k < h_masks; ++k) parts.push_back(of_gate[k].t().mm(of_rows[k]));
  return at::cat(parts);
}
// dropout_h * h, once or for each gate.
Tensor drop_h(const Tensor& mask, const Tensor& h, int64_t h_masks) {
  return mask.defined() ? (h_masks == 1 ? h : h.repeat({1, h_masks})) * mask : h;
}
Tensor drop_h_backward(const Tensor& mask, const Tensor& grad, int64_t h_masks) {
  if (!mask.defined()) return grad;
  Tensor sum;
  for (const Tensor& part : (grad * mask).chunk(h_masks, -1))
    sum = sum.defined() ? sum + part : part;
  return sum;
}

Tensor plus(const Tensor& value, const std::optional<Tensor>& bias) {
  return defined(bias) ? value + *bias : value;
}

// One step, and what its backward needs.
struct RecurrenceStep {
  Tensor update_h, update_c, dropout_h;
  Tensor h_multiplied, c_before;
  Normalized z, c;
  TensorGates gate;
  Tensor raw_c, tanh_c, r, projected;
  Tensor h_next, c_next;
};

RecurrenceStep make_step(const RecurrenceInputs& in, const Sequence& sequence, int64_t t,
                         const Tensor& rows, const Tensor& h, const Tensor& c) {
  RecurrenceStep step;
  step.update_h = mask_at(in.update_h, in, sequence, t);
  step.update_c = mask_at(in.update_c, in, sequence, t);
  step.dropout_h = mask_at(in.dropout_h, in, sequence, t);
  const int64_t h_masks = h_masks_of(in);
  step.h_multiplied = drop_h(step.dropout_h, h, h_masks);
  step.c_before = c;
  const Tensor z = multiply_gates(step.h_multiplied, in.w_hh, h_masks), x = sequence.of(rows, t);
  Tensor pre;
  if (!defined(in.norm)) {
    pre = x + z;
  } else if (in.norm_joint) {
    step.z = normalize(x + z, in.eps);
    pre = step.z.value * *in.norm;
  } else {
    step.z = normalize(z, in.eps);
    pre = x + step.z.value * *in.norm;
  }
  step.gate = PlainCell::activate<TensorMath>(quarters(plus(pre, in.bias)));
  step.raw_c = next_cell_state(step.gate, c);
  const Tensor clipped = clip(step.raw_c, in.cell_clip);
  Tensor shown = clipped;
  if (defined(in.norm_c)) {
    step.c = normalize(clipped, in.eps);
    shown = plus(step.c.value * *in.norm_c, in.bias_c);
  }
  step.tanh_c = shown.tanh();
  step.r = step.gate.o * step.tanh_c;
  if (in.projects()) step.projected = at::linear(step.r, *in.w_hr);
  const Tensor h_new = in.projects() ? clip(step.projected, in.projection_clip) : step.r;
  step.h_next = mix(step.update_h, h_new, h);
  step.c_next = mix(step.update_c, in.carry_norm ? shown : clipped, c);
  return step;
}

struct RecurrenceSteps {
  Sequence sequence;
  std::vector<RecurrenceStep> at;  // by time
  Tensor h, c;                     // in the end
};

RecurrenceSteps run_recurrence(const RecurrenceInputs& in) {
  check_recurrence(in);
  const LayerInputs layer = in.sequence();
  RecurrenceSteps steps = {Sequence(layer), {}, in.hx, in.cx};
  const Sequence& sequence = steps.sequence;
  steps.at.resize(sequence.L());
  const Tensor rows = in.gates_x.reshape({sequence.S(), in.gates_x.size(-1)});
  for (int64_t s = 0; s < sequence.L(); ++s) {
    const int64_t t = sequence.time(s), n = sequence.rows(t);
    steps.at[t] = make_step(in, sequence, t, rows, reset_to_zero(steps.h.narrow(0, 0, n), layer, t),
                            reset_to_zero(steps.c.narrow(0, 0, n), layer, t));
    // Sequences that have ended, or in reverse not begun, keep their states.
    steps.h = over(steps.at[t].h_next, steps.h);
    steps.c = over(steps.at[t].c_next, steps.c);
  }
  return steps;
}

template <class Of>
Tensor join_steps(const RecurrenceSteps& steps, const Tensor& like, int64_t columns, const Of& of) {
  std::vector<Tensor> parts;
  for (const RecurrenceStep& step : steps.at) parts.push_back(of(step));
  return parts.empty() ? like.new_empty({0, columns}) : at::cat(parts);
}

Tensor output_of(const RecurrenceSteps& steps, const RecurrenceInputs& in) {
  const Tensor rows = join_steps(steps, in.hx, in.hx.size(1),
                                 [](const RecurrenceStep& step) { return step.h_next; });
  if (defined(in.batch_sizes)) return rows;
  return rows.view({steps.sequence.L(), in.hx.size(0), in.hx.size(1)});
}

}  // namespace

LayerOutputs recurrence(const RecurrenceInputs& in) {
  const RecurrenceSteps steps = run_recurrence(in);
  return {output_of(steps, in), steps.h.clone(), steps.c.clone()};
}

RecurrenceTrainingOutputs recurrence_forward(const RecurrenceInputs& in) {
  const RecurrenceSteps steps = run_recurrence(in);
  const int64_t H = in.cx.size(1), P = in.hx.size(1), h_masks = h_masks_of(in);
  const Tensor none = in.hx.new_empty({0, 4 * H});
  RecurrenceTrainingOutputs out;
  out.output = output_of(steps, in);
  out.hy = steps.h.clone();
  out.cy = steps.c.clone();
  out.kept.gates =
      join_steps(steps, in.hx, 4 * H, [](const RecurrenceStep& step) { return join(step.gate); });
  out.kept.c_before =
      join_steps(steps, in.hx, H, [](const RecurrenceStep& step) { return step.c_before; });
  out.kept.h_before = join_steps(steps, in.hx, h_masks * P,
                                 [](const RecurrenceStep& step) { return step.h_multiplied; });
  const at::ScalarType sums = in.hx.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (defined(in.norm)) {
    out.kept.normalized =
        join_steps(steps, in.hx, 4 * H, [](const RecurrenceStep& step) { return step.z.value; });
    out.kept.scale =
        join_steps(steps, in.hx, 1, [](const RecurrenceStep& step) { return step.z.scale; })
            .flatten()
            .to(sums);
  } else {
    out.kept.normalized = none;
    out.kept.scale = in.hx.new_empty({0}, in.hx.options().dtype(sums));
  }
  if (in.projects()) {
    out.kept.r = join_steps(steps, in.hx, H, [](const RecurrenceStep& step) { return step.r; });
    out.kept.projected =
        join_steps(steps, in.hx, P, [](const RecurrenceStep& step) { return step.projected; });
  } else {
    out.kept.r = in.hx.new_empty({0, H});
    out.kept.projected = in.hx.new_empty({0, P});
  }
  return out;
}

// The forward is run anew, so that the gradients are differentiable too: what it kept is only
// checked.
RecurrenceGradients recurrence_backward(const LayerOutputGradients& grads,
                                        const RecurrenceInputs& in,
                                        const RecurrenceResults& results,
                                        const RecurrenceWanted& wanted) {
  check_recurrence(in);
  check_backward_sizes(grads, in, results);
  const RecurrenceSteps steps = run_recurrence(in);
  const LayerInputs layer = in.sequence();
  const int64_t h_masks = h_masks_of(in);
  const Sequence& sequence = steps.sequence;
  Tensor grad_h = defined(grads.hy) ? *grads.hy : at::zeros_like(in.hx);
  Tensor grad_c = defined(grads.cy) ? *grads.cy : at::zeros_like(in.cx);
  const Tensor grad_output =
      defined(grads.output) ? grads.output->reshape({sequence.S(), in.hx.size(1)}) : Tensor();
  std::vector<Tensor> grad_rows(sequence.L());
  RecurrenceGradients sum;
  const auto add = [](bool asked, Tensor& to, const auto& term) {
    if (asked) to = to.defined() ? to + term() : term();
  };
  for (int64_t s = sequence.L() - 1; s >= 0; --s) {
    const int64_t t = sequence.time(s), n = sequence.rows(t);
    const RecurrenceStep& step = steps.at[t];
    Tensor of_h = grad_h.narrow(0, 0, n), of_c = grad_c.narrow(0, 0, n), past_h, past_c;
    if (grad_output.defined()) of_h = of_h + sequence.of(grad_output, t);
    const auto split = [](const Tensor& update, Tensor& through, Tensor& past) {
      if (!update.defined()) return;
      past = (1 - update) * through;
      through = update * through;
    };
    split(step.update_h, of_h, past_h);
    split(step.update_c, of_c, past_c);
    if (in.projects()) {
      const Tensor of_projected = clip_backward(step.projected, in.projection_clip, of_h);
      add(wanted.w_hr, sum.w_hr, [&] { return of_projected.t().mm(step.r); });
      of_h = of_projected.mm(*in.w_hr);
    }
    const Tensor of_o = PlainCell::output_gradient(step.gate, step.tanh_c, of_h);
    Tensor of_shown = PlainCell::shown_gradient(step.gate, step.tanh_c, of_h);
    if (defined(in.norm_c)) {
      if (in.carry_norm) of_shown = of_shown + of_c;
      add(wanted.norm_c, sum.norm_c, [&] { return (of_shown * step.c.value).sum(0); });
      add(wanted.bias_c && defined(in.bias_c), sum.bias_c, [&] { return of_shown.sum(0); });
      of_shown = normalize_backward(step.c, of_shown * *in.norm_c);
      if (!in.carry_norm) of_shown = of_shown + of_c;
    } else {
      of_shown = of_shown + of_c;
    }
    of_shown = clip_backward(step.raw_c, in.cell_clip, of_shown);
    Tensor of_c_before;
    const TensorGates grad =
        PlainCell::state_gradients(step.gate, step.c_before, of_shown, of_o, of_c_before);
    const Tensor of_pre = join(grad);
    add(wanted.bias && defined(in.bias), sum.bias, [&] { return of_pre.sum(0); });
    Tensor of_z = of_pre;
    if (defined(in.norm)) {
      add(wanted.norm, sum.norm, [&] { return (of_pre * step.z.value).sum(0); });
      of_z = normalize_backward(step.z, of_pre * *in.norm);
    }
    grad_rows[t] = defined(in.norm) && !in.norm_joint ? of_pre : of_z;
    add(wanted.w_hh, sum.w_hh, [&] { return gates_gradient(of_z, step.h_multiplied, h_masks); });
    Tensor of_h_before =
        drop_h_backward(step.dropout_h, rows_gradient(of_z, in.w_hh, h_masks), h_masks);
    if (past_h.defined()) of_h_before = of_h_before + past_h;
    if (past_c.defined()) of_c_before = of_c_before + past_c;
    grad_h = over(reset_to_zero(of_h_before, layer, t), grad_h);
    grad_c = over(reset_to_zero(of_c_before, layer, t), grad_c);
  }
  if (wanted.gates_x)
    sum.gates_x =
        grad_rows.empty() ? at::zeros_like(in.gates_x) : at::cat(grad_rows).view_as(in.gates_x);
  if (wanted.hx) sum.hx = grad_h;
  if (wanted.cx) sum.cx = grad_c;
  const auto or_zeros = [](bool asked, Tensor& grad, const auto& like) {
    const Tensor& tensor = or_undefined(like);
    if (asked && tensor.defined() && !grad.defined()) grad = at::zeros_like(tensor);
  };
  or_zeros(wanted.w_hh, sum.w_hh, in.w_hh);
  or_zeros(wanted.bias, sum.bias, in.bias);
  or_zeros(wanted.norm, sum.norm, in.norm);
  or_zeros(wanted.norm_c, sum.norm_c, in.norm_c);
  or_zeros(wanted.bias_c, sum.bias_c, in.bias_c);
  or_zeros(wanted.w_hr, sum.w_hr, in.w_hr);
  return sum;
}

}  // namespace lstm_ext::composite

namespace lstm_ext {

TORCH_LIBRARY_IMPL(lstm_ext, CompositeExplicitAutograd, m) {
  ops::lstm_recurrence::implement<composite::recurrence>(m);
  ops::lstm_recurrence_forward::implement<composite::recurrence_forward>(m);
  ops::lstm_recurrence_backward::implement<composite::recurrence_backward>(m);
}

}  // namespace lstm_ext
