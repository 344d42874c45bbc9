// What the layer's operators check.
#include "ops/layer.h"

#include <torch/library.h>

#include <vector>

#include "core/sequence.h"

namespace lstm_ext {

namespace {

// Whether the input is a batch, padded or packed, of as many sequences as there are states.
bool states_fit(const LayerInputs& in, bool projected) {
  const bool packed = defined(in.batch_sizes);
  return in.input.dim() == (packed ? 2 : 3) && in.hx.dim() == 2 && in.cx.dim() == 2 &&
         in.hx.sym_size(0) == in.cx.sym_size(0) &&
         (projected || in.hx.sym_size(1) == in.cx.sym_size(1)) &&
         (packed || in.input.sym_size(1) == in.hx.sym_size(0));
}

}  // namespace

bool sizes_fit(const LayerInputs& in, bool projected) {
  const CellInputs recurrent = {in.hx,   in.hx,   in.cx,           in.w_hh,   in.w_hh,
                                in.b_ih, in.b_hh, in.unit_weights, in.variant};
  return states_fit(in, projected) && sizes_fit(recurrent, projected) && in.w_ih.dim() == 2 &&
         in.w_ih.sym_size(0) == in.w_hh.sym_size(0) && in.w_ih.sym_size(1) == in.input.sym_size(-1);
}

bool fusable(const LayerInputs& in) { return all_alike(in) && sizes_fit(in); }

void check_sequence(const LayerInputs& in, bool projected) {
  TORCH_CHECK(states_fit(in, projected),
              "input and states do not fit each other: got an input of shape ", in.input.sizes(),
              ", states of ", in.hx.sizes(), " and ", in.cx.sizes());
  if (defined(in.batch_sizes)) {
    const at::Tensor& sizes = *in.batch_sizes;
    TORCH_CHECK(sizes.dim() == 1 && sizes.scalar_type() == at::kLong && sizes.is_cpu(),
                "batch_sizes should be a 1-D int64 tensor on the CPU");
    TORCH_CHECK(sizes.numel() <= in.input.size(0),
                "a packed input must have as many rows as batch_sizes adds up to, at least ",
                sizes.numel(), ", got shape ", in.input.sizes());
    const at::Tensor dense = plain_batch_sizes(sizes);
    const auto* size = dense.const_data_ptr<int64_t>();
    int64_t sum = 0;
    for (int64_t t = 0; t < dense.numel(); ++t) {
      TORCH_CHECK(size[t] > 0 && (t == 0 || size[t] <= size[t - 1]),
                  "batch_sizes should be positive and in descending order");
      sum += size[t];
    }
    TORCH_CHECK(in.input.dim() == 2 && in.input.size(0) == sum,
                "a packed input must have as many rows as batch_sizes adds up to, ", sum,
                ", got shape ", in.input.sizes());
    TORCH_CHECK(dense.numel() > 0 && in.hx.size(0) == size[0],
                "Expected hidden[0] to have a batch of batch_sizes[0]");
  }
  if (defined(in.reset)) {
    const int64_t L = defined(in.batch_sizes) ? in.batch_sizes->size(0) : in.input.size(0);
    TORCH_CHECK(in.reset->scalar_type() == at::kBool && in.reset->dim() == 2 &&
                    in.reset->size(0) == L && in.reset->size(1) == in.hx.size(0) &&
                    in.reset->device() == in.hx.device() && in.reset->layout() == at::kStrided,
                "reset must be a bool tensor of shape (L, N) = (", L, ", ", in.hx.size(0), ") on ",
                in.hx.device(), ", got ", in.reset->scalar_type(), " of shape ", in.reset->sizes(),
                " on ", in.reset->device());
  }
}

void check_packed_inputs(const LayerInputs& in, bool projected) {
  const at::Tensor &input = in.input, &hx = in.hx, &cx = in.cx;
  bool fits = fused_dtype(input.scalar_type()) && states_fit(in, projected);
  for (const at::Tensor* t : {&input, &hx, &cx}) fits = fits && alike(*t, input);
  for (const auto* bias : {&in.b_ih, &in.b_hh})
    fits = fits && bias_fits(*bias, 4 * cx.size(1)) && (!defined(*bias) || alike(**bias, input));
  if (fits) check_variant(in, cx.size(1));
  fits = fits && (!defined(in.unit_weights) || alike(*in.unit_weights, input));
  TORCH_CHECK(fits,
              "lstm_layer_packed: input, states and biases do not fit each other: got an input of ",
              "shape ", input.sizes(), ", states of ", hx.sizes(), " and ", cx.sizes());
}

void check_backward_sizes(const LayerOutputGradients& grads, const LayerInputs& in,
                          const LayerResults& results) {
  std::vector<int64_t> output = in.input.sizes().vec();
  output.back() = in.hx.size(1);
  const auto check = [](const std::optional<at::Tensor>& grad, at::IntArrayRef sizes) {
    TORCH_CHECK(!defined(grad) || grad->sizes() == sizes,
                "lstm_layer_backward: a gradient must have its tensor's shape ", sizes);
  };
  check(grads.output, output);
  check(grads.hy, in.hx.sizes());
  check(grads.cy, in.cx.sizes());
  const int64_t H = in.cx.size(1),
                S = in.input.size(0) * (defined(in.batch_sizes) ? 1 : in.input.size(1));
  const auto has = [](const at::Tensor& tensor, int64_t rows, int64_t columns) {
    return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns;
  };
  TORCH_CHECK(has(results.gates, S, 4 * H) && has(results.c_before, S, H) &&
                  results.output.sizes() == output,
              "lstm_layer_backward: output, gates and c_before must be those of "
              "lstm_layer_forward");
}

void check_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                    const LayerResults& results) {
  check_sequence(in);
  check_backward_sizes(grads, in, results);
  check_alike_for_backward(grads, in, results);
}

void check_alike_for_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                              const LayerResults& results) {
  for_each_tensor(
      [&](const at::Tensor& grad) {
        TORCH_CHECK(alike(grad, in.hx), "lstm_layer_backward: a gradient must have the states' ",
                    "dtype ", in.hx.scalar_type(), " and device ", in.hx.device());
      },
      grads);
  TORCH_CHECK(!any_tensor([&](const at::Tensor& t) { return !alike(t, in.hx); }, results),
              "lstm_layer_backward: output, gates and c_before must be those of "
              "lstm_layer_forward");
}

TORCH_LIBRARY_FRAGMENT(lstm_ext, m) {
  define<ops::lstm_layer, ops::lstm_layer_forward, ops::lstm_layer_backward, ops::lstm_layer_pack,
         ops::lstm_layer_packed>(m);
}

}  // namespace lstm_ext
