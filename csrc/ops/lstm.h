// The operators lstm_ext::lstm and lstm_packed: layers and directions one after the other, each one
// call of lstm_layer (layer_ops.h). Layers K, directions D; other shapes as there.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "ops/layer.h"

namespace lstm_ext {

using OptionalTensors = std::vector<std::optional<at::Tensor>>;

struct LSTMInputs {
  const at::Tensor& input;                       // [L, N, I], or packed [S, I]
  const at::Tensor& hx;                          // [K D, N, H]
  const at::Tensor& cx;                          // [K D, N, H]
  const OptionalTensors& weights;                // of each layer and direction, see below
  bool bidirectional;                            // every second one reads from the end
  double dropout;                                // after each layer but the last
  const std::optional<at::Tensor>& batch_sizes;  // as in LayerInputs
  const std::optional<at::Tensor>& reset;
  int64_t variant;        // of CellInputs
  bool projects = false;  // then hx [K D, N, P]; packed weights say it themselves
};
// w_ih, w_hh, b_ih, b_hh; or the result of lstm_layer_pack, b_ih, b_hh. Behind them, w_hr where h
// is projected, and the weights of the units where the cell has some.
inline constexpr int64_t kLayerWeights = 4;
inline constexpr int64_t kPackedLayerWeights = 3;

// The same as the operators take it; packed weights are for inference, without dropout.
using TensorList = c10::List<std::optional<at::Tensor>>;
struct LSTMArguments {
  const at::Tensor& input;
  const at::Tensor& hx;
  const at::Tensor& cx;
  const TensorList& weights;
  bool bidirectional;
  double dropout;
  const std::optional<at::Tensor>& batch_sizes;
  const std::optional<at::Tensor>& reset;
  int64_t variant;
  bool projects;
  auto fields() const {
    return std::tuple_cat(std::tie(input, hx, cx, weights), std::tuple(bidirectional, dropout),
                          std::tie(batch_sizes, reset), std::tuple(variant, projects));
  }
};
struct PackedLSTMArguments {
  const at::Tensor& input;
  const at::Tensor& hx;
  const at::Tensor& cx;
  const TensorList& weights;
  bool bidirectional;
  const std::optional<at::Tensor>& batch_sizes;
  const std::optional<at::Tensor>& reset;
  int64_t variant;
  auto fields() const {
    return std::tuple_cat(std::tie(input, hx, cx, weights), std::tuple(bidirectional),
                          std::tie(batch_sizes, reset), std::tuple(variant));
  }
};

namespace ops {

// All layers and directions: w_ih, w_hh, b_ih, b_hh of each, w_hr if projects, and unit_weights
// where there are some.
struct lstm : Operator<lstm, LayerOutputs(const LSTMArguments&)> {
  static constexpr char kSchema[] =
      "lstm(Tensor input, Tensor hx, Tensor cx, Tensor?[] weights, bool bidirectional, "
      "float dropout, Tensor? batch_sizes, Tensor? reset, int variant=0, bool projects=False) "
      "-> (Tensor, Tensor, Tensor)";
};
// The same for inference: packed weights, b_ih, b_hh of each, and unit_weights.
struct lstm_packed : Operator<lstm_packed, LayerOutputs(const PackedLSTMArguments&)> {
  static constexpr char kSchema[] =
      "lstm_packed(Tensor input, Tensor hx, Tensor cx, Tensor?[] weights, bool bidirectional, "
      "Tensor? batch_sizes, Tensor? reset, int variant=0) -> (Tensor, Tensor, Tensor)";
};

}  // namespace ops

// output [L, N, D H] or [S, D H], h_n and c_n [K D, N, H].
LayerOutputs lstm(const LSTMInputs& in);
LayerOutputs lstm_packed(const LSTMInputs& in);

}  // namespace lstm_ext
