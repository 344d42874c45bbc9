// The operators on the CPU: tensors in, kernels over raw pointers out.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "cpu/cell_kernels.h"
#include "cpu/denormals.h"
#include "ops.h"

namespace lstm_ext::cpu {
namespace {

using at::Tensor;

// Multiplications and additions, in their thousands, below which a second thread costs more
// than it brings.
constexpr int64_t kForkWork = 64 * 1024;

Dtype kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return Dtype::kFloat;
    case at::kDouble:
      return Dtype::kDouble;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      return Dtype::kHalf;
  }
}

at::ScalarType compute_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}
Tensor to_compute_type(const Tensor& tensor) {
  return tensor.to(compute_type(tensor.scalar_type())).contiguous();
}

// The tensor itself where it is dense, borrowed, else a copy; null where it is undefined.
class Dense {
 public:
  explicit Dense(const Tensor& tensor)
      : tensor_(tensor.defined() ? tensor.expect_contiguous()
                                 : c10::MaybeOwned<Tensor>::borrowed(tensor)) {}
  explicit Dense(const std::optional<Tensor>& tensor)
      : tensor_(defined(tensor) ? tensor->expect_contiguous()
                                : c10::MaybeOwned<Tensor>::owned(std::in_place)) {}
  const void* data() const { return tensor_->defined() ? tensor_->const_data_ptr() : nullptr; }

 private:
  const c10::MaybeOwned<Tensor> tensor_;
};

// A new dense tensor; at::empty, less its way through the dispatcher.
Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::detail::empty_cpu(sizes, at::dtype(dtype));
}

template <class Kernel>
void run(int64_t tasks, int64_t work, const Kernel& kernel) {
  const int64_t work_per_task = std::max<int64_t>(1, work / std::max<int64_t>(1, tasks));
  const int64_t grain = std::max<int64_t>(1, kForkWork / work_per_task);
  at::parallel_for(0, tasks, grain, [&](int64_t first, int64_t last) {
    const FlushDenormals guard;
    kernel(first, last);
  });
}

void forward(const CellInputs& in, Tensor& hy, Tensor& cy, Tensor* gates) {
  const int64_t N = in.input.size(0), I = in.input.size(1), H = in.hx.size(1);
  const at::ScalarType dtype = in.input.scalar_type();
  hy = empty({N, H}, dtype);
  cy = empty({N, H}, dtype);
  if (gates) *gates = empty({N, 4 * H}, dtype);
  if (hy.numel() == 0) return;
  const CellKernels& kernels = cell_kernels(kernel_dtype(dtype));
  const Dense input(in.input), hx(in.hx), cx(in.cx), w_ih(in.w_ih), w_hh(in.w_hh), b_ih(in.b_ih),
      b_hh(in.b_hh);
  Tensor input_compute, hx_compute;
  if (kernels.forward_packs(N)) {
    input_compute = to_compute_type(in.input);
    hx_compute = to_compute_type(in.hx);
  }
  const CellForwardArgs args = {N,
                                I,
                                H,
                                input.data(),
                                hx.data(),
                                Dense(input_compute).data(),
                                Dense(hx_compute).data(),
                                cx.data(),
                                w_ih.data(),
                                w_hh.data(),
                                b_ih.data(),
                                b_hh.data(),
                                hy.mutable_data_ptr(),
                                cy.mutable_data_ptr(),
                                gates ? gates->mutable_data_ptr() : nullptr};
  run(kernels.forward_tasks(N, H), N * 4 * H * (I + H + 16),
      [&](int64_t first, int64_t last) { kernels.forward(args, first, last); });
}

CellOutputs lstm_cell(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& w_ih,
                      const Tensor& w_hh, const std::optional<Tensor>& b_ih,
                      const std::optional<Tensor>& b_hh) {
  const CellInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh};
  if (!fusable(in)) return torch_lstm_cell(in);
  Tensor hy, cy;
  forward(in, hy, cy, nullptr);
  return {std::move(hy), std::move(cy)};
}

CellTrainingOutputs lstm_cell_forward(const Tensor& input, const Tensor& hx, const Tensor& cx,
                                      const Tensor& w_ih, const Tensor& w_hh,
                                      const std::optional<Tensor>& b_ih,
                                      const std::optional<Tensor>& b_hh) {
  const CellInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh};
  if (!fusable(in)) {
    torch_lstm_cell(in);  // raises torch's error, if torch rejects them
    return composite::cell_forward(in);
  }
  Tensor hy, cy, gates;
  forward(in, hy, cy, &gates);
  return {std::move(hy), std::move(cy), std::move(gates)};
}

// A gradient to compute: a new tensor, or one that exists and is added to. No tensor: not wanted.
struct Target {
  Tensor tensor;
  bool accumulate = false;

