// Backward of the layer on the CPU: the gradients that travel from step to step in one parallel
// region (threads as in the forward), then those of weights and inputs as large products.
#include <ATen/ops/zeros.h>

#include <cstring>

#include "cpu/gradient_products.h"
#include "cpu/layer.h"
#include "cpu/shares.h"
#include "cpu/team.h"
#include "cpu/tensors.h"
#include "ops/layer_states.h"

namespace lstm_ext::cpu {
namespace {

// The sizes of the gradient of a state that resets set.
at::IntArrayRef like_reset(const std::optional<Tensor>& state, const StatesInputs& in) {
  return defined(state) ? state->sizes() : in.hx.sizes();
}

// In the compute type: of the initial states, and of those that resets set, if they are wanted.
struct StateGradients {
  Tensor h, c, reset_h, reset_c;
};

// The gradients of the gates [S, 4H] of all steps, with those of states on the way.
Tensor backward_loop(const StatesOutputGradients& grads, const StatesInputs& in,
                     const SharedSequence& sequence, const Kernels& kernels,
                     const LayerResults& results, const StatesWanted& wanted,
                     StateGradients& states) {
  const LayerKernels& layer = kernels.layer;
  const int64_t N = sequence.N(), L = sequence.L(), H = in.hx.size(1);
  const at::ScalarType dtype = in.hx.scalar_type(), compute = compute_type(dtype);
  const Elements stored(dtype), computed(compute);
  const int64_t column_blocks = layer.column_blocks(H), unit_blocks = layer.unit_blocks(H);

  const auto initial = [&](const std::optional<Tensor>& grad) {
    return defined(grad) ? grad->to(compute).clone(at::MemoryFormat::Contiguous)
                         : at::zeros({N, H}, at::dtype(compute));
  };
  const Tensor &grad_h = states.h = initial(grads.hy), &grad_c = states.c = initial(grads.cy);
  const auto zeros = [&](bool asked, const std::optional<Tensor>& state) {
    return asked ? at::zeros(like_reset(state, in), at::dtype(compute)) : Tensor();
  };
  const Tensor &reset_h = states.reset_h = zeros(wanted.reset_hx, in.reset_hx),
               &reset_c = states.reset_c = zeros(wanted.reset_cx, in.reset_cx);
  const Tensor grad_gates = empty_large({sequence.S(), 4 * H}, compute);
  const bool pairs = kernels.product.pair_rows != nullptr;
  const Tensor halves = pairs ? empty({sequence.S(), 4 * H}, dtype) : grad_gates;
  const Elements factor = pairs ? stored : computed;
  const Dense w_hh(in.w_hh), gates(results.gates), c_before(results.c_before),
      grad_output(grads.output), grad_cells(grads.cells);
  const DenseCell cell(in);
  const Tensor packed = empty_large({layer.packed_columns(H)}, compute);
  const int64_t block_elements = layer.packed_columns(H) / column_blocks;
  const auto pack = [&](int64_t first, int64_t last) {
    layer.pack_columns(w_hh.data(), H,
                       computed.at(packed.mutable_data_ptr(), first * block_elements), first, last);
  };

  const Cut cut(sequence, H, column_blocks);
  if (!cut.own_blocks()) cpu::run(column_blocks, 4 * H * H, pack);
  Barrier barrier(cut.shares);
  run_team(cut.shares, [&](int64_t first, int64_t last) {
    const Share share = cut.share(sequence, first, last);
    const int64_t row = share.row, block = share.block, block_end = share.block_end;
    if (cut.own_blocks()) pack(block, block_end);
    for (int64_t s = L - 1; s >= 0; --s) {
      const int64_t t = sequence.time(s), rows = share.rows(sequence, t);
      const int64_t first_row = sequence.offset(t) + row;
      const bool* reset = sequence.reset(s) ? sequence.reset(s) + row : nullptr;
      StepGradientArgs step = {};
      step.rows = rows;
      step.H = H;
      step.grad_output = stored.at(grad_output.data(), first_row * H);
      step.grad_cells = stored.at(grad_cells.data(), first_row * H);
      step.grad_h = computed.at(grad_h.const_data_ptr(), row * H);
      step.grad_c = computed.at(grad_c.mutable_data_ptr(), row * H);
      step.gates = stored.at(gates.data(), first_row * 4 * H);
      step.c_before = stored.at(c_before.data(), first_row * H);
      step.cell = cell.kind();
      step.grad_gates = computed.at(grad_gates.mutable_data_ptr(), first_row * 4 * H);
      if (pairs) step.grad_gates_factors = stored.at(halves.mutable_data_ptr(), first_row * 4 * H);
      step.reset = reset;
      const auto of_reset = [&](const Tensor& grad) -> void* {
        if (!grad.defined()) return nullptr;
        return computed.at(grad.mutable_data_ptr(), (sequence.reset_row(grad, s) + row) * H);
      };
      step.grad_reset_c = of_reset(reset_c);
      if (rows > 0)
        layer.step_gradient(step, block * kUnitBlocks,
                            std::min(unit_blocks, block_end * kUnitBlocks));
      if (!cut.by_rows) barrier.wait(last - first, L - s);
      if (rows > 0 && (s > 0 || wanted.hx || wanted.reset_hx))
        zigzag(block, block_end, rows == 1 ? kSideBlocks : 1, s % 2, [&](int64_t from, int64_t to) {
          StateGradientArgs product = {};
          product.rows = rows;
          product.H = H;
          product.grad_gates = factor.at(halves.const_data_ptr(), first_row * 4 * H);
          product.packed = computed.at(packed.const_data_ptr(), from * block_elements);
          product.grad_h = computed.at(grad_h.mutable_data_ptr(), row * H);
          product.reset = reset;
          product.grad_reset_h = of_reset(reset_h);
          layer.state_gradient(product, from, to);
        });
    }
  });
  return grad_gates;
}

// The h that each step started from [S, H].
Tensor h_before(const StatesInputs& in, const SharedSequence& sequence, const Tensor& output) {
  const int64_t H = in.hx.size(1), bytes = H * output.element_size();
  const Tensor before = empty({sequence.S(), H}, output.scalar_type());
  const Dense hx(in.hx), h(output);
  const Tensor reset_h = dense(in.reset_hx);
  cpu::run(sequence.L(), sequence.S() * H, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      const int64_t t = sequence.time(s), rows = sequence.rows(t);
      // Rows that the step before had too; in reverse some begin here, from hx.
      const int64_t went_on = sequence.rows_going_on(s);
      void* to = advance(before.mutable_data_ptr(), sequence.offset(t) * bytes);
      if (went_on > 0)
        std::memcpy(to, advance(h.data(), sequence.offset(sequence.time(s - 1)) * bytes),
                    went_on * bytes);
      std::memcpy(advance(to, went_on * bytes), advance(hx.data(), went_on * bytes),
                  (rows - went_on) * bytes);
      const bool* reset = sequence.reset(s);
      for (int64_t row = 0; reset && row < rows; ++row) {
        if (!reset[row]) continue;
        void* of_row = advance(to, row * bytes);
        if (reset_h.defined())
          std::memcpy(
              of_row,
              advance(reset_h.const_data_ptr(), (sequence.reset_row(reset_h, s) + row) * bytes),
              bytes);
        else
          std::memset(of_row, 0, bytes);
      }
    }
  });
  return before;
}

}  // namespace

