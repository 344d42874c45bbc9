// The operators lstm_ext::*, tensors in and out. Shapes: N batch, I input, H hidden.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "core/operator.h"

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

  auto fields() const { return std::tie(input, hx, cx, w_ih, w_hh, b_ih, b_hh); }
};
inline constexpr int kCellInputs = std::tuple_size_v<operators::FieldsOf<const CellInputs&>>;
// Where the parameters begin, and their biases.
inline constexpr int kFirstParameter = 3, kFirstBias = 5;
inline constexpr int kCellParameters = kCellInputs - kFirstParameter;

using CellOutputs = std::tuple<at::Tensor, at::Tensor>;                      // h', c'
using CellTrainingOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // and gates [N, 4H]
// Gradients of h' and c'.
struct CellOutputGradients {
  const std::optional<at::Tensor>& hy;
  const std::optional<at::Tensor>& cy;
  auto fields() const { return std::tie(hy, cy); }
};
// What the forward kept beside its inputs.
struct CellResults {
  const at::Tensor& gates;
  auto fields() const { return std::tie(gates); }
};
// Of CellInputs; undefined where not asked for.
struct Gradients {
  at::Tensor input, hx, cx, w_ih, w_hh, b_ih, b_hh;
  auto results() {
    return std::make_tuple(std::move(input), std::move(hx), std::move(cx), std::move(w_ih),
                           std::move(w_hh), std::move(b_ih), std::move(b_hh));
  }
};
// Which of them are asked for.
struct Wanted {
  using Mask = std::array<bool, kCellInputs>;
  bool input, hx, cx, w_ih, w_hh, b_ih, b_hh;
  explicit Wanted(const Mask& mask)
      : input(mask[0]),
        hx(mask[1]),
        cx(mask[2]),
        w_ih(mask[3]),
        w_hh(mask[4]),
        b_ih(mask[5]),
        b_hh(mask[6]) {}
  std::tuple<Mask> fields() const { return {{input, hx, cx, w_ih, w_hh, b_ih, b_hh}}; }
};

// Gradients of input, hx and cx; the parameters' are added into existing tensors.
using CellStateGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using CellStateGradientMask = std::array<bool, kFirstParameter>;
struct ParameterGradients {
  const std::optional<at::Tensor>& w_ih;
  const std::optional<at::Tensor>& w_hh;
  const std::optional<at::Tensor>& b_ih;
  const std::optional<at::Tensor>& b_hh;
  auto fields() const { return std::tie(w_ih, w_hh, b_ih, b_hh); }
};

namespace ops {

// The cell: h', c'.
struct lstm_cell : Operator<lstm_cell, CellOutputs(const CellInputs&)> {
  static constexpr char kSchema[] =
      "lstm_cell(Tensor input, Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, "
      "Tensor? b_ih=None, Tensor? b_hh=None) -> (Tensor, Tensor)";
};
// The cell and what its backward needs: h', c', the activated gates.
struct lstm_cell_forward : Operator<lstm_cell_forward, CellTrainingOutputs(const CellInputs&)> {
  static constexpr char kSchema[] =
      "lstm_cell_forward(Tensor input, Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, "
      "Tensor? b_ih=None, Tensor? b_hh=None) -> (Tensor, Tensor, Tensor)";
};
// Gradients of the seven inputs; those that output_mask leaves out are not computed (None). The
// biases are here for the second derivative, which needs the gates as a function of them.
struct lstm_cell_backward
    : Operator<lstm_cell_backward, Gradients(const CellOutputGradients&, const CellInputs&,
                                             const CellResults&, const Wanted&)> {
  static constexpr char kSchema[] =
      "lstm_cell_backward(Tensor? grad_hy, Tensor? grad_cy, Tensor input, Tensor hx, Tensor cx, "
      "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor gates, bool[7] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
};
// The same, with the parameters' gradients added into tensors that exist, None for not wanted:
// what .backward() does with .grad, in the same pass. Returns the gradients of input, hx and cx.
struct lstm_cell_backward_accumulate
    : Operator<lstm_cell_backward_accumulate,
               CellStateGradients(const CellOutputGradients&, const CellInputs&, const CellResults&,
                                  const ParameterGradients&, CellStateGradientMask)> {
  static constexpr char kSchema[] =
      "lstm_cell_backward_accumulate(Tensor? grad_hy, Tensor? grad_cy, Tensor input, Tensor hx, "
      "Tensor cx, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor gates, "
      "Tensor(a!)? grad_w_ih, Tensor(b!)? grad_w_hh, Tensor(c!)? grad_b_ih, "
      "Tensor(d!)? grad_b_hh, bool[3] output_mask) -> (Tensor, Tensor, Tensor)";
};

}  // namespace ops

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
template <class... Parts>
void check_all_allocated(const Parts&... parts) {
  for_each_tensor([](const at::Tensor& tensor) { check_allocated(tensor); }, parts...);
}

// The same of what a backward reads of the inputs: of biases nothing, which may be gone by then.
inline void check_allocated_for_backward(const CellInputs& in) {
  check_all_allocated(in.input, in.hx, in.cx, in.w_ih, in.w_hh);
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
void check_backward_sizes(const CellOutputGradients& grads, const at::Tensor& hx,
                          const CellResults& results);
void check_backward(const CellOutputGradients& grads, const at::Tensor& hx,
                    const CellResults& results);

// Raises torch's error for tensors of several devices. Operations of some on meta and others not
// would compute with memory that nobody has written to.
void check_one_device(const CellInputs& in);

// Whether one step of the cell is faster from packed weights (lstm_layer_pack) than from plain
// ones.
bool packed_cell_is_faster(const at::Tensor& input, int64_t H);

// torch's own cell: it answers for whatever is not fusable, with its result where it has one
// (complex numbers, sparse input, mixed dtypes) and with its error where it has none.
CellOutputs torch_lstm_cell(const CellInputs& in);

}  // namespace lstm_ext
