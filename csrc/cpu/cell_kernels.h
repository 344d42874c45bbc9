// What the CPU kernels of one LSTM cell take and how they are reached: raw
// pointers and sizes, no tensors. Shapes: N batch, I input, H hidden; every
// matrix is dense and row-major; gates are ordered i, f, g, o.
#pragma once

#include <cstdint>

#include "cpu/product_kernels.h"

namespace lstm_ext::cpu {

// No output may overlap an input. Compute type and factors: product_kernels.h.
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

struct CellKernels {
  bool (*forward_packs)(int64_t N);
  int64_t (*forward_tasks)(int64_t N, int64_t H);
  void (*forward)(const CellForwardArgs&, int64_t first_task, int64_t last_task);
  int64_t (*gate_gradient_tasks)(int64_t N, int64_t H);
  void (*gate_gradients)(const GateGradientArgs&, int64_t first_task, int64_t last_task);
};

inline constexpr int64_t kBiasBlockRows = 16;  // short sums: few roundings
inline int64_t bias_blocks(int64_t N) { return (N + kBiasBlockRows - 1) / kBiasBlockRows; }

}  // namespace lstm_ext::cpu
