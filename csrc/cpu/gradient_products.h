// What a backward makes of the gradients of the gates: those of the units' own weights, and by
// matrix products those of inputs and weights.
#pragma once

#include <array>

#include "cpu/tensors.h"

namespace lstm_ext::cpu {

// A gradient to compute: a new tensor, or one that exists and is added to. No tensor: not wanted.
struct Target {
  Tensor tensor;
  bool accumulate = false;

  bool wanted() const { return tensor.defined(); }
  static Target fresh(bool wanted, const Tensor& like) {
    return {wanted ? empty(like.sizes(), like.scalar_type()) : Tensor(), false};
  }
  // Of a bias, by the weight [4H, H] that goes with it.
  static Target bias(bool wanted, const Tensor& weight) {
    return {wanted ? empty({weight.size(0)}, weight.scalar_type()) : Tensor(), false};
  }
  static Target existing(const std::optional<Tensor>& tensor) {
    return {tensor.value_or(Tensor()), true};
  }
};

// target = or += the gradients of the units' own weights [P, H], from those of the gates.
inline void unit_gradients(const Kernels& kernels, int64_t variant, const Tensor& cx,
                           const Tensor& gates, const Tensor& grad_gates, const Target& target) {
  const int64_t rows = cx.size(0), H = cx.size(1), blocks = bias_blocks(rows);
  const Tensor sums = empty({blocks, target.tensor.numel()}, grad_gates.scalar_type());
  const Dense c(cx), g(gates);
  UnitGradientArgs args = {};
  args.rows = rows;
  args.H = H;
  args.cx = c.data();
  args.gates = g.data();
  args.grad_gates = grad_gates.const_data_ptr();
  args.variant = static_cast<int>(variant);
  args.sums = sums.mutable_data_ptr();
  cpu::run(blocks, rows * H * 64,
           [&](int64_t first, int64_t last) { kernels.cell.unit_gradients(args, first, last); });
  kernels.product.add_up(sums.const_data_ptr(), blocks, target.tensor.numel(),
                         target.tensor.mutable_data_ptr(), target.accumulate);
}

// The gradients of the gates [N, 4H], or others, as the left factors of the products, made when
// asked for.
class GateFactors {
 public:
  GateFactors(const ProductKernels& kernels, Tensor grad_gates)
      : kernels_(kernels), grad_gates_(std::move(grad_gates)) {}
  int64_t N() const { return grad_gates_.size(0); }
  int64_t gates() const { return grad_gates_.size(1); }

  // Fills in args.a, which lives as long as this, for a product with the gradients or, transposed,
  // with their transpose.
  void left(bool transposed, ProductArgs& args) {
    const bool pairs = kernels_.pair_rows && kernels_.packs(args.rows, args.depth);
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

  const ProductKernels& kernels_;
  const Tensor grad_gates_;
  Tensor halves_, row_pairs_;
};

// Matrix products that run side by side in one parallel region.
class Products {
 public:
  Products(const ProductKernels& kernels, GateFactors& factors)
      : kernels_(kernels), factors_(factors) {}

  // target = or += the gates' gradients, or their transpose, times b, which outlives this.
  void add(const Target& target, bool transposed, const Tensor& b) {
    add(target, transposed, b, Tensor());
  }
  // The same with b in two pieces, one below the other; only if takes_pieces(). Both are dense.
  void add(const Target& target, bool transposed, const Tensor& b, const Tensor& tail) {
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
    parts_[count_] = kernels_.parts(rows, depth, columns);
    if (parts_[count_] > 1)
      terms_[count_] =
          empty({parts_[count_], rows, columns}, compute_type(target.tensor.scalar_type()));
    results_[count_] = target;
    args.c = (parts_[count_] > 1 ? terms_[count_] : target.tensor).mutable_data_ptr();
    args.accumulate = target.accumulate;
    args.threads = at::get_num_threads();
    args.b_tail = tail.defined() ? tail.const_data_ptr() : nullptr;
    args.tail_row = b.size(0);
    tasks_[count_] = kernels_.tasks(args);
    work_ += rows * columns * (depth + 4);
    ++count_;
  }

  // Whether a product with the transposed gradients takes b in two pieces.
  bool takes_pieces() const {
    return !kernels_.pair_rows && kernels_.packs(factors_.gates(), factors_.N());
  }

  // Every thread takes its share of each product: their tasks differ in size.
  void run() const {
    const int64_t shares =
        std::clamp<int64_t>(work_ / kForkWork, 1, static_cast<int64_t>(at::get_num_threads()));
    cpu::run(shares, work_, [&](int64_t first, int64_t last) {
      for (int p = 0; p < count_; ++p) {
        const int64_t from = tasks_[p] * first / shares, to = tasks_[p] * last / shares;
        if (from < to) kernels_.run(args_[p], from, to);
      }
    });
    for (int p = 0; p < count_; ++p)
      if (parts_[p] > 1)
        kernels_.add_up(terms_[p].const_data_ptr(), parts_[p], args_[p].rows * args_[p].columns,
                        results_[p].tensor.mutable_data_ptr(), results_[p].accumulate);
  }

 private:
  static constexpr int kMost = 4;
  const ProductKernels& kernels_;
  GateFactors& factors_;
  std::array<c10::MaybeOwned<Tensor>, kMost> operands_;
  std::array<ProductArgs, kMost> args_;
  std::array<int64_t, kMost> tasks_, parts_;
  std::array<Tensor, kMost> terms_;
  std::array<Target, kMost> results_;
  int count_ = 0;
  int64_t work_ = 0;
};

}  // namespace lstm_ext::cpu
