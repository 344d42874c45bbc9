// The recurrence's operators on the CPU: the time loop in one parallel region, products by the
// panels' kernels and the rest of a step row by row.
//
// Threads share the rows of the batch, each going through the whole sequence on its own; or, where
// those are few, each multiplies by its part of the weights for all rows, and they meet.
#include "ops/recurrence.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>

#include "cpu/gradient_products.h"
#include "cpu/packed_weights.h"
#include "cpu/shares.h"
#include "cpu/team.h"
#include "cpu/tensors.h"
#include "ops/composite.h"

namespace lstm_ext::cpu {
namespace {

// A mask, dense, and where its rows of a step begin.
class Mask {
 public:
  Mask(const std::optional<Tensor>& mask, const RecurrenceInputs& in, const Elements& stored)
      : mask_(mask), stored_(stored), columns_(defined(mask) ? mask->size(-1) : 0) {
    if (defined(mask)) rows_ = mask_rows(*mask, in);
  }
  MaskRowsArgs at(int64_t step_offset, int64_t row) const {
    if (!mask_.data()) return {nullptr, 0};
    if (rows_ == MaskRows::kUnit) return {mask_.data(), 0};
    const int64_t first = rows_ == MaskRows::kStep ? step_offset + row : row;
    return {stored_.at(mask_.data(), first * columns_), columns_};
  }

 private:
  const Dense mask_;
  const Elements stored_;
  const int64_t columns_;
  MaskRows rows_ = MaskRows::kUnit;
};

// Sequences of fewer steps are short: of cells, and streams. torch's product, which they get, is of
// other bits for other rows and threads.
constexpr int64_t kShort = 2;

Cut cut_of(const SharedSequence& sequence, int64_t H, const Kernels& kernels, bool is_short) {
  Cut cut(sequence, H, (kernels.layer.unit_blocks(H) + kUnitBlocks - 1) / kUnitBlocks,
          kRowsOfAProjectingThread);
  if (is_short) {
    cut.by_rows = true;
    cut.shares = 1;
  }
  return cut;
}

// The inputs, dense, as the kernels take them; and how the work is cut.
class Recurrence {
 public:
  explicit Recurrence(const RecurrenceInputs& in)
      : N(in.hx.size(0)),
        H(in.cx.size(1)),
        P(in.hx.size(1)),
        projects(in.projects()),
        dtype(in.hx.scalar_type()),
        stored(dtype),
        computed(compute_type(dtype)),
        kernels(cpu::kernels(kernel_dtype(dtype))),
        pairs(kernels.product.pair_rows != nullptr),
        factor(pairs ? stored : computed),
        sequence(in.sequence()),
        short_(!pairs && compute_type(dtype) == dtype && sequence.L() < kShort),
        cut(cut_of(sequence, H, kernels, short_)),
        w_hh(in.w_hh),
        w_hr(in.w_hr),
        update_h(in.update_h, in, stored),
        update_c(in.update_c, in, stored),
        dropout_h(in.dropout_h, in, stored),
        bias_(in.bias),
        norm_(in.norm),
        norm_c_(in.norm_c),
        bias_c_(in.bias_c) {
    const int64_t h_masks = h_masks_of(in);
    options = {H,
               P,
               bias_.data(),
               norm_.data(),
               norm_c_.data(),
               bias_c_.data(),
               in.norm_joint,
               in.carry_norm,
               in.eps,
               in.cell_clip,
               in.projection_clip,
               h_masks,
               N};
  }

  int64_t factor_columns(int64_t K) const { return pairs ? (K + 1) / 2 * 2 : K; }
  // Factors of N rows, once or in several lists; the last of an odd number of pairs is never
  // written.
  Tensor factors(int64_t columns, int64_t lists = 1) const {
    const Tensor rows =
        empty({lists * N, factor_columns(columns)}, pairs ? dtype : compute_type(dtype));
    if (pairs) rows.zero_();
    return rows;
  }
  // Whether packing the weights would cost more than it brings: then torch multiplies.
  bool is_short() const { return short_; }
  int64_t shares_of_weights() const { return cut.by_rows ? 1 : cut.shares; }

  const int64_t N, H, P;
  const bool projects;
  const at::ScalarType dtype;
  const Elements stored, computed;
  const Kernels& kernels;
  const bool pairs;
  const Elements factor;
  const SharedSequence sequence;

