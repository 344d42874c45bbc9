// The operators on the CPU: tensors in, kernels over raw pointers out.
#include "ops/cell.h"

#include <torch/library.h>

#include "cpu/gradient_products.h"
#include "cpu/tensors.h"
#include "ops/composite.h"

namespace lstm_ext::cpu {
namespace {

void forward(const CellInputs& in, Tensor& hy, Tensor& cy, Tensor* gates) {
  const int64_t N = in.input.size(0), I = in.input.size(1), H = in.hx.size(1);
  const at::ScalarType dtype = in.input.scalar_type();
  hy = empty({N, H}, dtype);
  cy = empty({N, H}, dtype);
  if (gates) *gates = empty({N, 4 * H}, dtype);
  if (hy.numel() == 0) return;
  const Kernels& all = cpu::kernels(kernel_dtype(dtype));
  const CellKernels& kernels = all.cell;
  const Dense input(in.input), hx(in.hx), cx(in.cx), w_ih(in.w_ih), w_hh(in.w_hh), b_ih(in.b_ih),
      b_hh(in.b_hh);
  Tensor input_factors, hx_factors;
  if (kernels.forward_packs(N)) {
    input_factors = to_factors(all.product, in.input);
    hx_factors = to_factors(all.product, in.hx);
  }
  CellForwardArgs args = {};
  args.N = N;
  args.I = I;
  args.H = H;
  args.input = input.data();
  args.hx = hx.data();
  args.input_factors = Dense(input_factors).data();
  args.hx_factors = Dense(hx_factors).data();
  args.cx = cx.data();
  args.w_ih = w_ih.data();
  args.w_hh = w_hh.data();
  args.b_ih = b_ih.data();
  args.b_hh = b_hh.data();
  args.hy = hy.mutable_data_ptr();
  args.cy = cy.mutable_data_ptr();
  args.gates = gates ? gates->mutable_data_ptr() : nullptr;
  run(kernels.forward_tasks(N, H), N * 4 * H * (I + H + 16),
      [&](int64_t first, int64_t last) { kernels.forward(args, first, last); });
}

CellOutputs lstm_cell(const CellInputs& in) {
  if (!fusable(in)) return torch_lstm_cell(in);
  check_all_allocated(in);
  log_cpu_path("lstm_cell", in.input, in.hx);
  Tensor hy, cy;
  forward(in, hy, cy, nullptr);
  return {std::move(hy), std::move(cy)};
}

CellTrainingOutputs lstm_cell_forward(const CellInputs& in) {
  if (!fusable(in)) {
    torch_lstm_cell(in);  // raises torch's error, if torch rejects them
    return composite::cell_forward(in);
  }
  check_all_allocated(in);
  log_cpu_path("lstm_cell_forward", in.input, in.hx);
  Tensor hy, cy, gates;
  forward(in, hy, cy, &gates);
  return {std::move(hy), std::move(cy), std::move(gates)};
}

struct Targets {
  Target input, hx, cx, w_ih, w_hh, b_ih, b_hh;
};

// The gradients of the gates' pre-activations [N, 4H] in the compute type, those of cx, and the
// biases', in one pass.
Tensor gate_gradients(const Kernels& kernels, const CellOutputGradients& grads, const Tensor& cx,
                      const Tensor& gates, const Targets& targets) {
  const int64_t N = cx.size(0), H = cx.size(1);
  const at::ScalarType compute = compute_type(cx.scalar_type());
  Tensor grad_gates = empty({N, 4 * H}, compute);
  const Dense grad_hy(grads.hy), grad_cy(grads.cy), c(cx), g(gates);
  Tensor bias_sums;
  if (targets.b_ih.wanted() || targets.b_hh.wanted())
    bias_sums = empty({bias_blocks(N), 4 * H}, compute);
  GateGradientArgs args = {};
  args.N = N;
  args.H = H;
  args.grad_hy = grad_hy.data();
  args.grad_cy = grad_cy.data();
  args.cx = c.data();
  args.gates = g.data();
  args.grad_gates = grad_gates.mutable_data_ptr();
  args.grad_cx = targets.cx.wanted() ? targets.cx.tensor.mutable_data_ptr() : nullptr;
  args.bias_sums = bias_sums.defined() ? bias_sums.mutable_data_ptr() : nullptr;
  run(kernels.cell.gate_gradient_tasks(N, H), N * H * 64,
      [&](int64_t first, int64_t last) { kernels.cell.gate_gradients(args, first, last); });
  for (const Target* bias : {&targets.b_ih, &targets.b_hh})
    if (bias->wanted())
      kernels.product.add_up(bias_sums.const_data_ptr(), bias_blocks(N), 4 * H,
                             bias->tensor.mutable_data_ptr(), bias->accumulate);
  return grad_gates;
}

void backward(const CellOutputGradients& grads, const CellInputs& in, const CellResults& results,
              const Targets& targets) {
  const Kernels& kernels = cpu::kernels(kernel_dtype(in.hx.scalar_type()));
  GateFactors factors(kernels.product,
                      gate_gradients(kernels, grads, in.cx, results.gates, targets));
  Products products(kernels.product, factors);
  products.add(targets.input, false, in.w_ih);
  products.add(targets.hx, false, in.w_hh);
  products.add(targets.w_ih, true, in.input);
  products.add(targets.w_hh, true, in.hx);
  products.run();
}

Gradients lstm_cell_backward(const CellOutputGradients& grads, const CellInputs& in,
                             const CellResults& results, const Wanted& wanted) {
  if (!fusable(in)) return composite::cell_backward(grads, in, results, wanted);
  check_backward(grads, in.hx, results);
  check_allocated_for_backward(in);
  check_all_allocated(grads, results);
  Targets to;
  to.input = Target::fresh(wanted.input, in.input);
  to.hx = Target::fresh(wanted.hx, in.hx);
  to.cx = Target::fresh(wanted.cx, in.cx);
  to.w_ih = Target::fresh(wanted.w_ih, in.w_ih);
  to.w_hh = Target::fresh(wanted.w_hh, in.w_hh);
  to.b_ih = Target::bias(wanted.b_ih, in.w_hh);
  to.b_hh = Target::bias(wanted.b_hh, in.w_hh);
  log_cpu_path("lstm_cell_backward", in.input, in.hx);
  backward(grads, in, results, to);
  return {std::move(to.input.tensor), std::move(to.hx.tensor),   std::move(to.cx.tensor),
          std::move(to.w_ih.tensor),  std::move(to.w_hh.tensor), std::move(to.b_ih.tensor),
          std::move(to.b_hh.tensor)};
}

// Raises an error unless the sums are dense, have their parameters' sizes and dtype, and share
// memory with nothing that is read and with no other sum.
void check_sums(const ParameterGradients& sums, const CellOutputGradients& grads,
                const CellInputs& in, const CellResults& results) {
  // Of each, once: what is read, and what is written to so far.
  c10::SmallVector<MemoryRange, 12> used;
  for_each_tensor([&](const Tensor& read) { used.push_back(memory_of(read)); }, in.input, in.hx,
                  in.cx, in.w_ih, in.w_hh, grads, results);
  for_each_tensor(
      [&](const Tensor& sum) {
        const MemoryRange written = memory_of(sum);
        for (const MemoryRange& other : used)
          TORCH_CHECK(!written.overlaps(other),
                      "lstm_cell_backward_accumulate: a gradient to add to must share memory with "
                      "no tensor that is read, and no other gradient");
        used.push_back(written);
      },
      sums);
  const auto check = [&](const std::optional<Tensor>& sum, at::IntArrayRef sizes) {
    TORCH_CHECK(!defined(sum) || (sum->sizes() == sizes && sum->is_contiguous() &&
                                  sum->scalar_type() == in.hx.scalar_type() && sum->is_cpu()),
                "lstm_cell_backward_accumulate: a gradient to add to must be dense, with its "
                "parameter's shape ",
                sizes, " and dtype ", in.hx.scalar_type());
  };
  check(sums.w_ih, in.w_ih.sizes());
  check(sums.w_hh, in.w_hh.sizes());
  check(sums.b_ih, {in.w_hh.size(0)});
  check(sums.b_hh, {in.w_hh.size(0)});
}

CellStateGradients lstm_cell_backward_accumulate(const CellOutputGradients& grads,
                                                 const CellInputs& in, const CellResults& results,
                                                 const ParameterGradients& sums,
                                                 CellStateGradientMask mask) {
  TORCH_CHECK(fusable(in),
              "lstm_cell_backward_accumulate: the tensors must be those of lstm_cell_forward");
  check_backward(grads, in.hx, results);
  check_allocated_for_backward(in);
  check_all_allocated(grads, results, sums);
  check_sums(sums, grads, in, results);
  Targets to;
  to.input = Target::fresh(mask[0], in.input);
  to.hx = Target::fresh(mask[1], in.hx);
  to.cx = Target::fresh(mask[2], in.cx);
  to.w_ih = Target::existing(sums.w_ih);
  to.w_hh = Target::existing(sums.w_hh);
  to.b_ih = Target::existing(sums.b_ih);
  to.b_hh = Target::existing(sums.b_hh);
  log_cpu_path("lstm_cell_backward_accumulate", in.input, in.hx);
  backward(grads, in, results, to);
  return {std::move(to.input.tensor), std::move(to.hx.tensor), std::move(to.cx.tensor)};
}

}  // namespace

}  // namespace lstm_ext::cpu

bool lstm_ext::packed_cell_is_faster(const at::Tensor& input, int64_t H) {
  // From so many weights on, what is saved outweighs the longer way through the layer's kernels.
  constexpr int64_t kEnough = int64_t{1} << 17;
  const at::ScalarType dtype = input.scalar_type();
  return fused_dtype(dtype) && 4 * H * (input.size(1) + H) >= kEnough &&
         cpu::kernels(cpu::kernel_dtype(dtype)).cell.forward_packs(input.size(0));
}

namespace lstm_ext::cpu {

TORCH_LIBRARY_IMPL(lstm_ext, CPU, m) {
  ops::lstm_cell::implement<lstm_cell>(m);
  ops::lstm_cell_forward::implement<lstm_cell_forward>(m);
  ops::lstm_cell_backward::implement<lstm_cell_backward>(m);
  ops::lstm_cell_backward_accumulate::implement<lstm_cell_backward_accumulate>(m);
}

}  // namespace lstm_ext::cpu
