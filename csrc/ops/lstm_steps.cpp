#include "ops/lstm_steps.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/bernoulli.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>

#include <cmath>
#include <limits>

#include "core/cells.h"
#include "ops/cell.h"
#include "ops/lstm.h"
#include "ops/recurrence.h"

namespace lstm_ext {
namespace {

using at::Tensor;

// 1 with probability 1 - p, else 0; the same draws as keep_mask in _recurrence.py, which says why.
Tensor keep_mask(at::IntArrayRef size, double p, const Tensor& like) {
  constexpr double kWords = 65536;
  const auto limit = static_cast<int64_t>(std::nearbyint((1 - p) * kWords) - kWords / 2);
  if (!like.is_cpu() || limit >= kWords / 2)
    return at::bernoulli(at::full(size, 1 - p, like.options()));
  const int64_t count = c10::multiply_integers(size);
  Tensor words = at::empty({(count + 3) / 4}, at::dtype(at::kLong));
  words.random_(std::numeric_limits<int64_t>::min(), std::optional<int64_t>());
  return (words.view(at::kShort).narrow(0, 0, count).view(size) < limit).to(like.scalar_type());
}

struct Masks {
  std::optional<Tensor> update_h, update_c, dropout_h;
};

// draw_masks in _recurrence.py, in its order.
Masks draw_masks(const StepOptions& o, const Tensor& x, const Tensor& h, const Tensor& c) {
  const auto rows_of = [](const Tensor& t) { return t.sizes().slice(0, t.dim() - 1).vec(); };
  const auto of = [](std::vector<int64_t> rows, int64_t columns) {
    rows.push_back(columns);
    return rows;
  };
  Masks masks;
  if (const double p = o.recurrent_dropout; o.training && p > 0) {
    const int64_t columns = h.size(1) * (o.dropout_per_gate ? 4 : 1);
    const Tensor mask = keep_mask(of(rows_of(o.dropout_per_step ? x : h), columns), p, x);
    masks.dropout_h = p < 1 ? mask / (1 - p) : mask;
  }
  const auto update = [&](double p, const Tensor& state) -> std::optional<Tensor> {
    if (p == 0) return std::nullopt;
    if (!o.training) return at::full({state.size(1)}, 1 - p, x.options());
    return keep_mask(of(rows_of(x), state.size(1)), p, x);
  };
  masks.update_h = update(o.zoneout_h, h);
  masks.update_c = update(o.zoneout_c, c);
  return masks;
}

LayerOutputs layer(const Tensor& x, const Tensor& h, const Tensor& c, const StepWeights& w,
                   const StepOptions& o, const std::optional<Tensor>& batch_sizes, bool reverse) {
  static const std::optional<Tensor> none;
  std::optional<Tensor> bias = w.b_ih;
  if (w.b_hh) bias = bias ? *bias + *w.b_hh : *w.b_hh;
  const Masks masks = draw_masks(o, x, h, c);
  Tensor gates_x;
  if (!o.norms) {
    gates_x = at::linear(x, w.w_ih, bias);
    bias.reset();
  } else {
    gates_x = at::linear(x, w.w_ih);
    if (!o.norm_joint) {
      gates_x = at::layer_norm(gates_x, {gates_x.size(-1)}, w.norm_ih, bias, o.eps);
      bias.reset();
    }
  }
  return ops::lstm_recurrence::call({gates_x,
                                     h,
                                     c,
                                     w.w_hh,
                                     bias,
                                     w.norm,
                                     w.norm_c,
                                     w.bias_c,
                                     w.w_hr,
                                     masks.update_h,
                                     masks.update_c,
                                     masks.dropout_h,
                                     batch_sizes,
                                     none,
                                     reverse,
                                     o.norm_joint,
                                     o.carry_norm,
                                     o.eps,
                                     o.cell_clip,
                                     o.projection_clip});
}

// With f = 1 - i, and with elements or rows of w_hh dropped: couple_gates and drop_weights in
// _recurrence.py.
StepWeights changed(StepWeights w, const StepOptions& o) {
  if (o.coupled_gates) {
    const auto couple = [](const Tensor& t) {
      const std::vector<Tensor> gates = t.chunk(4);
      TORCH_CHECK(gates.size() == 4, "expected the rows of four gates, got ", t.size(0));
      return at::cat({gates[0], -gates[0], gates[2], gates[3]});
    };
    w.w_ih = couple(w.w_ih);
    w.w_hh = couple(w.w_hh);
    if (w.b_ih) w.b_ih = couple(*w.b_ih);
    if (w.b_hh) w.b_hh = couple(*w.b_hh);
  }
  if (const double p = o.weight_dropout; o.training && p > 0) {
    const int64_t columns = o.weight_dropout_rows ? 1 : w.w_hh.size(1);
    const Tensor mask = keep_mask({w.w_hh.size(0), columns}, p, w.w_hh);
    w.w_hh = w.w_hh * (p < 1 ? mask / (1 - p) : mask);
  }
  return w;
}

LayerOutputs torchs_layers(const LSTMStepsInputs& in, const std::vector<StepWeights>& weights) {
  static const std::optional<Tensor> none;
  const bool projects = weights[0].w_hr.has_value();
  OptionalTensors list;
  for (const StepWeights& w : weights) {
    list.insert(list.end(), {w.w_ih, w.w_hh, w.b_ih, w.b_hh});
    if (projects) list.push_back(w.w_hr);
  }
  return lstm({in.input, in.hx, in.cx, list, in.directions == 2, 0, in.batch_sizes, none,
               kPlainCell, projects});
}

}  // namespace

LayerOutputs lstm_steps(const LSTMStepsInputs& in) {
  const auto count = static_cast<int64_t>(in.weights.size());
  std::vector<StepWeights> weights = in.weights;
  if (in.options.changes_weights())
    for (StepWeights& w : weights) w = changed(std::move(w), in.options);
  if (!in.options.needs_steps()) return torchs_layers(in, weights);
  Tensor x = in.input;
  std::vector<Tensor> h_n(count), c_n(count);
  for (int64_t k = 0; k < count; k += in.directions) {
    std::vector<Tensor> outputs(in.directions);
    for (int64_t d = 0; d < in.directions; ++d) {
      const StepWeights& w = weights[k + d];
      const Tensor c = in.cx.select(0, k + d);
      Tensor c_new;
      std::tie(outputs[d], h_n[k + d], c_new) =
          layer(x, in.hx.select(0, k + d), c, w, in.options, in.batch_sizes, d == 1);
      // Of layers with projections, autocast leaves c with its own dtype.
      c_n[k + d] = w.w_hr ? c_new.to(c.scalar_type()) : c_new;
    }
    x = in.directions == 1 ? outputs[0] : at::cat(outputs, -1);
  }
  // A single one in place: a view could not be detached in place, as in lstm.cpp.
  if (count == 1) return {std::move(x), h_n[0].unsqueeze_(0), c_n[0].unsqueeze_(0)};
  return {std::move(x), at::stack(h_n), at::stack(c_n)};
}

std::tuple<Tensor, Tensor> lstm_cell_step(const Tensor& input, const Tensor& h, const Tensor& c,
                                          const StepWeights& given, const StepOptions& o) {
  const StepWeights w = o.changes_weights() ? changed(given, o) : given;
  static const std::optional<Tensor> none;
  if (o.norms || o.cell_clip > 0 || (o.training && o.recurrent_dropout > 0 && o.dropout_per_gate)) {
    auto [output, h_new, c_new] = layer(input.unsqueeze(0), h, c, w, o, none, false);
    return {h_new.to(c.scalar_type()), c_new.to(c.scalar_type())};
  }
  // torch's step, with masks: the recurrence would lay w_hh out anew for it.
  const Masks masks = draw_masks(o, input.unsqueeze(0), h, c);
  const Tensor seen = masks.dropout_h ? h * *masks.dropout_h : h;
  auto [h_new, c_new] =
      ops::lstm_cell::call({input, seen, c, w.w_ih, w.w_hh, w.b_ih, w.b_hh, none, kPlainCell});
  const auto updated = [](const Tensor& old, const Tensor& next,
                          const std::optional<Tensor>& mask) {
    if (!mask) return next;
    const Tensor update = mask->dim() == 3 ? mask->select(0, 0) : *mask;
    return at::lerp(old.to(next.scalar_type()), next, update.to(next.scalar_type()));
  };
  return {updated(h, h_new, masks.update_h), updated(c, c_new, masks.update_c)};
}

}  // namespace lstm_ext
