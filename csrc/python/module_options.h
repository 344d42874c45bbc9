// What torch.nn's LSTM modules keep in their __dict__, read for the direct calls.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <array>
#include <optional>

#include "ops/cell.h"
#include "ops/lstm.h"
#include "ops/lstm_steps.h"

namespace lstm_ext {

// None -> no tensor. False for anything that is neither, subclasses but Parameter among them.
bool unpack(PyObject* arg, std::optional<at::Tensor>& tensor);

struct LSTMOptions {
  int64_t input_size, hidden_size, num_layers, directions;
  int64_t proj_size;  // 0 without a projection
  bool bias, batch_first, training;
  int64_t states() const { return num_layers * directions; }
  int64_t h_size() const { return proj_size > 0 ? proj_size : hidden_size; }
  int64_t weights_per_layer() const { return kLayerWeights + (proj_size > 0 ? 1 : 0); }
};

// None where torch.nn.LSTM or lstm_ext/_call.py has to decide: an option of another type than at
// construction, another cell than torch's, dropout that is to be drawn,
// checkpoint_every.
std::optional<LSTMOptions> read_options(PyObject* module_dict);

// The weights of a torch.nn.LSTM, as ops/lstm.h orders those of each layer and direction. None
// unless each is a parameter of the module and the same tensor in _flat_weights, of the size of the
// options.
std::optional<OptionalTensors> read_weights(PyObject* module_dict, const LSTMOptions& options);

// The buffers of a frozen LSTM: packed weights, b_ih, b_hh, for each layer and direction. None
// unless there are biases exactly if the options say so.
std::optional<OptionalTensors> read_packed_weights(PyObject* module_dict,
                                                   const LSTMOptions& options);

// What a module does in a step beyond torch's, and with its weights. None where there is nothing of
// the kind, or where lstm_ext/_recurrence.py has to compute it: dropout of features.
std::optional<StepOptions> read_step_options(PyObject* module_dict, bool training);

// Of each layer and direction: its weights, which read_weights has read, and its norms.
std::optional<std::vector<StepWeights>> read_step_weights(PyObject* module_dict,
                                                          const LSTMOptions& options,
                                                          const OptionalTensors& weights,
                                                          const StepOptions& steps);

inline constexpr int kCellWeights = 4;  // w_ih, w_hh, b_ih, b_hh
using CellParameters = std::array<std::optional<at::Tensor>, kCellWeights>;

// The buffers of a frozen cell: packed weights, b_ih, b_hh, and the plain weights w_ih, w_hh, which
// weights of fewer bits have not.
struct FrozenCell {
  at::Tensor packed;
  CellParameters plain;
};
std::optional<FrozenCell> read_frozen_cell(PyObject* module_dict);

// The weights of a torch.nn.LSTMCell. None unless each is a parameter of the module, and its cell
// is torch's.
std::optional<CellParameters> read_cell_weights(PyObject* module_dict);

struct CellSizes {
  int64_t input, hidden;
};
std::optional<StepWeights> read_cell_step_weights(PyObject* module_dict,
                                                  const CellParameters& weights,
                                                  const CellSizes& sizes, const StepOptions& steps);
// None unless it is a bool.
std::optional<bool> read_training(PyObject* module_dict);

std::optional<CellSizes> read_cell_sizes(PyObject* module_dict);

}  // namespace lstm_ext
