// The recurrence's operators on a GPU, step by step: the library's products, and between two of
// them one launch.
#include "ops/recurrence.h"

#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>
#include <vector>

#include "core/sequence.h"
#include "cuda/recurrence.h"
#include "cuda/tensors.h"
#include "ops/composite.h"

namespace lstm_ext::cuda {
namespace {

at::ScalarType type_of_sums(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A mask, dense, and where its rows of a step begin.
class Mask {
 public:
  Mask(const std::optional<Tensor>& mask, const RecurrenceInputs& in) : mask_(dense(mask)) {
    if (defined(mask)) rows_ = mask_rows(*mask, in);
  }
  bool defined_at_all() const { return mask_.defined(); }
  // Of the step whose rows begin at this one.
  template <class T>
  StepMask<T> at(int64_t offset) const {
    if (!mask_.defined() || rows_ == MaskRows::kUnit) return {read<T>(mask_), 0};
    const int64_t columns = mask_.size(-1);
    return {read<T>(mask_) + (rows_ == MaskRows::kStep ? offset * columns : 0), columns};
  }

 private:
  const Tensor mask_;
  MaskRows rows_ = MaskRows::kUnit;
};

// The inputs, dense, as the kernels take them.
template <class T>
class Recurrence {
 public:
  Recurrence(const RecurrenceInputs& in, const Sequence& sequence)
      : steps(sequence),
        N(in.hx.size(0)),
        H(in.cx.size(1)),
        P(in.hx.size(1)),
        projects(in.projects()),
        w_hh(dense(in.w_hh)),
        w_hr(dense(in.w_hr)),
        update_h(in.update_h, in),
        update_c(in.update_c, in),
        dropout_h(in.dropout_h, in),
        reset_(dense(in.reset)),
        bias_(dense(in.bias)),
        norm_(dense(in.norm)),
        norm_c_(dense(in.norm_c)),
        bias_c_(dense(in.bias_c)) {
    options = {static_cast<int>(H), static_cast<int>(P), read<T>(bias_),
               read<T>(norm_),      read<T>(norm_c_),    read<T>(bias_c_),
               in.norm_joint,       in.carry_norm,       in.eps,
               in.cell_clip,        in.projection_clip};
  }
  bool resets() const { return reset_.defined(); }
  const bool* reset(int64_t t) const {
    return reset_.defined() ? read<bool>(reset_) + t * N : nullptr;
  }
  // The rows of a time, of a tensor with those of all; null where that is not there, or has none.
  template <class S = T>
  const S* read_at(const Tensor& tensor, int64_t t) const {
    return has_rows(tensor) ? read<S>(tensor) + first(tensor, t) : nullptr;
  }
  template <class S = T>
  S* write_at(const Tensor& tensor, int64_t t) const {
    return has_rows(tensor) ? write<S>(tensor) + first(tensor, t) : nullptr;
  }

  const Sequence& steps;
  const int64_t N, H, P;
  const bool projects;
  const Tensor w_hh, w_hr;
  const Mask update_h, update_c, dropout_h;
  RecurrenceOptions<T> options;

 private:
  static bool has_rows(const Tensor& tensor) { return tensor.defined() && tensor.numel() > 0; }
  int64_t first(const Tensor& tensor, int64_t t) const {
    return steps.offset(t) * (tensor.dim() > 1 ? tensor.size(-1) : 1);
  }
  const Tensor reset_, bias_, norm_, norm_c_, bias_c_;
};

template <class T>
void forward_loop(const Recurrence<T>& r, const RecurrenceInputs& in, bool training,
                  RecurrenceTrainingOutputs& out) {
  const Sequence& steps = r.steps;
  const Tensor gates_x = dense(in.gates_x), z = empty({r.N, 4 * r.H}, in.hx);
  // What W_hh multiplies, where that is not h itself; and what W_hr does.
  const bool own_x = !training && (r.resets() || r.dropout_h.defined_at_all());
  const Tensor x = own_x ? empty({r.N, r.P}, in.hx) : Tensor(),
               o_tanh = r.projects && !training ? empty({r.N, r.H}, in.hx) : Tensor(),
               projected = r.projects && !training ? empty({r.N, r.P}, in.hx) : Tensor();
  const cudaStream_t stream = current_stream();
  // Rows of a step: kept for backward, or in the same place at each.
  const auto rows_of = [&](const Tensor& kept, const Tensor& instead, int64_t t) {
    return training ? steps.of(kept, t) : instead.narrow(0, 0, steps.rows(t));
  };
  const auto begins = [&](RecurrenceForward<T>& call, int64_t step) {
    if (step == steps.L()) return;
    const int64_t t = steps.time(step);
    call.next_rows = steps.rows(t);
    call.next_reset = r.reset(t);
    call.next_dropout_h = r.dropout_h.template at<T>(steps.offset(t));
    call.next_x = training ? r.write_at(out.kept.h_before, t) : write<T>(x);
  };
  RecurrenceForward<T> first = {};
  first.options = r.options;
  first.h = write<T>(out.hy);
  begins(first, 0);
  if (first.next_x != nullptr) check_launch(recurrence_end(first, stream));
  for (int64_t step = 0; step < steps.L(); ++step) {
    const int64_t t = steps.time(step), n = steps.rows(t), offset = steps.offset(t);
    Tensor product = z.narrow(0, 0, n);
    at::mm_out(product, rows_of(out.kept.h_before, own_x ? x : out.hy, t), r.w_hh.t());
    RecurrenceForward<T> call = {};
    call.options = r.options;
    call.rows = n;
    call.reset = r.reset(t);
    call.z = read<T>(z);
    call.gates_x = read<T>(gates_x) + offset * 4 * r.H;
    call.update_c = r.update_c.template at<T>(offset);
    call.update_h = r.update_h.template at<T>(offset);
    call.c = write<T>(out.cy);
    call.h = write<T>(out.hy);
    call.output = write<T>(out.output) + offset * r.P;
    call.gates = r.write_at(out.kept.gates, t);
    call.c_before = r.write_at(out.kept.c_before, t);
    call.normalized = r.write_at(out.kept.normalized, t);
    call.scale = r.template write_at<Sum<T>>(out.kept.scale, t);
    begins(call, step + 1);
    if (!r.projects) {
      check_launch(recurrence_step(call, stream));
      continue;
    }
    const Tensor to_project = rows_of(out.kept.r, o_tanh, t);
    Tensor h_new = rows_of(out.kept.projected, projected, t);
    call.r = write<T>(to_project);
    call.projected = read<T>(h_new);
    check_launch(recurrence_step(call, stream));
    at::mm_out(h_new, to_project, r.w_hr.t());
    check_launch(recurrence_end(call, stream));
  }
}

RecurrenceTrainingOutputs forward(const RecurrenceInputs& in, bool training) {
  check_recurrence(in);
  const OnDevice guard(in.hx);
  const LayerPrecision precision(in.hx);
  const Sequence steps(in.sequence());
  const int64_t S = steps.S(), H = in.cx.size(1), P = in.hx.size(1);
  RecurrenceTrainingOutputs out;
  std::vector<int64_t> sizes = in.gates_x.sizes().vec();
  sizes.back() = P;
  out.output = empty(sizes, in.hx);
  out.hy = in.hx.clone(at::MemoryFormat::Contiguous);
  out.cy = in.cx.clone(at::MemoryFormat::Contiguous);
  if (training) {
    const int64_t normed = defined(in.norm) ? S : 0, projected = in.projects() ? S : 0;
    out.kept.gates = empty({S, 4 * H}, in.hx);
    out.kept.c_before = empty({S, H}, in.hx);
    out.kept.h_before = empty({S, P}, in.hx);
    out.kept.normalized = empty({normed, 4 * H}, in.hx);
    out.kept.scale = at::empty({normed}, in.hx.options().dtype(type_of_sums(in.hx)));
    out.kept.r = empty({projected, H}, in.hx);
    out.kept.projected = empty({projected, P}, in.hx);
  }
  with_type(in.hx.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    forward_loop(Recurrence<T>(in, steps), in, training, out);
  });
  return out;
}

// Of all steps, [S, ..]; undefined where not wanted.
struct RecurrenceStepGradients {
  Tensor z, pre, h_new;                           // in the type of the tensors
  Tensor norm_terms, norm_c_terms, bias_c_terms;  // in that of sums
};

template <class T>
void backward_loop(const Recurrence<T>& r, const LayerOutputGradients& grads,
                   const RecurrenceResults& results, bool wants_hx, const Tensor& grad_h,
                   const Tensor& grad_c, const RecurrenceStepGradients& of_steps) {
  const Sequence& steps = r.steps;
  const Tensor grad_output = dense(grads.output), gates = dense(results.gates),
               c_before = dense(results.c_before), normalized = dense(results.normalized),
               scale = dense(results.scale), projected = dense(results.projected);
  const Tensor product = empty({r.N, r.P}, gates),
               grad_r = r.projects ? empty({r.N, r.H}, gates) : Tensor();
  const cudaStream_t stream = current_stream();
  // What the gradient of h still needs of the step before this one, which came later.
  const auto ends_later = [&](RecurrenceBackward<T>& call, int64_t step) {
    call.options = r.options;
    call.grad_h = write<Sum<T>>(grad_h);
    if (step + 1 == steps.L()) return;
    const int64_t t = steps.time(step + 1);
    call.later_rows = steps.rows(t);
    call.later_reset = r.reset(t);
    call.later_dropout_h = r.dropout_h.template at<T>(steps.offset(t));
    call.product = read<T>(product);
  };
  for (int64_t step = steps.L() - 1; step >= 0; --step) {
    const int64_t t = steps.time(step), n = steps.rows(t), offset = steps.offset(t);
    RecurrenceBackward<T> call = {};
    ends_later(call, step);
    call.rows = n;
    call.reset = r.reset(t);
    call.update_h = r.update_h.template at<T>(offset);
    call.update_c = r.update_c.template at<T>(offset);
    if (grad_output.defined()) call.grad_output = read<T>(grad_output) + offset * r.P;
    call.projected = r.read_at(projected, t);
    call.gates = r.read_at(gates, t);
    call.c_before = r.read_at(c_before, t);
    call.normalized = r.read_at(normalized, t);
    call.scale = r.template read_at<Sum<T>>(scale, t);
    call.grad_c = write<Sum<T>>(grad_c);
    call.grad_z = r.write_at(of_steps.z, t);
    call.grad_pre = r.write_at(of_steps.pre, t);
    call.norm_terms = r.template write_at<Sum<T>>(of_steps.norm_terms, t);
    call.norm_c_terms = r.template write_at<Sum<T>>(of_steps.norm_c_terms, t);
    call.bias_c_terms = r.template write_at<Sum<T>>(of_steps.bias_c_terms, t);
    if (r.projects) {
      call.grad_h_new = r.write_at(of_steps.h_new, t);
      check_launch(recurrence_end_gradient(call, stream));
      Tensor of_r = grad_r.narrow(0, 0, n);
      at::mm_out(of_r, steps.of(of_steps.h_new, t), r.w_hr);
      call.grad_r = read<T>(grad_r);
    }
    check_launch(recurrence_step_gradient(call, stream));
    if (step == 0 && !wants_hx) return;
    Tensor of_x = product.narrow(0, 0, n);
    at::mm_out(of_x, steps.of(of_steps.z, t), r.w_hh);
  }
  RecurrenceBackward<T> last = {};
  ends_later(last, -1);
  check_launch(recurrence_end_gradient(last, stream));
}

RecurrenceGradients backward(const LayerOutputGradients& grads, const RecurrenceInputs& in,
                             const RecurrenceResults& results, const RecurrenceWanted& wanted) {
  const OnDevice guard(in.hx);
  const LayerPrecision precision(in.hx);
  const Sequence steps(in.sequence());
  const int64_t S = steps.S(), H = in.cx.size(1), P = in.hx.size(1);
  const at::TensorOptions sums = in.hx.options().dtype(type_of_sums(in.hx));
  const auto initial = [&](const std::optional<Tensor>& grad, const Tensor& state) {
    return defined(grad)
               ? grad->to(sums, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous)
               : at::zeros(state.sizes(), sums);
  };
  const Tensor grad_h = initial(grads.hy, in.hx), grad_c = initial(grads.cy, in.cx);
  const bool normed = defined(in.norm), apart = normed && !in.norm_joint;
  RecurrenceStepGradients of_steps;
  of_steps.z = empty({S, 4 * H}, in.hx);
  const bool wants_bias = wanted.bias && defined(in.bias);
  if (normed && (wants_bias || (wanted.gates_x && apart))) of_steps.pre = empty({S, 4 * H}, in.hx);
  if (in.projects()) of_steps.h_new = empty({S, P}, in.hx);
  const auto terms = [&](bool asked, const std::optional<Tensor>& given, int64_t columns) {
    return asked && defined(given) ? at::empty({S, columns}, sums) : Tensor();
  };
  of_steps.norm_terms = terms(wanted.norm, in.norm, 4 * H);
  of_steps.norm_c_terms = terms(wanted.norm_c, in.norm_c, H);
  of_steps.bias_c_terms = terms(wanted.bias_c, in.bias_c, H);
  with_type(in.hx.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    backward_loop(Recurrence<T>(in, steps), grads, results, wanted.hx, grad_h, grad_c, of_steps);
  });
  const auto sum = [&](const Tensor& of_rows) {
    return of_rows.defined() ? of_rows.sum(0).to(in.hx.scalar_type()) : Tensor();
  };
  const Tensor& pre = of_steps.pre.defined() ? of_steps.pre : of_steps.z;
  RecurrenceGradients out;
  if (wanted.gates_x) out.gates_x = (apart ? pre : of_steps.z).view_as(in.gates_x);
  if (wanted.hx) out.hx = grad_h.to(in.hx.scalar_type());
  if (wanted.cx) out.cx = grad_c.to(in.hx.scalar_type());
  if (wants_bias) out.bias = sum(pre);
  out.norm = sum(of_steps.norm_terms);
  out.norm_c = sum(of_steps.norm_c_terms);
  out.bias_c = sum(of_steps.bias_c_terms);
  if (wanted.w_hh) out.w_hh = weight_gradient(of_steps.z, results.h_before);
  if (wanted.w_hr && in.projects()) out.w_hr = weight_gradient(of_steps.h_new, results.r);
  return out;
}

// The kernels' loops are over units and rows that exist, their masks one for each unit, and a row
// that is normalised has to fit into shared memory.
bool has_kernel(const RecurrenceInputs& in) {
  constexpr int64_t most = std::numeric_limits<int>::max() / 8;
  if (!fusable(in) || in.gates_x.numel() == 0 || in.hx.numel() == 0) return false;
  if (in.w_hh.size(0) > most || in.hx.size(1) > most) return false;
  if (defined(in.dropout_h) && in.dropout_h->size(-1) != in.hx.size(1)) return false;
  if (!defined(in.norm) && !defined(in.norm_c)) return true;
  const OnDevice guard(in.hx);
  const Device device = describe_device(in.hx, at::Float32Op::RNN);
  return with_type(in.hx.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    return recurrence_norm_fits<T>(static_cast<int>(in.cx.size(1)), device);
  });
}

