#include "ops/lstm.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include "core/cells.h"
#include "ops/projected.h"

namespace lstm_ext {
namespace {

using Optional = const std::optional<at::Tensor>&;

const at::Tensor& required(Optional tensor) {
  TORCH_CHECK(defined(tensor), "lstm: only biases may be None");
  return *tensor;
}

// The weights of the units, which come last of a layer's.
Optional unit_weights(const LSTMInputs& in, const std::optional<at::Tensor>* last) {
  static const std::optional<at::Tensor> none;
  return unit_weights_of(in.variant) > 0 ? *last : none;
}

// layer(input, h, c, the layer's weights, reverse) for one after the other.
template <class Layer>
LayerOutputs run_layers(const LSTMInputs& in, int64_t weights_per_layer, const Layer& layer) {
  TORCH_CHECK(is_cell(in.variant), "there is no cell of variant ", in.variant);
  if (unit_weights_of(in.variant) > 0) ++weights_per_layer;
  const int64_t directions = in.bidirectional ? 2 : 1;
  const int64_t count = static_cast<int64_t>(in.weights.size()) / weights_per_layer;
  TORCH_CHECK(count > 0 && count % directions == 0 &&
                  static_cast<int64_t>(in.weights.size()) == count * weights_per_layer,
              "lstm: expected ", weights_per_layer, " weights for each layer and direction, got ",
              in.weights.size());
  TORCH_CHECK(in.hx.dim() == 3 && in.cx.dim() == 3 && in.hx.sym_size(0) == count &&
                  in.cx.sym_size(0) == count,
              "lstm: expected the states of ", count, " layers and directions, got shapes ",
              in.hx.sym_sizes(), " and ", in.cx.sym_sizes());
  const auto weights_of = [&](int64_t k) { return in.weights.data() + k * weights_per_layer; };
  if (count == 1) {
    auto [output, h, c] =
        layer(in.input, in.hx.select(0, 0), in.cx.select(0, 0), weights_of(0), false);
    // In place: a view could not be detached in place (h.detach_()), as people do between steps.
    return {std::move(output), h.unsqueeze_(0), c.unsqueeze_(0)};
  }
  at::Tensor input = in.input;
  std::vector<at::Tensor> h_n(count), c_n(count);
  for (int64_t k = 0; k < count; k += directions) {
    // Not > 0: at::dropout refuses what is no probability.
    if (k > 0 && in.dropout != 0) input = at::dropout(input, in.dropout, /*train=*/true);
    std::vector<at::Tensor> outputs(directions);
    const OutputStaysInside stays(directions == 2 || k + directions < count);
    for (int64_t d = 0; d < directions; ++d)
      std::tie(outputs[d], h_n[k + d], c_n[k + d]) =
          layer(input, in.hx.select(0, k + d), in.cx.select(0, k + d), weights_of(k + d), d == 1);
    input = directions == 1 ? outputs[0] : at::cat(outputs, -1);
  }
  return {input, at::stack(h_n), at::stack(c_n)};
}

OptionalTensors to_vector(const TensorList& list) { return {list.begin(), list.end()}; }

LayerOutputs projected_lstm(const LSTMInputs& in) {
  constexpr int64_t kWeights = kLayerWeights + 1;
  return run_layers(in, kWeights,
                    [&](const at::Tensor& input, const at::Tensor& h, const at::Tensor& c,
                        const std::optional<at::Tensor>* w, bool reverse) {
                      const LayerInputs layer = {{input, h, c, required(w[0]), required(w[1]), w[2],
                                                  w[3], unit_weights(in, w + kWeights), in.variant},
                                                 in.batch_sizes,
                                                 in.reset,
                                                 reverse};
                      return ops::lstm_layer_projected::call({layer, required(w[kLayerWeights])});
                    });
}

LayerOutputs lstm_op(const LSTMArguments& in) {
  return lstm({in.input, in.hx, in.cx, to_vector(in.weights), in.bidirectional, in.dropout,
               in.batch_sizes, in.reset, in.variant, in.projects});
}

LayerOutputs lstm_packed_op(const PackedLSTMArguments& in) {
  return lstm_packed({in.input, in.hx, in.cx, to_vector(in.weights), in.bidirectional, 0,
                      in.batch_sizes, in.reset, in.variant});
}

}  // namespace

LayerOutputs lstm(const LSTMInputs& in) {
  if (in.projects) return projected_lstm(in);
  return run_layers(
      in, kLayerWeights,
      [&](const at::Tensor& input, const at::Tensor& h, const at::Tensor& c,
          const std::optional<at::Tensor>* w, bool reverse) {
        return ops::lstm_layer::call({{input, h, c, required(w[0]), required(w[1]), w[2], w[3],
                                       unit_weights(in, w + kLayerWeights), in.variant},
                                      in.batch_sizes,
                                      in.reset,
                                      reverse});
      });
}

LayerOutputs lstm_packed(const LSTMInputs& in) {
  return run_layers(in, kPackedLayerWeights,
                    [&](const at::Tensor& input, const at::Tensor& h, const at::Tensor& c,
                        const std::optional<at::Tensor>* w, bool reverse) {
                      return ops::lstm_layer_packed::call(
                          {input, h, c, required(w[0]), w[1], w[2], in.batch_sizes, in.reset,
                           reverse, unit_weights(in, w + kPackedLayerWeights), in.variant});
                    });
}

TORCH_LIBRARY_FRAGMENT(lstm_ext, m) { define<ops::lstm, ops::lstm_packed>(m); }

TORCH_LIBRARY_IMPL(lstm_ext, CompositeImplicitAutograd, m) {
  ops::lstm::implement<lstm_op>(m);
  ops::lstm_packed::implement<lstm_packed_op>(m);
}

// The same under torch.vmap, which asks for it by this name.
TORCH_LIBRARY_IMPL(lstm_ext, FuncTorchBatchedDecomposition, m) {
  ops::lstm::implement<lstm_op>(m);
  ops::lstm_packed::implement<lstm_packed_op>(m);
}

}  // namespace lstm_ext
