// The operators on the CPU: tensors in, kernels over raw pointers out.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
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

// The rows of x [N, K] as factors.
Tensor to_factors(const CellKernels& kernels, const Tensor& x) {
  if (!kernels.pair_rows) return x.to(compute_type(x.scalar_type())).contiguous();
  return x.size(1) % 2 ? at::constant_pad_nd(x, {0, 1}) : x.contiguous();
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
  Tensor input_factors, hx_factors;
  if (kernels.forward_packs(N)) {
    input_factors = to_factors(kernels, in.input);
    hx_factors = to_factors(kernels, in.hx);
  }
  const CellForwardArgs args = {N,
                                I,
                                H,
                                input.data(),
                                hx.data(),
                                Dense(input_factors).data(),
                                Dense(hx_factors).data(),
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
      kernels.add_up(bias_sums.const_data_ptr(), bias_blocks(N), 4 * H,
                     bias->tensor.mutable_data_ptr(), bias->accumulate);
  return grad_gates;
}

// The gradients of the gates [N, 4H] as the left factors of the products, made when asked for.
class GateFactors {
 public:
  GateFactors(const CellKernels& kernels, Tensor grad_gates)
      : kernels_(kernels), grad_gates_(std::move(grad_gates)) {}
  int64_t N() const { return grad_gates_.size(0); }
  int64_t gates() const { return grad_gates_.size(1); }

  // Fills in args.a, which lives as long as this, for a product with the gradients or, transposed,
  // with their transpose.
  void left(bool transposed, ProductArgs& args) {
    const bool pairs = kernels_.pair_rows && kernels_.product_packs(args.rows, args.depth);
    const Tensor& a = !pairs ? grad_gates_ : transposed ? row_pairs() : halves();
    args.a = a.const_data_ptr();
    args.a_row_stride = transposed ? 1 : pairs ? gates() / 2 : gates();
    args.a_k_stride = transposed ? gates() : 1;
  }

 private:
  const Tensor& halves() {
    if (!halves_.defined()) halves_ = grad_gates_.to(at::kBFloat16);
    return halves_;
  }
  const Tensor& row_pairs() {
    if (!row_pairs_.defined()) {
      const int64_t pairs = (N() + 1) / 2;
      row_pairs_ = empty({pairs, gates(), 2}, at::kBFloat16);
      run(pairs, N() * gates(), [&](int64_t first, int64_t last) {
        kernels_.pair_rows(grad_gates_.const_data_ptr(), N(), gates(),
                           row_pairs_.mutable_data_ptr(), first, last);
      });
    }
    return row_pairs_;
  }

  const CellKernels& kernels_;
  const Tensor grad_gates_;
  Tensor halves_, row_pairs_;
};

// Matrix products that run side by side in one parallel region.
class Products {
 public:
  Products(const CellKernels& kernels, GateFactors& factors)
      : kernels_(kernels), factors_(factors) {}

  // target = or += the gates' gradients, or their transpose, times b.
  void add(const Target& target, bool transposed, const Tensor& b) {
    if (!target.wanted()) return;
    const int64_t rows = transposed ? factors_.gates() : factors_.N();
    const int64_t depth = transposed ? factors_.N() : factors_.gates();
    const int64_t columns = b.size(1);
    operands_[count_] = b.expect_contiguous();
    ProductArgs& args = args_[count_];
    args.rows = rows;
    args.columns = columns;
    args.depth = depth;
    factors_.left(transposed, args);
    args.b = operands_[count_]->const_data_ptr();
    parts_[count_] = kernels_.product_parts(rows, depth, columns);
    if (parts_[count_] > 1)
      terms_[count_] =
          empty({parts_[count_], rows, columns}, compute_type(target.tensor.scalar_type()));
    results_[count_] = target;
    args.c = (parts_[count_] > 1 ? terms_[count_] : target.tensor).mutable_data_ptr();
    args.accumulate = target.accumulate;
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
    for (int p = 0; p < count_; ++p)
      if (parts_[p] > 1)
        kernels_.add_up(terms_[p].const_data_ptr(), parts_[p], args_[p].rows * args_[p].columns,
                        results_[p].tensor.mutable_data_ptr(), results_[p].accumulate);
  }

 private:
  static constexpr int kMost = 4;
  const CellKernels& kernels_;
  GateFactors& factors_;
  std::array<c10::MaybeOwned<Tensor>, kMost> operands_;
  std::array<ProductArgs, kMost> args_;
  std::array<int64_t, kMost> tasks_, parts_;
  std::array<Tensor, kMost> terms_;
  std::array<Target, kMost> results_;
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
  GateFactors factors(kernels, gate_gradients(kernels, grad_hy, grad_cy, in.cx, gates, targets));
  Products products(kernels, factors);
  products.add(targets.input, false, in.w_ih);
  products.add(targets.hx, false, in.w_hh);
  products.add(targets.w_ih, true, in.input);
  products.add(targets.w_hh, true, in.hx);
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
