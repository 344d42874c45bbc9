// Forward of the layer on the CPU: weights packed once, then the time loop in one parallel region.
//
// Threads share the work by rows of the batch, each going through the whole sequence on its own,
// or, when rows are few, by hidden units, each keeping its part of the weights in its cache and
// meeting the others once a step. Neither changes the order in which a number is summed.
#include <cstring>

#include "cpu/layer.h"
#include "cpu/packed_weights.h"
#include "cpu/shares.h"
#include "cpu/team.h"
#include "cpu/tensors.h"
#include "ops/layer.h"

namespace lstm_ext::cpu {
namespace {

// Rows whose pre-activations are made at once: enough to make use of a panel, few enough to stay
// in a near cache.
constexpr int64_t kChunkRows = 48;
// Sequences of no more rows are one chunk: W_ih is read once, each block where it has just been
// packed.
constexpr int64_t kOneChunkRows = 256;

int64_t factor_columns(const ProductKernels& kernels, int64_t K) {
  return kernels.pair_rows ? (K + 1) / 2 * 2 : K;
}
at::ScalarType factor_type(const ProductKernels& kernels, at::ScalarType dtype) {
  return kernels.pair_rows ? dtype : compute_type(dtype);
}

// hx in both places of h, and zero states for rows that are reset before they begin.
void start_states(const SharedSequence& sequence, const Tensor& hx, void* const (&h)[2],
                  const Tensor& c) {
  const int64_t h_bytes = hx.size(1) * hx.element_size(), c_bytes = c.size(1) * c.element_size();
  for (void* place : h) std::memcpy(place, hx.const_data_ptr(), hx.nbytes());
  for (int64_t row = 0; row < sequence.N(); ++row) {
    const bool* reset = sequence.reset(sequence.first_step(row));
    if (!reset || !reset[row]) continue;
    for (void* place : h) std::memset(advance(place, row * h_bytes), 0, h_bytes);
    std::memset(advance(c.mutable_data_ptr(), row * c_bytes), 0, c_bytes);
  }
}

// Rows as the weights' kernels multiply them: as they are, or made of them by each share for
// itself, for the products that it makes next.
class Rows {
 public:
  // rows: of all shares at once, at most.
  Rows(const WeightKernels& weights, const Cut& cut, int64_t rows, int64_t I, int64_t H)
      : weights_(weights),
        by_rows_(cut.by_rows),
        rows_(rows),
        copies_(cut.by_rows ? 1 : cut.shares) {
    if (weights.row_bytes) row_bytes_ = std::max(weights.row_bytes(I), weights.row_bytes(H));
  }
  int64_t bytes() const { return copies_ * rows_ * row_bytes_; }
  // Where a share's own begin.
  int64_t offset(int64_t share, int64_t row) const {
    return (by_rows_ ? row : share * rows_) * row_bytes_;
  }
  const void* made(const void* factors, int64_t rows, int64_t K, void* place) const {
    if (!weights_.make_rows) return factors;
    weights_.make_rows(factors, rows, K, place);
    return place;
  }

 private:
  const WeightKernels& weights_;
  const bool by_rows_;
  const int64_t rows_, copies_;
  int64_t row_bytes_ = 0;
};

// What a step works with where h is projected: the rows of r, those as factors, and sums.
class ProjectionScratch {
 public:
  // r may be kept elsewhere; its rows are the factors where the two are alike.
  ProjectionScratch(bool projects, int64_t N, int64_t H, int64_t P, Elements stored,
                    Elements computed, Elements factor, int64_t factor_columns, bool keeps_r)
      : stored_(stored),
        computed_(computed),
        factor_(factor),
        H_(H),
        P_(P),
        columns_(factor_columns),
        made_(factor.size != stored.size || factor_columns != H),
        r_bytes_(projects && !keeps_r ? N * H * stored.size : 0),
        factor_bytes_(projects && made_ ? N * factor_columns * factor.size : 0),
        sum_bytes_(projects ? N * P * computed.size : 0) {}
  int64_t bytes() const { return r_bytes_ + factor_bytes_ + sum_bytes_; }
  // The last of an odd number of pairs is never written.
  void clear(void* place) const { std::memset(advance(place, r_bytes_), 0, factor_bytes_); }

  void* r(void* place, int64_t row) const { return stored_.at(place, row * H_); }
  void* r_factors(void* place, int64_t row) const {
    return made_ ? factor_.at(advance(place, r_bytes_), row * columns_) : nullptr;
  }
  void* sums(void* place, int64_t row) const {
    return computed_.at(advance(place, r_bytes_ + factor_bytes_), row * P_);
  }

