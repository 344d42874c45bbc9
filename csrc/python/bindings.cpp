// The Python module lstm_ext._C. Importing it registers the operators; it says what was compiled
// into it; and it has the short way from Python to an operator.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "cpu/kernels.h"
#include "python/direct_calls.h"

namespace py = pybind11;

namespace {

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
  for (PyMethodDef* method = lstm_ext::direct_calls(); method->ml_name; ++method)
    m.attr(method->ml_name) =
        py::reinterpret_steal<py::object>(PyCFunction_NewEx(method, nullptr, nullptr));
  m.def("set_gpu_cells_by_torch", &lstm_ext::set_gpu_cells_by_torch,
        "Whether the direct call of a cell on a CUDA device returns None.");
  m.def("build_info", &build_info, "What this module was compiled with and what it uses.");
}
