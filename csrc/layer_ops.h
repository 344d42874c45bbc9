// The operators lstm_ext::lstm_layer*: one layer of an LSTM in one direction, over a whole
// sequence. Shapes: L time, N batch, I input, H hidden, S = L N, or for a packed sequence the sum
// of its batch sizes.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "ops.h"

namespace lstm_ext {

struct LayerInputs {
  const at::Tensor& input;                       // [L, N, I], or packed [S, I]
  const at::Tensor& hx;                          // [N, H]
  const at::Tensor& cx;                          // [N, H]
  const at::Tensor& w_ih;                        // [4H, I]
  const at::Tensor& w_hh;                        // [4H, H]
  const std::optional<at::Tensor>& b_ih;         // [4H] or none
  const std::optional<at::Tensor>& b_hh;         // [4H] or none
  const std::optional<at::Tensor>& batch_sizes;  // of a packed sequence: int64 [L], on the CPU
  const std::optional<at::Tensor>& reset;        // bool [L, N]: states are zero before these steps
  bool reverse;                                  // from the last step to the first
};

using LayerOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // output, h_n, c_n
// And what backward needs: gates [S, 4H], and the c that each step started from, [S, H].
using LayerTrainingOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct LayerOutputGradients {
  const std::optional<at::Tensor>& output;
  const std::optional<at::Tensor>& hy;
  const std::optional<at::Tensor>& cy;
};
// What the forward kept.
struct LayerResults {
  const at::Tensor& output;
  const at::Tensor& gates;
  const at::Tensor& c_before;
};

// Whether the fused kernels take these tensors.
bool layer_fusable(const LayerInputs& in);
inline void check_allocated(const LayerInputs& in) {
  check_all_allocated(in.input, in.hx, in.cx, in.w_ih, in.w_hh, in.b_ih, in.b_hh, in.batch_sizes,
                      in.reset);
}
// Raises an error that says what is wrong with batch_sizes or reset.
void check_sequence(const LayerInputs& in);
// Raises an error unless the gradients and the forward's results have the sizes that the inputs
// give; and, for the kernels, are like the states.
void check_backward_sizes(const LayerOutputGradients& grads, const LayerInputs& in,
                          const LayerResults& results);
void check_layer_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                          const LayerResults& results);
// The rows before each step, and at last of all steps: L + 1 numbers.
std::vector<int64_t> step_offsets(const LayerInputs& in);
// Raises an error unless everything but the weights fits the kernels of packed weights.
void check_packed_inputs(const LayerInputs& in);

// The layer in plain tensor operations, step by step, differentiable any number of times.
namespace composite {

LayerTrainingOutputs layer_forward(const LayerInputs& in);
// The first rows of h or c, with zeros in those that time t starts anew.
at::Tensor reset_to_zero(const at::Tensor& state, const LayerInputs& in, int64_t t);
// Gradients of the first seven. The forward is run anew, so that they are differentiable too: the
// results are only checked.
CellGradients layer_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                             const LayerResults& results, CellGradientMask mask);

}  // namespace composite

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

LayerOutputs call_lstm_layer(const LayerInputs& in);
LayerOutputs redispatch_lstm_layer(c10::DispatchKeySet keys, const LayerInputs& in);
// Of LayerInputs, what follows the weights.
struct PackedLayerOptions {
  const std::optional<at::Tensor>& b_ih;
  const std::optional<at::Tensor>& b_hh;
  const std::optional<at::Tensor>& batch_sizes;
  const std::optional<at::Tensor>& reset;
  bool reverse;
};
inline constexpr at::ScalarType kPackedType = at::kByte;
at::Tensor call_lstm_layer_pack(const at::Tensor& w_ih, const at::Tensor& w_hh);
LayerOutputs call_lstm_layer_packed(const at::Tensor& input, const at::Tensor& hx,
                                    const at::Tensor& cx, const at::Tensor& packed,
                                    const PackedLayerOptions& options);
LayerTrainingOutputs call_lstm_layer_forward(const LayerInputs& in);
CellGradients call_lstm_layer_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                                       const LayerResults& results, CellGradientMask mask);

}  // namespace lstm_ext