 private:
  const bool short_;

 public:
  const Cut cut;
  const Dense w_hh, w_hr;
  const Mask update_h, update_c, dropout_h;
  RecurrenceOptions options;

 private:
  const Dense bias_, norm_, norm_c_, bias_c_;
};

// What a thread has of the time loop: rows of its own, the rows whose products it makes, and the
// blocks that it makes of them.
class Part {
 public:
  Part(const Recurrence& r, int64_t first, int64_t last, Barrier& barrier)
      : cut_(r.cut), first_(first), last_(last), barrier_(barrier) {
    if (cut_.by_rows) {
      row = all_row = r.sequence.row_at(first, cut_.shares);
      row_end_ = all_end_ = r.sequence.row_at(last, cut_.shares);
    } else {
      row = r.N * first / cut_.shares;
      row_end_ = r.N * last / cut_.shares;
      all_row = 0;
      all_end_ = r.N;
    }
  }
  // Of those that a step has.
  int64_t rows(int64_t of_step) const {
    return std::max<int64_t>(0, std::min(of_step, row_end_) - row);
  }
  int64_t all_rows(int64_t of_step) const {
    return std::max<int64_t>(0, std::min(of_step, all_end_) - all_row);
  }
  int64_t block(const PackedColumns& m) const {
    return cut_.by_rows ? 0 : m.blocks() * first_ / cut_.shares;
  }
  int64_t block_end(const PackedColumns& m) const {
    return cut_.by_rows ? m.blocks() : m.blocks() * last_ / cut_.shares;
  }
  void meet() {
    if (!cut_.by_rows) barrier_.wait(last_ - first_, ++meetings_);
  }

  int64_t row, all_row;

 private:
  const Cut& cut_;
  const int64_t first_, last_;
  Barrier& barrier_;
  int64_t row_end_, all_end_, meetings_ = 0;
};

// Two matrices as panels, the second where h is projected. The first comes gate by gate where each
// has a mask of its own.
class Panels {
 public:
  Panels(const Recurrence& r, int64_t depth, int64_t columns, int64_t r_depth, int64_t r_columns)
      : hh(r.options.h_masks,
           {r.kernels.layer, compute_type(r.dtype), depth, columns, r.shares_of_weights()}),
        hr(r.kernels.layer, compute_type(r.dtype), r_depth, r_columns, r.shares_of_weights()) {
    if (r.is_short()) return;
    const auto gates = static_cast<int64_t>(hh.size());
    memory_ = empty_large({gates * hh[0].bytes() + (r.projects ? hr.bytes() : 0)}, at::kByte);
    void* at = memory_.mutable_data_ptr();
    for (PackedColumns& gate : hh) {
      gate.lie_at(at);
      at = advance(at, gate.bytes());
    }
    hr.lie_at(at);
  }
  // pack(matrix's panels, its data, first, last), by all threads, or by the one that reads them.
  template <class Pack>
  void pack_shared(const Recurrence& r, const Pack& pack) const {
    if (r.cut.own_blocks()) return;
    const int64_t blocks = hh[0].blocks();
    cpu::run(blocks, 4 * r.H * r.P, [&](int64_t from, int64_t to) { pack_hh(r, from, to, pack); });
    if (r.projects)
      cpu::run(hr.blocks(), r.H * r.P,
               [&](int64_t from, int64_t to) { pack(hr, r.w_hr.data(), from, to); });
  }
  template <class Pack>
  void pack_own(const Recurrence& r, const Part& part, const Pack& pack) const {
    if (!r.cut.own_blocks() || r.is_short()) return;
    pack_hh(r, part.block(hh[0]), part.block_end(hh[0]), pack);
    if (r.projects) pack(hr, r.w_hr.data(), part.block(hr), part.block_end(hr));
  }

  std::vector<PackedColumns> hh;
  PackedColumns hr;

 private:
  template <class Pack>
  void pack_hh(const Recurrence& r, int64_t from, int64_t to, const Pack& pack) const {
    const void* w = r.w_hh.data();
    for (const PackedColumns& gate : hh) {
      pack(gate, w, from, to);
      w = r.stored.at(w, r.H * r.P);
    }
  }

