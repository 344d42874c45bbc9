// What the recurrence's operators check.
#include "ops/recurrence.h"

#include <torch/library.h>

#include <vector>

#include "core/sequence.h"

namespace lstm_ext {

LayerInputs RecurrenceInputs::sequence() const {
  static const std::optional<at::Tensor> none;
  return {{gates_x, hx, cx, w_hh, w_hh, none, none, none, 0}, batch_sizes, reset, reverse};
}

MaskRows mask_rows(const at::Tensor& mask, const RecurrenceInputs& in) {
  if (mask.dim() == 1) return MaskRows::kUnit;
  return mask.dim() == 2 && mask.sym_size(0) == in.hx.sym_size(0) ? MaskRows::kSequence
                                                                  : MaskRows::kStep;
}

int64_t h_masks_of(const RecurrenceInputs& in) {
  return defined(in.dropout_h) && in.dropout_h->sym_size(-1) != in.hx.sym_size(1) ? 4 : 1;
}

namespace {

bool mask_fits(const std::optional<at::Tensor>& mask, const c10::SymInt& columns,
               const RecurrenceInputs& in) {
  if (!defined(mask)) return true;
  if (mask->dim() == 0 || mask->sym_size(-1) != columns) return false;
  if (mask_rows(*mask, in) != MaskRows::kStep) return true;
  if (mask->dim() != in.gates_x.dim()) return false;
  for (int64_t d = 0; d + 1 < mask->dim(); ++d)
    if (mask->sym_size(d) != in.gates_x.sym_size(d)) return false;
  return true;
}

bool sizes_fit(const RecurrenceInputs& in) {
  const bool packed = defined(in.batch_sizes);
  if (in.gates_x.dim() != (packed ? 2 : 3) || in.hx.dim() != 2 || in.cx.dim() != 2 ||
      in.w_hh.dim() != 2)
    return false;
  const c10::SymInt H = in.cx.sym_size(1), P = in.hx.sym_size(1);
  const auto vector = [](const std::optional<at::Tensor>& t, const c10::SymInt& size) {
    return bias_fits(t, size);
  };
  return in.hx.sym_size(0) == in.cx.sym_size(0) &&
         (packed || in.gates_x.sym_size(1) == in.hx.sym_size(0)) &&
         in.gates_x.sym_size(-1) == 4 * H && in.w_hh.sym_size(0) == 4 * H &&
         in.w_hh.sym_size(1) == P && (in.projects() || P == H) && vector(in.bias, 4 * H) &&
         vector(in.norm, 4 * H) && vector(in.norm_c, H) && vector(in.bias_c, H) &&
         (!in.projects() ||
          (in.w_hr->dim() == 2 && in.w_hr->sym_size(0) == P && in.w_hr->sym_size(1) == H)) &&
         mask_fits(in.update_h, P, in) && mask_fits(in.update_c, H, in) &&
         (mask_fits(in.dropout_h, P, in) || mask_fits(in.dropout_h, 4 * P, in));
}

template <class Visit>
void visit_floats(const RecurrenceInputs& in, const Visit& visit) {
  const auto one = [&](const auto& field) {
    const at::Tensor& tensor = or_undefined(field);
    if (tensor.defined()) visit(tensor);
  };
  std::apply([&](const auto&... field) { (one(field), ...); },
             std::tuple_cat(in.tensors(), in.masks()));
}

}  // namespace

bool fusable(const RecurrenceInputs& in) {
  bool fits = fused_dtype(in.gates_x.scalar_type());
  visit_floats(in, [&](const at::Tensor& t) { fits = fits && alike(t, in.gates_x); });
  return fits && sizes_fit(in);
}

void check_recurrence(const RecurrenceInputs& in) {
  TORCH_CHECK(
      sizes_fit(in),
      "lstm_recurrence: expected gates_x (L, N, 4H) or packed (S, 4H), states (N, P) and "
      "(N, H), w_hh (4H, P), w_hr (P, H) or P = H, bias and norm (4H), norm_c and bias_c "
      "(H), and masks of all steps, of each sequence (N, ..) or of each unit, dropout_h for "
      "all gates (.., P) or for each (.., 4P); got gates_x of shape ",
      in.gates_x.sym_sizes(), ", states of ", in.hx.sym_sizes(), " and ", in.cx.sym_sizes(),
      ", w_hh of ", in.w_hh.sym_sizes());
  TORCH_CHECK(!defined(in.bias_c) || defined(in.norm_c), "bias_c is for a call with norm_c");
  TORCH_CHECK(in.projection_clip == 0 || in.projects(), "projection_clip is for a call with w_hr");
  TORCH_CHECK(in.cell_clip >= 0 && in.projection_clip >= 0, "a clip must not be negative, got ",
              in.cell_clip, " and ", in.projection_clip);
  TORCH_CHECK(in.eps > 0 || !(defined(in.norm) || defined(in.norm_c)), "eps must be positive, got ",
              in.eps);
  check_sequence(in.sequence(), /*projected=*/true);
}

void check_backward_sizes(const LayerOutputGradients& grads, const RecurrenceInputs& in,
                          const RecurrenceResults& results) {
  std::vector<int64_t> output = in.gates_x.sizes().vec();
  output.back() = in.hx.size(1);
  const auto check = [](const std::optional<at::Tensor>& grad, at::IntArrayRef sizes) {
    TORCH_CHECK(!defined(grad) || grad->sizes() == sizes,
                "lstm_recurrence_backward: a gradient must have its tensor's shape ", sizes);
  };
  check(grads.output, output);
  check(grads.hy, in.hx.sizes());
  check(grads.cy, in.cx.sizes());
  const int64_t H = in.cx.size(1), P = in.hx.size(1), h_columns = h_masks_of(in) * P,
                S = in.gates_x.size(0) * (defined(in.batch_sizes) ? 1 : in.gates_x.size(1));
  const int64_t normed = defined(in.norm) ? S : 0, projected = in.projects() ? S : 0;
  const auto has = [](const at::Tensor& tensor, int64_t rows, int64_t columns) {
    return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns;
  };
  TORCH_CHECK(has(results.gates, S, 4 * H) && has(results.c_before, S, H) &&
                  has(results.h_before, S, h_columns) && has(results.normalized, normed, 4 * H) &&
                  results.scale.dim() == 1 && results.scale.size(0) == normed &&
                  has(results.r, projected, H) && has(results.projected, projected, P),
              "lstm_recurrence_backward: what the forward kept must be that of "
              "lstm_recurrence_forward");
}

void check_backward(const LayerOutputGradients& grads, const RecurrenceInputs& in,
                    const RecurrenceResults& results) {
  check_recurrence(in);
  check_backward_sizes(grads, in, results);
  const auto check = [&](const at::Tensor& grad) {
    TORCH_CHECK(alike(grad, in.hx), "lstm_recurrence_backward: a gradient must have the states' ",
                "dtype ", in.hx.scalar_type(), " and device ", in.hx.device());
  };
  for_each_tensor(check, grads);
  const at::ScalarType sums = in.hx.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  bool fits = results.scale.scalar_type() == sums && results.scale.device() == in.hx.device();
  for (const at::Tensor* t : {&results.gates, &results.c_before, &results.h_before,
                              &results.normalized, &results.r, &results.projected})
    fits = fits && alike(*t, in.hx);
  TORCH_CHECK(fits,
              "lstm_recurrence_backward: what the forward kept must be that of "
              "lstm_recurrence_forward");
}

TORCH_LIBRARY_FRAGMENT(lstm_ext, m) {
  define<ops::lstm_recurrence, ops::lstm_recurrence_forward, ops::lstm_recurrence_backward>(m);
}

}  // namespace lstm_ext
