#include "python/direct_calls.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/zeros.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <atomic>

#include "core/cells.h"
#include "ops/cell.h"
#include "ops/lstm.h"
#include "python/module_options.h"

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

// Of torch's cell: this way is for no other.
CellInputs plain_cell(const at::Tensor& input, const at::Tensor& h, const at::Tensor& c,
                      const at::Tensor& w_ih, const at::Tensor& w_hh,
                      const std::optional<at::Tensor>& b_ih,
                      const std::optional<at::Tensor>& b_hh) {
  static const std::optional<at::Tensor> none;
  return {input, h, c, w_ih, w_hh, b_ih, b_hh, none, kPlainCell};
}

PyObject* call_cell(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr int kRequired = 5, kArguments = 7;
  if (count != kArguments || !plain_mode()) Py_RETURN_NONE;
  for (int k = 0; k < kRequired; ++k)
    if (!THPVariable_CheckExact(args[k])) Py_RETURN_NONE;
  std::optional<at::Tensor> b_ih, b_hh;
  if (!unpack(args[5], b_ih) || !unpack(args[6], b_hh)) Py_RETURN_NONE;
  for (int k = 0; k < 3; ++k)
    if (THPVariable_Unpack(args[k]).dim() != 2) Py_RETURN_NONE;
  if (THPVariable_Unpack(args[0]).is_cuda() && gpu_cells_by_torch) Py_RETURN_NONE;
  const CellInputs in = plain_cell(THPVariable_Unpack(args[0]), THPVariable_Unpack(args[1]),
                                   THPVariable_Unpack(args[2]), THPVariable_Unpack(args[3]),
                                   THPVariable_Unpack(args[4]), b_ih, b_hh);
  auto [hy, cy] = without_lock(brief(in), [&] { return ops::lstm_cell::call(in); });
  return wrap(std::move(hy), std::move(cy));
  END_HANDLE_TH_ERRORS
}

// What the modules' own checks would find right.
bool usual(const at::Tensor& input, int64_t I, const at::Tensor& h, const at::Tensor& c,
           at::IntArrayRef h_sizes, at::IntArrayRef c_sizes) {
  return input.is_cpu() && input.layout() == at::kStrided &&
         !input.unsafeGetTensorImpl()->has_symbolic_sizes_strides() && input.numel() > 0 &&
         input.size(-1) == I && h.sizes() == h_sizes && c.sizes() == c_sizes &&
         h.scalar_type() == input.scalar_type() && c.scalar_type() == input.scalar_type() &&
         h.is_cpu() && c.is_cpu() && h.layout() == at::kStrided && c.layout() == at::kStrided;
}

// (h, c) or None for zeros. False for anything else.
bool unpack_states(PyObject* arg, std::optional<at::Tensor>& h, std::optional<at::Tensor>& c) {
  if (arg == Py_None) return true;
  return PyTuple_CheckExact(arg) && PyTuple_GET_SIZE(arg) == 2 &&
         THPVariable_CheckExact(PyTuple_GET_ITEM(arg, 0)) &&
         THPVariable_CheckExact(PyTuple_GET_ITEM(arg, 1)) && unpack(PyTuple_GET_ITEM(arg, 0), h) &&
         unpack(PyTuple_GET_ITEM(arg, 1), c);
}

// Two zero states: two tensors, for a user may write into one.
void zeros_if_none(std::optional<at::Tensor>& h, std::optional<at::Tensor>& c,
                   at::IntArrayRef h_sizes, at::IntArrayRef c_sizes, const at::Tensor& input) {
  if (h) return;
  h = at::zeros(h_sizes, input.options());
  c = at::zeros(c_sizes, input.options());
}

// What a module is of.
enum class Kind {
  kPlain,   // torch's steps
  kFrozen,  // the same with packed weights
  kSteps    // steps of its own
};

// torch.func draws masks in its own way.
bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

bool all_of(at::ScalarType dtype, const std::vector<StepWeights>& layers) {
  const auto fits = [&](const std::optional<at::Tensor>& t) {
    return !t || t->scalar_type() == dtype;
  };
  for (const StepWeights& w : layers)
    if (!fits(w.norm_ih) || !fits(w.norm) || !fits(w.norm_c) || !fits(w.bias_c)) return false;
  return true;
}

// Whether backward will need the input and the states.
bool is_recorded(const at::Tensor& input, const at::Tensor& h, const at::Tensor& c,
                 const OptionalTensors& weights) {
  if (!at::GradMode::is_enabled()) return false;
  if (input.requires_grad() || h.requires_grad() || c.requires_grad()) return true;
  for (const auto& weight : weights)
    if (weight && weight->requires_grad()) return true;
  return false;
}

