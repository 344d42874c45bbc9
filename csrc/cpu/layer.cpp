// The layer's operators on the CPU.
#include "cpu/layer.h"

#include <torch/library.h>

#include "ops/composite.h"
#include "ops/projected.h"

namespace lstm_ext::cpu {
namespace {

LayerOutputs lstm_layer(const LayerInputs& in) {
  if (!fusable(in)) return composite::layer(in);
  check_all_allocated(in);
  log_cpu_path("lstm_layer", in.input, in.hx);
  LayerTensors out = layer_forward(StatesInputs::plain(in), {});
  return {std::move(out.output), std::move(out.hy), std::move(out.cy)};
}

LayerTrainingOutputs lstm_layer_forward(const LayerInputs& in) {
  if (!fusable(in)) return composite::layer_forward(in);
  check_all_allocated(in);
  log_cpu_path("lstm_layer_forward", in.input, in.hx);
  LayerTensors out = layer_forward(StatesInputs::plain(in), {/*training=*/true});
  return {std::move(out.output), std::move(out.hy), std::move(out.cy), std::move(out.gates),
          std::move(out.c_before)};
}

Gradients lstm_layer_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                              const LayerResults& results, const Wanted& wanted) {
  if (!fusable(in)) return composite::layer_backward(grads, in, results, wanted);
  check_allocated_for_backward(in);
  check_all_allocated(in.batch_sizes, in.reset, grads, results);
  check_backward(grads, in, results);
  log_cpu_path("lstm_layer_backward", in.input, in.hx);
  return layer_backward(StatesOutputGradients::plain(grads), StatesInputs::plain(in), results,
                        {wanted, false, false});
}

StatesOutputs lstm_layer_states(const StatesInputs& in) {
  if (!fusable(in)) return composite::layer_states(in);
  check_all_allocated(in);
  log_cpu_path("lstm_layer_states", in.input, in.hx);
  LayerTensors out = layer_forward(in, {/*training=*/false, /*cells=*/true});
  return {std::move(out.output), std::move(out.hy), std::move(out.cy), std::move(out.cells)};
}

StatesTrainingOutputs lstm_layer_states_forward(const StatesInputs& in) {
  if (!fusable(in)) return composite::layer_states_forward(in);
  check_all_allocated(in);
  log_cpu_path("lstm_layer_states_forward", in.input, in.hx);
  LayerTensors out = layer_forward(in, {/*training=*/true, /*cells=*/true});
  return {std::move(out.output), std::move(out.hy),    std::move(out.cy),
          std::move(out.cells),  std::move(out.gates), std::move(out.c_before)};
}

StatesGradients lstm_layer_states_backward(const StatesOutputGradients& grads,
                                           const StatesInputs& in, const LayerResults& results,
                                           const StatesWanted& wanted) {
  if (!fusable(in)) return composite::layer_states_backward(grads, in, results, wanted);
  check_allocated_for_backward(in);
  check_all_allocated(in.batch_sizes, in.reset, in.reset_hx, in.reset_cx, grads, results);
  check_backward(grads, in, results);
  log_cpu_path("lstm_layer_states_backward", in.input, in.hx);
  return layer_backward(grads, in, results, wanted);
}

LayerOutputs lstm_layer_projected(const ProjectedInputs& in) {
  if (!fusable(in)) return composite::projected(in);
  check_all_allocated(in);
  log_cpu_path("lstm_layer_projected", in.input, in.cx);
  LayerTensors out = layer_forward(StatesInputs::plain(in), {}, {}, in.w_hr);
  return {std::move(out.output), std::move(out.hy), std::move(out.cy)};
}

ProjectedTrainingOutputs lstm_layer_projected_forward(const ProjectedInputs& in) {
  if (!fusable(in)) return composite::projected_forward(in);
  check_all_allocated(in);
  log_cpu_path("lstm_layer_projected_forward", in.input, in.cx);
  LayerTensors out = layer_forward(StatesInputs::plain(in), {/*training=*/true}, {}, in.w_hr);
  return {std::move(out.output), std::move(out.hy),       std::move(out.cy),
          std::move(out.gates),  std::move(out.c_before), std::move(out.r)};
}

ProjectedGradients lstm_layer_projected_backward(const LayerOutputGradients& grads,
                                                 const ProjectedInputs& in,
                                                 const ProjectedResults& results,
                                                 const ProjectedWanted& wanted) {
  if (!fusable(in)) return composite::projected_backward(grads, in, results, wanted);
  check_allocated_for_backward(in);
  check_all_allocated(in.w_hr, in.batch_sizes, in.reset, grads, results);
  check_backward(grads, in, results);
  log_cpu_path("lstm_layer_projected_backward", in.input, in.cx);
  return projected_backward(grads, in, results, wanted);
}

}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, CPU, m) {
  ops::lstm_layer::implement<lstm_layer>(m);
  ops::lstm_layer_forward::implement<lstm_layer_forward>(m);
  ops::lstm_layer_backward::implement<lstm_layer_backward>(m);
  ops::lstm_layer_states::implement<lstm_layer_states>(m);
  ops::lstm_layer_states_forward::implement<lstm_layer_states_forward>(m);
  ops::lstm_layer_states_backward::implement<lstm_layer_states_backward>(m);
  ops::lstm_layer_projected::implement<lstm_layer_projected>(m);
  ops::lstm_layer_projected_forward::implement<lstm_layer_projected_forward>(m);
  ops::lstm_layer_projected_backward::implement<lstm_layer_projected_backward>(m);
}

}  // namespace lstm_ext::cpu
