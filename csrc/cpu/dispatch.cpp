// Picks the kernels of the best instruction set that this machine and
// ATEN_CPU_CAPABILITY allow.
#include <ATen/Version.h>

#include <cstdlib>
#include <string>

#include "cpu/cell_kernels.h"

namespace lstm_ext::cpu {

namespace {

struct InstructionSet {
  const char* name;
  const CellKernels* cell;
  const CellKernels* cell_bfloat16 = nullptr;  // where it has its own
};

// Read once, as ATen itself does.
const InstructionSet& active() {
  static const InstructionSet set = [] {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability.rfind("AVX512", 0) == 0) {
      // ATen names no extension of AVX-512; who asks for that one by name gets no more.
      const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
      if (__builtin_cpu_supports("avx512bf16") && (!asked || std::string(asked) != "avx512"))
        return InstructionSet{"AVX512_BF16", kCellKernelsAVX512, &kCellKernelsAVX512BF16};
      return InstructionSet{"AVX512", kCellKernelsAVX512};
    }
    if (capability.rfind("AVX", 0) == 0) return InstructionSet{"AVX2", kCellKernelsAVX2};
#endif
    return InstructionSet{"DEFAULT", kCellKernelsDefault};
  }();
  return set;
}

}  // namespace

const char* compiled_instruction_sets() {
#if defined(__x86_64__)
  return "DEFAULT,AVX2,AVX512,AVX512_BF16";
#else
  return "DEFAULT";
#endif
}

const char* active_instruction_set() { return active().name; }

const CellKernels& cell_kernels(Dtype dtype) {
  const InstructionSet& set = active();
  if (dtype == Dtype::kBFloat16 && set.cell_bfloat16) return *set.cell_bfloat16;
  return set.cell[static_cast<int>(dtype)];
}

}  // namespace lstm_ext::cpu
