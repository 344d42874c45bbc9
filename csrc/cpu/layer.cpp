// The layer's operators on the CPU: weights packed once, then the time loop in one parallel region.
//
// Threads share the work by rows of the batch, each going through the whole sequence on its own,
// or, when rows are few, by hidden units, each keeping its part of the weights in its cache and
// meeting the others once a step. Neither changes the order in which a number is summed.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/products.h"
#include "cpu/sequence.h"
#include "cpu/team.h"
#include "cpu/tensors.h"
#include "layer_ops.h"

namespace lstm_ext::cpu {
namespace {

// Rows whose pre-activations are made at once: enough to make use of a panel, few enough to stay
// in a near cache.
constexpr int64_t kChunkRows = 48;
// Byte offsets into raw memory.
template <class T>
T* advance(T* base, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return base ? reinterpret_cast<Byte*>(base) + bytes : nullptr;
}
// An element size with the pointers that go with it.
struct Elements {
  int64_t size;
  template <class T>
  T* at(T* base, int64_t count) const {
    return advance(base, count * size);
  }
};

int64_t factor_columns(const CellKernels& kernels, int64_t K) {
  return kernels.pair_rows ? (K + 1) / 2 * 2 : K;
}
at::ScalarType factor_type(const CellKernels& kernels, at::ScalarType dtype) {
  return kernels.pair_rows ? dtype : compute_type(dtype);
}

struct Outputs {
  Tensor output, hy, cy, gates, c_before;  // the last two undefined in inference
};

void forward_loop(const LayerInputs& in, const Sequence& sequence, const Kernels& kernels,
                  Outputs& out) {
  const LayerKernels& layer = kernels.layer;
  const int64_t N = sequence.N(), L = sequence.L(), H = in.hx.size(1), I = in.input.size(-1);
  const at::ScalarType dtype = in.hx.scalar_type(), compute = compute_type(dtype);
  const at::ScalarType factors = factor_type(kernels.cell, dtype);
  const int64_t blocks = layer.unit_blocks(H);
  const Elements stored = {static_cast<int64_t>(elementSize(dtype))};
  const Elements factor = {static_cast<int64_t>(elementSize(factors))};

  const Dense w_ih(in.w_ih), w_hh(in.w_hh), b_ih(in.b_ih), b_hh(in.b_hh);
  const Cut cut(sequence, H, blocks);
  const int64_t chunk_rows = kChunkRows * (cut.by_rows ? cut.shares : 1);
  const int64_t chunk_steps = std::clamp<int64_t>(chunk_rows / N, 1, L);
  // One piece of memory for all: the allocator returns several large ones to the system each time,
  // and to get their pages anew takes as long as to fill them.
  const std::vector<Tensor> scratch =
      empty({layer.packed_gates(I, H) + layer.packed_gates(H, H) +
             chunk_steps * N * layer.sums_per_row(H)},
            compute)
          .split_with_sizes({layer.packed_gates(I, H), layer.packed_gates(H, H),
                             chunk_steps * N * layer.sums_per_row(H)});
  const Tensor &packed_ih = scratch[0], &packed_hh = scratch[1], &sums = scratch[2];
  cpu::run(blocks, 4 * H * (I + H), [&](int64_t first, int64_t last) {
    layer.pack_gates(w_ih.data(), I, H, packed_ih.mutable_data_ptr(), first, last);
    layer.pack_gates(w_hh.data(), H, H, packed_hh.mutable_data_ptr(), first, last);
  });
  const Tensor x = to_factors(kernels.cell, in.input.reshape({sequence.rows(), I}));
  const int64_t x_columns = factor_columns(kernels.cell, I);
  const int64_t h_columns = factor_columns(kernels.cell, H);
  // The states travel in place; h in two buffers, so that a step can read one and write the other.
  Tensor h[2] = {to_factors(kernels.cell, in.hx).clone(), Tensor()};
  h[1] = h[0].clone();
  for (int64_t row = 0; row < N; ++row) {
    const int64_t s = sequence.first_step(row);
    const bool* reset = sequence.reset(s);
    if (!reset || !reset[row]) continue;
    for (const Tensor& state : {h[0], h[1], out.cy}) state[row].zero_();
  }

  Barrier barrier(cut.shares);

  run_team(cut.shares, [&](int64_t first, int64_t last) {
    const int64_t row = cut.by_rows ? sequence.row_at(first, cut.shares) : 0;
    const int64_t row_end = cut.by_rows ? sequence.row_at(last, cut.shares) : N;
    const int64_t block = cut.by_rows ? 0 : blocks * first / cut.shares;
    const int64_t block_end = cut.by_rows ? blocks : blocks * last / cut.shares;
    const auto active = [&](int64_t t) { return std::min(sequence.rows(t), row_end) - row; };
    for (int64_t begin = 0; begin < L; begin += chunk_steps) {
      const int64_t end = std::min(begin + chunk_steps, L);
      const int64_t low = sequence.offset(std::min(sequence.time(begin), sequence.time(end - 1)));
      const int64_t high =
          sequence.offset(std::max(sequence.time(begin), sequence.time(end - 1)) + 1);
      // Where the pre-activations of the s'th step's rows lie. Threads with rows of their own do
      // not wait for each other between chunks, so that each needs a place of its own.
      const bool alone = row == 0 && row_end == N;
      const GateSums chunk = {sums.mutable_data_ptr(), alone ? high - low : chunk_steps * N};
      const auto place = [&](int64_t s) {
        return alone ? sequence.offset(sequence.time(s)) - low : (s - begin) * N + row;
      };
      const auto project = [&](int64_t from, int64_t rows, int64_t to) {
        layer.gate_product({rows, I, H, factor.at(x.const_data_ptr(), from * x_columns),
                            packed_ih.const_data_ptr(), chunk, to, false},
                           block, block_end);
      };
      if (alone)
        project(low, high - low, 0);
      else
        for (int64_t s = begin; s < end; ++s)
          if (active(sequence.time(s)) > 0)
            project(sequence.offset(sequence.time(s)) + row, active(sequence.time(s)), place(s));

      for (int64_t s = begin; s < end; ++s) {
        const int64_t t = sequence.time(s), rows = active(t), first_row = sequence.offset(t) + row;
        const bool* reset_next = sequence.reset(s + 1);
        if (rows > 0) {
          const GateProductArgs product = {rows,
                                           H,
                                           H,
                                           factor.at(h[s % 2].const_data_ptr(), row * h_columns),
                                           packed_hh.const_data_ptr(),
                                           chunk,
                                           place(s),
                                           true};
          const StepArgs step = {
              rows,
              H,
              chunk,
              place(s),
              b_ih.data(),
              b_hh.data(),
              stored.at(out.cy.mutable_data_ptr(), row * H),
              factor.at(h[(s + 1) % 2].mutable_data_ptr(), row * h_columns),
              stored.at(out.output.mutable_data_ptr(), first_row * H),
              out.gates.defined() ? stored.at(out.gates.mutable_data_ptr(), first_row * 4 * H)
                                  : nullptr,
              out.gates.defined() ? stored.at(out.c_before.mutable_data_ptr(), first_row * H)
                                  : nullptr,
              reset_next ? reset_next + row : nullptr};
          for (int64_t b = block; b < block_end; ++b) {
            layer.gate_product(product, b, b + 1);
            layer.step(step, b, b + 1);
          }
        }
        if (!cut.by_rows) barrier.wait(last - first, s + 1);
      }
    }
  });
}

// The cell's own kernels, on the weights as they lie: for sequences too short to pay for packing.
void forward_by_cells(const LayerInputs& in, const Sequence& sequence, const Kernels& kernels,
                      Outputs& out) {
  const int64_t N = sequence.N(), H = in.hx.size(1), I = in.input.size(-1);
  const Elements stored = {static_cast<int64_t>(elementSize(in.hx.scalar_type()))};
  const Dense input(in.input), hx(in.hx), w_ih(in.w_ih), w_hh(in.w_hh), b_ih(in.b_ih),
      b_hh(in.b_hh);
  const void* h = hx.data();
  const Tensor c_next = empty({N, H}, in.hx.scalar_type());
  for (int64_t s = 0; s < sequence.L(); ++s) {
    const int64_t row = sequence.offset(sequence.time(s));
    void* output = stored.at(out.output.mutable_data_ptr(), row * H);
    if (out.c_before.defined())
      std::memcpy(stored.at(out.c_before.mutable_data_ptr(), row * H), out.cy.const_data_ptr(),
                  out.cy.nbytes());
    const CellForwardArgs args = {
        N,
        I,
        H,
        stored.at(input.data(), row * I),
        h,
        nullptr,
        nullptr,
        out.cy.const_data_ptr(),
        w_ih.data(),
        w_hh.data(),
        b_ih.data(),
        b_hh.data(),
        output,
        c_next.mutable_data_ptr(),
        out.gates.defined() ? stored.at(out.gates.mutable_data_ptr(), row * 4 * H) : nullptr};
    cpu::run(kernels.cell.forward_tasks(N, H), N * 4 * H * (I + H + 16),
             [&](int64_t first, int64_t last) { kernels.cell.forward(args, first, last); });
    std::memcpy(out.cy.mutable_data_ptr(), c_next.const_data_ptr(), out.cy.nbytes());
    h = output;
  }
}

Outputs forward(const LayerInputs& in, bool training) {
  check_sequence(in);
  const Sequence sequence(in);
  const int64_t N = sequence.N(), L = sequence.L(), H = in.hx.size(1);
  const at::ScalarType dtype = in.hx.scalar_type();
  Outputs out;
  out.output =
      defined(in.batch_sizes) ? empty({sequence.rows(), H}, dtype) : empty({L, N, H}, dtype);
  out.cy = in.cx.clone(at::MemoryFormat::Contiguous);
  if (training) {
    out.gates = empty({sequence.rows(), 4 * H}, dtype);
    out.c_before = empty({sequence.rows(), H}, dtype);
  }
  if (out.output.numel() == 0) {
    out.hy = in.hx.clone(at::MemoryFormat::Contiguous);
    return out;
  }
  const Kernels& kernels = cpu::kernels(kernel_dtype(dtype));
  const bool plain = !defined(in.batch_sizes) && !defined(in.reset);
  constexpr int64_t kShort = 4;  // steps
  if (plain && L < kShort && !kernels.cell.forward_packs(N))
    forward_by_cells(in, sequence, kernels, out);
  else
    forward_loop(in, sequence, kernels, out);
  out.hy = empty({N, H}, dtype);
  const int64_t bytes = H * elementSize(dtype);
  for (int64_t row = 0; row < N; ++row)
    std::memcpy(advance(out.hy.mutable_data_ptr(), row * bytes),
                advance(out.output.const_data_ptr(),
                        (sequence.offset(sequence.last_time(row)) + row) * bytes),
                bytes);
  return out;
}

using Optional = const std::optional<Tensor>&;

LayerOutputs lstm_layer(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& w_ih,
                        const Tensor& w_hh, Optional b_ih, Optional b_hh, Optional batch_sizes,
                        Optional reset, bool reverse) {
  const LayerInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse};
  if (!layer_fusable(in)) {
    auto [output, hy, cy, gates, c_before] = composite::layer_forward(in);
    return {std::move(output), std::move(hy), std::move(cy)};
  }
  Outputs out = forward(in, false);
  return {std::move(out.output), std::move(out.hy), std::move(out.cy)};
}

LayerTrainingOutputs lstm_layer_forward(const Tensor& input, const Tensor& hx, const Tensor& cx,
                                        const Tensor& w_ih, const Tensor& w_hh, Optional b_ih,
                                        Optional b_hh, Optional batch_sizes, Optional reset,
                                        bool reverse) {
  const LayerInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse};
  if (!layer_fusable(in)) return composite::layer_forward(in);
  Outputs out = forward(in, true);
  return {std::move(out.output), std::move(out.hy), std::move(out.cy), std::move(out.gates),
          std::move(out.c_before)};
}

