// The operators lstm_ext::lstm_recurrence*: the steps of one layer in one direction, from the
// product of its input on, with what the relatives of torch's LSTM do in a step. Each part is
// optional, but for the gates. Shapes: L time, N batch, H hidden, P projected (else H), S = L N, or
// for a packed sequence the sum of its batch sizes.
//
//   z      = (dropout_h * h) W_hh^T               or each gate's rows of z by a mask of their own
//   pre    = gates_x + norm(z) + bias, or norm(gates_x + z) + bias where norm_joint
//   i, f, g, o = the activated gates
//   c~     = clip(f * c + i * g)
//   n      = norm_c(c~)                            norm(v) = weight * (v - mean) / deviation
//   h~     = o * tanh(n), or clip(W_hr of it)
//   h'     = update_h * h~ + (1 - update_h) * h
//   c'     = update_c * (n where carry_norm, else c~) + (1 - update_c) * c
//
// Means and deviations are those of a row (Ba, Kiros & Hinton 2016). Zoneout is update_h and
// update_c (Krueger et al. 2017), a mask in training and its mean in evaluation.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "ops/layer.h"

namespace lstm_ext {

struct RecurrenceInputs {
  const at::Tensor& gates_x;                // [L, N, 4H], or packed [S, 4H]
  const at::Tensor& hx;                     // [N, P]
  const at::Tensor& cx;                     // [N, H]
  const at::Tensor& w_hh;                   // [4H, P]
  const std::optional<at::Tensor>& bias;    // [4H]
  const std::optional<at::Tensor>& norm;    // [4H]
  const std::optional<at::Tensor>& norm_c;  // [H]
  const std::optional<at::Tensor>& bias_c;  // [H], with norm_c
  const std::optional<at::Tensor>& w_hr;    // [P, H]
  // Of all steps, like gates_x; of each sequence, [N, ..]; or of each unit, [..]. dropout_h may
  // have 4P columns: masks for i, f, g and o.
  const std::optional<at::Tensor>& update_h;
  const std::optional<at::Tensor>& update_c;
  const std::optional<at::Tensor>& dropout_h;
  const std::optional<at::Tensor>& batch_sizes;
  const std::optional<at::Tensor>& reset;
  bool reverse, norm_joint, carry_norm;
  double eps, cell_clip, projection_clip;  // clips of 0 are none

