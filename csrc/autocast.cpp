// Autocast on the CPU, with the result dtypes of torch's modules.
//
// nn.LSTM casts all it gets to the lower precision, but for packed input, which it computes by
// linear layers whose results meet the states and take their dtype: there, as in the cell, our
// float32 is kept. So the cell needs nothing here.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "layer_ops.h"

namespace lstm_ext {
namespace {

using at::Tensor;
using Optional = const std::optional<Tensor>&;

LayerOutputs lstm_layer(c10::DispatchKeySet keys, const Tensor& input, const Tensor& hx,
                        const Tensor& cx, const Tensor& w_ih, const Tensor& w_hh, Optional b_ih,
                        Optional b_hh, Optional batch_sizes, Optional reset, bool reverse) {
  if (defined(batch_sizes)) {
    // What the kernels do not take is computed by operations that autocast sees.
    const auto below =
        keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::AutocastCPU);
    return redispatch_lstm_layer(
        below, {input, hx, cx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse});
  }
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(at::kCPU);
  const auto cast = [&](const auto& tensor) {
    return at::autocast::cached_cast(dtype, tensor, at::kCPU);
  };
  const std::optional<Tensor> low_b_ih = cast(b_ih), low_b_hh = cast(b_hh);
  return call_lstm_layer({cast(input), cast(hx), cast(cx), cast(w_ih), cast(w_hh), low_b_ih,
                          low_b_hh, batch_sizes, reset, reverse});
}

}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, AutocastCPU, m) { m.impl("lstm_layer", TORCH_FN(lstm_layer)); }

}  // namespace lstm_ext
