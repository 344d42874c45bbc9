#include "python/module_options.h"

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>
#include <string_view>
#include <vector>

namespace py = pybind11;

namespace lstm_ext {
namespace {

// Names as Python itself has them: a look-up compares addresses first.
struct Names {
  PyObject* bias = PyUnicode_InternFromString("bias");
  PyObject* batch_first = PyUnicode_InternFromString("batch_first");
  PyObject* bidirectional = PyUnicode_InternFromString("bidirectional");
  PyObject* training = PyUnicode_InternFromString("training");
  PyObject* dropout = PyUnicode_InternFromString("dropout");
  PyObject* input_size = PyUnicode_InternFromString("input_size");
  PyObject* hidden_size = PyUnicode_InternFromString("hidden_size");
  PyObject* num_layers = PyUnicode_InternFromString("num_layers");
  PyObject* proj_size = PyUnicode_InternFromString("proj_size");
  PyObject* variant = PyUnicode_InternFromString("_variant");
  PyObject* checkpoint_every = PyUnicode_InternFromString("checkpoint_every");
  PyObject* parameters = PyUnicode_InternFromString("_parameters");
  PyObject* step_options = PyUnicode_InternFromString("_step_options");
  PyObject* layer_norm = PyUnicode_InternFromString("_layer_norm");
  PyObject* buffers = PyUnicode_InternFromString("_buffers");
  PyObject* packed_names = PyUnicode_InternFromString("_packed_names");
  PyObject* flat_weights = PyUnicode_InternFromString("_flat_weights");
  PyObject* flat_weights_names = PyUnicode_InternFromString("_flat_weights_names");
  std::array<PyObject*, kCellWeights> cell = {
      PyUnicode_InternFromString("weight_ih"), PyUnicode_InternFromString("weight_hh"),
      PyUnicode_InternFromString("bias_ih"), PyUnicode_InternFromString("bias_hh")};
};

const Names& names() {
  static const Names interned;
  return interned;
}

// A borrowed reference, null where there is none.
PyObject* look_up(PyObject* dict, PyObject* name) {
  return PyDict_CheckExact(dict) ? PyDict_GetItemWithError(dict, name) : nullptr;
}

PyObject* list_in(PyObject* dict, PyObject* name) {
  PyObject* list = look_up(dict, name);
  return list != nullptr && PyList_CheckExact(list) ? list : nullptr;
}

PyObject* dict_in(PyObject* dict, PyObject* name) {
  PyObject* inner = look_up(dict, name);
  return inner != nullptr && PyDict_CheckExact(inner) ? inner : nullptr;
}

bool read_bool(PyObject* dict, PyObject* name, bool& value) {
  PyObject* const object = look_up(dict, name);
  value = object == Py_True;
  return value || object == Py_False;
}

bool read_int(PyObject* dict, PyObject* name, int64_t& value) {
  PyObject* const object = look_up(dict, name);
  if (object == nullptr || !PyLong_CheckExact(object)) return false;
  value = PyLong_AsLongLong(object);
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

// A parameter that no attribute of the same name hides.
PyObject* parameter(PyObject* module_dict, PyObject* parameters, PyObject* name) {
  return look_up(module_dict, name) == nullptr ? look_up(parameters, name) : nullptr;
}

bool has_shape(const std::optional<at::Tensor>& tensor, int64_t rows, int64_t columns) {
  return !tensor ||
         (tensor->dim() == 2 && tensor->sym_size(0) == rows && tensor->sym_size(1) == columns);
}

}  // namespace

bool unpack(PyObject* arg, std::optional<at::Tensor>& tensor) {
  if (arg == Py_None) return true;
  if (!THPVariable_CheckExact(arg)) return false;
  tensor = THPVariable_Unpack(arg);
  return true;
}

std::optional<LSTMOptions> read_options(PyObject* dict) {
  const Names& n = names();
  LSTMOptions options = {};
  bool bidirectional = false;
  if (!read_bool(dict, n.bias, options.bias) ||
      !read_bool(dict, n.batch_first, options.batch_first) ||
      !read_bool(dict, n.bidirectional, bidirectional) ||
      !read_bool(dict, n.training, options.training) ||
      !read_int(dict, n.input_size, options.input_size) ||
      !read_int(dict, n.hidden_size, options.hidden_size) ||
      !read_int(dict, n.num_layers, options.num_layers) ||
      !read_int(dict, n.proj_size, options.proj_size) || options.proj_size < 0)
    return std::nullopt;
  if (look_up(dict, n.variant) != nullptr) return std::nullopt;
  PyObject* const dropout = look_up(dict, n.dropout);
  if (dropout == nullptr || !PyFloat_CheckExact(dropout)) return std::nullopt;
  if (options.training && options.num_layers > 1 && PyFloat_AS_DOUBLE(dropout) != 0)
    return std::nullopt;
  PyObject* const checkpoint_every = look_up(dict, n.checkpoint_every);
  if (checkpoint_every != nullptr && checkpoint_every != Py_None) return std::nullopt;
  if (options.input_size <= 0 || options.hidden_size <= 0 || options.num_layers <= 0)
    return std::nullopt;
  options.directions = bidirectional ? 2 : 1;
  return options;
}

std::optional<OptionalTensors> read_weights(PyObject* dict, const LSTMOptions& options) {
  const Names& n = names();
  PyObject* const parameters = dict_in(dict, n.parameters);
  PyObject* const flat = list_in(dict, n.flat_weights);
  PyObject* const flat_names = list_in(dict, n.flat_weights_names);
  if (parameters == nullptr || flat == nullptr || flat_names == nullptr) return std::nullopt;
  const int64_t per_layer = options.weights_per_layer();
  const Py_ssize_t biases = options.bias ? 2 : 0;
  const Py_ssize_t given = 2 + biases + (per_layer - kLayerWeights);
  const Py_ssize_t count = options.states() * given;
  if (PyList_GET_SIZE(flat) != count || PyList_GET_SIZE(flat_names) != count) return std::nullopt;
  OptionalTensors weights(options.states() * per_layer);
  // Of the projection, the last.
  const auto place = [&](Py_ssize_t k) { return k < 2 + biases ? k : kLayerWeights; };
  for (Py_ssize_t k = 0; k < count; ++k) {
    PyObject* const weight = parameter(dict, parameters, PyList_GET_ITEM(flat_names, k));
    if (weight == nullptr || weight == Py_None || weight != PyList_GET_ITEM(flat, k) ||
        !unpack(weight, weights[k / given * per_layer + place(k % given)]))
      return std::nullopt;
  }
  const int64_t H = options.hidden_size, P = options.h_size();
  for (int64_t k = 0; k < options.states(); ++k) {
    const auto* w = weights.data() + k * per_layer;
    const int64_t I = k < options.directions ? options.input_size : P * options.directions;
    if (!has_shape(w[0], 4 * H, I) || !has_shape(w[1], 4 * H, P) || !bias_fits(w[2], 4 * H) ||
        !bias_fits(w[3], 4 * H) || (options.proj_size > 0 && !has_shape(w[kLayerWeights], P, H)))
      return std::nullopt;
  }
  return weights;
}

namespace {

// Into as many tensors as there are buffers; false if there are more or fewer.
bool read_buffers(PyObject* dict, std::optional<at::Tensor>* tensors, int64_t count) {
  PyObject* const buffers = dict_in(dict, names().buffers);
  PyObject* const buffer_names = list_in(dict, names().packed_names);
  if (buffers == nullptr || buffer_names == nullptr || PyList_GET_SIZE(buffer_names) != count)
    return false;
  for (int64_t k = 0; k < count; ++k) {
    PyObject* const buffer = look_up(buffers, PyList_GET_ITEM(buffer_names, k));
    if (buffer == nullptr || !unpack(buffer, tensors[k])) return false;
  }
  return true;
}

}  // namespace

std::optional<OptionalTensors> read_packed_weights(PyObject* dict, const LSTMOptions& options) {
  OptionalTensors weights(options.states() * kPackedLayerWeights);
  if (!read_buffers(dict, weights.data(), static_cast<int64_t>(weights.size())) ||
      weights[1].has_value() != options.bias)
    return std::nullopt;
  for (int64_t k = 0; k < options.states(); ++k)
    if (!weights[k * kPackedLayerWeights]) return std::nullopt;
  return weights;
}

std::optional<FrozenCell> read_frozen_cell(PyObject* dict) {
  std::array<std::optional<at::Tensor>, 5> t;
  if (!read_buffers(dict, t.data(), t.size()) || !t[0] || t[3].has_value() != t[4].has_value())
    return std::nullopt;
  return FrozenCell{std::move(*t[0]),
                    {std::move(t[3]), std::move(t[4]), std::move(t[1]), std::move(t[2])}};
}

std::optional<CellParameters> read_cell_weights(PyObject* dict) {
  PyObject* const parameters = dict_in(dict, names().parameters);
  if (parameters == nullptr || look_up(dict, names().variant) != nullptr) return std::nullopt;
  CellParameters weights;
  for (int k = 0; k < kCellWeights; ++k) {
    PyObject* const weight = parameter(dict, parameters, names().cell[k]);
    if (weight == nullptr || !unpack(weight, weights[k])) return std::nullopt;
  }
  if (!weights[0] || !weights[1]) return std::nullopt;
  return weights;
}

namespace {

bool as_number(PyObject* object, double& value) {
  if (!PyFloat_CheckExact(object)) return false;
  value = PyFloat_AS_DOUBLE(object);
  return true;
}

// One of lstm_ext/_step_options.py. False for dropout of features where it is of effect.
bool read_step_option(const char* name, PyObject* value, StepOptions& steps) {
  const std::string_view key = name;
  if (key == "zoneout_h") return as_number(value, steps.zoneout_h);
  if (key == "zoneout_c") return as_number(value, steps.zoneout_c);
  if (key == "cell_clip") return as_number(value, steps.cell_clip);
  if (key == "projection_clip") return as_number(value, steps.projection_clip);
  if (key == "recurrent_dropout") return as_number(value, steps.recurrent_dropout);
  if (key == "weight_dropout") return as_number(value, steps.weight_dropout);
  const auto as_bool = [&](bool& to) {
    to = value == Py_True;
    return PyBool_Check(value) != 0;
  };
  if (key == "recurrent_dropout_per_step") return as_bool(steps.dropout_per_step);
  if (key == "recurrent_dropout_per_gate") return as_bool(steps.dropout_per_gate);
  if (key == "weight_dropout_rows") return as_bool(steps.weight_dropout_rows);
  if (key == "coupled_gates") return as_bool(steps.coupled_gates);
  // Of dropout between layers, which read_options refuses where it is to be drawn.
  if (key == "variational_dropout") return true;
  return key == "input_dropout" && !steps.training;
}

bool read_norm_form(PyObject* dict, StepOptions& steps) {
  PyObject* const form = look_up(dict, names().layer_norm);
  if (form == nullptr || form == Py_None) return true;
  if (!PyTuple_CheckExact(form) || PyTuple_GET_SIZE(form) != 3) return false;
  PyObject *const joint = PyTuple_GET_ITEM(form, 0), *const carry = PyTuple_GET_ITEM(form, 1);
  steps.norms = true;
  steps.norm_joint = joint == Py_True;
  steps.carry_norm = carry == Py_True;
  return PyBool_Check(joint) && PyBool_Check(carry) &&
         as_number(PyTuple_GET_ITEM(form, 2), steps.eps);
}

// The norms of a layer, whose parameters' names end so; bias_c where there are biases. False unless
// those that there should be are parameters, of their sizes.
bool read_norms(PyObject* dict, const std::string& end, int64_t H, bool bias,
                const StepOptions& steps, StepWeights& w) {
  if (!steps.norms) return true;
  PyObject *const parameters = dict_in(dict, names().parameters), *const buffers = dict_in(
                                                                      dict, names().buffers);
  if (parameters == nullptr || buffers == nullptr) return false;
  const auto read = [&](const char* name, int64_t size, std::optional<at::Tensor>& to) {
    const py::str key(name + end);
    PyObject* const found = parameter(dict, parameters, key.ptr());
    return found != nullptr && unpack(found, to) && to && bias_fits(to, size);
  };
  const auto is_absent = [&](const char* name) {
    const py::str key(name + end);
    return look_up(dict, key.ptr()) == nullptr && look_up(parameters, key.ptr()) == nullptr &&
           look_up(buffers, key.ptr()) == nullptr;
  };
  return (steps.norm_joint || read("norm_ih", 4 * H, w.norm_ih)) &&
         read(steps.norm_joint ? "norm_gates" : "norm_hh", 4 * H, w.norm) &&
         read("norm_c", H, w.norm_c) && (bias ? read("bias_c", H, w.bias_c) : is_absent("bias_c"));
}

}  // namespace

std::optional<StepOptions> read_step_options(PyObject* dict, bool training) {
  StepOptions steps;
  steps.training = training;
  PyObject* const given = look_up(dict, names().step_options);
  if (given != nullptr && given != Py_None) {
    if (!PyDict_CheckExact(given)) return std::nullopt;
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(given, &at, &key, &value);) {
      const char* const name = PyUnicode_CheckExact(key) ? PyUnicode_AsUTF8(key) : nullptr;
      if (name == nullptr || !read_step_option(name, value, steps)) return std::nullopt;
    }
  }
  if (!read_norm_form(dict, steps)) return std::nullopt;
  const bool is_own = steps.needs_steps() || steps.changes_weights();
  return is_own ? std::optional(steps) : std::nullopt;
}

std::optional<std::vector<StepWeights>> read_step_weights(PyObject* dict,
                                                          const LSTMOptions& options,
                                                          const OptionalTensors& weights,
                                                          const StepOptions& steps) {
  std::vector<StepWeights> layers(options.states());
  for (int64_t k = 0; k < options.states(); ++k) {
    const auto* w = weights.data() + k * options.weights_per_layer();
    StepWeights& to = layers[k];
    to.w_ih = *w[0];
    to.w_hh = *w[1];
    to.b_ih = w[2];
    to.b_hh = w[3];
    if (options.proj_size > 0) to.w_hr = w[kLayerWeights];
    const std::string end = "_l" + std::to_string(k / options.directions) +
                            (k % options.directions == 1 ? "_reverse" : "");
    if (!read_norms(dict, end, options.hidden_size, options.bias, steps, to)) return std::nullopt;
  }
  return layers;
}

std::optional<StepWeights> read_cell_step_weights(PyObject* dict, const CellParameters& weights,
                                                  const CellSizes& sizes,
                                                  const StepOptions& steps) {
  const auto [I, H] = sizes;
  bool bias = false;
  if (!read_bool(dict, names().bias, bias) || !has_shape(weights[0], 4 * H, I) ||
      !has_shape(weights[1], 4 * H, H) || !bias_fits(weights[2], 4 * H) ||
      !bias_fits(weights[3], 4 * H))
    return std::nullopt;
  StepWeights to = {*weights[0], *weights[1], weights[2], weights[3], {}, {}, {}, {}, {}};
  if (!read_norms(dict, "", H, bias, steps, to)) return std::nullopt;
  return to;
}

std::optional<bool> read_training(PyObject* dict) {
  bool training = false;
  return read_bool(dict, names().training, training) ? std::optional(training) : std::nullopt;
}

std::optional<CellSizes> read_cell_sizes(PyObject* dict) {
  CellSizes sizes = {};
  if (!read_int(dict, names().input_size, sizes.input) ||
      !read_int(dict, names().hidden_size, sizes.hidden) || sizes.input <= 0 || sizes.hidden <= 0)
    return std::nullopt;
  return sizes;
}

}  // namespace lstm_ext