// The gradients of the gates [S, 4H] of all steps, with those of the initial states on the way.
Tensor backward_loop(const LayerOutputGradients& grads, const LayerInputs& in,
                     const Sequence& sequence, const Kernels& kernels, const LayerResults& results,
                     bool want_hx, Tensor& grad_h, Tensor& grad_c) {
  const LayerKernels& layer = kernels.layer;
  const int64_t N = sequence.N(), L = sequence.L(), H = in.hx.size(1);
  const at::ScalarType dtype = in.hx.scalar_type(), compute = compute_type(dtype);
  const Elements stored = {static_cast<int64_t>(elementSize(dtype))};
  const Elements computed = {static_cast<int64_t>(elementSize(compute))};
  const int64_t column_blocks = layer.column_blocks(H), unit_blocks = layer.unit_blocks(H);

  const auto initial = [&](const std::optional<Tensor>& grad) {
    return defined(grad) ? grad->to(compute).clone(at::MemoryFormat::Contiguous)
                         : at::zeros({N, H}, at::dtype(compute));
  };
  grad_h = initial(grads.hy);
  grad_c = initial(grads.cy);
  const Tensor grad_gates = empty({sequence.rows(), 4 * H}, compute);
  const bool pairs = kernels.cell.pair_rows != nullptr;
  const Tensor halves = pairs ? empty({sequence.rows(), 4 * H}, dtype) : grad_gates;
  const Elements factor = {pairs ? stored.size : computed.size};
  const Dense w_hh(in.w_hh), gates(results.gates), c_before(results.c_before),
      grad_output(grads.output);
  const Tensor packed = empty({layer.packed_columns(H)}, compute);
  cpu::run(column_blocks, 4 * H * H, [&](int64_t first, int64_t last) {
    layer.pack_columns(w_hh.data(), H, packed.mutable_data_ptr(), first, last);
  });

  const Cut cut(sequence, H, column_blocks);
  Barrier barrier(cut.shares);
  run_team(cut.shares, [&](int64_t first, int64_t last) {
    const int64_t row = cut.by_rows ? sequence.row_at(first, cut.shares) : 0;
    const int64_t row_end = cut.by_rows ? sequence.row_at(last, cut.shares) : N;
    const int64_t block = cut.by_rows ? 0 : column_blocks * first / cut.shares;
    const int64_t block_end = cut.by_rows ? column_blocks : column_blocks * last / cut.shares;
    for (int64_t s = L - 1; s >= 0; --s) {
      const int64_t t = sequence.time(s), rows = std::min(sequence.rows(t), row_end) - row;
      const int64_t first_row = sequence.offset(t) + row;
      const bool* reset = sequence.reset(s) ? sequence.reset(s) + row : nullptr;
      if (rows > 0)
        layer.step_gradient(
            {rows, H, stored.at(grad_output.data(), first_row * H),
             computed.at(grad_h.const_data_ptr(), row * H),
             computed.at(grad_c.mutable_data_ptr(), row * H),
             stored.at(gates.data(), first_row * 4 * H), stored.at(c_before.data(), first_row * H),
             computed.at(grad_gates.mutable_data_ptr(), first_row * 4 * H),
             pairs ? stored.at(halves.mutable_data_ptr(), first_row * 4 * H) : nullptr, reset},
            block * kUnitBlocks, std::min(unit_blocks, block_end * kUnitBlocks));
      if (!cut.by_rows) barrier.wait(last - first, L - s);
      if (rows > 0 && (s > 0 || want_hx))
        layer.state_gradient(
            {rows, H, factor.at(halves.const_data_ptr(), first_row * 4 * H),
             packed.const_data_ptr(), computed.at(grad_h.mutable_data_ptr(), row * H), reset},
            block, block_end);
    }
  });
  return grad_gates;
}

