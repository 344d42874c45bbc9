#include "python/module_options.h"

#include <torch/csrc/autograd/python_variable.h>

#include <string>
#include <vector>

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
  bool bidirectional = false, training = false;
  if (!read_bool(dict, n.bias, options.bias) ||
      !read_bool(dict, n.batch_first, options.batch_first) ||
      !read_bool(dict, n.bidirectional, bidirectional) || !read_bool(dict, n.training, training) ||
      !read_int(dict, n.input_size, options.input_size) ||
      !read_int(dict, n.hidden_size, options.hidden_size) ||
      !read_int(dict, n.num_layers, options.num_layers) ||
      !read_int(dict, n.proj_size, options.proj_size) || options.proj_size < 0)
    return std::nullopt;
  if (look_up(dict, n.variant) != nullptr) return std::nullopt;
  PyObject* const dropout = look_up(dict, n.dropout);
  if (dropout == nullptr || !PyFloat_CheckExact(dropout)) return std::nullopt;
  if (training && options.num_layers > 1 && PyFloat_AS_DOUBLE(dropout) != 0) return std::nullopt;
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

std::optional<CellSizes> read_cell_sizes(PyObject* dict) {
  CellSizes sizes = {};
  if (!read_int(dict, names().input_size, sizes.input) ||
      !read_int(dict, names().hidden_size, sizes.hidden) || sizes.input <= 0 || sizes.hidden <= 0)
    return std::nullopt;
  return sizes;
}

}  // namespace lstm_ext
