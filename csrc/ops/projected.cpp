// What the projected layer's operators check.
#include "ops/projected.h"

#include <torch/library.h>

#include "core/sequence.h"

namespace lstm_ext {

bool sizes_fit(const ProjectedInputs& in) {
  return sizes_fit(static_cast<const LayerInputs&>(in), /*projected=*/true) && in.w_hr.dim() == 2 &&
         in.w_hr.sym_size(0) == in.hx.sym_size(1) && in.w_hr.sym_size(1) == in.cx.sym_size(1);
}

bool fusable(const ProjectedInputs& in) {
  return all_alike(in) && alike(in.w_hr, in.input) && sizes_fit(in);
}

void check_backward_sizes(const LayerOutputGradients& grads, const ProjectedInputs& in,
                          const ProjectedResults& results) {
  check_backward_sizes(grads, static_cast<const LayerInputs&>(in), results);
  TORCH_CHECK(results.r.sizes() == results.c_before.sizes(),
              "lstm_layer_projected_backward: r must be that of lstm_layer_projected_forward");
}

void check_backward(const LayerOutputGradients& grads, const ProjectedInputs& in,
                    const ProjectedResults& results) {
  check_sequence(in, /*projected=*/true);
  check_backward_sizes(grads, in, results);
  check_alike_for_backward(grads, in, results);
  TORCH_CHECK(alike(results.r, in.hx),
              "lstm_layer_projected_backward: r must be that of lstm_layer_projected_forward");
}

TORCH_LIBRARY_FRAGMENT(lstm_ext, m) {
  define<ops::lstm_layer_projected, ops::lstm_layer_projected_forward,
         ops::lstm_layer_projected_backward>(m);
}

}  // namespace lstm_ext
