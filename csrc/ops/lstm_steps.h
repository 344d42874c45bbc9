// Layers whose steps or weights are not torch's, one after the other: what lstm_ext/_recurrence.py
// computes of a module, for the direct calls. Shapes as in lstm.h and recurrence.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "ops/layer.h"

namespace lstm_ext {

// lstm_ext/_step_options.py and LayerNormLSTM have the names and the meaning.
struct StepOptions {
  double zoneout_h = 0, zoneout_c = 0, recurrent_dropout = 0, cell_clip = 0, projection_clip = 0;
  bool dropout_per_step = false, dropout_per_gate = false;
  double weight_dropout = 0;
  bool weight_dropout_rows = false, coupled_gates = false;
  bool training = false;
  bool norms = false, norm_joint = false, carry_norm = false;
  double eps = 1e-5;

  // Whether a step is another one than torch's. Else the weights are.
  bool needs_steps() const {
    return norms || zoneout_h > 0 || zoneout_c > 0 || cell_clip > 0 || projection_clip > 0 ||
           (training && recurrent_dropout > 0);
  }
  bool changes_weights() const { return coupled_gates || (training && weight_dropout > 0); }
};

// Of one layer and direction, or of a cell.
struct StepWeights {
  at::Tensor w_ih, w_hh;
  std::optional<at::Tensor> b_ih, b_hh, w_hr;
  std::optional<at::Tensor> norm_ih, norm, norm_c, bias_c;  // norm: of h, or of the sum
};

struct LSTMStepsInputs {
  const at::Tensor& input;                       // [L, N, I], or packed [S, I]
  const at::Tensor& hx;                          // [K D, N, P]
  const at::Tensor& cx;                          // [K D, N, H]
  const std::vector<StepWeights>& weights;       // of each layer and direction
  const std::optional<at::Tensor>& batch_sizes;  // as in LayerInputs
  int64_t directions;
  const StepOptions& options;
};

LayerOutputs lstm_steps(const LSTMStepsInputs& in);

// One step of N rows: h' and c' from input [N, I], h and c [N, H].
std::tuple<at::Tensor, at::Tensor> lstm_cell_step(const at::Tensor& input, const at::Tensor& h,
                                                  const at::Tensor& c, const StepWeights& weights,
                                                  const StepOptions& options);

}  // namespace lstm_ext
