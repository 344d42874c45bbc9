// The operators on the CPU: tensors in, kernels over raw pointers out.
#include <torch/library.h>

#include "cpu/products.h"
#include "cpu/tensors.h"
#include "ops.h"

namespace lstm_ext::cpu {
namespace {

void forward(const CellInputs& in, Tensor& hy, Tensor& cy, Tensor* gates) {
  const int64_t N = in.input.size(0), I = in.input.size(1), H = in.hx.size(1);
  const at::ScalarType dtype = in.input.scalar_type();
  hy = empty({N, H}, dtype);
  cy = empty({N, H}, dtype);
  if (gates) *gates = empty({N, 4 * H}, dtype);
  if (hy.numel() == 0) return;
  const CellKernels& kernels = cpu::kernels(kernel_dtype(dtype)).cell;
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
  check_allocated(in);
  log_cpu_path("lstm_cell", input, hx);
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
  check_allocated(in);
  log_cpu_path("lstm_cell_forward", input, hx);
  Tensor hy, cy, gates;
  forward(in, hy, cy, &gates);
  return {std::move(hy), std::move(cy), std::move(gates)};
}

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

void backward(const std::optional<Tensor>& grad_hy, const std::optional<Tensor>& grad_cy,
              const CellInputs& in, const Tensor& gates, const Targets& targets) {
  const CellKernels& kernels = cpu::kernels(kernel_dtype(in.hx.scalar_type())).cell;
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
  check_cell_backward(grad_hy, grad_cy, hx, gates);
  check_all_allocated(input, hx, cx, w_ih, w_hh, grad_hy, grad_cy, gates);
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
  log_cpu_path("lstm_cell_backward", input, hx);
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
  check_cell_backward(grad_hy, grad_cy, hx, gates);
  check_all_allocated(input, hx, cx, w_ih, w_hh, grad_hy, grad_cy, gates, grad_w_ih, grad_w_hh,
                      grad_b_ih, grad_b_hh);
  // Of each, once: what is read, and what is written to so far.
  c10::SmallVector<MemoryRange, 12> used;
  for (const Tensor* read : {&input, &hx, &cx, &w_ih, &w_hh, &gates})
    used.push_back(memory_of(*read));
  for (const auto* read : {&grad_hy, &grad_cy})
    if (defined(*read)) used.push_back(memory_of(**read));
  for (const auto* sum : {&grad_w_ih, &grad_w_hh, &grad_b_ih, &grad_b_hh}) {
    if (!defined(*sum)) continue;
    const MemoryRange written = memory_of(**sum);
    for (const MemoryRange& other : used)
      TORCH_CHECK(!written.overlaps(other),
                  "lstm_cell_backward_accumulate: a gradient to add to must share memory with no "
                  "tensor that is read, and no other gradient");
    used.push_back(written);
  }
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
  log_cpu_path("lstm_cell_backward_accumulate", input, hx);
  backward(grad_hy, grad_cy, in, gates, to);
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
  m.impl("lstm_cell", lstm_cell);
  m.impl("lstm_cell_forward", lstm_cell_forward);
  m.impl("lstm_cell_backward", lstm_cell_backward);
  m.impl("lstm_cell_backward_accumulate", lstm_cell_backward_accumulate);
}

}  // namespace lstm_ext::cpu
