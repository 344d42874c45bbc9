// Activations for kernels whose steps wait for them: no branch, no division, and errors of some
// 1e-7, as float sums of products have anyway.
#pragma once

#include <cmath>

#include "cuda/platform.cuh"

namespace lstm_ext::cuda {

struct QuickMath {
  __device__ static float sigmoid(float x) { return below(-1.44269504f * x); }

  // As the toolkit's tanhf, but both ways are gone and one is taken.
  __device__ static float tanh(float x) {
    const float far = 1 - 2 * below(2.88539008f * x);
    const float square = x * x;
    float sum = 1.57394409e-2f;
    sum = sum * square - 5.23025580e-2f;
    sum = sum * square + 1.33152470e-1f;
    sum = sum * square - 3.33327681e-1f;
    const float near = sum * square * x + x;
    return fabsf(x) < 0.55f ? near : far;
  }

 private:
  // 1 / (1 + 2^x)
  __device__ static float below(float x) {
#if defined(LSTM_EXT_CUDA_EMU)
    return 1 / (1 + std::exp2(x));
#else
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1 + power));
    return inverse;
#endif
  }
};

}  // namespace lstm_ext::cuda
