// The operators lstm_ext::lstm_layer_states*: the layer with the cell states of all steps among its
// outputs, whose resets may be to states that are given. Shapes as in layer.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "ops/layer.h"

namespace lstm_ext {

struct StatesInputs : LayerInputs {
  // What h and c are before the steps of reset: [N, H], or [L, N, H], those of each step's own;
  // zero where there is none.
  const std::optional<at::Tensor>& reset_hx;
  const std::optional<at::Tensor>& reset_cx;

  auto tensors() const {
    return std::tuple_cat(LayerInputs::tensors(), std::tie(reset_hx, reset_cx));
  }
  auto fields() const {
    return std::tuple_cat(LayerInputs::fields(), std::tie(reset_hx, reset_cx));
  }
  static StatesInputs of(const at::Tensor& input, const at::Tensor& hx, const at::Tensor& cx,
                         const at::Tensor& w_ih, const at::Tensor& w_hh,
                         const std::optional<at::Tensor>& b_ih,
                         const std::optional<at::Tensor>& b_hh,
                         const std::optional<at::Tensor>& batch_sizes,
                         const std::optional<at::Tensor>& reset, bool reverse,
                         const std::optional<at::Tensor>& unit_weights, int64_t variant,
                         const std::optional<at::Tensor>& reset_hx,
                         const std::optional<at::Tensor>& reset_cx) {
    return {LayerInputs::of(input, hx, cx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse,
                            unit_weights, variant),
            reset_hx, reset_cx};
  }
  // Resets to zero.
  static StatesInputs plain(const LayerInputs& in) {
    static const std::optional<at::Tensor> none;
    return {in, none, none};
  }
};
// Its tensors that have gradients: those of the cell, reset_hx and reset_cx.
inline constexpr int kStatesTensors = kCellTensors + 2;

// output, h_n, c_n; and the c after each step, shaped like the output.
using StatesOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// And what backward needs: gates [S, 4H], and the c that each step started from, [S, H].
using StatesTrainingOutputs =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct StatesOutputGradients : LayerOutputGradients {
  const std::optional<at::Tensor>& cells;
  auto fields() const { return std::tuple_cat(LayerOutputGradients::fields(), std::tie(cells)); }
  static StatesOutputGradients plain(const LayerOutputGradients& grads) {
    static const std::optional<at::Tensor> none;
    return {grads, none};
  }
};
struct StatesGradients : Gradients {
  at::Tensor reset_hx, reset_cx;
  auto results() {
    return std::tuple_cat(Gradients::results(),
                          std::make_tuple(std::move(reset_hx), std::move(reset_cx)));
  }
};
struct StatesWanted : Wanted {
  using Mask = std::array<bool, kStatesTensors>;
  bool reset_hx, reset_cx;
  StatesWanted(const Wanted& of_layer, bool of_reset_hx, bool of_reset_cx)
      : Wanted(of_layer), reset_hx(of_reset_hx), reset_cx(of_reset_cx) {}
  explicit StatesWanted(const Mask& m)
      : StatesWanted(Wanted({m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]}), m[8], m[9]) {}
  std::tuple<Mask> fields() const {
    return {{input, hx, cx, w_ih, w_hh, b_ih, b_hh, unit_weights, reset_hx, reset_cx}};
  }
};

namespace ops {

// The layer: output, h_n, c_n, cells.
struct lstm_layer_states : Operator<lstm_layer_states, StatesOutputs(const StatesInputs&)> {
  static constexpr char kSchema[] =
      "lstm_layer_states(Tensor input, Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, "
      "Tensor? b_ih, Tensor? b_hh, Tensor? batch_sizes, Tensor? reset, bool reverse, "
      "Tensor? unit_weights=None, int variant=0, Tensor? reset_hx=None, Tensor? reset_cx=None) "
      "-> (Tensor, Tensor, Tensor, Tensor)";
};
// The same, and what its backward needs: gates, and the c that each step started from.
struct lstm_layer_states_forward
    : Operator<lstm_layer_states_forward, StatesTrainingOutputs(const StatesInputs&)> {
  static constexpr char kSchema[] =
      "lstm_layer_states_forward(Tensor input, Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, "
      "Tensor? b_ih, Tensor? b_hh, Tensor? batch_sizes, Tensor? reset, bool reverse, "
      "Tensor? unit_weights=None, int variant=0, Tensor? reset_hx=None, Tensor? reset_cx=None) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
};
// Gradients of input, states, parameters and the states of resets; those that output_mask leaves
// out are not computed (None).
struct lstm_layer_states_backward
    : Operator<lstm_layer_states_backward,
               StatesGradients(const StatesOutputGradients&, const StatesInputs&,
                               const LayerResults&, const StatesWanted&)> {
  static constexpr char kSchema[] =
      "lstm_layer_states_backward(Tensor? grad_output, Tensor? grad_hy, Tensor? grad_cy, "
      "Tensor? grad_cells, Tensor input, Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, "
      "Tensor? b_ih, Tensor? b_hh, Tensor? batch_sizes, Tensor? reset, bool reverse, "
      "Tensor? unit_weights, int variant, Tensor? reset_hx, Tensor? reset_cx, Tensor output, "
      "Tensor gates, Tensor c_before, bool[10] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
};

}  // namespace ops

// Whether each step has states of its own to be reset to.
inline bool reset_by_step(const std::optional<at::Tensor>& state) {
  return defined(state) && state->dim() == 3;
}
// As for a layer; and whether the kernels take the states of resets.
bool fusable(const StatesInputs& in);
// As for a layer; and an error that says what is wrong with the states of resets.
void check_states(const StatesInputs& in, bool projected = false);
void check_backward_sizes(const StatesOutputGradients& grads, const StatesInputs& in,
                          const LayerResults& results);
void check_backward(const StatesOutputGradients& grads, const StatesInputs& in,
                    const LayerResults& results);

}  // namespace lstm_ext
