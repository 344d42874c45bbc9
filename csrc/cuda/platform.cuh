// Where the kernels meet the machine: a GPU, or tests/cuda_emu, which runs these sources on the
// CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(LSTM_EXT_CUDA_EMU)
#include "cuda_emu.h"
#define LSTM_EXT_DYNAMIC_SHARED(T, name) \
  T* const name = reinterpret_cast<T*>(::cuda_emu::block->dynamic_shared)
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LSTM_EXT_DYNAMIC_SHARED(T, name)                          \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared)
#endif

namespace lstm_ext::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Launch {
  dim3 grid, block;
  size_t shared = 0;         // bytes of dynamic shared memory
  bool cooperative = false;  // blocks may wait for each other
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;  // blocks that run side by side and reach each other's shared memory
};

#if !defined(LSTM_EXT_CUDA_EMU)
// Asked before the launch: one that fails would spoil the capture of a CUDA graph.
template <class Kernel>
cudaError_t all_blocks_run_at_once(const Launch& how, Kernel kernel) {
  int device = 0, multiprocessors = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &resident, kernel, static_cast<int>(how.block.x * how.block.y * how.block.z), how.shared);
  if (error != cudaSuccess) return error;
  const int64_t most = int64_t{resident} * multiprocessors;
  return int64_t{how.grid.x} * how.grid.y * how.grid.z <= most ? cudaSuccess
                                                               : cudaErrorCooperativeLaunchTooLarge;
}

// The same of clusters: whether there is code for them, compiled for compute capability 9.0 at
// least, and whether one fits on the device as it is. Shared memory has been allowed.
template <class Kernel>
bool clusters_run(const cudaLaunchConfig_t& config, unsigned cluster, Kernel kernel) {
  constexpr unsigned kAlwaysAllowed = 8;
  cudaFuncAttributes code = {};
  int at_once = 0;
  cudaError_t error = cudaFuncGetAttributes(&code, kernel);
  if (error == cudaSuccess && code.ptxVersion < 90) return false;
  if (error == cudaSuccess && cluster > kAlwaysAllowed)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&at_once, kernel, &config);
  if (error == cudaSuccess) return at_once > 0;
  static_cast<void>(cudaGetLastError());  // so that no later call is blamed for it
  return false;
}
#endif

template <class... Parameters, class... Arguments>
cudaError_t launch(const Launch& how, void (*kernel)(Parameters...), Arguments... arguments) {
#if defined(LSTM_EXT_CUDA_EMU)
  return cuda_emu::launch(kernel, how.grid, how.block, how.shared, how.cooperative, how.cluster,
                          arguments...);
#else
  constexpr size_t kAlwaysAllowed = 48 * 1024;
  if (how.shared > kAlwaysAllowed) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared));
    if (error != cudaSuccess) return error;
  }
  if (how.cooperative) {
    const cudaError_t error = all_blocks_run_at_once(how, kernel);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute = {};
  if (how.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {how.cluster, 1, 1};
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = how.cooperative;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared;
  config.stream = how.stream;
  config.attrs = &attribute;
  config.numAttrs = how.cooperative || how.cluster > 1 ? 1 : 0;
  if (how.cluster > 1 && !clusters_run(config, how.cluster, kernel)) return cudaErrorNotSupported;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
#endif
}

}  // namespace lstm_ext::cuda
