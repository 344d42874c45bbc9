// All CPU kernels of one dtype, and how they are chosen.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cpu/cell_kernels.h"
#include "cpu/layer_kernels.h"
#include "cpu/recurrence_kernels.h"

namespace lstm_ext::cpu {

struct Kernels {
  CellKernels cell;
  LayerKernels layer;
  ProductKernels product;
  RecurrenceKernels recurrence;
};

// Of weights, from kFirstIntegerType on.
inline constexpr int kIntegerTypes = kWeightTypes - kFirstIntegerType;

// One table per instruction set, indexed by Dtype.
extern const Kernels kKernelsDefault[kDtypes];
#if defined(__x86_64__)
extern const Kernels kKernelsAVX2[kDtypes];
extern const Kernels kKernelsAVX512[kDtypes];
extern const Kernels kKernelsAVX512BF16;  // for bfloat16 alone
// For float and the integer types alone.
extern const WeightKernels kIntegersAVX2VNNI[kIntegerTypes];
extern const WeightKernels kIntegersAVX512VNNI[kIntegerTypes];
#endif

#if defined(__x86_64__)
// AVX-VNNI, which not every compiler's __builtin_cpu_supports knows; to be asked where there is
// AVX2.
inline bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
#endif

// The instruction sets compiled in, comma-separated, and the one that at::get_cpu_capability()
// (hence ATEN_CPU_CAPABILITY) selects.
const char* compiled_instruction_sets();
const char* active_instruction_set();
const Kernels& kernels(Dtype dtype);
const WeightKernels& weight_kernels(Dtype dtype, WeightType type);

}  // namespace lstm_ext::cpu
