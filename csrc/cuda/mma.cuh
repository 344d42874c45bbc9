// Tensor-core products of one warp, D[16, 8] += A[16, K] B[K, 8] with float sums: K is 16 for the
// 16-bit types and 8 for TF32. Lane 4 r + t holds, of D, columns 2t and 2t + 1 of rows r (d[0],
// d[1]) and r + 8 (d[2], d[3]); of A, numbers t and t + 4 (counted in 32-bit words along k) of
// rows r (a[0], a[2]) and r + 8 (a[1], a[3]); of B, the same of column r (b[0], b[1]). (PTX ISA,
// "Matrix fragments for mma.m16n8k16" and "mma.m16n8k8".)
#pragma once

#include "cuda/platform.cuh"

namespace lstm_ext::cuda {

// The word's 16-bit numbers are of type T.
template <class T>
__device__ inline void mma_16bit(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(LSTM_EXT_CUDA_EMU)
  const auto decode = [](uint32_t word, int k) {
    const auto bits = static_cast<uint16_t>(word >> (16 * k));
    T number{};
    std::memcpy(static_cast<void*>(&number), &bits, sizeof(bits));
    return static_cast<float>(number);
  };
  cuda_emu::mma<2>(d, a, b, decode, __LINE__);
#else
  if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The nearest number of TF32 (10 bits of mantissa), ties away from zero.
__device__ inline uint32_t to_tf32(float x) {
#if defined(LSTM_EXT_CUDA_EMU)
  uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof(bits));
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & ~0x1fffu : bits;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

__device__ inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(LSTM_EXT_CUDA_EMU)
  const auto decode = [](uint32_t word, int) {
    float number = 0;
    std::memcpy(&number, &word, sizeof(word));
    return number;
  };
  cuda_emu::mma<1>(d, a, b, decode, __LINE__);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace lstm_ext::cuda
