// The operators lstm_ext::lstm_layer*: one layer of an LSTM in one direction, over a whole
// sequence. Shapes: L time, N batch, I input, H hidden, S = L N, or for a packed sequence the sum
// of its batch sizes.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "ops/cell.h"

namespace lstm_ext {

// A cell's inputs, of all steps: input [L, N, I], or packed [S, I].
struct LayerInputs : CellInputs {
  const std::optional<at::Tensor>& batch_sizes;  // of a packed sequence: int64 [L], on the CPU
  const std::optional<at::Tensor>& reset;        // bool [L, N]: states are zero before these steps
  bool reverse;                                  // from the last step to the first

  // In the schema's order, in which what came to it later stands last.
  auto fields() const {
    return std::tuple_cat(std::tie(input, hx, cx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset),
                          std::tuple(reverse), std::tie(unit_weights), std::tuple(variant));
  }
  static LayerInputs of(const at::Tensor& input, const at::Tensor& hx, const at::Tensor& cx,
                        const at::Tensor& w_ih, const at::Tensor& w_hh,
                        const std::optional<at::Tensor>& b_ih,
                        const std::optional<at::Tensor>& b_hh,
                        const std::optional<at::Tensor>& batch_sizes,
                        const std::optional<at::Tensor>& reset, bool reverse,
                        const std::optional<at::Tensor>& unit_weights, int64_t variant) {
    return {{input, hx, cx, w_ih, w_hh, b_ih, b_hh, unit_weights, variant},
            batch_sizes,
            reset,
            reverse};
  }
};

using LayerOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // output, h_n, c_n
// And what backward needs: gates [S, 4H], and the c that each step started from, [S, H].
using LayerTrainingOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct LayerOutputGradients {
  const std::optional<at::Tensor>& output;
  const std::optional<at::Tensor>& hy;
  const std::optional<at::Tensor>& cy;
  auto fields() const { return std::tie(output, hy, cy); }
};
// What the forward kept.
struct LayerResults {
  const at::Tensor& output;
  const at::Tensor& gates;
  const at::Tensor& c_before;
  auto fields() const { return std::tie(output, gates, c_before); }
};
// LayerInputs with the result of lstm_layer_pack for the weights.
struct PackedLayerInputs {
  const at::Tensor& input;
  const at::Tensor& hx;
  const at::Tensor& cx;
  const at::Tensor& packed;
  const std::optional<at::Tensor>& b_ih;
  const std::optional<at::Tensor>& b_hh;
  const std::optional<at::Tensor>& batch_sizes;
  const std::optional<at::Tensor>& reset;
  bool reverse;
  const std::optional<at::Tensor>& unit_weights;
  int64_t variant;
  auto fields() const {
    return std::tuple_cat(std::tie(input, hx, cx, packed, b_ih, b_hh, batch_sizes, reset),
                          std::tuple(reverse), std::tie(unit_weights), std::tuple(variant));
  }
};
inline constexpr at::ScalarType kPackedType = at::kByte;

namespace ops {

// The layer: output, h_n, c_n.
struct lstm_layer : Operator<lstm_layer, LayerOutputs(const LayerInputs&)> {
  static constexpr char kSchema[] =
      "lstm_layer(Tensor input, Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, Tensor? b_ih, "
      "Tensor? b_hh, Tensor? batch_sizes, Tensor? reset, bool reverse, Tensor? unit_weights=None, "
      "int variant=0) -> (Tensor, Tensor, Tensor)";
};
// The same, and what its backward needs: gates, and the c that each step started from.
struct lstm_layer_forward : Operator<lstm_layer_forward, LayerTrainingOutputs(const LayerInputs&)> {
  static constexpr char kSchema[] =
      "lstm_layer_forward(Tensor input, Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, "
      "Tensor? b_ih, Tensor? b_hh, Tensor? batch_sizes, Tensor? reset, bool reverse, "
      "Tensor? unit_weights=None, int variant=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)";
};
// Gradients of input, states and parameters; those that output_mask leaves out are not computed
// (None).
struct lstm_layer_backward
    : Operator<lstm_layer_backward, Gradients(const LayerOutputGradients&, const LayerInputs&,
                                              const LayerResults&, const Wanted&)> {
  static constexpr char kSchema[] =
      "lstm_layer_backward(Tensor? grad_output, Tensor? grad_hy, Tensor? grad_cy, Tensor input, "
      "Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor? batch_sizes, Tensor? reset, bool reverse, Tensor? unit_weights, int variant, "
      "Tensor output, Tensor gates, Tensor c_before, bool[8] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
};
// Inference over weights packed before: w_ih and w_hh in the layout of this processor's kernels.
// weights: how they are stored, 0 as the products take them, 1 in bfloat16 (for float32). With w_hr
// [P, H], as the products take it in any case, h is projected (ops/projected.h).
struct lstm_layer_pack
    : Operator<lstm_layer_pack, at::Tensor(const at::Tensor&, const at::Tensor&, int64_t,
                                           const std::optional<at::Tensor>&)> {
  static constexpr char kSchema[] =
      "lstm_layer_pack(Tensor w_ih, Tensor w_hh, int weights=0, Tensor? w_hr=None) -> Tensor";
};
struct lstm_layer_packed : Operator<lstm_layer_packed, LayerOutputs(const PackedLayerInputs&)> {
  static constexpr char kSchema[] =
      "lstm_layer_packed(Tensor input, Tensor hx, Tensor cx, Tensor packed, Tensor? b_ih, "
      "Tensor? b_hh, Tensor? batch_sizes, Tensor? reset, bool reverse, "
      "Tensor? unit_weights=None, int variant=0) "
      "-> (Tensor, Tensor, Tensor)";
};

}  // namespace ops

// Whether input, states, weights and biases fit each other, whatever the number of steps.
// Of a projected layer, hx and w_hh are as wide as the projection.
bool sizes_fit(const LayerInputs& in, bool projected = false);
// Whether the fused kernels take these tensors.
bool fusable(const LayerInputs& in);
// Raises an error that says what is wrong with batch_sizes or reset.
void check_sequence(const LayerInputs& in, bool projected = false);
// Raises an error unless the gradients and the forward's results have the sizes that the inputs
// give; and, for the kernels, are like the states.
void check_backward_sizes(const LayerOutputGradients& grads, const LayerInputs& in,
                          const LayerResults& results);
void check_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                    const LayerResults& results);
// The last part of it alone.
void check_alike_for_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                              const LayerResults& results);
// Raises an error unless everything but the weights fits the kernels of packed weights.
void check_packed_inputs(const LayerInputs& in, bool projected);

// While it lives, the output of a layer is not seen by a user, who could change it in place before
// backward: this thread's calls of the layer need not copy it for backward.
class OutputStaysInside {
 public:
  explicit OutputStaysInside(bool stays) : before_(stays_) { stays_ = stays; }
  ~OutputStaysInside() { stays_ = before_; }
  OutputStaysInside(const OutputStaysInside&) = delete;
  OutputStaysInside& operator=(const OutputStaysInside&) = delete;
  static bool now() { return stays_; }

 private:
  const bool before_;
  inline static thread_local bool stays_ = false;
};

}  // namespace lstm_ext
