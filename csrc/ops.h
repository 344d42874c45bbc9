// The operators lstm_ext::*, tensors in and out. Shapes: N batch, I input, H hidden.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace lstm_ext {

// What a cell computes from. input [N, I], hx and cx [N, H], w_ih [4H, I],
// w_hh [4H, H], b_ih and b_hh [4H] or none: torch.lstm_cell's layout and order.
struct CellInputs {
  const at::Tensor& input;
  const at::Tensor& hx;
  const at::Tensor& cx;
  const at::Tensor& w_ih;
  const at::Tensor& w_hh;
  const std::optional<at::Tensor>& b_ih;
  const std::optional<at::Tensor>& b_hh;
};
inline constexpr int kCellInputs = 7;

using CellOutputs = std::tuple<at::Tensor, at::Tensor>;                      // h', c'
using CellTrainingOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // and gates [N, 4H]
// In the order of CellInputs; undefined where not asked for.
using CellGradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using CellGradientMask = std::array<bool, kCellInputs>;

// Gradients of input, hx and cx; the parameters' are added into existing tensors.
using CellStateGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using CellStateGradientMask = std::array<bool, 3>;
inline constexpr int kCellParameters = 4;
using CellParameterGradients = std::array<std::optional<at::Tensor>, kCellParameters>;

inline bool defined(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined();
}

// A dtype that the fused kernels compute in; a strided tensor of the other's dtype on its device;
// and a bias [size], or none.
bool fused_dtype(at::ScalarType dtype);
bool alike(const at::Tensor& tensor, const at::Tensor& other);
bool bias_fits(const std::optional<at::Tensor>& bias, const c10::SymInt& size);
// Whether every tensor has the number of dimensions and the size that CellInputs gives.
bool sizes_fit(const CellInputs& in);
// Whether all are strided, on one device, of one dtype that the fused kernels compute in.
bool all_alike(const CellInputs& in);
// Whether the fused kernels take these tensors: both.
bool fusable(const CellInputs& in);

// Raises torch's error for a tensor whose memory is gone or too small: a storage can be resized
// behind a tensor's back, between forward and backward too.
void check_allocated(const at::Tensor& tensor);
inline void check_allocated(const std::optional<at::Tensor>& tensor) {
  if (defined(tensor)) check_allocated(*tensor);
}
template <class... Tensors>
void check_all_allocated(const Tensors&... tensors) {
  (check_allocated(tensors), ...);
}
inline void check_allocated(const CellInputs& in) {
  check_all_allocated(in.input, in.hx, in.cx, in.w_ih, in.w_hh, in.b_ih, in.b_hh);
}

// The memory that a strided tensor reaches: by addresses, for one storage may hold several tensors
// apart, and two storages may lie in the same memory (by way of NumPy).
struct MemoryRange {
  const char *begin, *end;
  bool overlaps(const MemoryRange& other) const { return begin < other.end && other.begin < end; }
};
MemoryRange memory_of(const at::Tensor& tensor);

// Raises an error unless the gradients and the gates have the sizes of the states; and, for the
// kernels, are like them.
void check_backward_sizes(const std::optional<at::Tensor>& grad_hy,
                          const std::optional<at::Tensor>& grad_cy, const at::Tensor& hx,
                          const at::Tensor& gates);
void check_cell_backward(const std::optional<at::Tensor>& grad_hy,
                         const std::optional<at::Tensor>& grad_cy, const at::Tensor& hx,
                         const at::Tensor& gates);

// Raises torch's error for tensors of several devices. Operations of some on meta and others not
// would compute with memory that nobody has written to.
void check_one_device(const CellInputs& in);

// Whether one step of the cell is faster from packed weights (lstm_layer_pack) than from plain
// ones.
bool packed_cell_is_faster(const at::Tensor& input, int64_t H);

// torch's own cell: it answers for whatever is not fusable, with its result where it has one
// (complex numbers, sparse input, mixed dtypes) and with its error where it has none.
CellOutputs torch_lstm_cell(const CellInputs& in);

// The cell in plain tensor operations, differentiable any number of times and forward-mode
// too. It serves devices without a kernel, forward-mode AD and double backward.
namespace composite {

CellTrainingOutputs cell_forward(const CellInputs& in);
// The activated gates [N, 4H] alone.
at::Tensor cell_gates(const CellInputs& in);
CellGradients cell_backward(const std::optional<at::Tensor>& grad_hy,
                            const std::optional<at::Tensor>& grad_cy, const CellInputs& in,
                            const at::Tensor& gates, CellGradientMask mask);

}  // namespace composite

// Calls through the dispatcher, for kernels that call one another.
CellOutputs call_lstm_cell(const CellInputs& in);
CellTrainingOutputs call_lstm_cell_forward(const CellInputs& in);
CellGradients call_lstm_cell_backward(const std::optional<at::Tensor>& grad_hy,
                                      const std::optional<at::Tensor>& grad_cy,
                                      const CellInputs& in, const at::Tensor& gates,
                                      CellGradientMask mask);
CellStateGradients call_lstm_cell_backward_accumulate(const std::optional<at::Tensor>& grad_hy,
                                                      const std::optional<at::Tensor>& grad_cy,
                                                      const CellInputs& in, const at::Tensor& gates,
                                                      const CellParameterGradients& parameters,
                                                      CellStateGradientMask mask);

}  // namespace lstm_ext