StatesGradients layer_backward(const StatesOutputGradients& grads, const StatesInputs& in,
                               const LayerResults& results, const StatesWanted& wanted) {
  const SharedSequence sequence(in);
  const int64_t N = sequence.N(), H = in.hx.size(1), I = in.input.size(-1), S = sequence.S();
  const at::ScalarType dtype = in.hx.scalar_type(), compute = compute_type(dtype);
  const Kernels& kernels = cpu::kernels(kernel_dtype(dtype));
  Target input = Target::fresh(wanted.input, in.input), w_ih = Target::fresh(wanted.w_ih, in.w_ih),
         w_hh = Target::fresh(wanted.w_hh, in.w_hh), b_ih = Target::bias(wanted.b_ih, in.w_hh),
         b_hh = Target::bias(wanted.b_hh, in.w_hh),
         unit_weights = Target::fresh(wanted.unit_weights, or_undefined(in.unit_weights));
  StateGradients states;
  if (S == 0 || H == 0) {
    for (const Target* target : {&input, &w_ih, &w_hh, &b_ih, &b_hh, &unit_weights})
      if (target->wanted()) target->tensor.zero_();
    const auto zeros = [&](at::IntArrayRef sizes) { return at::zeros(sizes, at::dtype(dtype)); };
    states.h = defined(grads.hy) ? grads.hy->clone() : zeros({N, H});
    states.c = defined(grads.cy) ? grads.cy->clone() : zeros({N, H});
    states.reset_h = zeros(like_reset(in.reset_hx, in));
    states.reset_c = zeros(like_reset(in.reset_cx, in));
  } else {
    const Tensor grad_gates = backward_loop(grads, in, sequence, kernels, results, wanted, states);
    if (b_ih.wanted() || b_hh.wanted()) {
      const Tensor sums = empty({bias_blocks(S), 4 * H}, compute);
      cpu::run(bias_blocks(S), S * 4 * H, [&](int64_t first, int64_t last) {
        kernels.layer.block_sums(grad_gates.const_data_ptr(), S, 4 * H, sums.mutable_data_ptr(),
                                 first, last);
      });
      for (const Target* target : {&b_ih, &b_hh})
        if (target->wanted())
          kernels.product.add_up(sums.const_data_ptr(), bias_blocks(S), 4 * H,
                                 target->tensor.mutable_data_ptr(), false);
    }
    if (unit_weights.wanted())
      unit_gradients(kernels, in.variant, results.c_before, results.gates, grad_gates,
                     unit_weights);
    GateFactors factors(kernels.product, grad_gates);
    Products products(kernels.product, factors);
    if (input.wanted()) input.tensor = input.tensor.view({S, I});
    products.add(input, false, in.w_ih);
    const Tensor rows = in.input.reshape({S, I});
    products.add(w_ih, true, rows);
    Tensor h, tail;  // the h that each step started from
    if (w_hh.wanted()) {
      if (products.takes_pieces() && !defined(in.batch_sizes) && !defined(in.reset)) {
        const Tensor output = results.output.contiguous().view({S, H}), hx = in.hx.contiguous();
        h = in.reverse ? output.narrow(0, N, S - N) : hx;
        tail = in.reverse ? hx : output.narrow(0, 0, S - N);
      } else {
        h = h_before(in, sequence, results.output);
      }
    }
    products.add(w_hh, true, h, tail);
    products.run();
  }
  if (input.wanted()) input.tensor = input.tensor.view(in.input.sizes());
  const auto stored = [&](bool asked, const Tensor& grad) {
    return asked ? grad.to(dtype) : Tensor();
  };
  return {{std::move(input.tensor), stored(wanted.hx, states.h), stored(wanted.cx, states.c),
           std::move(w_ih.tensor), std::move(w_hh.tensor), std::move(b_ih.tensor),
           std::move(b_hh.tensor), std::move(unit_weights.tensor)},
          stored(wanted.reset_hx, states.reset_h),
          stored(wanted.reset_cx, states.reset_c)};
}

}  // namespace lstm_ext::cpu