  bool wanted() const { return tensor.defined(); }
  static Target fresh(bool wanted, const Tensor& like) {
    return {wanted ? empty(like.sizes(), like.scalar_type()) : Tensor(), false};
  }
  static Target existing(const std::optional<Tensor>& tensor) {
    return {tensor.value_or(Tensor()), true};
  }
};

struct Targets {
  Target input, hx, cx, w_ih, w_hh, b_ih, b_hh;
};

// The gradients of the gates' pre-activations [N, 4H] in the compute type, those of cx, and the
// biases', in one pass.
Tensor gate_gradients(const CellKernels& kernels, const std::optional<Tensor>& grad_hy,
                      const std::optional<Tensor>& grad_cy, const Tensor& cx, const Tensor& gates,
                      const Targets& targets) {
  const int64_t N = cx.size(0), H = cx.size(1);
  const at::ScalarType compute = compute_type(cx.scalar_type());
  Tensor grad_gates = empty({N, 4 * H}, compute);
  const Dense grad_h(grad_hy), grad_c(grad_cy), c(cx), g(gates);
  Tensor bias_sums;
  if (targets.b_ih.wanted() || targets.b_hh.wanted())
    bias_sums = empty({bias_blocks(N), 4 * H}, compute);
  const GateGradientArgs args = {
      N,
      H,
      grad_h.data(),
      grad_c.data(),
      c.data(),
      g.data(),
      grad_gates.mutable_data_ptr(),
      targets.cx.wanted() ? targets.cx.tensor.mutable_data_ptr() : nullptr,
      bias_sums.defined() ? bias_sums.mutable_data_ptr() : nullptr};
  run(kernels.gate_gradient_tasks(N, H), N * H * 64,
      [&](int64_t first, int64_t last) { kernels.gate_gradients(args, first, last); });
  for (const Target* bias : {&targets.b_ih, &targets.b_hh})
    if (bias->wanted())
      kernels.reduce_bias(bias_sums.const_data_ptr(), bias_blocks(N), H,
                          bias->tensor.mutable_data_ptr(), bias->accumulate);
  return grad_gates;
}

// Matrix products that run side by side in one parallel region.
class Products {
 public:
  explicit Products(const CellKernels& kernels) : kernels_(kernels) {}

  // target = or += a * b, or a^T * b; a is grad_gates [N, 4H], dense, and outlives this.
  void add(const Target& target, const Tensor& a, bool transpose_a, const Tensor& b) {
    if (!target.wanted()) return;
    const int64_t N = a.size(0), gates = a.size(1);
    const int64_t rows = transpose_a ? gates : N, depth = transpose_a ? N : gates;
    const int64_t columns = b.size(1);
    operands_[count_] = b.expect_contiguous();
    args_[count_] = {rows,
                     columns,
                     depth,
                     a.const_data_ptr(),
                     transpose_a ? 1 : gates,
                     transpose_a ? gates : 1,
                     operands_[count_]->const_data_ptr(),
                     target.tensor.mutable_data_ptr(),
                     target.accumulate};
    tasks_[count_] = kernels_.product_tasks(rows, depth, columns);
    work_ += rows * columns * (depth + 4);
    ++count_;
  }

  // Every thread takes its share of each product: their tasks differ in size.
  void run() const {
    const int64_t shares =
        std::clamp<int64_t>(work_ / kForkWork, 1, static_cast<int64_t>(at::get_num_threads()));
    cpu::run(shares, work_, [&](int64_t first, int64_t last) {
      for (int p = 0; p < count_; ++p) {
        const int64_t from = tasks_[p] * first / shares, to = tasks_[p] * last / shares;
        if (from < to) kernels_.product(args_[p], from, to);
      }
    });
  }

 private:
  static constexpr int kMost = 4;
  const CellKernels& kernels_;
  std::array<c10::MaybeOwned<Tensor>, kMost> operands_;
  std::array<ProductArgs, kMost> args_;
  std::array<int64_t, kMost> tasks_;
  int count_ = 0;
  int64_t work_ = 0;
};

void check_backward(const std::optional<Tensor>& grad_hy, const std::optional<Tensor>& grad_cy,
                    const CellInputs& in, const Tensor& gates) {
  const Tensor& hx = in.hx;
  TORCH_CHECK(gates.dim() == 2 && gates.size(0) == hx.size(0) && gates.size(1) == 4 * hx.size(1) &&
                  gates.scalar_type() == hx.scalar_type(),
              "lstm_cell_backward: gates must be the third result of lstm_cell_forward");
  for (const auto* grad : {&grad_hy, &grad_cy})
    TORCH_CHECK(!defined(*grad) ||
                    ((*grad)->sizes() == hx.sizes() && (*grad)->scalar_type() == hx.scalar_type()),
                "lstm_cell_backward: a gradient must have the state's shape ", hx.sizes(),
                " and dtype ", hx.scalar_type());
}

