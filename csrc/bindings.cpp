// The Python module lstm_ext._C. Importing it registers the operators; it says what was compiled
// into it; and it has the short way from Python to an operator.
#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/version.h>

#include "cpu/kernels.h"
#include "ops.h"

namespace py = pybind11;

namespace {

// Whether the cell is done before another thread could make use of the interpreter's lock: some
// ten microseconds on the CPU. Giving it up and taking it back costs a tenth of a small cell.
bool brief(const lstm_ext::CellInputs& in) {
  constexpr int64_t kBriefWork = 64 * 1024;
  return in.input.is_cpu() && in.w_ih.is_cpu() && in.w_hh.is_cpu() &&
         in.input.sym_size(0) * (in.w_ih.sym_numel() + in.w_hh.sym_numel()) < kBriefWork;
}

// lstm_cell(input, hx, cx, w_ih, w_hh, b_ih, b_hh) -> (h', c'), without the generic argument
// parser and the boxed call of torch.ops, which take longer than a small cell. Returns
// None for what only torch.ops handles: arguments that are no tensors (its error names
// them) or of a subclass other than Parameter, __torch_function__ modes, torch.jit.trace; and for
// input or states that are not 2-D.
PyObject* lstm_cell(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr int kRequired = 5;
  if (count != lstm_ext::kCellInputs || torch::jit::tracer::isTracing() ||
      at::impl::torch_function_mode_enabled())
    Py_RETURN_NONE;
  for (int k = 0; k < lstm_ext::kCellInputs; ++k) {
    if (k >= kRequired && args[k] == Py_None) continue;
    if (!THPVariable_CheckExact(args[k])) Py_RETURN_NONE;
  }
  for (int k = 0; k < 3; ++k)
    if (THPVariable_Unpack(args[k]).dim() != 2) Py_RETURN_NONE;
  const auto bias = [&](int k) -> std::optional<at::Tensor> {
    if (args[k] == Py_None) return std::nullopt;
    return THPVariable_Unpack(args[k]);
  };
  const std::optional<at::Tensor> b_ih = bias(5), b_hh = bias(6);
  const lstm_ext::CellInputs in = {THPVariable_Unpack(args[0]),
                                   THPVariable_Unpack(args[1]),
                                   THPVariable_Unpack(args[2]),
                                   THPVariable_Unpack(args[3]),
                                   THPVariable_Unpack(args[4]),
                                   b_ih,
                                   b_hh};
  lstm_ext::CellOutputs out;
  if (brief(in)) {
    out = lstm_ext::call_lstm_cell(in);
  } else {
    py::gil_scoped_release no_gil;
    out = lstm_ext::call_lstm_cell(in);
  }
  auto& [hy, cy] = out;
  return PyTuple_Pack(2, py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(hy))).ptr(),
                      py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(cy))).ptr());
  END_HANDLE_TH_ERRORS
}

PyMethodDef kLstmCell = {"lstm_cell",
                         reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&lstm_cell)),
                         METH_FASTCALL, "The operator lstm_ext::lstm_cell, called directly."};

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(LSTM_EXT_WITH_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["compiler"] = __VERSION__;
  info["cpu_instruction_sets"] = lstm_ext::cpu::compiled_instruction_sets();
  info["cpu_instruction_set"] = lstm_ext::cpu::active_instruction_set();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of lstm_ext; importing it registers torch.ops.lstm_ext.";
  m.attr("lstm_cell") =
      py::reinterpret_steal<py::object>(PyCFunction_NewEx(&kLstmCell, nullptr, nullptr));
  m.def("build_info", &build_info, "What this module was compiled with and what it uses.");
}