bool runs_in_kernels(const char* operation, const RecurrenceInputs& in) {
  const bool runs = has_kernel(in);
  if (verbose())
    log_path(operation, in.gates_x, in.cx,
             runs ? "step by step: the library's products, and one launch between two of them"
                  : "tensor operations, step by step");
  return runs;
}

LayerOutputs lstm_recurrence(const RecurrenceInputs& in) {
  if (!runs_in_kernels("lstm_recurrence", in)) return composite::recurrence(in);
  check_all_allocated(in);
  RecurrenceTrainingOutputs out = forward(in, /*training=*/false);
  return {std::move(out.output), std::move(out.hy), std::move(out.cy)};
}

RecurrenceTrainingOutputs lstm_recurrence_forward(const RecurrenceInputs& in) {
  if (!runs_in_kernels("lstm_recurrence_forward", in)) return composite::recurrence_forward(in);
  check_all_allocated(in);
  return forward(in, /*training=*/true);
}

RecurrenceGradients lstm_recurrence_backward(const LayerOutputGradients& grads,
                                             const RecurrenceInputs& in,
                                             const RecurrenceResults& results,
                                             const RecurrenceWanted& wanted) {
  if (!runs_in_kernels("lstm_recurrence_backward", in))
    return composite::recurrence_backward(grads, in, results, wanted);
  check_all_allocated(in, grads, results);
  check_backward(grads, in, results);
  return backward(grads, in, results, wanted);
}

}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, LSTM_EXT_CUDA_KEY, m) {
  ops::lstm_recurrence::implement<lstm_recurrence>(m);
  ops::lstm_recurrence_forward::implement<lstm_recurrence_forward>(m);
  ops::lstm_recurrence_backward::implement<lstm_recurrence_backward>(m);
}

}  // namespace lstm_ext::cuda
