// Backward of the layer on the CPU: the gradients that travel from step to step in one parallel
// region (threads as in the forward), then those of weights and inputs as large products.
#include <ATen/ops/zeros.h>

#include <cstring>

#include "cpu/gradient_products.h"
#include "cpu/layer.h"
#include "cpu/packed_weights.h"
#include "cpu/shares.h"
#include "cpu/team.h"
#include "cpu/tensors.h"
#include "ops/layer_states.h"

namespace lstm_ext::cpu {
namespace {

// The sizes of the gradient of a state that resets set.
at::IntArrayRef like_reset(const std::optional<Tensor>& state, const Tensor& like) {
  return defined(state) ? state->sizes() : like.sizes();
}

// In the compute type: of the initial states, and of those that resets set, if they are wanted.
struct StateGradients {
  Tensor h, c, reset_h, reset_c;
};

// W_hr [P, H] where h is projected, and the gradients of h [S, P] of all steps, in the compute
// type; else neither.
struct ProjectionBackward {
  const Tensor w_hr;
  Tensor grad_h;
};

// The gradients of the gates [S, 4H] of all steps, with those of states on the way.
Tensor backward_loop(const StatesOutputGradients& grads, const StatesInputs& in,
                     const SharedSequence& sequence, const Kernels& kernels,
                     const LayerResults& results, const StatesWanted& wanted,
                     StateGradients& states, ProjectionBackward& projection) {
  const LayerKernels& layer = kernels.layer;
  const int64_t N = sequence.N(), L = sequence.L(), H = in.cx.size(1);
  const int64_t P = in.hx.size(1);  // H where h is not projected
  const bool projects = projection.w_hr.defined();
  const at::ScalarType dtype = in.hx.scalar_type(), compute = compute_type(dtype);
  const Elements stored(dtype), computed(compute);
  const int64_t unit_blocks = layer.unit_blocks(H);

  const auto initial = [&](const std::optional<Tensor>& grad, const Tensor& state) {
    return defined(grad) ? grad->to(compute).clone(at::MemoryFormat::Contiguous)
                         : at::zeros(state.sizes(), at::dtype(compute));
  };
  const Tensor &grad_h = states.h = initial(grads.hy, in.hx),
               &grad_c = states.c = initial(grads.cy, in.cx);
  const auto zeros = [&](bool asked, const std::optional<Tensor>& state, const Tensor& like) {
    return asked ? at::zeros(like_reset(state, like), at::dtype(compute)) : Tensor();
  };
  const Tensor &reset_h = states.reset_h = zeros(wanted.reset_hx, in.reset_hx, in.hx),
               &reset_c = states.reset_c = zeros(wanted.reset_cx, in.reset_cx, in.cx);
  const Tensor grad_gates = empty_large({sequence.S(), 4 * H}, compute);
  const bool pairs = kernels.product.pair_rows != nullptr;
  const Tensor halves = pairs ? empty({sequence.S(), 4 * H}, dtype) : grad_gates;
  const Elements factor = pairs ? stored : computed;
  const Dense w_hh(in.w_hh), gates(results.gates), c_before(results.c_before),
      grad_output(grads.output), grad_cells(grads.cells), w_hr(projection.w_hr);
  const DenseCell cell(in);

  const Cut cut(sequence, H, (unit_blocks + kUnitBlocks - 1) / kUnitBlocks,
                projects ? kRowsOfAProjectingThread : kRowsOfAThread);
  PackedColumns hh(layer, compute, 4 * H, P, projects && !cut.by_rows ? cut.shares : 1);
  PackedColumns hr(layer, compute, P, H);
  const Tensor packed = empty_large({hh.bytes() + (projects ? hr.bytes() : 0)}, at::kByte);
  hh.lie_at(packed.mutable_data_ptr());
  hr.lie_at(advance(packed.mutable_data_ptr(), hh.bytes()));
  if (!cut.own_blocks()) {
    cpu::run(hh.blocks(), 4 * H * P,
             [&](int64_t first, int64_t last) { hh.pack(w_hh.data(), first, last); });
    if (projects)
      cpu::run(hr.blocks(), H * P,
               [&](int64_t first, int64_t last) { hr.pack(w_hr.data(), first, last); });
  }
  // The gradients of h: of all steps, and of one as factors; and of r, which h is projected from.
  const int64_t h_columns = pairs ? (P + 1) / 2 * 2 : P;
  Tensor h_factors, grad_r;
  if (projects) {
    projection.grad_h = empty_large({sequence.S(), P}, compute);
    if (pairs) h_factors = at::zeros({N, h_columns}, at::dtype(dtype));
    grad_r = empty({N, H}, compute);
  }
  Barrier barrier(cut.shares);
  run_team(cut.shares, [&](int64_t first, int64_t last) {
    const Share share = cut.share(sequence, first, last);
    const int64_t row = share.row, block = share.block, block_end = share.block_end;
    const int64_t hh_block = cut.by_rows ? 0 : hh.blocks() * first / cut.shares;
    const int64_t hh_end = cut.by_rows ? hh.blocks() : hh.blocks() * last / cut.shares;
    int64_t meetings = 0;
    const auto meet = [&] {
      if (!cut.by_rows) barrier.wait(last - first, ++meetings);
    };
    if (cut.own_blocks()) {
      hh.pack(w_hh.data(), hh_block, hh_end);
      if (projects) hr.pack(w_hr.data(), block, block_end);
    }
    for (int64_t s = L - 1; s >= 0; --s) {
      const int64_t t = sequence.time(s), rows = share.rows(sequence, t);
      const int64_t first_row = sequence.offset(t) + row;
      const bool* reset = sequence.reset(s) ? sequence.reset(s) + row : nullptr;
      StepGradientArgs step = {};
      step.rows = rows;
      step.H = H;
      step.grad_cells = stored.at(grad_cells.data(), first_row * H);
      if (projects) {
        OutputGradientArgs of_h = {};
        of_h.rows = rows;
        of_h.P = P;
        of_h.grad_output = stored.at(grad_output.data(), first_row * P);
        of_h.grad_h = computed.at(grad_h.const_data_ptr(), row * P);
        of_h.sum = computed.at(projection.grad_h.mutable_data_ptr(), first_row * P);
        if (pairs) of_h.factors = stored.at(h_factors.mutable_data_ptr(), row * h_columns);
        const int64_t vectors = hh.panels().vectors;
        if (rows > 0) layer.output_gradient(of_h, hh_block * vectors, hh_end * vectors);
        meet();
        ColumnProductArgs of_r = {};
        of_r.rows = rows;
        of_r.panels = hr.panels();
        of_r.x = pairs ? of_h.factors : of_h.sum;
        of_r.packed = hr.at(block);
        of_r.out = computed.at(grad_r.mutable_data_ptr(), row * H);
        of_r.out_stride = H;
        if (rows > 0) layer.multiply_columns(of_r, block, block_end);
        step.grad_h = of_r.out;
      } else {
        step.grad_output = stored.at(grad_output.data(), first_row * H);
        step.grad_h = computed.at(grad_h.const_data_ptr(), row * H);
      }
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
      meet();
      if (rows > 0 && (s > 0 || wanted.hx || wanted.reset_hx))
        zigzag(hh_block, hh_end, rows == 1 ? kSideBlocks : 1, s % 2, [&](int64_t from, int64_t to) {
          StateGradientArgs product = {};
          product.rows = rows;
          product.panels = hh.panels();
          product.grad_gates = factor.at(halves.const_data_ptr(), first_row * 4 * H);
          product.packed = hh.at(from);
          product.grad_h = computed.at(grad_h.mutable_data_ptr(), row * P);
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

StatesGradients backward(const StatesOutputGradients& grads, const StatesInputs& in,
                         const LayerResults& results, const StatesWanted& wanted,
                         ProjectionBackward& projection) {
  const SharedSequence sequence(in);
  const int64_t N = sequence.N(), H = in.cx.size(1), I = in.input.size(-1), S = sequence.S();
  const int64_t P = in.hx.size(1);
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
    states.h = defined(grads.hy) ? grads.hy->clone() : zeros({N, P});
    states.c = defined(grads.cy) ? grads.cy->clone() : zeros({N, H});
    states.reset_h = zeros(like_reset(in.reset_hx, in.hx));
    states.reset_c = zeros(like_reset(in.reset_cx, in.cx));
  } else {
    const Tensor grad_gates =
        backward_loop(grads, in, sequence, kernels, results, wanted, states, projection);
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
        const Tensor output = results.output.contiguous().view({S, P}), hx = in.hx.contiguous();
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

}  // namespace

StatesGradients layer_backward(const StatesOutputGradients& grads, const StatesInputs& in,
                               const LayerResults& results, const StatesWanted& wanted) {
  ProjectionBackward none = {};
  return backward(grads, in, results, wanted, none);
}

ProjectedGradients projected_backward(const LayerOutputGradients& grads, const ProjectedInputs& in,
                                      const ProjectedResults& results,
                                      const ProjectedWanted& wanted) {
  ProjectionBackward projection = {in.w_hr, {}};
  ProjectedGradients out;
  static_cast<Gradients&>(out) =
      backward(StatesOutputGradients::plain(grads), StatesInputs::plain(in), results,
               {wanted.layer, false, false}, projection);
  if (!wanted.w_hr) return out;
  const Target w_hr = Target::fresh(true, in.w_hr);
  if (projection.grad_h.defined()) {
    const ProductKernels& kernels = cpu::kernels(kernel_dtype(in.hx.scalar_type())).product;
    GateFactors factors(kernels, projection.grad_h);
    Products products(kernels, factors);
    products.add(w_hr, true, results.r);
    products.run();
  } else {
    w_hr.tensor.zero_();
  }
  out.w_hr = w_hr.tensor;
  return out;
}

}  // namespace lstm_ext::cpu