  Tensor memory_;
};

// The rows of W_hh that have a mask of h in common, of each; or their transposes.
std::vector<Tensor> parts_of(const Tensor& w_hh, int64_t h_masks, bool transposed) {
  std::vector<Tensor> parts = w_hh.chunk(h_masks);
  if (transposed)
    for (Tensor& part : parts) part = part.t();
  return parts;
}

// out = x m, its rows out_stride apart; w is m, as torch takes it where the sequence is short.
void multiply(const Recurrence& r, const PackedColumns& m, const Tensor& w, const Part& part,
              int64_t rows, const void* x, void* out, int64_t out_stride, bool backwards) {
  if (rows == 0) return;
  if (r.is_short()) {
    const ColumnPanels& size = m.panels();
    const auto rows_of = [&](const void* data, int64_t columns, int64_t stride) {
      return at::from_blob(const_cast<void*>(data), {rows, columns}, {stride, 1},
                           at::dtype(r.dtype));
    };
    Tensor result = rows_of(out, size.columns, out_stride);
    at::mm_out(result, rows_of(x, size.depth, size.depth), w);
    return;
  }
  zigzag(part.block(m), part.block_end(m), rows == 1 ? kSideBlocks : 1, backwards,
         [&](int64_t from, int64_t to) {
           r.kernels.layer.multiply_columns({rows, m.panels(), x, m.at(from), out, out_stride},
                                            from, to);
         });
}

void forward_loop(const Recurrence& r, const RecurrenceInputs& in, bool training,
                  RecurrenceTrainingOutputs& out) {
  const Dense gates_x(in.gates_x);
  const int64_t N = r.N, H = r.H, P = r.P, h_masks = r.options.h_masks;
  const std::vector<Tensor> w_hh = parts_of(in.w_hh, h_masks, /*transposed=*/true);
  const Tensor w_hr = r.projects ? in.w_hr->t() : Tensor();
  const auto transposed = [](const PackedColumns& m, const void* w, int64_t from, int64_t to) {
    m.pack_transposed(w, from, to);
  };
  const RecurrenceKernels& step_kernels = r.kernels.recurrence;
  const at::ScalarType compute = compute_type(r.dtype);
  const Panels panels(r, P, 4 * H / h_masks, H, P);
  panels.pack_shared(r, transposed);
  const Tensor z = empty({N, 4 * H}, compute), o_tanh = empty({N, H}, compute),
               x = r.factors(P, h_masks), r_factors = r.projects ? r.factors(H) : Tensor(),
               projected = r.projects ? empty({N, P}, compute) : Tensor();
  const int64_t x_columns = x.size(1);
  const bool normed = r.options.norm != nullptr;
  const auto kept = [&](const Tensor& tensor, int64_t row) -> void* {
    if (!tensor.defined() || tensor.numel() == 0) return nullptr;
    return r.stored.at(tensor.mutable_data_ptr(), row * tensor.size(-1));
  };
  Barrier barrier(r.cut.shares);
  run_team(r.cut.shares, [&](int64_t first, int64_t last) {
    Part part(r, first, last, barrier);
    panels.pack_own(r, part, transposed);
    const int64_t row = part.row;
    for (int64_t s = 0; s < r.sequence.L(); ++s) {
      const int64_t t = r.sequence.time(s), offset = r.sequence.offset(t), at = offset + row;
      const int64_t rows = part.rows(r.sequence.rows(t)),
                    all_rows = part.all_rows(r.sequence.rows(t));
      RecurrenceBeginArgs begin = {};
      begin.rows = rows;
      begin.options = r.options;
      begin.reset = r.sequence.reset(s) ? r.sequence.reset(s) + row : nullptr;
      begin.dropout_h = r.dropout_h.at(offset, row);
      begin.h = kept(out.hy, row);
      begin.c = kept(out.cy, row);
      begin.factors = r.factor.at(x.mutable_data_ptr(), row * x_columns);
      begin.h_before = kept(out.kept.h_before, at);
      if (rows > 0) step_kernels.begin(begin);
      part.meet();
      for (int64_t k = 0; k < h_masks; ++k)
        multiply(r, panels.hh[k], w_hh[k], part, all_rows,
                 r.factor.at(x.const_data_ptr(), (k * N + part.all_row) * x_columns),
                 r.computed.at(z.mutable_data_ptr(), part.all_row * 4 * H + k * H), 4 * H,
                 s % 2 != 0);
      part.meet();
      RecurrenceStepArgs step = {};
      step.rows = rows;
      step.options = r.options;
      step.z = r.computed.at(z.mutable_data_ptr(), row * 4 * H);
      step.gates_x = r.stored.at(gates_x.data(), at * 4 * H);
      step.update_c = r.update_c.at(offset, row);
      step.c = begin.c;
      step.r = r.computed.at(o_tanh.mutable_data_ptr(), row * H);
      if (r.projects) {
        step.r_factors = r.factor.at(r_factors.mutable_data_ptr(), row * r_factors.size(1));
        step.r_kept = kept(out.kept.r, at);
      }
      if (training) {
        step.gates = kept(out.kept.gates, at);
        step.c_before = kept(out.kept.c_before, at);
        if (normed) {
          step.normalized = kept(out.kept.normalized, at);
          step.scale = r.computed.at(out.kept.scale.mutable_data_ptr(), at);
        }
      }
      if (rows > 0) step_kernels.step(step);
      RecurrenceEndArgs end = {};
      end.rows = rows;
      end.options = r.options;
      end.h_new = step.r;
      if (r.projects) {
        part.meet();
        multiply(r, panels.hr, w_hr, part, all_rows,
                 r.factor.at(r_factors.const_data_ptr(), part.all_row * r_factors.size(1)),
                 r.computed.at(projected.mutable_data_ptr(), part.all_row * P), P, s % 2 != 0);
        part.meet();
        end.h_new = r.computed.at(projected.const_data_ptr(), row * P);
        end.projected = kept(out.kept.projected, at);
      }
      end.update_h = r.update_h.at(offset, row);
      end.h = begin.h;
      end.output = kept(out.output, at);
      if (rows > 0) step_kernels.end(end);
    }
  });
}

RecurrenceTrainingOutputs forward(const RecurrenceInputs& in, bool training) {
  check_recurrence(in);
  const Recurrence r(in);
  const int64_t S = r.sequence.S(), H = r.H, P = r.P;
  RecurrenceTrainingOutputs out;
  std::vector<int64_t> sizes = in.gates_x.sizes().vec();
  sizes.back() = P;
  out.output = empty(sizes, r.dtype);
  out.hy = in.hx.clone(at::MemoryFormat::Contiguous);
  out.cy = in.cx.clone(at::MemoryFormat::Contiguous);
  if (training) {
    const int64_t normed = r.options.norm ? S : 0, projected = r.projects ? S : 0;
    out.kept.gates = empty_large({S, 4 * H}, r.dtype);
    out.kept.c_before = empty_large({S, H}, r.dtype);
    out.kept.h_before = empty_large({S, r.options.h_masks * P}, r.dtype);
    out.kept.normalized = empty_large({normed, 4 * H}, r.dtype);
    out.kept.scale = empty({normed}, compute_type(r.dtype));
    out.kept.r = empty_large({projected, H}, r.dtype);
    out.kept.projected = empty_large({projected, P}, r.dtype);
  }
  if (S > 0) forward_loop(r, in, training, out);
  return out;
}

// In the compute type; undefined where not wanted, or alike to grad_z.
struct StepGradients {
  Tensor z, pre, h_new;  // of all steps
  // Sums of a sequence's terms over kStepsOfTerms steps, [.. N, 4H] or [.. N, H]: short sums, for
  // few roundings, and little memory.
  Tensor norm_terms, bias_terms, norm_c_terms, bias_c_terms;
};
constexpr int64_t kStepsOfTerms = 16;

StepGradients backward_loop(const Recurrence& r, const RecurrenceInputs& in,
                            const LayerOutputGradients& grads, const RecurrenceResults& results,
                            const RecurrenceWanted& wanted, const Tensor& grad_h,
                            const Tensor& grad_c) {
  const auto as_it_lies = [](const PackedColumns& m, const void* w, int64_t from, int64_t to) {
    m.pack(w, from, to);
  };
  const int64_t N = r.N, H = r.H, P = r.P, S = r.sequence.S(), h_masks = r.options.h_masks;
  const std::vector<Tensor> w_hh = parts_of(in.w_hh, h_masks, /*transposed=*/false);
  const Tensor& w_hr = or_undefined(in.w_hr);
  const RecurrenceKernels& step_kernels = r.kernels.recurrence;
  const at::ScalarType compute = compute_type(r.dtype);
  const int64_t z_columns = 4 * H / h_masks;
  const Panels panels(r, z_columns, P, P, H);
  panels.pack_shared(r, as_it_lies);
  StepGradients of_steps;
  const auto of_all = [&](bool asked, int64_t columns) {
    return asked ? empty_large({S, columns}, compute) : Tensor();
  };
  const bool normed = r.options.norm != nullptr;
  of_steps.z = of_all(true, 4 * H);
  of_steps.pre = of_all(normed && wanted.gates_x && !r.options.norm_joint, 4 * H);
  const int64_t sums = (r.sequence.L() + kStepsOfTerms - 1) / kStepsOfTerms * N;
  const auto terms = [&](bool asked, int64_t columns) {
    return asked ? at::zeros({sums, columns}, at::dtype(compute)) : Tensor();
  };
  of_steps.norm_terms = terms(wanted.norm && normed, 4 * H);
  of_steps.bias_terms = terms(wanted.bias && normed && r.options.bias, 4 * H);
  of_steps.norm_c_terms = terms(wanted.norm_c && r.options.norm_c, H);
  of_steps.bias_c_terms = terms(wanted.bias_c && r.options.bias_c, H);
  of_steps.h_new = of_all(r.projects, P);
  const Dense grad_output(grads.output), gates(results.gates), c_before(results.c_before),
      normalized(results.normalized), scale(results.scale), projected(results.projected);
  const bool copies_z = r.pairs || h_masks > 1;
  const Tensor z_factors = copies_z ? r.factors(z_columns, h_masks) : Tensor(),
               h_factors = r.pairs && r.projects ? r.factors(P) : Tensor(),
               grad_new = r.projects ? Tensor() : empty({N, P}, compute),
               grad_r = r.projects ? empty({N, H}, compute) : Tensor(),
               product = empty({h_masks * N, P}, compute),
               scratch = empty({r.cut.shares, 2, H}, compute);
  const auto at_row = [&](const Tensor& tensor, int64_t row) -> void* {
    if (!tensor.defined()) return nullptr;
    return r.computed.at(tensor.mutable_data_ptr(), row * tensor.size(1));
  };
  Barrier barrier(r.cut.shares);
  run_team(r.cut.shares, [&](int64_t first, int64_t last) {
    Part part(r, first, last, barrier);
    panels.pack_own(r, part, as_it_lies);
    const int64_t row = part.row;
    for (int64_t s = r.sequence.L() - 1; s >= 0; --s) {
      const int64_t t = r.sequence.time(s), offset = r.sequence.offset(t), at = offset + row;
      const int64_t rows = part.rows(r.sequence.rows(t)),
                    all_rows = part.all_rows(r.sequence.rows(t));
      const bool* reset = r.sequence.reset(s) ? r.sequence.reset(s) + row : nullptr;
      RecurrenceEndGradientArgs end = {};
      end.rows = rows;
      end.options = r.options;
      end.grad_output = r.stored.at(grad_output.data(), at * P);
      end.update_h = r.update_h.at(offset, row);
      if (r.projects) end.projected = r.stored.at(projected.data(), at * P);
      end.grad_h = at_row(grad_h, row);
      end.grad_h_new = r.projects ? at_row(of_steps.h_new, at) : at_row(grad_new, row);
      if (h_factors.defined())
        end.factors = r.stored.at(h_factors.mutable_data_ptr(), row * h_factors.size(1));
      if (rows > 0) step_kernels.end_gradient(end);
      if (r.projects) {
        part.meet();
        const void* x = h_factors.defined() ? r.stored.at(h_factors.const_data_ptr(),
                                                          part.all_row * h_factors.size(1))
                                            : at_row(of_steps.h_new, offset + part.all_row);
        multiply(r, panels.hr, w_hr, part, all_rows, x, at_row(grad_r, part.all_row), H,
                 s % 2 != 0);
        part.meet();
      }
      RecurrenceStepGradientArgs step = {};
      step.rows = rows;
      step.options = r.options;
      step.grad_r = r.projects ? at_row(grad_r, row) : end.grad_h_new;
      step.update_c = r.update_c.at(offset, row);
      step.gates = r.stored.at(gates.data(), at * 4 * H);
      step.c_before = r.stored.at(c_before.data(), at * H);
      if (normed) {
        step.normalized = r.stored.at(normalized.data(), at * 4 * H);
        step.scale = r.computed.at(scale.data(), at);
      }
      step.reset = reset;
      step.grad_c = at_row(grad_c, row);
      step.grad_z = at_row(of_steps.z, at);
      const auto z_factors_at = [&](int64_t of_row) {
        return r.factor.at(z_factors.mutable_data_ptr(), of_row * z_factors.size(1));
      };
      if (copies_z) step.z_factors = z_factors_at(row);
      step.grad_pre = at_row(of_steps.pre, at);
      const int64_t sum = s / kStepsOfTerms * N + row;
      step.norm_terms = at_row(of_steps.norm_terms, sum);
      step.bias_terms = at_row(of_steps.bias_terms, sum);
      step.norm_c_terms = at_row(of_steps.norm_c_terms, sum);
      step.bias_c_terms = at_row(of_steps.bias_c_terms, sum);
      step.scratch = r.computed.at(scratch.mutable_data_ptr(), first * 2 * H);
      if (rows > 0) step_kernels.step_gradient(step);
      if (s == 0 && !wanted.hx) continue;
      part.meet();
      for (int64_t k = 0; k < h_masks; ++k) {
        const int64_t first_row = k * N + part.all_row;
        const void* x =
            copies_z ? z_factors_at(first_row) : at_row(of_steps.z, offset + part.all_row);
        multiply(r, panels.hh[k], w_hh[k], part, all_rows, x, at_row(product, first_row), P,
                 s % 2 != 0);
      }
      part.meet();
      RecurrenceBeginGradientArgs begin = {};
      begin.rows = rows;
      begin.options = r.options;
      begin.grad_product = at_row(product, row);
      begin.dropout_h = r.dropout_h.at(offset, row);
      begin.reset = reset;
      begin.grad_h = end.grad_h;
      if (rows > 0) step_kernels.begin_gradient(begin);
    }
  });
  return of_steps;
}

RecurrenceGradients no_steps(const LayerOutputGradients& grads, const RecurrenceInputs& in,
                             const RecurrenceWanted& wanted) {
  const auto zeros = [&](bool asked, const auto& like) {
    const Tensor& tensor = or_undefined(like);
    return asked && tensor.defined() ? at::zeros(tensor.sizes(), tensor.options()) : Tensor();
  };
  RecurrenceGradients out;
  out.gates_x = zeros(wanted.gates_x, in.gates_x);
  out.hx = wanted.hx && defined(grads.hy) ? grads.hy->clone() : zeros(wanted.hx, in.hx);
  out.cx = wanted.cx && defined(grads.cy) ? grads.cy->clone() : zeros(wanted.cx, in.cx);
  out.w_hh = zeros(wanted.w_hh, in.w_hh);
  out.bias = zeros(wanted.bias, in.bias);
  out.norm = zeros(wanted.norm, in.norm);
  out.norm_c = zeros(wanted.norm_c, in.norm_c);
  out.bias_c = zeros(wanted.bias_c, in.bias_c);
  out.w_hr = zeros(wanted.w_hr, in.w_hr);
  return out;
}

// In blocks, and so in one order: that of at::sum for a single column is one of the threads.
Tensor sum_of_rows(const Recurrence& r, const Tensor& terms) {
  const int64_t rows = terms.size(0), columns = terms.size(1), blocks = bias_blocks(rows);
  const Tensor sums = empty({blocks, columns}, terms.scalar_type()),
               out = empty({columns}, r.dtype);
  cpu::run(blocks, rows * columns, [&](int64_t first, int64_t last) {
    r.kernels.layer.block_sums(terms.const_data_ptr(), rows, columns, sums.mutable_data_ptr(),
                               first, last);
  });
  r.kernels.product.add_up(sums.const_data_ptr(), blocks, columns, out.mutable_data_ptr(), false);
  return out;
}

RecurrenceGradients backward(const LayerOutputGradients& grads, const RecurrenceInputs& in,
                             const RecurrenceResults& results, const RecurrenceWanted& wanted) {
  const Recurrence r(in);
  if (r.sequence.S() == 0) return no_steps(grads, in, wanted);
  const at::ScalarType compute = compute_type(r.dtype);
  const auto initial = [&](const std::optional<Tensor>& grad, const Tensor& state) {
    return defined(grad) ? grad->to(compute).clone(at::MemoryFormat::Contiguous)
                         : at::zeros(state.sizes(), at::dtype(compute));
  };
  const Tensor grad_h = initial(grads.hy, in.hx), grad_c = initial(grads.cy, in.cx);
  const StepGradients of_steps = backward_loop(r, in, grads, results, wanted, grad_h, grad_c);
  const auto stored = [&](bool asked, const Tensor& grad) {
    return asked ? grad.to(r.dtype) : Tensor();
  };
  const auto sum = [&](bool asked, const std::optional<Tensor>& given, const Tensor& terms) {
    return asked && defined(given) ? sum_of_rows(r, terms) : Tensor();
  };
  RecurrenceGradients out;
  if (wanted.gates_x)
    out.gates_x =
        (of_steps.pre.defined() ? of_steps.pre : of_steps.z).to(r.dtype).view_as(in.gates_x);
  out.hx = stored(wanted.hx, grad_h);
  out.cx = stored(wanted.cx, grad_c);
  out.bias = sum(wanted.bias, in.bias, r.options.norm ? of_steps.bias_terms : of_steps.z);
  out.norm = sum(wanted.norm, in.norm, of_steps.norm_terms);
  out.norm_c = sum(wanted.norm_c, in.norm_c, of_steps.norm_c_terms);
  out.bias_c = sum(wanted.bias_c, in.bias_c, of_steps.bias_c_terms);
  // to = of_rows^T rows.
  const auto weight = [&](const Tensor& to, const Tensor& of_rows, const Tensor& rows) {
    GateFactors factors(r.kernels.product, of_rows);
    Products products(r.kernels.product, factors);
    products.add({to, false}, true, rows);
    products.run();
  };
  if (wanted.w_hh) {
    out.w_hh = empty(in.w_hh.sizes(), r.dtype);
    const int64_t masks = r.options.h_masks;
    for (int64_t k = 0; k < masks; ++k) {
      const auto own = [&](const Tensor& rows) { return rows.chunk(masks, 1)[k].contiguous(); };
      weight(out.w_hh.chunk(masks)[k], own(of_steps.z), own(results.h_before));
    }
  }
  if (wanted.w_hr && r.projects) {
    out.w_hr = empty(in.w_hr->sizes(), r.dtype);
    weight(out.w_hr, of_steps.h_new, results.r);
  }
  return out;
}

// The kernels' loops are over units that exist.
bool takes(const RecurrenceInputs& in) {
  return fusable(in) && in.cx.size(1) > 0 && in.hx.size(1) > 0;
}

void log_recurrence(const char* operation, const RecurrenceInputs& in) {
  if (!verbose()) return;
  const Recurrence r(in);
  const char* product = r.is_short() ? "; torch's product, for a single step" : "";
  log_path(operation, in.gates_x, in.cx,
           c10::str("the CPU's kernels, ", active_instruction_set(), product));
}

LayerOutputs lstm_recurrence(const RecurrenceInputs& in) {
  if (!takes(in)) return composite::recurrence(in);
  check_all_allocated(in);
  log_recurrence("lstm_recurrence", in);
  RecurrenceTrainingOutputs out = forward(in, /*training=*/false);
  return {std::move(out.output), std::move(out.hy), std::move(out.cy)};
}

RecurrenceTrainingOutputs lstm_recurrence_forward(const RecurrenceInputs& in) {
  if (!takes(in)) return composite::recurrence_forward(in);
  check_all_allocated(in);
  log_recurrence("lstm_recurrence_forward", in);
  return forward(in, /*training=*/true);
}

RecurrenceGradients lstm_recurrence_backward(const LayerOutputGradients& grads,
                                             const RecurrenceInputs& in,
                                             const RecurrenceResults& results,
                                             const RecurrenceWanted& wanted) {
  if (!takes(in)) return composite::recurrence_backward(grads, in, results, wanted);
  check_all_allocated(in, grads, results);
  check_backward(grads, in, results);
  log_recurrence("lstm_recurrence_backward", in);
  return backward(grads, in, results, wanted);
}

}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, CPU, m) {
  ops::lstm_recurrence::implement<lstm_recurrence>(m);
  ops::lstm_recurrence_forward::implement<lstm_recurrence_forward>(m);
  ops::lstm_recurrence_backward::implement<lstm_recurrence_backward>(m);
}

}  // namespace lstm_ext::cpu
