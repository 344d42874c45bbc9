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
  const WeightKernels* integers = nullptr;
};

// Read once, as ATen itself does.
const InstructionSet& active() {
  static const InstructionSet set = [] {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    // ATen names no extension; who asks for a set by name gets no more than that.
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string asked = variable ? variable : "";
    if (capability.rfind("AVX512", 0) == 0) {
      if (!__builtin_cpu_supports("avx512vnni") || asked == "avx512")
        return InstructionSet{"AVX512", kKernelsAVX512};
      if (!__builtin_cpu_supports("avx512bf16") || asked == "avx512_vnni")
        return InstructionSet{"AVX512_VNNI", kKernelsAVX512, nullptr, kIntegersAVX512VNNI};
      return InstructionSet{"AVX512_BF16", kKernelsAVX512, &kKernelsAVX512BF16,
                            kIntegersAVX512VNNI};
    }
    if (capability.rfind("AVX", 0) == 0) {
      if (has_avx_vnni() && asked != "avx2")
        return InstructionSet{"AVX2_VNNI", kKernelsAVX2, nullptr, kIntegersAVX2VNNI};
      return InstructionSet{"AVX2", kKernelsAVX2};
    }
#endif
    return InstructionSet{"DEFAULT", kKernelsDefault};
  }();
  return set;
}

}  // namespace

const char* compiled_instruction_sets() {
#if defined(__x86_64__)
  return "DEFAULT,AVX2,AVX2_VNNI,AVX512,AVX512_VNNI,AVX512_BF16";
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

const WeightKernels& weight_kernels(Dtype dtype, WeightType type) {
  const InstructionSet& set = active();
  const int index = static_cast<int>(type);
  if (dtype == Dtype::kFloat && index >= kFirstIntegerType && set.integers)
    return set.integers[index - kFirstIntegerType];
  return kernels(dtype).layer.weights[index];
}

}  // namespace lstm_ext::cpu
