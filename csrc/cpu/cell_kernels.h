// What the CPU kernels of one LSTM cell take and how they are reached: raw
// pointers and sizes, no tensors. Shapes: N batch, I input, H hidden; every
// matrix is dense and row-major; gates are ordered i, f, g, o.
#pragma once

#include <cstdint>

namespace lstm_ext::cpu {

enum class Dtype { kFloat, kDouble, kBFloat16, kHalf };
inline constexpr int kDtypes = 4;

// Sums are made in the "compute type": float for the two halves, else the dtype itself. The
// "factors" of the large products are in the compute type too, but for bfloat16 where the processor
// multiplies it: there a factor is two neighbouring k's, (0, 1), (2, 3), .., the last one padded
// with zero. No output may overlap an input.
struct CellForwardArgs {
  int64_t N, I, H;
  const void* input;          // [N, I]
  const void* hx;             // [N, H]
  const void* input_factors;  // both as factors; read if forward_packs(N)
  const void* hx_factors;
  const void* cx;    // [N, H]
  const void* w_ih;  // [4H, I]
  const void* w_hh;  // [4H, H]
  const void* b_ih;  // [4H] or null
  const void* b_hh;  // [4H] or null
  void* hy;          // [N, H]
  void* cy;          // [N, H]
  void* gates;       // [N, 4H], the activated gates; null in inference
};

struct GateGradientArgs {
  int64_t N, H;
  const void* grad_hy;  // [N, H] or null for zero
  const void* grad_cy;  // [N, H] or null for zero
  const void* cx;       // [N, H]
  const void* gates;    // [N, 4H], activated
  void* grad_gates;     // [N, 4H] in the compute type, of the pre-activations
  void* grad_cx;        // [N, H] or null
  void* bias_sums;      // [bias_blocks(N), 4H] in the compute type or null: grad_gates summed
                        // over the rows of each block
};

// c [rows, columns] = a [rows, depth] * b [depth, columns], or that added to c
struct ProductArgs {
  int64_t rows, columns, depth;
  // In the compute type, or in factors if product_packs(rows, depth): element [r, k] at
  // r * a_row_stride + k * a_k_stride.
  const void* a;
  int64_t a_row_stride, a_k_stride;
  const void* b;
  void* c;
  bool accumulate;
  int64_t threads;  // that will share the tasks
  // If product_packs and factors are no pairs: rows of b from tail_row on lie here.
  const void* b_tail;
  int64_t tail_row;
};

// Work is cut into tasks, any range of which may run on any thread. No result depends on the number
// of threads.
struct CellKernels {
  bool (*forward_packs)(int64_t N);
  int64_t (*forward_tasks)(int64_t N, int64_t H);
  void (*forward)(const CellForwardArgs&, int64_t first_task, int64_t last_task);
  int64_t (*gate_gradient_tasks)(int64_t N, int64_t H);
  void (*gate_gradients)(const GateGradientArgs&, int64_t first_task, int64_t last_task);
  // out [size] = or += the sum of parts [count, size], in the compute type, in a fixed order.
  void (*add_up)(const void* parts, int64_t count, int64_t size, void* out, bool accumulate);
  bool (*product_packs)(int64_t rows, int64_t depth);
  // If more than one, c is not the result: it takes as many terms of it [parts, rows, columns], in
  // the compute type, to be added up.
  int64_t (*product_parts)(int64_t rows, int64_t depth, int64_t columns);
  int64_t (*product_tasks)(const ProductArgs&);
  void (*product)(const ProductArgs&, int64_t first_task, int64_t last_task);
  // Null unless factors are pairs. m [rows, columns] in the compute type, its rows two by two:
  // pairs [ceil(rows / 2), columns], of which those from first to last are written.
  void (*pair_rows)(const void* m, int64_t rows, int64_t columns, void* pairs, int64_t first,
                    int64_t last);
};

inline constexpr int64_t kBiasBlockRows = 16;  // short sums: few roundings
inline int64_t bias_blocks(int64_t N) { return (N + kBiasBlockRows - 1) / kBiasBlockRows; }

}  // namespace lstm_ext::cpu
