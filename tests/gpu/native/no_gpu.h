// What the programs of this folder have in common: an end of their own where there is no GPU, and
// no CUDA call whose error goes unseen.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <stdexcept>
#include <string>

namespace native {

constexpr int kNoGpu = 77;  // exit status

inline void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// 0, or the exit status of a program that cannot run here, after a line that says why.
inline int find_gpu() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver || count == 0) {
    std::printf("no GPU: %s\n", error == cudaSuccess ? "none found" : cudaGetErrorString(error));
    return kNoGpu;
  }
  must(error, "cudaGetDeviceCount");
  return 0;
}

inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  must(cudaGetDevice(&device), "cudaGetDevice");
  must(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace native