// The h that each step started from [S, H].
Tensor h_before(const LayerInputs& in, const Sequence& sequence, const Tensor& output) {
  const int64_t H = in.hx.size(1), bytes = H * output.element_size();
  const Tensor before = empty({sequence.rows(), H}, output.scalar_type());
  const Dense hx(in.hx), h(output);
  cpu::run(sequence.L(), sequence.rows() * H, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      const int64_t t = sequence.time(s), rows = sequence.rows(t);
      // Rows that the step before had too; in reverse some begin here, from hx.
      const int64_t went_on = s > 0 ? std::min(rows, sequence.rows(sequence.time(s - 1))) : 0;
      void* to = advance(before.mutable_data_ptr(), sequence.offset(t) * bytes);
      if (went_on > 0)
        std::memcpy(to, advance(h.data(), sequence.offset(sequence.time(s - 1)) * bytes),
                    went_on * bytes);
      std::memcpy(advance(to, went_on * bytes), advance(hx.data(), went_on * bytes),
                  (rows - went_on) * bytes);
      const bool* reset = sequence.reset(s);
      for (int64_t row = 0; reset && row < rows; ++row)
        if (reset[row]) std::memset(advance(to, row * bytes), 0, bytes);
    }
  });
  return before;
}

CellGradients backward(const LayerOutputGradients& grads, const LayerInputs& in,
                       const LayerResults& results, CellGradientMask mask) {
  const Sequence sequence(in);
  const int64_t N = sequence.N(), H = in.hx.size(1), I = in.input.size(-1), S = sequence.rows();
  const at::ScalarType dtype = in.hx.scalar_type(), compute = compute_type(dtype);
  TORCH_CHECK(results.gates.dim() == 2 && results.gates.size(0) == S &&
                  results.gates.size(1) == 4 * H && results.gates.scalar_type() == dtype &&
                  results.c_before.dim() == 2 && results.c_before.size(0) == S &&
                  results.c_before.size(1) == H && results.c_before.scalar_type() == dtype &&
                  results.output.numel() == S * H && results.output.scalar_type() == dtype,
              "lstm_layer_backward: output, gates and c_before must be those of "
              "lstm_layer_forward");
  const auto check = [&](Optional grad, at::IntArrayRef sizes) {
    TORCH_CHECK(!defined(grad) || (grad->sizes() == sizes && grad->scalar_type() == dtype),
                "lstm_layer_backward: a gradient must have its tensor's shape ", sizes,
                " and dtype ", dtype);
  };
  check(grads.output, results.output.sizes());
  check(grads.hy, in.hx.sizes());
  check(grads.cy, in.cx.sizes());

  const Kernels& kernels = cpu::kernels(kernel_dtype(dtype));
  const auto bias = [&](bool wanted) -> Target {
    return {wanted ? empty({4 * H}, dtype) : Tensor(), false};
  };
  Target input = Target::fresh(mask[0], in.input), w_ih = Target::fresh(mask[3], in.w_ih),
         w_hh = Target::fresh(mask[4], in.w_hh), b_ih = bias(mask[5]), b_hh = bias(mask[6]);
  Tensor grad_h, grad_c;
  if (S == 0 || H == 0) {
    for (const Target* target : {&input, &w_ih, &w_hh, &b_ih, &b_hh})
      if (target->wanted()) target->tensor.zero_();
    grad_h = defined(grads.hy) ? grads.hy->clone() : at::zeros({N, H}, at::dtype(dtype));
    grad_c = defined(grads.cy) ? grads.cy->clone() : at::zeros({N, H}, at::dtype(dtype));
  } else {
    const Tensor grad_gates =
        backward_loop(grads, in, sequence, kernels, results, mask[1], grad_h, grad_c);
    if (b_ih.wanted() || b_hh.wanted()) {
      const Tensor sums = empty({bias_blocks(S), 4 * H}, compute);
      cpu::run(bias_blocks(S), S * 4 * H, [&](int64_t first, int64_t last) {
        kernels.layer.block_sums(grad_gates.const_data_ptr(), S, 4 * H, sums.mutable_data_ptr(),
                                 first, last);
      });
      for (const Target* target : {&b_ih, &b_hh})
        if (target->wanted())
          kernels.cell.add_up(sums.const_data_ptr(), bias_blocks(S), 4 * H,
                              target->tensor.mutable_data_ptr(), false);
    }
    GateFactors factors(kernels.cell, grad_gates);
    Products products(kernels.cell, factors);
    if (input.wanted()) input.tensor = input.tensor.view({S, I});
    products.add(input, false, in.w_ih);
    const Tensor rows = in.input.reshape({S, I});
    const Tensor h = w_hh.wanted() ? h_before(in, sequence, results.output) : Tensor();
    products.add(w_ih, true, rows);
    products.add(w_hh, true, h);
    products.run();
  }
  if (input.wanted()) input.tensor = input.tensor.view(in.input.sizes());
  return {std::move(input.tensor),
          mask[1] ? grad_h.to(dtype) : Tensor(),
          mask[2] ? grad_c.to(dtype) : Tensor(),
          std::move(w_ih.tensor),
          std::move(w_hh.tensor),
          std::move(b_ih.tensor),
          std::move(b_hh.tensor)};
}

CellGradients lstm_layer_backward(Optional grad_output, Optional grad_hy, Optional grad_cy,
                                  const Tensor& input, const Tensor& hx, const Tensor& cx,
                                  const Tensor& w_ih, const Tensor& w_hh, Optional b_ih,
                                  Optional b_hh, Optional batch_sizes, Optional reset, bool reverse,
                                  const Tensor& output, const Tensor& gates, const Tensor& c_before,
                                  CellGradientMask mask) {
  const LayerInputs in = {input, hx, cx, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse};
  const LayerOutputGradients grads = {grad_output, grad_hy, grad_cy};
  if (!layer_fusable(in)) return composite::layer_backward(grads, in, mask);
  check_sequence(in);
  return backward(grads, in, {output, gates, c_before}, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, CPU, m) {
  m.impl("lstm_layer", lstm_layer);
  m.impl("lstm_layer_forward", lstm_layer_forward);
  m.impl("lstm_layer_backward", lstm_layer_backward);
}

}  // namespace lstm_ext::cpu