template <Kind kKind>
PyObject* call_lstm(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 4 || !plain_mode() || !THPVariable_CheckExact(args[1])) Py_RETURN_NONE;
  constexpr bool kPacked = kKind == Kind::kFrozen;
  if (kPacked && at::autocast::is_autocast_enabled(at::kCPU)) Py_RETURN_NONE;
  if (kKind == Kind::kSteps && is_transformed()) Py_RETURN_NONE;
  at::Tensor input = THPVariable_Unpack(args[1]);
  if (!input.is_cpu()) Py_RETURN_NONE;
  std::optional<at::Tensor> h, c, batch_sizes;
  if (!unpack_states(args[2], h, c) || !unpack(args[3], batch_sizes)) Py_RETURN_NONE;
  if (input.dim() != (batch_sizes ? 2 : 3)) Py_RETURN_NONE;
  if (batch_sizes && (batch_sizes->dim() != 1 || batch_sizes->scalar_type() != at::kLong ||
                      !batch_sizes->is_cpu() || batch_sizes->numel() == 0))
    Py_RETURN_NONE;
  const std::optional<LSTMOptions> options = read_options(args[0]);
  if (!options) Py_RETURN_NONE;
  const int64_t I = options->input_size, H = options->hidden_size;
  const int64_t N = batch_sizes ? *batch_sizes->const_data_ptr<int64_t>()
                                : input.size(options->batch_first ? 0 : 1);
  if (N < 0) Py_RETURN_NONE;
  std::optional<OptionalTensors> weights =
      kPacked ? read_packed_weights(args[0], *options) : read_weights(args[0], *options);
  if (!weights) Py_RETURN_NONE;
  std::optional<StepOptions> steps;
  std::optional<std::vector<StepWeights>> layers;
  if (kKind == Kind::kSteps) {
    steps = read_step_options(args[0], options->training);
    if (steps) layers = read_step_weights(args[0], *options, *weights, *steps);
    if (!layers || !all_of(input.scalar_type(), *layers)) Py_RETURN_NONE;
  }
  const int64_t h_sizes[] = {options->states(), N, options->h_size()};
  const int64_t c_sizes[] = {options->states(), N, H};
  zeros_if_none(h, c, h_sizes, c_sizes, input);
  if (!usual(input, I, *h, *c, h_sizes, c_sizes)) Py_RETURN_NONE;
  for (size_t k = 0; k < weights->size(); ++k) {
    const bool of_bytes = kPacked && k % kPackedLayerWeights == 0;
    const auto& weight = (*weights)[k];
    if (weight && !of_bytes && weight->scalar_type() != input.scalar_type()) Py_RETURN_NONE;
  }
  const bool transposed = options->batch_first && !batch_sizes;
  if (transposed) input = input.transpose(0, 1);
  // As torch, which copies what is not contiguous: a user may then change it before backward.
  const bool contiguous = input.is_contiguous() && h->is_contiguous() && c->is_contiguous();
  if (!contiguous && is_recorded(input, *h, *c, *weights)) {
    input = input.contiguous();
    h = h->contiguous();
    c = c->contiguous();
  }
  const bool brief =
      kKind != Kind::kSteps && input.numel() / I * 4 * H * (I + H) * c_sizes[0] < kBriefWork;
  auto [output, h_n, c_n] = without_lock(brief, [&] {
    if (kKind == Kind::kSteps)
      return lstm_steps({input, *h, *c, *layers, batch_sizes, options->directions, *steps});
    const LSTMInputs in = {input, *h,          *c,           *weights,   options->directions == 2,
                           0,     batch_sizes, std::nullopt, kPlainCell, options->proj_size > 0};
    return kPacked ? lstm_packed(in) : lstm(in);
  });
  if (transposed) output = output.transpose(0, 1);
  const py::object states = py::reinterpret_steal<py::object>(wrap(std::move(h_n), std::move(c_n)));
  return PyTuple_Pack(2,
                      py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(output))).ptr(),
                      states.ptr());
  END_HANDLE_TH_ERRORS
}

PyObject* call_cell_module(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 3 || !plain_mode() || !THPVariable_CheckExact(args[1])) Py_RETURN_NONE;
  const at::Tensor& input = THPVariable_Unpack(args[1]);
  std::optional<at::Tensor> h, c;
  if (input.dim() != 2 || !unpack_states(args[2], h, c)) Py_RETURN_NONE;
  if (input.is_cuda() && gpu_cells_by_torch) Py_RETURN_NONE;
  const std::optional<CellParameters> w = read_cell_weights(args[0]);
  if (!w) Py_RETURN_NONE;
  if (!h) {
    const std::optional<CellSizes> sizes = read_cell_sizes(args[0]);
    if (!sizes || !input.is_cpu() || input.layout() != at::kStrided ||
        input.unsafeGetTensorImpl()->has_symbolic_sizes_strides())
      Py_RETURN_NONE;
    const int64_t state[] = {input.size(0), sizes->hidden};
    zeros_if_none(h, c, state, state, input);
  } else if (h->dim() != 2 || c->dim() != 2) {
    Py_RETURN_NONE;
  }
  const CellInputs in = plain_cell(input, *h, *c, *(*w)[0], *(*w)[1], (*w)[2], (*w)[3]);
  auto [hy, cy] = without_lock(brief(in), [&] { return ops::lstm_cell::call(in); });
  return wrap(std::move(hy), std::move(cy));
  END_HANDLE_TH_ERRORS
}

