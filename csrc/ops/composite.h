// Cell and layer in plain tensor operations, differentiable any number of times and forward-mode
// too. They serve devices without a kernel, forward-mode AD and double backward.
#pragma once

#include "ops/cell.h"
#include "ops/layer.h"
#include "ops/layer_states.h"
#include "ops/projected.h"
#include "ops/recurrence.h"

namespace lstm_ext::composite {

CellTrainingOutputs cell_forward(const CellInputs& in);
// The activated gates [N, 4H] alone.
at::Tensor cell_gates(const CellInputs& in);
Gradients cell_backward(const CellOutputGradients& grads, const CellInputs& in,
                        const CellResults& results, const Wanted& wanted);
// The same with hx [N, P] and w_hh [4H, P], of a layer that projects h: h' is r, from which it
// does.
CellTrainingOutputs projected_cell_forward(const CellInputs& in);
Gradients projected_cell_backward(const CellOutputGradients& grads, const CellInputs& in,
                                  const CellResults& results, const Wanted& wanted);

// The gradients of the units' own weights [P, H], summed over rows: from the activated gates
// [S, 4H], the c that each row started from, and the gradients of the pre-activations [S, 4H].
at::Tensor unit_gradients(int64_t variant, const at::Tensor& gates, const at::Tensor& cx,
                          const at::Tensor& grad_gates);

LayerTrainingOutputs layer_forward(const LayerInputs& in);
// Its first three results.
LayerOutputs layer(const LayerInputs& in);
// The forward is run anew, so that the gradients are differentiable too: the results are only
// checked.
Gradients layer_backward(const LayerOutputGradients& grads, const LayerInputs& in,
                         const LayerResults& results, const Wanted& wanted);
// The same with the states of all steps.
StatesTrainingOutputs layer_states_forward(const StatesInputs& in);
StatesOutputs layer_states(const StatesInputs& in);
StatesGradients layer_states_backward(const StatesOutputGradients& grads, const StatesInputs& in,
                                      const LayerResults& results, const StatesWanted& wanted);
// The first rows of h or c, with those of value, or zeros, in those that time t starts anew.
at::Tensor reset_to(const std::optional<at::Tensor>& value, const at::Tensor& state,
                    const LayerInputs& in, int64_t t);
// Of a layer that projects h.
ProjectedTrainingOutputs projected_forward(const ProjectedInputs& in);
LayerOutputs projected(const ProjectedInputs& in);
ProjectedGradients projected_backward(const LayerOutputGradients& grads, const ProjectedInputs& in,
                                      const ProjectedResults& results,
                                      const ProjectedWanted& wanted);
// Of a recurrence.
LayerOutputs recurrence(const RecurrenceInputs& in);
RecurrenceTrainingOutputs recurrence_forward(const RecurrenceInputs& in);
RecurrenceGradients recurrence_backward(const LayerOutputGradients& grads,
                                        const RecurrenceInputs& in,
                                        const RecurrenceResults& results,
                                        const RecurrenceWanted& wanted);
// first, and below it the rows of whole that it leaves out.
at::Tensor over(const at::Tensor& first, const at::Tensor& whole);
// The first rows of h or c, with zeros in those that time t starts anew.
at::Tensor reset_to_zero(const at::Tensor& state, const LayerInputs& in, int64_t t);

}  // namespace lstm_ext::composite
