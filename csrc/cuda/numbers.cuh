// The number types of tensors, and vectors of 16 bytes to load and store.
#pragma once

#include <type_traits>

#include "core/cell_math.h"
#include "cuda/kernels.h"
#include "cuda/platform.cuh"

namespace lstm_ext::cuda {

constexpr int kGates = 4;

// define(T) for the number types T that the launchers are made for.
#define LSTM_EXT_EACH_TYPE(define) define(float) define(double) define(__half) define(__nv_bfloat16)

// By name: torch builds extensions without the half types' own conversions.
template <class T>
__device__ inline Sum<T> widen(T x) {
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __bfloat162float(x);
  else
    return x;
}

// To the nearest.
template <class T>
__device__ inline T narrow(Sum<T> x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

// As accurate as torch's own: no fast division, no approximate exponential.
struct Math {
  __device__ static float sigmoid(float x) { return 1 / (1 + expf(-x)); }
  __device__ static double sigmoid(double x) { return 1 / (1 + exp(-x)); }
  __device__ static float tanh(float x) { return tanhf(x); }
  __device__ static double tanh(double x) { return ::tanh(x); }
};

// kCount numbers side by side in memory, loaded and stored at once.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T at[kCount];
};

template <class T>
constexpr int kFullVector = 16 / sizeof(T);

// Whether pointers (null: not there) lie as Vector wants them.
template <class... Pointers>
bool in_vectors(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Numbers k .. k + kCount of a row of K, zero beyond its end; k + kCount <= K or k >= K.
template <int kCount, class T>
__device__ inline Vector<T, kCount> load(const T* row, int k, int K) {
  if (k < K) return *reinterpret_cast<const Vector<T, kCount>*>(row + k);
  Vector<T, kCount> zeros;
#pragma unroll
  for (int j = 0; j < kCount; ++j) zeros.at[j] = narrow<T>(0);
  return zeros;
}

// The same where k + kCount may cross K, and the row may lie anywhere: number by number.
template <int kCount, class T>
__device__ inline Vector<T, kCount> load_each(const T* row, int k, int K) {
  Vector<T, kCount> numbers;
#pragma unroll
  for (int j = 0; j < kCount; ++j) numbers.at[j] = k + j < K ? row[k + j] : narrow<T>(0);
  return numbers;
}

}  // namespace lstm_ext::cuda