PyObject* call_cell_with_steps(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 3 || !plain_mode() || is_transformed() || !THPVariable_CheckExact(args[1]))
    Py_RETURN_NONE;
  const at::Tensor& input = THPVariable_Unpack(args[1]);
  std::optional<at::Tensor> h, c;
  if (input.dim() != 2 || !input.is_cpu() || !unpack_states(args[2], h, c)) Py_RETURN_NONE;
  const std::optional<CellParameters> w = read_cell_weights(args[0]);
  const std::optional<CellSizes> sizes = read_cell_sizes(args[0]);
  const std::optional<bool> training = read_training(args[0]);
  if (!w || !sizes || !training) Py_RETURN_NONE;
  const std::optional<StepOptions> steps = read_step_options(args[0], *training);
  if (!steps) Py_RETURN_NONE;
  const std::optional<StepWeights> weights = read_cell_step_weights(args[0], *w, *sizes, *steps);
  if (!weights) Py_RETURN_NONE;
  const int64_t N = input.sym_size(0).maybe_as_int().value_or(-1);
  if (N < 0) Py_RETURN_NONE;
  const int64_t state[] = {N, sizes->hidden};
  zeros_if_none(h, c, state, state, input);
  if (!usual(input, sizes->input, *h, *c, state, state) || !all_of(input.scalar_type(), {*weights}))
    Py_RETURN_NONE;
  auto [hy, cy] = without_lock(/*brief=*/false,
                               [&] { return lstm_cell_step(input, *h, *c, *weights, *steps); });
  return wrap(std::move(hy), std::move(cy));
  END_HANDLE_TH_ERRORS
}

PyObject* call_frozen_cell(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 3 || !plain_mode() || !THPVariable_CheckExact(args[1])) Py_RETURN_NONE;
  const at::Tensor& input = THPVariable_Unpack(args[1]);
  std::optional<at::Tensor> h, c;
  if (input.dim() != 2 || !unpack_states(args[2], h, c)) Py_RETURN_NONE;
  const std::optional<FrozenCell> cell = read_frozen_cell(args[0]);
  if (!cell || !input.is_cpu()) Py_RETURN_NONE;
  const bool has_plain = cell->plain[1].has_value();
  if (has_plain && (cell->plain[0]->dim() != 2 || cell->plain[1]->dim() != 2)) Py_RETURN_NONE;
  const std::optional<CellSizes> sizes =
      has_plain ? CellSizes{cell->plain[0]->size(1), cell->plain[1]->size(1)}
                : read_cell_sizes(args[0]);
  const int64_t N = input.sym_size(0).maybe_as_int().value_or(-1);
  if (N < 0 || !sizes) Py_RETURN_NONE;
  const auto [I, H] = *sizes;
  const int64_t h_sizes[] = {N, H};
  zeros_if_none(h, c, h_sizes, h_sizes, input);
  const auto& [w_ih, w_hh, b_ih, b_hh] = cell->plain;
  if (has_plain && !packed_cell_is_faster(input, H)) {
    // Packed weights refuse to be differentiated through, in any size.
    if (h->dim() != 2 || c->dim() != 2 || input.scalar_type() != w_ih->scalar_type() ||
        torch::autograd::compute_requires_grad(input, *h, *c))
      Py_RETURN_NONE;
    const CellInputs in = plain_cell(input, *h, *c, *w_ih, *w_hh, b_ih, b_hh);
    auto [hy, cy] = without_lock(brief(in), [&] { return ops::lstm_cell::call(in); });
    return wrap(std::move(hy), std::move(cy));
  }
  if (at::autocast::is_autocast_enabled(at::kCPU)) Py_RETURN_NONE;
  if (!usual(input, I, *h, *c, h_sizes, h_sizes)) Py_RETURN_NONE;
  const bool is_brief = N * 4 * H * (I + H) < kBriefWork;
  auto [output, h_n, c_n] = without_lock(is_brief, [&] {
    return ops::lstm_layer_packed::call({input.unsqueeze(0), *h, *c, cell->packed, b_ih, b_hh,
                                         std::nullopt, std::nullopt, false, std::nullopt,
                                         kPlainCell});
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
      method("lstm_cell_module", call_cell_module, "A torch.nn.LSTMCell, by its __dict__."),
      method("lstm_module", call_lstm<Kind::kPlain>, "A torch.nn.LSTM, by its __dict__."),
      method("frozen_lstm_module", call_lstm<Kind::kFrozen>, "A frozen LSTM, by its __dict__."),
      method("lstm_module_with_steps", call_lstm<Kind::kSteps>,
             "An LSTM whose steps are not torch's, by its __dict__."),
      method("lstm_cell_module_with_steps", call_cell_with_steps,
             "A cell whose step is not torch's, by its __dict__."),
      method("frozen_lstm_cell_module", call_frozen_cell, "A frozen cell, by its __dict__."),
      {nullptr, nullptr, 0, nullptr}};
  return methods;
}

}  // namespace lstm_ext
