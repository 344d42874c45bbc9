#include "direct_calls.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/ops/zeros.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <atomic>

#include "lstm.h"
#include "ops.h"

namespace py = pybind11;

namespace lstm_ext {
namespace {

// LSTM_EXT_CUDA=torch, as Python last set it (lstm_ext/_backend.py).
std::atomic<bool> gpu_cells_by_torch = false;

// Work that is done before another thread could make use of the interpreter's lock: some ten
// microseconds on the CPU. Giving it up and taking it back costs a tenth of a small cell.
constexpr int64_t kBriefWork = 64 * 1024;

template <class Call>
auto without_lock(bool brief, const Call& call) {
  if (brief) return call();
  py::gil_scoped_release no_lock;
  return call();
}

bool plain_mode() {
  return !torch::jit::tracer::isTracing() && !at::impl::torch_function_mode_enabled();
}

// None -> no tensor. False for anything that is neither.
bool unpack(PyObject* arg, std::optional<at::Tensor>& tensor) {
  if (arg == Py_None) return true;
  if (!THPVariable_CheckExact(arg)) return false;
  tensor = THPVariable_Unpack(arg);
  return true;
}

template <class... Tensors>
PyObject* wrap(Tensors&&... tensors) {
  return PyTuple_Pack(
      sizeof...(Tensors),
      py::reinterpret_steal<py::object>(THPVariable_Wrap(std::forward<Tensors>(tensors))).ptr()...);
}

bool brief(const CellInputs& in) {
  return in.input.is_cpu() && in.w_ih.is_cpu() && in.w_hh.is_cpu() &&
         in.input.sym_size(0) * (in.w_ih.sym_numel() + in.w_hh.sym_numel()) < kBriefWork;
}

PyObject* call_cell(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr int kRequired = 5;
  if (count != kCellInputs || !plain_mode()) Py_RETURN_NONE;
  for (int k = 0; k < kRequired; ++k)
    if (!THPVariable_CheckExact(args[k])) Py_RETURN_NONE;
  std::optional<at::Tensor> b_ih, b_hh;
  if (!unpack(args[5], b_ih) || !unpack(args[6], b_hh)) Py_RETURN_NONE;
  for (int k = 0; k < 3; ++k)
    if (THPVariable_Unpack(args[k]).dim() != 2) Py_RETURN_NONE;
  if (THPVariable_Unpack(args[0]).is_cuda() && gpu_cells_by_torch) Py_RETURN_NONE;
  const CellInputs in = {THPVariable_Unpack(args[0]),
                         THPVariable_Unpack(args[1]),
                         THPVariable_Unpack(args[2]),
                         THPVariable_Unpack(args[3]),
                         THPVariable_Unpack(args[4]),
                         b_ih,
                         b_hh};
  auto [hy, cy] = without_lock(brief(in), [&] { return call_lstm_cell(in); });
  return wrap(std::move(hy), std::move(cy));
  END_HANDLE_TH_ERRORS
}

struct Sizes {
  int64_t input, hidden;
};
std::optional<Sizes> sizes_of(PyObject* input_size, PyObject* hidden_size) {
  const Sizes sizes = {PyLong_AsLongLong(input_size), PyLong_AsLongLong(hidden_size)};
  if (!PyErr_Occurred()) return sizes;
  PyErr_Clear();
  return std::nullopt;
}

// What the modules' own checks would find right.
bool usual(const at::Tensor& input, int64_t I, const at::Tensor& h, const at::Tensor& c,
           at::IntArrayRef h_sizes) {
  return input.is_cpu() && input.layout() == at::kStrided &&
         !input.unsafeGetTensorImpl()->has_symbolic_sizes_strides() && input.numel() > 0 &&
         input.size(-1) == I && h.sizes() == h_sizes && c.sizes() == h_sizes &&
         h.scalar_type() == input.scalar_type() && c.scalar_type() == input.scalar_type() &&
         h.is_cpu() && c.is_cpu();
}

template <LayerOutputs Run(const LSTMInputs&), int64_t WeightsPerLayer>
PyObject* call_lstm(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 9 || !plain_mode() || !THPVariable_CheckExact(args[0]) || !PyTuple_Check(args[3]))
    Py_RETURN_NONE;
  at::Tensor input = THPVariable_Unpack(args[0]);
  std::optional<at::Tensor> h, c, batch_sizes;
  if (!unpack(args[1], h) || !unpack(args[2], c) || !unpack(args[8], batch_sizes)) Py_RETURN_NONE;
  const Py_ssize_t weight_count = PyTuple_GET_SIZE(args[3]);
  OptionalTensors weights(weight_count);
  for (Py_ssize_t k = 0; k < weight_count; ++k)
    if (!unpack(PyTuple_GET_ITEM(args[3], k), weights[k])) Py_RETURN_NONE;
  const std::optional<Sizes> sizes = sizes_of(args[4], args[5]);
  if (!sizes) Py_RETURN_NONE;
  const auto [I, H] = *sizes;
  const bool bidirectional = args[6] == Py_True, batch_first = args[7] == Py_True;
  if (input.dim() != (batch_sizes ? 2 : 3) || h.has_value() != c.has_value()) Py_RETURN_NONE;
  if (batch_sizes && (batch_sizes->dim() != 1 || batch_sizes->scalar_type() != at::kLong ||
                      !batch_sizes->is_cpu() || batch_sizes->numel() == 0))
    Py_RETURN_NONE;
  const int64_t N =
      batch_sizes ? *batch_sizes->const_data_ptr<int64_t>() : input.size(batch_first ? 0 : 1);
  const int64_t h_sizes[] = {weight_count / WeightsPerLayer, N, H};
  if (N < 0) Py_RETURN_NONE;
  // No states of a size that no weights have.
  constexpr int64_t kRecurrent = WeightsPerLayer == kPackedLayerWeights ? 0 : 1;
  if (weight_count < WeightsPerLayer || !weights[kRecurrent] || weights[kRecurrent]->numel() < H)
    Py_RETURN_NONE;
  if (!h) h = c = at::zeros(h_sizes, input.options());
  if (!usual(input, I, *h, *c, h_sizes)) Py_RETURN_NONE;
  for (Py_ssize_t k = 0; k < weight_count; ++k) {
    const bool packed = WeightsPerLayer == kPackedLayerWeights && k % WeightsPerLayer == 0;
    if (weights[k] && !packed && weights[k]->scalar_type() != input.scalar_type()) Py_RETURN_NONE;
  }
  const bool transposed = batch_first && !batch_sizes;
  if (transposed) input = input.transpose(0, 1);
  const bool brief = input.numel() / I * 4 * H * (I + H) * h_sizes[0] < kBriefWork;
  auto [output, h_n, c_n] = without_lock(brief, [&] {
    return Run({input, *h, *c, weights, bidirectional, 0, batch_sizes, std::nullopt});
  });
  if (transposed) output = output.transpose(0, 1);
  return wrap(std::move(output), std::move(h_n), std::move(c_n));
  END_HANDLE_TH_ERRORS
}

PyObject* call_cell_packed(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 8 || !plain_mode()) Py_RETURN_NONE;
  for (int k = 0; k < 4; ++k)
    if (!THPVariable_CheckExact(args[k])) Py_RETURN_NONE;
  std::optional<at::Tensor> b_ih, b_hh;
  if (!unpack(args[4], b_ih) || !unpack(args[5], b_hh)) Py_RETURN_NONE;
  const at::Tensor &input = THPVariable_Unpack(args[0]), &h = THPVariable_Unpack(args[1]),
                   &c = THPVariable_Unpack(args[2]);
  const std::optional<Sizes> sizes = sizes_of(args[6], args[7]);
  if (!sizes || input.dim() != 2) Py_RETURN_NONE;
  const auto [I, H] = *sizes;
  const int64_t h_sizes[] = {input.size(0), H};
  if (!usual(input, I, h, c, h_sizes)) Py_RETURN_NONE;
  auto [output, h_n, c_n] = without_lock(input.size(0) * 4 * H * (I + H) < kBriefWork, [&] {
    return call_lstm_layer_packed(input.unsqueeze(0), h, c, THPVariable_Unpack(args[3]),
                                  {b_ih, b_hh, std::nullopt, std::nullopt, false});
  });
  return wrap(std::move(h_n), std::move(c_n));
  END_HANDLE_TH_ERRORS
}

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef method(const char* name, FastCall call, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL,
          doc};
}

}  // namespace

void set_gpu_cells_by_torch(bool by_torch) { gpu_cells_by_torch = by_torch; }

PyMethodDef* direct_calls() {
  static PyMethodDef methods[] = {
      method("lstm_cell", call_cell, "The operator lstm_ext::lstm_cell, called directly."),
      method("lstm", call_lstm<lstm, kLayerWeights>, "lstm_ext::lstm, called directly."),
      method("lstm_packed", call_lstm<lstm_packed, kPackedLayerWeights>,
             "lstm_ext::lstm_packed, called directly."),
      method("lstm_cell_packed", call_cell_packed,
             "One step of lstm_ext::lstm_layer_packed, called directly."),
      {nullptr, nullptr, 0, nullptr}};
  return methods;
}

}  // namespace lstm_ext
