// From Python to an operator without the generic argument parser and the boxed call of torch.ops,
// which take longer than a small cell.
#pragma once

#include <Python.h>

namespace lstm_ext {

// lstm_cell(input, hx, cx, w_ih, w_hh, b_ih, b_hh) -> (h', c')
// lstm(input, hx, cx, weights, input_size, hidden_size, bidirectional, batch_first, batch_sizes)
//   -> (output, h_n, c_n), where hx and cx may be None for zeros, and weights is a tuple as in
//   lstm.h; lstm_packed: the same with packed weights.
// lstm_cell_packed(input, hx, cx, packed, b_ih, b_hh, input_size, hidden_size) -> (h', c')
//
// They return None for what is left to torch.ops and to the checks in Python: arguments that are
// no tensors (the operator's error names them) or of a subclass other than Parameter,
// __torch_function__ modes, torch.jit.trace; input or states whose rank or size is not the usual;
// but for lstm_cell also other devices than the CPU and empty input.
PyMethodDef* direct_calls();  // ends with a null name

// Whether lstm_cell returns None for a cell on a CUDA device: Python then gives it to torch.
void set_gpu_cells_by_torch(bool by_torch);

}  // namespace lstm_ext
