// Autocast, with the result dtypes of torch's modules.
//
// On a GPU both cast all they get to the lower precision, packed input too. On the CPU nn.LSTM
// casts all it gets, but for packed input, which it computes by linear layers whose results meet
// the states and take their dtype: there, as in the cell, our float32 is kept. So the cell needs
// nothing there.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops/cell.h"
#include "ops/layer.h"
#include "ops/layer_states.h"
#include "ops/projected.h"
#include "ops/recurrence.h"

namespace lstm_ext {
namespace {

using at::Tensor;
// What casts a tensor to a device's lower precision, once for all uses of a parameter.
auto caster(at::DeviceType device) {
  return [device, dtype = at::autocast::get_autocast_dtype(device)](const auto& tensor) {
    return at::autocast::cached_cast(dtype, tensor, device);
  };
}

template <class Cast, class Call>
auto with_cast(at::DeviceType device, const Cast& cast, const CellInputs& in, const Call& call) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  return std::apply([&](const auto&... tensor) { return call({cast(tensor)..., in.variant}); },
                    in.tensors());
}

LayerOutputs cast_layer(at::DeviceType device, const LayerInputs& in) {
  return with_cast(device, caster(device), in, [&](const CellInputs& cell) {
    return ops::lstm_layer::call({cell, in.batch_sizes, in.reset, in.reverse});
  });
}

// What the kernels do not take is computed by operations that autocast sees.
c10::DispatchKeySet below_autocast(c10::DispatchKeySet keys) {
  return keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::AutocastCPU);
}

LayerOutputs lstm_layer_cpu(c10::DispatchKeySet keys, const LayerInputs& in) {
  if (!defined(in.batch_sizes)) return cast_layer(at::kCPU, in);
  return ops::lstm_layer::redispatch(below_autocast(keys), in);
}

// torch's projection is a linear layer: output and h have the lower precision, and c its own. In
// between float32 is kept where something is given in it.
LayerOutputs lstm_layer_projected_cpu(c10::DispatchKeySet keys, const ProjectedInputs& in) {
  const at::ScalarType low = at::autocast::get_autocast_dtype(at::kCPU);
  bool whole = false, other = false;
  const auto look = [&](const Tensor& t) {
    whole = whole || t.scalar_type() == at::kFloat;
    other =
        other || (t.is_floating_point() && t.scalar_type() != at::kFloat && t.scalar_type() != low);
  };
  for_each_tensor(look, in);
  if (other || !whole) {
    const auto below =
        keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::AutocastCPU);
    return ops::lstm_layer_projected::redispatch(below, in);
  }
  const auto to_float = [](const auto& tensor) {
    using Field = std::decay_t<decltype(tensor)>;
    if constexpr (std::is_same_v<Field, Tensor>)
      return tensor.to(at::kFloat);
    else
      return defined(tensor) ? Field(tensor->to(at::kFloat)) : Field();
  };
  auto [output, h, c] = with_cast(at::kCPU, to_float, in, [&](const CellInputs& cell) {
    return ops::lstm_layer_projected::call(
        {{cell, in.batch_sizes, in.reset, in.reverse}, to_float(in.w_hr)});
  });
  return {output.to(low), h.to(low), c.to(in.cx.scalar_type())};
}

LayerOutputs lstm_layer_cuda(const LayerInputs& in) { return cast_layer(at::kCUDA, in); }

StatesOutputs cast_states(at::DeviceType device, const StatesInputs& in) {
  const auto cast = caster(device);
  const auto reset_hx = cast(in.reset_hx), reset_cx = cast(in.reset_cx);
  return with_cast(device, cast, in, [&](const CellInputs& cell) {
    return ops::lstm_layer_states::call(
        {{cell, in.batch_sizes, in.reset, in.reverse}, reset_hx, reset_cx});
  });
}

StatesOutputs lstm_layer_states_cpu(c10::DispatchKeySet keys, const StatesInputs& in) {
  if (!defined(in.batch_sizes)) return cast_states(at::kCPU, in);
  return ops::lstm_layer_states::redispatch(below_autocast(keys), in);
}

StatesOutputs lstm_layer_states_cuda(const StatesInputs& in) { return cast_states(at::kCUDA, in); }

CellOutputs lstm_cell_cuda(const CellInputs& in) {
  return with_cast(at::kCUDA, caster(at::kCUDA), in,
                   [](const CellInputs& cell) { return ops::lstm_cell::call(cell); });
}

// As a layer: all of it in the lower precision, packed or not.
LayerOutputs cast_recurrence(at::DeviceType device, const RecurrenceInputs& in) {
  const auto cast = caster(device);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  return std::apply(
      [&](const auto&... tensor) {
        return std::apply(
            [&](const auto&... mask) {
              return ops::lstm_recurrence::call({cast(tensor)..., cast(mask)..., in.batch_sizes,
                                                 in.reset, in.reverse, in.norm_joint, in.carry_norm,
                                                 in.eps, in.cell_clip, in.projection_clip});
            },
            in.masks());
      },
      in.tensors());
}
LayerOutputs lstm_recurrence_cpu(const RecurrenceInputs& in) {
  return cast_recurrence(at::kCPU, in);
}
LayerOutputs lstm_recurrence_cuda(const RecurrenceInputs& in) {
  return cast_recurrence(at::kCUDA, in);
}

}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, AutocastCPU, m) {
  ops::lstm_recurrence::implement<lstm_recurrence_cpu>(m);
  ops::lstm_layer::implement_with_keys<lstm_layer_cpu>(m);
  ops::lstm_layer_states::implement_with_keys<lstm_layer_states_cpu>(m);
  ops::lstm_layer_projected::implement_with_keys<lstm_layer_projected_cpu>(m);
}

TORCH_LIBRARY_IMPL(lstm_ext, AutocastCUDA, m) {
  ops::lstm_recurrence::implement<lstm_recurrence_cuda>(m);
  ops::lstm_layer::implement<lstm_layer_cuda>(m);
  ops::lstm_layer_states::implement<lstm_layer_states_cuda>(m);
  ops::lstm_cell::implement<lstm_cell_cuda>(m);
}

}  // namespace lstm_ext
