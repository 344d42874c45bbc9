// A few numbers to the device in launches' parameters: no wait, no pinned memory, and a CUDA graph
// may capture it, all of which a copy from ordinary memory does not offer.
#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/platform.cuh"

namespace lstm_ext::cuda {
namespace {

constexpr int kCount = 480;  // parameters may have 4096 bytes

struct Chunk {
  int64_t at[kCount];
};

__global__ void copy_kernel(Chunk chunk, int count, int64_t* to) {
  const int k = static_cast<int>(threadIdx.x);
  if (k < count) to[k] = chunk.at[k];
}

}  // namespace

cudaError_t copy_numbers(const int64_t* from, int64_t count, int64_t* to, cudaStream_t stream) {
  for (int64_t done = 0; done < count; done += kCount) {
    const int here = static_cast<int>(std::min<int64_t>(kCount, count - done));
    Chunk chunk = {};
    std::copy_n(from + done, here, chunk.at);
    const cudaError_t error =
        launch({dim3(1), dim3(kCount), 0, false, stream}, copy_kernel, chunk, here, to + done);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace lstm_ext::cuda