 private:
  const Elements stored_, computed_, factor_;
  const int64_t H_, P_, columns_;
  const bool made_;
  const int64_t r_bytes_, factor_bytes_, sum_bytes_;
};

void forward_loop(const LayerInputs& in, const PackedWeights& packed_before, const Tensor& w_hr,
                  const SharedSequence& sequence, const Kernels& kernels, LayerTensors& out) {
  const LayerKernels& layer = kernels.layer;
  const int64_t N = sequence.N(), L = sequence.L(), H = in.cx.size(1), I = in.input.size(-1);
  const int64_t P = in.hx.size(1);  // H where h is not projected
  const bool projects = w_hr.defined() || packed_before.projection;
  const at::ScalarType dtype = in.hx.scalar_type(), compute = compute_type(dtype);
  const int64_t blocks = layer.unit_blocks(H);
  const Elements stored(dtype), computed(compute), factor(factor_type(kernels.product, dtype));
  const Dense w_ih(in.w_ih), w_hh(in.w_hh), b_ih(in.b_ih), b_hh(in.b_hh), dense_hr(w_hr);
  const DenseCell cell(in);

  const Cut cut(sequence, H, blocks, projects ? kRowsOfAProjectingThread : kRowsOfAThread);
  const bool one_chunk = cut.own_blocks() && sequence.S() <= kOneChunkRows;
  const int64_t chunk_rows = kChunkRows * (cut.by_rows ? cut.shares : 1);
  const int64_t chunk_steps = one_chunk ? L : std::clamp<int64_t>(chunk_rows / N, 1, L);

  // One piece of memory for all: the allocator returns several large ones to the system each time,
  // and to get their pages anew takes as long as to fill them.
  const WeightKernels& weights = weight_kernels(kernel_dtype(dtype), packed_before.type);
  PackedGates ih(kernel_dtype(dtype), packed_before.type, I, H),
      hh(kernel_dtype(dtype), packed_before.type, P, H);
  const bool pack = packed_before.data == nullptr, pack_by_block = pack && one_chunk;
  const int64_t ih_bytes = pack_by_block ? cut.shares * ih.block_bytes() : pack ? ih.bytes() : 0;
  const int64_t hh_bytes = pack ? hh.bytes() : 0;
  // Panels that were packed before know nothing of threads.
  PackedColumns hr(layer, compute, H, P, pack && !cut.by_rows ? cut.shares : 1);
  const int64_t hr_bytes = projects && pack ? hr.bytes() : 0;
  const int64_t sums_bytes = chunk_steps * N * layer.sums_per_row(H) * computed.size;
  const int64_t h_bytes = N * factor_columns(kernels.product, P) * factor.size;
  const Rows rows_of(weights, cut, chunk_steps * N, I, P);
  const bool keeps_r = out.r.defined();
  const ProjectionScratch of_projection(projects, N, H, P, stored, computed, factor,
                                        factor_columns(kernels.product, H), keeps_r);
  const Tensor scratch = empty_large({ih_bytes + hh_bytes + hr_bytes + sums_bytes + 2 * h_bytes +
                                      rows_of.bytes() + of_projection.bytes()},
                                     at::kByte);
  void* memory = scratch.mutable_data_ptr();
  void* packed = pack ? memory : const_cast<void*>(packed_before.data);  // then only read
  ih.lie_at(packed);
  hh.lie_at(advance(packed, pack ? ih_bytes : ih.bytes()));
  hr.lie_at(pack ? advance(memory, ih_bytes + hh_bytes)
                 : const_cast<void*>(packed_before.projection));
  void* sums = advance(memory, ih_bytes + hh_bytes + hr_bytes);
  // h in two places, so that a step can read one and write the other.
  void* h[2] = {advance(sums, sums_bytes), advance(sums, sums_bytes + h_bytes)};
  void* made_rows = advance(h[1], h_bytes);
  void* projection = advance(made_rows, rows_of.bytes());
  of_projection.clear(projection);
  // The part of W_hr that goes with a part of the blocks.
  const auto part_of_hr = [&](int64_t part, int64_t parts) { return hr.blocks() * part / parts; };
  if (pack && !cut.own_blocks())
    cpu::run(blocks, 4 * H * (I + P), [&](int64_t first, int64_t last) {
      ih.pack(w_ih.data(), first, last);
      hh.pack(w_hh.data(), first, last);
      if (projects)
        hr.pack_transposed(dense_hr.data(), part_of_hr(first, blocks), part_of_hr(last, blocks));
    });

  const Tensor rows_of_x =
      kernels.product.pair_rows ? in.input.reshape({sequence.S(), I}) : in.input;
  const Tensor x = to_factors(kernels.product, rows_of_x);
  const int64_t x_columns = factor_columns(kernels.product, I);
  const int64_t h_columns = factor_columns(kernels.product, P);
  // Where every step writes every row, the first can read what it was given.
  const Tensor hx = to_factors(kernels.product, in.hx);
  const bool steady = !defined(in.batch_sizes) && !defined(in.reset) && !kernels.product.pair_rows;
  if (!steady) start_states(sequence, hx, h, out.cy);

  Barrier barrier(cut.shares);

  run_team(cut.shares, [&](int64_t first, int64_t last) {
    const Share share = cut.share(sequence, first, last);
    const int64_t row = share.row, block = share.block, block_end = share.block_end;
    void* own_rows = advance(made_rows, rows_of.offset(first, row));
    const int64_t hr_block = cut.by_rows ? 0 : part_of_hr(first, cut.shares);
    const int64_t hr_end = cut.by_rows ? hr.blocks() : part_of_hr(last, cut.shares);
    int64_t meetings = 0;
    const auto meet = [&] {
      if (!cut.by_rows) barrier.wait(last - first, ++meetings);
    };
    if (pack && cut.own_blocks()) {
      if (!pack_by_block) ih.pack(w_ih.data(), block, block_end);
      hh.pack(w_hh.data(), block, block_end);
      if (projects) hr.pack_transposed(dense_hr.data(), hr_block, hr_end);
    }
    for (int64_t begin = 0; begin < L; begin += chunk_steps) {
      const int64_t end = std::min(begin + chunk_steps, L);
      const int64_t low = sequence.offset(std::min(sequence.time(begin), sequence.time(end - 1)));
      const int64_t high =
          sequence.offset(std::max(sequence.time(begin), sequence.time(end - 1)) + 1);
      // Where the pre-activations of the s'th step's rows lie. Threads with rows of their own do
      // not wait for each other between chunks, so that each needs a place of its own.
      const bool alone = row == 0 && share.row_end == N;
      const GateSums chunk = {sums, alone ? high - low : chunk_steps * N};
      const auto place = [&](int64_t s) {
        return alone ? sequence.offset(sequence.time(s)) - low : (s - begin) * N + row;
      };
      const auto project = [&](int64_t from, int64_t rows, int64_t to) {
        GateProductArgs product = {};
        product.rows = rows;
        product.K = I;
        product.H = H;
        product.x =
            rows_of.made(factor.at(x.const_data_ptr(), from * x_columns), rows, I, own_rows);
        product.packed = ih.at(block);
        product.sums = chunk;
        product.first_row = to;
        if (!pack_by_block) return weights.gate_product(product, block, block_end);
        void* slot = ih.at(first);
        product.packed = slot;
        for (int64_t b = block; b < block_end; ++b) {
          ih.pack(w_ih.data(), b, b + 1, slot);
          weights.gate_product(product, b, b + 1);
        }
      };
      if (alone)
        project(low, high - low, 0);
      else
        for (int64_t s = begin; s < end; ++s)
          if (const int64_t rows = share.rows(sequence, sequence.time(s)); rows > 0)
            project(sequence.offset(sequence.time(s)) + row, rows, place(s));

      for (int64_t s = begin; s < end; ++s) {
        const int64_t t = sequence.time(s), rows = share.rows(sequence, t);
        const int64_t first_row = sequence.offset(t) + row;
        const bool* reset_next = sequence.reset(s + 1);
        if (rows > 0) {
          const void* h_before = steady && s == 0 ? hx.const_data_ptr() : h[s % 2];
          GateProductArgs product = {};
          product.rows = rows;
          product.K = P;
          product.H = H;
          product.x = rows_of.made(factor.at(h_before, row * h_columns), rows, P, own_rows);
          product.sums = chunk;
          product.first_row = place(s);
          product.accumulate = true;
          StepArgs step = {};
          step.rows = rows;
          step.H = H;
          step.sums = chunk;
          step.first_row = place(s);
          step.b_ih = b_ih.data();
          step.b_hh = b_hh.data();
          step.cell = cell.kind();
          step.c = stored.at(out.cy.mutable_data_ptr(), row * H);
          step.h_factors = factor.at(h[(s + 1) % 2], row * h_columns);
          if (projects) {
            step.projects = true;
            step.h_factors = of_projection.r_factors(projection, row);
            step.output = keeps_r ? stored.at(out.r.mutable_data_ptr(), first_row * H)
                                  : of_projection.r(projection, row);
          } else {
            step.output = stored.at(out.output.mutable_data_ptr(), first_row * H);
          }
          if (out.gates.defined()) {
            step.gates = stored.at(out.gates.mutable_data_ptr(), first_row * 4 * H);
            step.c_before = stored.at(out.c_before.mutable_data_ptr(), first_row * H);
          }
          step.reset_next = reset_next ? reset_next + row : nullptr;
          zigzag(block, block_end, rows == 1 ? kSideBlocks : 1, s % 2, [&](int64_t b, int64_t e) {
            product.packed = hh.at(b);
            weights.gate_product(product, b, e);
            layer.step(step, b, e);
          });
        }
        if (projects) {
          meet();
          if (rows > 0 && hr_block < hr_end) {
            ProjectionArgs project = {};
            project.rows = rows;
            project.panels = hr.panels();
            project.r = of_projection.r_factors(projection, row);
            if (!project.r)
              project.r = keeps_r ? stored.at(out.r.const_data_ptr(), first_row * H)
                                  : of_projection.r(projection, row);
            project.packed = hr.at(hr_block);
            project.sums = of_projection.sums(projection, row);
            project.output = stored.at(out.output.mutable_data_ptr(), first_row * P);
            project.h_factors = factor.at(h[(s + 1) % 2], row * h_columns);
            project.reset_next = reset_next ? reset_next + row : nullptr;
            layer.project(project, hr_block, hr_end);
          }
        }
        meet();
      }
    }
  });
}

// The cell's own kernels, on the weights as they lie: for sequences too short to pay for packing.
void forward_by_cells(const LayerInputs& in, const SharedSequence& sequence, const Kernels& kernels,
                      LayerTensors& out) {
  const int64_t N = sequence.N(), H = in.hx.size(1), I = in.input.size(-1);
  const Elements stored(in.hx.scalar_type());
  const Dense input(in.input), hx(in.hx), w_ih(in.w_ih), w_hh(in.w_hh), b_ih(in.b_ih),
      b_hh(in.b_hh);
  const DenseCell cell(in);
  const void* h = hx.data();
  const Tensor c_next = empty({N, H}, in.hx.scalar_type());
  for (int64_t s = 0; s < sequence.L(); ++s) {
    const int64_t row = sequence.offset(sequence.time(s));
    void* output = stored.at(out.output.mutable_data_ptr(), row * H);
    if (out.c_before.defined())
      std::memcpy(stored.at(out.c_before.mutable_data_ptr(), row * H), out.cy.const_data_ptr(),
                  out.cy.nbytes());
    CellForwardArgs args = {};
    args.N = N;
    args.I = I;
    args.H = H;
    args.input = stored.at(input.data(), row * I);
    args.hx = h;
    args.cx = out.cy.const_data_ptr();
    args.w_ih = w_ih.data();
    args.w_hh = w_hh.data();
    args.b_ih = b_ih.data();
    args.b_hh = b_hh.data();
    args.cell = cell.kind();
    args.hy = output;
    args.cy = c_next.mutable_data_ptr();
    if (out.gates.defined()) args.gates = stored.at(out.gates.mutable_data_ptr(), row * 4 * H);
    cpu::run(kernels.cell.forward_tasks(N, H), N * 4 * H * (I + H + 16),
             [&](int64_t first, int64_t last) { kernels.cell.forward(args, first, last); });
    std::memcpy(out.cy.mutable_data_ptr(), c_next.const_data_ptr(), out.cy.nbytes());
    h = output;
  }
}

}  // namespace

LayerTensors layer_forward(const LayerInputs& in, bool training, const PackedWeights& packed,
                           const Tensor& w_hr) {
  const bool projects = w_hr.defined() || packed.projection;
  check_sequence(in, projects);
  const SharedSequence sequence(in);
  const int64_t N = sequence.N(), L = sequence.L(), H = in.cx.size(1), P = in.hx.size(1);
  const at::ScalarType dtype = in.hx.scalar_type();
  LayerTensors out;
  out.output = defined(in.batch_sizes) ? empty({sequence.S(), P}, dtype) : empty({L, N, P}, dtype);
  out.cy = in.cx.clone(at::MemoryFormat::Contiguous);
  if (training) {
    out.gates = empty_large({sequence.S(), 4 * H}, dtype);
    out.c_before = empty_large({sequence.S(), H}, dtype);
    if (projects) out.r = empty_large({sequence.S(), H}, dtype);
  }
  if (out.output.numel() == 0) {
    out.hy = in.hx.clone(at::MemoryFormat::Contiguous);
    return out;
  }
  const Kernels& kernels = cpu::kernels(kernel_dtype(dtype));
  const bool plain = !defined(in.batch_sizes) && !defined(in.reset);
  constexpr int64_t kShort = 4;  // steps
  if (packed.data == nullptr && plain && !projects && L < kShort && !kernels.cell.forward_packs(N))
    forward_by_cells(in, sequence, kernels, out);
  else
    forward_loop(in, packed, w_hr, sequence, kernels, out);
  out.hy = empty({N, P}, dtype);
  const int64_t bytes = P * elementSize(dtype);
  for (int64_t row = 0; row < N; ++row)
    std::memcpy(advance(out.hy.mutable_data_ptr(), row * bytes),
                advance(out.output.const_data_ptr(),
                        (sequence.offset(sequence.last_time(row)) + row) * bytes),
                bytes);
  return out;
}

}  // namespace lstm_ext::cpu
