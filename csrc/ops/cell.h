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
// w_hh [4H, H], b_ih and b_hh [4H] or none: torch.lstm_cell's layout and order. variant says which
// cell of core/cells.h, unit_weights [P, H] are those that each of its units has of its own.
struct CellInputs {
  const at::Tensor& input;
  const at::Tensor& hx;
  const at::Tensor& cx;
  const at::Tensor& w_ih;
  const at::Tensor& w_hh;
  const std::optional<at::Tensor>& b_ih;
  const std::optional<at::Tensor>& b_hh;
  const std::optional<at::Tensor>& unit_weights;
  int64_t variant;

  auto tensors() const { return std::tie(input, hx, cx, w_ih, w_hh, b_ih, b_hh, unit_weights); }
  auto fields() const { return std::tuple_cat(tensors(), std::tuple(variant)); }
};
// Its tensors, the first of which are input and states; then come the parameters.
inline constexpr int kCellTensors =
    std::tuple_size_v<decltype(std::declval<const CellInputs&>().tensors())>;
inline constexpr int kFirstParameter = 3, kFirstBias = 5;
inline constexpr int kCellParameters = kCellTensors - kFirstParameter;

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
// Of the tensors of CellInputs; undefined where not asked for.
struct Gradients {
  at::Tensor input, hx, cx, w_ih, w_hh, b_ih, b_hh, unit_weights;
  auto results() {
    return std::make_tuple(std::move(input), std::move(hx), std::move(cx), std::move(w_ih),
                           std::move(w_hh), std::move(b_ih), std::move(b_hh),
                           std::move(unit_weights));
  }
};
// Which of them are asked for.
struct Wanted {
  using Mask = std::array<bool, kCellTensors>;
  bool input, hx, cx, w_ih, w_hh, b_ih, b_hh, unit_weights;
  explicit Wanted(const Mask& mask)
      : input(mask[0]),
        hx(mask[1]),
        cx(mask[2]),
        w_ih(mask[3]),
        w_hh(mask[4]),
        b_ih(mask[5]),
        b_hh(mask[6]),
        unit_weights(mask[7]) {}
  std::tuple<Mask> fields() const {
    return {{input, hx, cx, w_ih, w_hh, b_ih, b_hh, unit_weights}};
  }
};

// Gradients of input, hx and cx; the parameters' are added into existing tensors.
using CellStateGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using CellStateGradientMask = std::array<bool, kFirstParameter>;
struct ParameterGradients {
  const std::optional<at::Tensor>& w_ih;
  const std::optional<at::Tensor>& w_hh;
  const std::optional<at::Tensor>& b_ih;
  const std::optional<at::Tensor>& b_hh;
  const std::optional<at::Tensor>& unit_weights;
  auto fields() const { return std::tie(w_ih, w_hh, b_ih, b_hh, unit_weights); }
};

namespace ops {

// The cell: h', c'.
struct lstm_cell : Operator<lstm_cell, CellOutputs(const CellInputs&)> {
  static constexpr char kSchema[] =
      "lstm_cell(Tensor input, Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, "
      "Tensor? b_ih=None, Tensor? b_hh=None, Tensor? unit_weights=None, int variant=0) "
      "-> (Tensor, Tensor)";
};
// The cell and what its backward needs: h', c', the activated gates.
struct lstm_cell_forward : Operator<lstm_cell_forward, CellTrainingOutputs(const CellInputs&)> {
  static constexpr char kSchema[] =
      "lstm_cell_forward(Tensor input, Tensor hx, Tensor cx, Tensor w_ih, Tensor w_hh, "
      "Tensor? b_ih=None, Tensor? b_hh=None, Tensor? unit_weights=None, int variant=0) "
      "-> (Tensor, Tensor, Tensor)";
};
// Gradients of the eight tensors; those that output_mask leaves out are not computed (None). The
// biases are here for the second derivative, which needs the gates as a function of them.
struct lstm_cell_backward
    : Operator<lstm_cell_backward, Gradients(const CellOutputGradients&, const CellInputs&,
                                             const CellResults&, const Wanted&)> {
  static constexpr char kSchema[] =
      "lstm_cell_backward(Tensor? grad_hy, Tensor? grad_cy, Tensor input, Tensor hx, Tensor cx, "
      "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? unit_weights, int variant, "
      "Tensor gates, bool[8] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
};
// The same, with the parameters' gradients added into tensors that exist, None for not wanted:
// what .backward() does with .grad, in the same pass. Returns the gradients of input, hx and cx.
struct lstm_cell_backward_accumulate
    : Operator<lstm_cell_backward_accumulate,
               CellStateGradients(const CellOutputGradients&, const CellInputs&, const CellResults&,
                                  const ParameterGradients&, CellStateGradientMask)> {
  static constexpr char kSchema[] =
      "lstm_cell_backward_accumulate(Tensor? grad_hy, Tensor? grad_cy, Tensor input, Tensor hx, "
      "Tensor cx, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? unit_weights, "
      "int variant, Tensor gates, Tensor(a!)? grad_w_ih, Tensor(b!)? grad_w_hh, "
      "Tensor(c!)? grad_b_ih, Tensor(d!)? grad_b_hh, Tensor(e!)? grad_unit_weights, "
      "bool[3] output_mask) -> (Tensor, Tensor, Tensor)";
};

}  // namespace ops

// A dtype that the fused kernels compute in; a strided tensor of the other's dtype on its device;
// and a bias [size], or none.
bool fused_dtype(at::ScalarType dtype);
bool alike(const at::Tensor& tensor, const at::Tensor& other);
bool bias_fits(const std::optional<at::Tensor>& bias, const c10::SymInt& size);
// Whether there is such a cell, with as many weights of its units as it has, of size H. And the
// same, or an error.
bool variant_fits(const CellInputs& in, const c10::SymInt& H);
void check_variant(const CellInputs& in, const c10::SymInt& H);
// Whether every tensor has the number of dimensions and the size that CellInputs gives.
// Of a projected cell, hx [N, P] and w_hh [4H, P] are as wide as the projection.
bool sizes_fit(const CellInputs& in, bool projected = false);
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
  check_all_allocated(in.input, in.hx, in.cx, in.w_ih, in.w_hh, in.unit_weights);
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
// The same; of another cell than torch's in tensor operations, with their checks.
CellOutputs unfused_lstm_cell(const CellInputs& in);

}  // namespace lstm_ext
