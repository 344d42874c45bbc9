// What the CPU kernels of a recurrence (ops/recurrence.h) take, for one step of some rows. Raw
// pointers and sizes, to the first of these rows; "factors" and the compute type as in
// layer_kernels.h. The products in between are column products over panels.
#pragma once

#include <cstdint>

namespace lstm_ext::cpu {

// A mask's rows, row_stride elements apart (0 for one of all rows); or null for none.
struct MaskRowsArgs {
  const void* data;
  int64_t row_stride;
};

// What a recurrence has for all steps.
struct RecurrenceOptions {
  int64_t H, P;
  const void* bias;    // [4H] or null
  const void* norm;    // [4H] or null
  const void* norm_c;  // [H] or null
  const void* bias_c;  // [H] or null
  bool norm_joint, carry_norm;
  double eps, cell_clip, projection_clip;
  // 4 where each gate has a mask of h of its own, else 1. Then h is multiplied by W_hh gate by
  // gate, and rows of factors come in four lists, factors_apart rows from each other.
  int64_t h_masks, factors_apart;
};

// Before the product: states of reset rows become zero; then dropout_h * h as factors.
struct RecurrenceBeginArgs {
  int64_t rows;
  RecurrenceOptions options;
  const bool* reset;  // or null
  MaskRowsArgs dropout_h;
  void* h;         // [rows, P]
  void* c;         // [rows, H]
  void* factors;   // [h_masks][rows, P] as factors
  void* h_before;  // [rows, h_masks P]; null in inference
};

// After it: gates and c.
struct RecurrenceStepArgs {
  int64_t rows;
  RecurrenceOptions options;
  void* z;              // [rows, 4H] in the compute type: h W_hh^T; replaced
  const void* gates_x;  // [rows, 4H]
  MaskRowsArgs update_c;
  void* c;           // [rows, H], replaced
  void* r;           // [rows, H] in the compute type: o * tanh
  void* r_factors;   // [rows, H] as factors, or null
  void* r_kept;      // [rows, H], or null
  void* gates;       // [rows, 4H], with the next three; null in inference
  void* c_before;    // [rows, H]
  void* normalized;  // [rows, 4H] where there is a norm
  void* scale;       // [rows] in the compute type
};

// Last: h' from r, or from its projection.
struct RecurrenceEndArgs {
  int64_t rows;
  RecurrenceOptions options;
  const void* h_new;  // [rows, P] in the compute type
  MaskRowsArgs update_h;
  void* h;          // [rows, P], replaced
  void* output;     // [rows, P]
  void* projected;  // [rows, P], h_new; or null
};

// Backward, in the opposite order.
struct RecurrenceEndGradientArgs {
  int64_t rows;
  RecurrenceOptions options;
  const void* grad_output;  // [rows, P] or null for zero
  MaskRowsArgs update_h;
  const void* projected;  // [rows, P]; null where h is not projected
  void* grad_h;           // [rows, P] in the compute type; of it remains what goes past the step
  void* grad_h_new;       // [rows, P] in the compute type
  void* factors;          // [rows, P] as factors where those are pairs, else null
};

struct RecurrenceStepGradientArgs {
  int64_t rows;
  RecurrenceOptions options;
  const void* grad_r;  // [rows, H] in the compute type
  MaskRowsArgs update_c;
  const void* gates;
  const void* c_before;
  const void* normalized;
  const void* scale;
  const bool* reset;  // or null
  void* grad_c;       // [rows, H] in the compute type, replaced
  void* grad_z;       // [rows, 4H] in the compute type
  void* z_factors;    // the same as factors: [rows, 4H] where those are pairs, else null; or
                      // where there are four masks of h, [4][rows, H]
  void* grad_pre;     // [rows, 4H] in the compute type, or null
  // Added to, in the compute type, or null. The sums of their rows are the gradients.
  void* norm_terms;    // [rows, 4H]
  void* bias_terms;    // [rows, 4H], where there is a norm
  void* norm_c_terms;  // [rows, H]
  void* bias_c_terms;  // [rows, H]
  void* scratch;       // [2, H] in the compute type
};

struct RecurrenceBeginGradientArgs {
  int64_t rows;
  RecurrenceOptions options;
  const void* grad_product;  // [h_masks][factors_apart, P] in the compute type: grad_z W_hh
  MaskRowsArgs dropout_h;
  const bool* reset;  // or null
  void* grad_h;       // [rows, P] in the compute type: added to
};

struct RecurrenceKernels {
  void (*begin)(const RecurrenceBeginArgs&);
  void (*step)(const RecurrenceStepArgs&);
  void (*end)(const RecurrenceEndArgs&);
  void (*end_gradient)(const RecurrenceEndGradientArgs&);
  void (*step_gradient)(const RecurrenceStepGradientArgs&);
  void (*begin_gradient)(const RecurrenceBeginGradientArgs&);
};

}  // namespace lstm_ext::cpu