  // What has a gradient.
  auto tensors() const { return std::tie(gates_x, hx, cx, w_hh, bias, norm, norm_c, bias_c, w_hr); }
  auto masks() const { return std::tie(update_h, update_c, dropout_h); }
  auto fields() const {
    return std::tuple_cat(
        tensors(), masks(), std::tie(batch_sizes, reset),
        std::tuple(reverse, norm_joint, carry_norm, eps, cell_clip, projection_clip));
  }
  bool projects() const { return defined(w_hr); }
  // Its sequence, as a layer with gates_x for input: the order of steps and the rows of each.
  LayerInputs sequence() const;
};
inline constexpr int kRecurrenceTensors =
    std::tuple_size_v<decltype(std::declval<const RecurrenceInputs&>().tensors())>;

// What the forward keeps for backward, each of all steps; of no rows what the options do not need.
struct RecurrenceKept {
  at::Tensor gates;       // [S, 4H], activated
  at::Tensor c_before;    // [S, H], the c that a step started from
  at::Tensor h_before;    // [S, P], what W_hh multiplied; [S, 4P] with a mask for each gate
  at::Tensor normalized;  // [S, 4H], where norm: before its weight
  at::Tensor scale;       // [S], where norm: one over the deviation, in the type of sums
  at::Tensor r;           // [S, H], where W_hr: what it multiplied
  at::Tensor projected;   // [S, P], where W_hr: before its clip
};
struct RecurrenceTrainingOutputs {
  at::Tensor output, hy, cy;
  RecurrenceKept kept;
  auto results() {
    return std::make_tuple(std::move(output), std::move(hy), std::move(cy), std::move(kept.gates),
                           std::move(kept.c_before), std::move(kept.h_before),
                           std::move(kept.normalized), std::move(kept.scale), std::move(kept.r),
                           std::move(kept.projected));
  }
};
struct RecurrenceResults {
  const at::Tensor& gates;
  const at::Tensor& c_before;
  const at::Tensor& h_before;
  const at::Tensor& normalized;
  const at::Tensor& scale;
  const at::Tensor& r;
  const at::Tensor& projected;
  auto fields() const {
    return std::tie(gates, c_before, h_before, normalized, scale, r, projected);
  }
};
struct RecurrenceGradients {
  at::Tensor gates_x, hx, cx, w_hh, bias, norm, norm_c, bias_c, w_hr;
  auto results() {
    return std::make_tuple(std::move(gates_x), std::move(hx), std::move(cx), std::move(w_hh),
                           std::move(bias), std::move(norm), std::move(norm_c), std::move(bias_c),
                           std::move(w_hr));
  }
};
struct RecurrenceWanted {
  using Mask = std::array<bool, kRecurrenceTensors>;
  bool gates_x, hx, cx, w_hh, bias, norm, norm_c, bias_c, w_hr;
  explicit RecurrenceWanted(const Mask& mask)
      : gates_x(mask[0]),
        hx(mask[1]),
        cx(mask[2]),
        w_hh(mask[3]),
        bias(mask[4]),
        norm(mask[5]),
        norm_c(mask[6]),
        bias_c(mask[7]),
        w_hr(mask[8]) {}
  std::tuple<Mask> fields() const {
    return {{gates_x, hx, cx, w_hh, bias, norm, norm_c, bias_c, w_hr}};
  }
};

namespace ops {

// output [L, N, P] or [S, P], h_n and c_n.
struct lstm_recurrence : Operator<lstm_recurrence, LayerOutputs(const RecurrenceInputs&)> {
  static constexpr char kSchema[] =
      "lstm_recurrence(Tensor gates_x, Tensor hx, Tensor cx, Tensor w_hh, Tensor? bias, "
      "Tensor? norm, Tensor? norm_c, Tensor? bias_c, Tensor? w_hr, Tensor? update_h, "
      "Tensor? update_c, Tensor? dropout_h, Tensor? batch_sizes, Tensor? reset, bool reverse, "
      "bool norm_joint, bool carry_norm, float eps, float cell_clip, float projection_clip) "
      "-> (Tensor, Tensor, Tensor)";
};
// The same, and what its backward needs (RecurrenceKept).
struct lstm_recurrence_forward
    : Operator<lstm_recurrence_forward, RecurrenceTrainingOutputs(const RecurrenceInputs&)> {
  static constexpr char kSchema[] =
      "lstm_recurrence_forward(Tensor gates_x, Tensor hx, Tensor cx, Tensor w_hh, Tensor? bias, "
      "Tensor? norm, Tensor? norm_c, Tensor? bias_c, Tensor? w_hr, Tensor? update_h, "
      "Tensor? update_c, Tensor? dropout_h, Tensor? batch_sizes, Tensor? reset, bool reverse, "
      "bool norm_joint, bool carry_norm, float eps, float cell_clip, float projection_clip) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
};
// Gradients of the nine tensors; those that output_mask leaves out are not computed (None).
struct lstm_recurrence_backward
    : Operator<lstm_recurrence_backward,
               RecurrenceGradients(const LayerOutputGradients&, const RecurrenceInputs&,
                                   const RecurrenceResults&, const RecurrenceWanted&)> {
  static constexpr char kSchema[] =
      "lstm_recurrence_backward(Tensor? grad_output, Tensor? grad_hy, Tensor? grad_cy, "
      "Tensor gates_x, Tensor hx, Tensor cx, Tensor w_hh, Tensor? bias, Tensor? norm, "
      "Tensor? norm_c, Tensor? bias_c, Tensor? w_hr, Tensor? update_h, Tensor? update_c, "
      "Tensor? dropout_h, Tensor? batch_sizes, Tensor? reset, bool reverse, bool norm_joint, "
      "bool carry_norm, float eps, float cell_clip, float projection_clip, Tensor gates, "
      "Tensor c_before, Tensor h_before, Tensor normalized, Tensor scale, Tensor r, "
      "Tensor projected, bool[9] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
};

}  // namespace ops

// Whether the kernels take these tensors; and an error unless they fit each other.
bool fusable(const RecurrenceInputs& in);
void check_recurrence(const RecurrenceInputs& in);
void check_backward_sizes(const LayerOutputGradients& grads, const RecurrenceInputs& in,
                          const RecurrenceResults& results);
void check_backward(const LayerOutputGradients& grads, const RecurrenceInputs& in,
                    const RecurrenceResults& results);

// Where a mask has its rows.
enum class MaskRows { kUnit, kSequence, kStep };
MaskRows mask_rows(const at::Tensor& mask, const RecurrenceInputs& in);
// How many masks of h a row has: 4 where each gate has its own, else 1.
int64_t h_masks_of(const RecurrenceInputs& in);

}  // namespace lstm_ext
