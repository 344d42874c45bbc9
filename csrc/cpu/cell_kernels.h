// What the CPU kernels of one LSTM cell take and how they are reached: raw
// pointers and sizes, no tensors. Shapes: N batch, I input, H hidden; every
// matrix is dense and row-major; gates are ordered i, f, g, o.
#pragma once

#include <cstdint>

namespace lstm_ext::cpu {

enum class Dtype { kFloat, kDouble, kBFloat16, kHalf };
inline constexpr int kDtypes = 4;

// Outputs may not overlap inputs.
struct CellForwardArgs {
  int64_t N, I, H;
  const void* input;  // [N, I]
  const void* hx;     // [N, H]
  const void* cx;     // [N, H]
  const void* w_ih;   // [4H, I]
  const void* w_hh;   // [4H, H]
  const void* b_ih;   // [4H] or null
  const void* b_hh;   // [4H] or null
  void* hy;           // [N, H]
  void* cy;           // [N, H]
  void* gates;        // [N, 4H], the activated gates; null in inference
};

struct CellBackwardArgs {
  int64_t N, H;
  const void* grad_hy;  // [N, H] or null for zero
  const void* grad_cy;  // [N, H] or null for zero
  const void* cx;       // [N, H]
  const void* gates;    // [N, 4H], activated
  void* grad_gates;     // [N, 4H], of the pre-activations
  void* grad_cx;        // [N, H] or null
  void* bias_sums;      // [row blocks, 4H] in float (double for double), or null:
                        // grad_gates summed over the rows of each block
};

// The work of both kernels is cut into tasks whose number and content do not
// depend on the number of threads; any range of tasks may run on any thread.
struct CellKernels {
  int64_t (*forward_tasks)(int64_t N, int64_t H);
  void (*forward)(const CellForwardArgs&, int64_t first_task, int64_t last_task);
  int64_t (*backward_tasks)(int64_t N, int64_t H);
  void (*backward)(const CellBackwardArgs&, int64_t first_task, int64_t last_task);
  // Adds the row blocks of bias_sums in order into one or both outputs of [4H].
  void (*reduce_bias)(const void* bias_sums, int64_t blocks, int64_t H, void* out_1, void* out_2);
};

inline constexpr int64_t kBackwardRows = 64;  // rows of one block of bias_sums
inline int64_t backward_row_blocks(int64_t N) { return (N + kBackwardRows - 1) / kBackwardRows; }

// One table per instruction set, indexed by Dtype.
extern const CellKernels kCellKernelsDefault[kDtypes];
#if defined(__x86_64__)
extern const CellKernels kCellKernelsAVX2[kDtypes];
extern const CellKernels kCellKernelsAVX512[kDtypes];
#endif

// The instruction sets compiled in, comma-separated, and the one that at::get_cpu_capability()
// (hence ATEN_CPU_CAPABILITY) selects.
const char* compiled_instruction_sets();
const char* active_instruction_set();
const CellKernels& cell_kernels(Dtype dtype);

}  // namespace lstm_ext::cpu
