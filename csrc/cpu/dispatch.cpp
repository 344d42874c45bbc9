// Picks the kernels of the best instruction set that this machine and
// ATEN_CPU_CAPABILITY allow.
#include <ATen/Version.h>

#include <cstdlib>
#include <string>

#include "cpu/kernels.h"

namespace lstm_ext::cpu {

namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  const Kernels* bfloat16 = nullptr;  // where it has its own
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
        return InstructionSet{"AVX512_BF16", kKernelsAVX512, &kKernelsAVX512BF16};
      return InstructionSet{"AVX512", kKernelsAVX512};
    }
    if (capability.rfind("AVX", 0) == 0) return InstructionSet{"AVX2", kKernelsAVX2};
#endif
    return InstructionSet{"DEFAULT", kKernelsDefault};
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

const Kernels& kernels(Dtype dtype) {
  const InstructionSet& set = active();
  if (dtype == Dtype::kBFloat16 && set.bfloat16) return *set.bfloat16;
  return set.kernels[static_cast<int>(dtype)];
}

}  // namespace lstm_ext::cpu
