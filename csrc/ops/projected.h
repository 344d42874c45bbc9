// The operators lstm_ext::lstm_layer_projected*: a layer as in ops/layer.h whose h is projected at
// every step (Sak, Senior & Beaufays 2014). Shapes: P numbers of the projection, others as there.
//
//   r = o * tanh(c') [N, H]        h' = r W_hr^T [N, P]        W_hh [4H, P]
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "ops/layer.h"

namespace lstm_ext {

// hx [N, P], cx [N, H], w_hh [4H, P], w_hr [P, H].
struct ProjectedInputs : LayerInputs {
  const at::Tensor& w_hr;

  auto tensors() const { return std::tuple_cat(LayerInputs::tensors(), std::tie(w_hr)); }
  auto fields() const { return std::tuple_cat(LayerInputs::fields(), std::tie(w_hr)); }
  static ProjectedInputs of(const at::Tensor& input, const at::Tensor& hx, const at::Tensor& cx,
                            const at::Tensor& w_ih, const at::Tensor& w_hh,
                            const std::optional<at::Tensor>& b_ih,
                            const std::optional<at::Tensor>& b_hh,
                            const std::optional<at::Tensor>& batch_sizes,
                            const std::optional<at::Tensor>& reset, bool reverse,
                            const std::optional<at::Tensor>& unit_weights, int64_t variant,
                            const at::Tensor& w_hr) {
    return {LayerInputs::of(input, hx, cx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse,
                            unit_weights, variant),
            w_hr};
  }
};

// output, h_n, c_n, gates, c_before as of a layer, and r [S, H].
using ProjectedTrainingOutputs =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct ProjectedResults : LayerResults {
  const at::Tensor& r;
  auto fields() const { return std::tuple_cat(LayerResults::fields(), std::tie(r)); }
  static ProjectedResults of(const at::Tensor& output, const at::Tensor& gates,
                             const at::Tensor& c_before, const at::Tensor& r) {
    return {{output, gates, c_before}, r};
  }
};

struct ProjectedGradients : Gradients {
  at::Tensor w_hr;
  auto results() { return std::tuple_cat(Gradients::results(), std::make_tuple(std::move(w_hr))); }
};
struct ProjectedWanted {
  using Mask = std::array<bool, kCellTensors + 1>;
  Wanted layer;
  bool w_hr;
  explicit ProjectedWanted(const Mask& mask) : layer(first_of(mask)), w_hr(mask.back()) {}
  std::tuple<Mask> fields() const {
    const auto [of_layer] = layer.fields();
    Mask mask;
    std::copy(of_layer.begin(), of_layer.end(), mask.begin());
    mask.back() = w_hr;
    return {mask};
  }

 private:
  static Wanted::Mask first_of(const Mask& mask) {
    Wanted::Mask first;
    std::copy_n(mask.begin(), first.size(), first.begin());
    return first;
  }
};

namespace ops {

struct lstm_layer_projected : Operator<lstm_layer_projected, LayerOutputs(const ProjectedInputs&)> {
  static constexpr char kSchema[] =
      "lstm_layer_projected(Tensor input, Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, "
      "Tensor? b_ih, Tensor? b_hh, Tensor? batch_sizes, Tensor? reset, bool reverse, "
      "Tensor? unit_weights, int variant, Tensor w_hr) -> (Tensor, Tensor, Tensor)";
};
// The same, and what its backward needs: gates, the c that each step started from, and r.
struct lstm_layer_projected_forward
    : Operator<lstm_layer_projected_forward, ProjectedTrainingOutputs(const ProjectedInputs&)> {
  static constexpr char kSchema[] =
      "lstm_layer_projected_forward(Tensor input, Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, "
      "Tensor? b_ih, Tensor? b_hh, Tensor? batch_sizes, Tensor? reset, bool reverse, "
      "Tensor? unit_weights, int variant, Tensor w_hr) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
};
// Gradients of input, states and parameters, w_hr last; None where output_mask leaves one out.
struct lstm_layer_projected_backward
    : Operator<lstm_layer_projected_backward,
               ProjectedGradients(const LayerOutputGradients&, const ProjectedInputs&,
                                  const ProjectedResults&, const ProjectedWanted&)> {
  static constexpr char kSchema[] =
      "lstm_layer_projected_backward(Tensor? grad_output, Tensor? grad_hy, Tensor? grad_cy, "
      "Tensor input, Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor? batch_sizes, Tensor? reset, bool reverse, Tensor? unit_weights, int variant, "
      "Tensor w_hr, Tensor output, Tensor gates, Tensor c_before, Tensor r, bool[9] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
};

}  // namespace ops

// As of a layer without a projection.
bool sizes_fit(const ProjectedInputs& in);
bool fusable(const ProjectedInputs& in);
void check_backward_sizes(const LayerOutputGradients& grads, const ProjectedInputs& in,
                          const ProjectedResults& results);
void check_backward(const LayerOutputGradients& grads, const ProjectedInputs& in,
                    const ProjectedResults& results);

}  // namespace lstm_ext
