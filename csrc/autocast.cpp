// Autocast, with the result dtypes of torch's modules.
//
// On a GPU both cast all they get to the lower precision, packed input too. On the CPU nn.LSTM
// casts all it gets, but for packed input, which it computes by linear layers whose results meet
// the states and take their dtype: there, as in the cell, our float32 is kept. So the cell needs
// nothing there.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "layer_ops.h"
#include "ops.h"

namespace lstm_ext {
namespace {

using at::Tensor;
using Optional = const std::optional<Tensor>&;

// What casts a tensor to a device's lower precision, once for all uses of a parameter.
auto caster(at::DeviceType device) {
  return [device, dtype = at::autocast::get_autocast_dtype(device)](const auto& tensor) {
    return at::autocast::cached_cast(dtype, tensor, device);
  };
}

LayerOutputs cast_layer(at::DeviceType device, const LayerInputs& in) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto cast = caster(device);
  const std::optional<Tensor> b_ih = cast(in.b_ih), b_hh = cast(in.b_hh);
  return call_lstm_layer({cast(in.input), cast(in.hx), cast(in.cx), cast(in.w_ih), cast(in.w_hh),
                          b_ih, b_hh, in.batch_sizes, in.reset, in.reverse});
}

LayerOutputs lstm_layer_cpu(c10::DispatchKeySet keys, const Tensor& input, const Tensor& hx,
                            const Tensor& cx, const Tensor& w_ih, const Tensor& w_hh, Optional b_ih,
                            Optional b_hh, Optional batch_sizes, Optional reset, bool reverse) {
  const LayerInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse};
  if (!defined(batch_sizes)) return cast_layer(at::kCPU, in);
  // What the kernels do not take is computed by operations that autocast sees.
  const auto below =
      keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::AutocastCPU);
  return redispatch_lstm_layer(below, in);
}

LayerOutputs lstm_layer_cuda(const Tensor& input, const Tensor& hx, const Tensor& cx,
                             const Tensor& w_ih, const Tensor& w_hh, Optional b_ih, Optional b_hh,
                             Optional batch_sizes, Optional reset, bool reverse) {
  return cast_layer(at::kCUDA,
                    {input, hx, cx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse});
}

CellOutputs lstm_cell_cuda(const Tensor& input, const Tensor& hx, const Tensor& cx,
                           const Tensor& w_ih, const Tensor& w_hh, Optional b_ih, Optional b_hh) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  const auto cast = caster(at::kCUDA);
  const std::optional<Tensor> low_b_ih = cast(b_ih), low_b_hh = cast(b_hh);
  return call_lstm_cell(
      {cast(input), cast(hx), cast(cx), cast(w_ih), cast(w_hh), low_b_ih, low_b_hh});
}

}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, AutocastCPU, m) { m.impl("lstm_layer", TORCH_FN(lstm_layer_cpu)); }

TORCH_LIBRARY_IMPL(lstm_ext, AutocastCUDA, m) {
  m.impl("lstm_layer", TORCH_FN(lstm_layer_cuda));
  m.impl("lstm_cell", TORCH_FN(lstm_cell_cuda));
}

}  // namespace lstm_ext
