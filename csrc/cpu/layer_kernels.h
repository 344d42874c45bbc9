// What the CPU kernels of a whole LSTM layer take: the steps of one time loop, over weights packed
// once per call. Raw pointers and sizes, no tensors; terms as in cell_kernels.h.
//
// The hidden units are cut into blocks, one vector each: what a thread can own. "Factors" are what
// the products multiply (cell_kernels.h); a row of K of them takes factors_of(K) elements. A
// pointer to packed weights is to the first of the blocks that a call is about.
#pragma once

#include <cstdint>

#include "cpu/cell_kernels.h"

namespace lstm_ext::cpu {

// Rows of pre-activations of one chunk of the sequence: [block][row][gate][unit], in the compute
// type.
struct GateSums {
  void* data;
  int64_t rows;  // of the chunk
};

// sums = or += x W^T for rows of x, whose pre-activations start at row first_row.
struct GateProductArgs {
  int64_t rows, K, H;
  const void* x;  // factors, [rows, K], or what make_rows made of them
  const void* packed;
  GateSums sums;
  int64_t first_row;
  bool accumulate;
};

// One time step of some rows: activations and states from the complete pre-activations.
// Every pointer is to the first of these rows.
struct StepArgs {
  int64_t rows, H;
  GateSums sums;
  int64_t first_row;
  const void* b_ih;  // [4H] or null
  const void* b_hh;  // [4H] or null
  CellKind cell;
  void* c;                 // [rows, H], replaced
  void* h_factors;         // [rows, H] as factors, for the next step's product
  void* output;            // [rows, H], h
  void* gates;             // [rows, 4H], activated; null in inference
  void* c_before;          // [rows, H], the c that the step read; null in inference
  void* cells;             // [rows, H], the c after the step; or null
  const bool* reset_next;  // rows that the next step shall find reset; or null
  const void* reset_h;     // [rows, H], to what they are reset; null for zero
  const void* reset_c;
  bool projects;  // output and h_factors are of h before its projection: not reset
};

// One time step backward: the gradients of the pre-activations.
struct StepGradientArgs {
  int64_t rows, H;
  const void* grad_output;  // [rows, H] or null for zero
  const void* grad_cells;   // [rows, H] or null for zero: of the c after the step
  const void* grad_h;       // [rows, H] in the compute type: from the step after
  void* grad_c;             // [rows, H] in the compute type, replaced
  const void* gates;        // [rows, 4H]
  const void* c_before;     // [rows, H]
  CellKind cell;
  void* grad_gates;          // [rows, 4H] in the compute type
  void* grad_gates_factors;  // [rows, 4H] as factors where those are pairs, else null
  const bool* reset;         // rows whose states the step found reset; or null
  void* grad_reset_c;        // [rows, H] in the compute type: added to where reset; or null
};

// A matrix [depth, columns] packed by its columns, in blocks of so many vectors of them: 4, or
// fewer where more threads want a part.
struct ColumnPanels {
  int64_t depth, columns, vectors;
};

// grad_h [rows, P] = grad_gates [rows, 4H] W_hh, zero where reset; P is H without a projection. Of
// W_hh, [4H, P], the panels.
struct StateGradientArgs {
  int64_t rows;
  ColumnPanels panels;
  const void* grad_gates;  // factors
  const void* packed;
  void* grad_h;  // in the compute type
  const bool* reset;
  void* grad_reset_h;  // as grad_reset_c
};

// h [rows, P] = r [rows, H] W_hr^T, where r = o * tanh(c'). Of W_hr^T, [H, P], the panels.
struct ProjectionArgs {
  int64_t rows;
  ColumnPanels panels;
  const void* r;  // factors
  const void* packed;
  void* sums;              // [rows, P] in the compute type, to work with
  void* output;            // [rows, P]
  void* h_factors;         // [rows, P] as factors, for the next step's product
  const bool* reset_next;  // as in StepArgs
};

// The gradient of h from a step's output and from the step after: grad_h += grad_output.
struct OutputGradientArgs {
  int64_t rows, P;
  const void* grad_output;  // [rows, P] or null for zero
  const void* grad_h;       // [rows, P] in the compute type: from the step after
  void* sum;                // [rows, P] in the compute type
  void* factors;            // [rows, P] as factors where those are pairs, else null
};

// out [rows, columns] = x [rows, depth] m, of a matrix m [depth, columns], the panels. Where h is
// projected, the gradient of r from that of h; and the products of a recurrence.
struct ColumnProductArgs {
  int64_t rows;
  ColumnPanels panels;
  const void* x;  // factors
  const void* packed;
  void* out;           // in the compute type
  int64_t out_stride;  // from one of its rows to the next
};

// How packed weights are stored (weight_types.h, integer_weights.h), the last in 8 bits for rows in
// 16; the operators' argument `weights`.
enum class WeightType { kWhole, kBFloat16, kInt8, kInt8Int16 };
inline constexpr int kWeightTypes = 4;
inline constexpr int kFirstIntegerType = static_cast<int>(WeightType::kInt8);

// The weights of the gates. Null functions where a type is not for these activations.
struct WeightKernels {
  int64_t (*block_bytes)(int64_t K);  // of a block of packed weights
  // What a row of factors takes where it is not multiplied as it is, and how it is made; or null.
  int64_t (*row_bytes)(int64_t K);
  void (*make_rows)(const void* factors, int64_t rows, int64_t K, void* out);
  void (*pack_gates)(const void* w, int64_t K, int64_t H, void* packed, int64_t first,
                     int64_t last);
  void (*gate_product)(const GateProductArgs&, int64_t first_block, int64_t last_block);
};

// Unit blocks of a whole block of panels.
inline constexpr int64_t kUnitBlocks = 4;
// Blocks that the product of a single row takes side by side, or a divisor of it.
inline constexpr int64_t kSideBlocks = 4;

struct LayerKernels {
  int64_t (*unit_blocks)(int64_t H);
  int64_t (*sums_per_row)(int64_t H);  // elements
  // Of a block of panels, elements; and packing those of a matrix [depth, columns], or of its
  // transpose.
  int64_t (*panel_elements)(int64_t depth);
  void (*pack_columns)(const ColumnPanels&, const void* m, void* packed, int64_t first,
                       int64_t last);
  void (*pack_rows)(const ColumnPanels&, const void* m, void* packed, int64_t first, int64_t last);
  WeightKernels weights[kWeightTypes];
  void (*step)(const StepArgs&, int64_t first_block, int64_t last_block);
  void (*step_gradient)(const StepGradientArgs&, int64_t first_block, int64_t last_block);
  void (*state_gradient)(const StateGradientArgs&, int64_t first_block, int64_t last_block);
  // By blocks of the panels; or, the third, by vectors of h.
  void (*project)(const ProjectionArgs&, int64_t first_block, int64_t last_block);
  void (*multiply_columns)(const ColumnProductArgs&, int64_t first_block, int64_t last_block);
  void (*output_gradient)(const OutputGradientArgs&, int64_t first_vector, int64_t last_vector);
  // sums [ceil(rows / kBiasBlockRows), columns] of m [rows, columns], in the compute type.
  void (*block_sums)(const void* m, int64_t rows, int64_t columns, void* sums, int64_t first,
                     int64_t last);
};

}  // namespace lstm_ext::cpu