void backward(const std::optional<Tensor>& grad_hy, const std::optional<Tensor>& grad_cy,
              const CellInputs& in, const Tensor& gates, const Targets& targets) {
  const CellKernels& kernels = cell_kernels(kernel_dtype(in.hx.scalar_type()));
  const Tensor grad_gates = gate_gradients(kernels, grad_hy, grad_cy, in.cx, gates, targets);
  Products products(kernels);
  products.add(targets.input, grad_gates, false, in.w_ih);
  products.add(targets.hx, grad_gates, false, in.w_hh);
  products.add(targets.w_ih, grad_gates, true, in.input);
  products.add(targets.w_hh, grad_gates, true, in.hx);
  products.run();
}

CellGradients lstm_cell_backward(const std::optional<Tensor>& grad_hy,
                                 const std::optional<Tensor>& grad_cy, const Tensor& input,
                                 const Tensor& hx, const Tensor& cx, const Tensor& w_ih,
                                 const Tensor& w_hh, const std::optional<Tensor>& b_ih,
                                 const std::optional<Tensor>& b_hh, const Tensor& gates,
                                 CellGradientMask mask) {
  const CellInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh};
  if (!fusable(in)) return composite::cell_backward(grad_hy, grad_cy, in, gates, mask);
  check_backward(grad_hy, grad_cy, in, gates);
  const auto bias = [&](bool wanted) -> Target {
    return {wanted ? empty({w_hh.size(0)}, w_hh.scalar_type()) : Tensor(), false};
  };
  Targets to = {Target::fresh(mask[0], input),
                Target::fresh(mask[1], hx),
                Target::fresh(mask[2], cx),
                Target::fresh(mask[3], w_ih),
                Target::fresh(mask[4], w_hh),
                bias(mask[5]),
                bias(mask[6])};
  backward(grad_hy, grad_cy, in, gates, to);
  return {std::move(to.input.tensor), std::move(to.hx.tensor),   std::move(to.cx.tensor),
          std::move(to.w_ih.tensor),  std::move(to.w_hh.tensor), std::move(to.b_ih.tensor),
          std::move(to.b_hh.tensor)};
}

CellStateGradients lstm_cell_backward_accumulate(
    const std::optional<Tensor>& grad_hy, const std::optional<Tensor>& grad_cy, const Tensor& input,
    const Tensor& hx, const Tensor& cx, const Tensor& w_ih, const Tensor& w_hh,
    const std::optional<Tensor>& b_ih, const std::optional<Tensor>& b_hh, const Tensor& gates,
    const std::optional<Tensor>& grad_w_ih, const std::optional<Tensor>& grad_w_hh,
    const std::optional<Tensor>& grad_b_ih, const std::optional<Tensor>& grad_b_hh,
    CellStateGradientMask mask) {
  const CellInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh};
  TORCH_CHECK(fusable(in),
              "lstm_cell_backward_accumulate: the tensors must be those of lstm_cell_forward");
  check_backward(grad_hy, grad_cy, in, gates);
  const auto check = [&](const std::optional<Tensor>& grad, at::IntArrayRef sizes) {
    TORCH_CHECK(!defined(grad) || (grad->sizes() == sizes && grad->is_contiguous() &&
                                   grad->scalar_type() == hx.scalar_type() && grad->is_cpu()),
                "lstm_cell_backward_accumulate: a gradient to add to must be dense, with its "
                "parameter's shape ",
                sizes, " and dtype ", hx.scalar_type());
  };
  check(grad_w_ih, w_ih.sizes());
  check(grad_w_hh, w_hh.sizes());
  check(grad_b_ih, {w_hh.size(0)});
  check(grad_b_hh, {w_hh.size(0)});
  Targets to = {Target::fresh(mask[0], input), Target::fresh(mask[1], hx),
                Target::fresh(mask[2], cx),    Target::existing(grad_w_ih),
                Target::existing(grad_w_hh),   Target::existing(grad_b_ih),
                Target::existing(grad_b_hh)};
  backward(grad_hy, grad_cy, in, gates, to);
  return {std::move(to.input.tensor), std::move(to.hx.tensor), std::move(to.cx.tensor)};
}

}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, CPU, m) {
  m.impl("lstm_cell", lstm_cell);
  m.impl("lstm_cell_forward", lstm_cell_forward);
  m.impl("lstm_cell_backward", lstm_cell_backward);
  m.impl("lstm_cell_backward_accumulate", lstm_cell_backward_accumulate);
}

}  // namespace lstm_ext::cpu
