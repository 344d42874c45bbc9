// From Python to an operator without the generic argument parser and the boxed call of torch.ops,
// which take longer than a small cell.
#pragma once

#include <Python.h>

namespace lstm_ext {

// lstm_cell(input, hx, cx, w_ih, w_hh, b_ih, b_hh) -> (h', c')
// lstm_cell_module(module.__dict__, input, (h, c) or None) -> (h', c')
// lstm_module(module.__dict__, input, (h, c) or None, batch_sizes or None) -> (output, (h_n, c_n))
// frozen_lstm_cell_module, frozen_lstm_module: the same for what lstm_ext.freeze makes.
// lstm_cell_module_with_steps, lstm_module_with_steps: the same for modules whose steps are not
// torch's (ops/lstm_steps.h).
//
// They return None for what is left to torch.ops and to the checks in Python: arguments that are
// no tensors (the operator's error names them) or of a subclass other than Parameter; another cell
// than torch's (core/cells.h); options and weights of a module that are not as they were when it
// was built; __torch_function__ modes, torch.jit.trace; where masks may be drawn, torch.func; input
// or states whose rank or size is not the usual; but for plain cells also other devices than the
// CPU and empty input.
PyMethodDef* direct_calls();  // ends with a null name

// Whether lstm_cell returns None for a cell on a CUDA device: Python then gives it to torch.
void set_gpu_cells_by_torch(bool by_torch);

}  // namespace lstm_ext
