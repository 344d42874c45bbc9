// Latencies within a multiprocessor and to memory, in cycles: chains in which each operation waits
// for the one before.
#pragma once

#include "core/cell_math.h"
#include "cuda/mma.cuh"
#include "cuda/numbers.cuh"
#include "micro_common.cuh"

namespace micro {

__global__ void spin_kernel(long long* found, long long wanted) {
  const long long begin = clock64();
  while (clock64() - begin < wanted) {
  }
  *found = clock64() - begin;
}

// The clock under a light load; cycles / MHz are microseconds.
inline void measure_clock() {
  Array<long long> found(1);
  constexpr long long kCycles = 30'000'000;
  spin_kernel<<<1, 1>>>(found.at(), kCycles);
  const double us = microseconds([&] { spin_kernel<<<1, 1>>>(found.at(), kCycles); });
  result("clock", static_cast<double>(found.first()) / us, "MHz",
         "measured; cycles / MHz are microseconds");
  result("clock_rated", native::attribute(cudaDevAttrClockRate) / 1000.0, "MHz");
  cudaDeviceProp properties;
  must(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  result("multiprocessors", properties.multiProcessorCount, "", properties.name);
  result("l2", properties.l2CacheSize / 1048576.0, "MiB");
  result("shared_a_block", static_cast<double>(properties.sharedMemPerBlockOptin) / 1024, "KiB");
  result("launches_may_be_cooperative", native::attribute(cudaDevAttrCooperativeLaunch), "");
}

__global__ void syncthreads_kernel(long long* found, int steps) {
  __syncthreads();
  const long long begin = clock64();
  for (int step = 0; step < steps; ++step) __syncthreads();
  if (threadIdx.x == 0) *found = (clock64() - begin) / steps;
}

__global__ void shared_chain_kernel(long long* found, int steps, unsigned* sink) {
  __shared__ unsigned next[1024];
  for (unsigned k = threadIdx.x; k < 1024; k += blockDim.x) next[k] = (5 * k + 3) % 1024;
  __syncthreads();
  unsigned at = 0;
  const long long begin = clock64();
  for (int step = 0; step < steps; ++step) at = next[at];
  *sink = at;
  if (threadIdx.x == 0) *found = (clock64() - begin) / steps;
}

// A ring of all nodes, a power of two: far from each other, in no order that is easy to foresee.
__global__ void make_ring_kernel(unsigned* ring, unsigned nodes, unsigned stride) {
  const unsigned node = blockIdx.x * blockDim.x + threadIdx.x;
  if (node < nodes) ring[size_t{node} * stride] = (1103515245u * node + 12345u) % nodes * stride;
}

__global__ void memory_chain_kernel(long long* found, const unsigned* ring, int steps,
                                    unsigned start, unsigned* sink) {
  unsigned at = start;
  const long long begin = clock64();
  for (int step = 0; step < steps; ++step) at = __ldcg(ring + at);
  *sink = at;
  *found = (clock64() - begin) / steps;
}

inline void measure_memory() {
  Array<unsigned> sink(1);
  Array<long long> found(1);
  result("shared_load", cycles({1, 32}, shared_chain_kernel, 1000, sink.at()), "cycles",
         "with the address of the next");
  const auto chain = [&](unsigned nodes, unsigned stride, int steps, size_t flush) {
    Array<unsigned> ring(size_t{nodes} * stride);
    make_ring_kernel<<<(nodes + 255) / 256, 256>>>(ring.at(), nodes, stride);
    if (flush == 0)  // all of it once: now it is in L2
      memory_chain_kernel<<<1, 1>>>(found.at(), ring.at(), static_cast<int>(nodes), 0u, sink.at());
    else
      Array<char> others(flush);
    memory_chain_kernel<<<1, 1>>>(found.at(), ring.at(), steps, 0u, sink.at());
    must(cudaDeviceSynchronize(), "chain");
    return static_cast<double>(found.first());
  };
  result("l2_load", chain(4096, 32, 4096, 0), "cycles", "dependent, in 512 KiB");
  result("dram_load", chain(32768, 1024, 2048, size_t{256} << 20), "cycles",
         "dependent, in 128 MiB after 256 MiB of others");
}

template <class T>
__device__ inline void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float>)
    lstm_ext::cuda::mma_tf32(d, a, b);
  else
    lstm_ext::cuda::mma_16bit<T>(d, a, b);
}

// kChains sums side by side, each of which waits for itself alone.
template <class T, int kChains>
__global__ void mma_kernel(long long* found, int steps, float* sink) {
  const uint32_t a[4] = {threadIdx.x, 0, threadIdx.x, 0}, b[2] = {threadIdx.x, 0};
  float sums[kChains][4] = {};
  __syncthreads();
  const long long begin = clock64();
  for (int step = 0; step < steps; ++step)
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain) multiply<T>(sums[chain], a, b);
  float sum = 0;
#pragma unroll
  for (int chain = 0; chain < kChains; ++chain) sum += sums[chain][0] + sums[chain][3];
  sink[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) *found = clock64() - begin;
}

template <class T>
void measure_mma(const std::string& type) {
  Array<float> sink(kThreads);
  constexpr int kSteps = 1000;
  const double one = cycles({1, 32}, mma_kernel<T, 1>, kSteps, sink.at());
  result("mma_chain_" + type, one / kSteps, "cycles", "one warp, each waits for the last");
  constexpr int kChains = 8, kWarps = kThreads / 32;
  const double many = cycles({1, kThreads}, mma_kernel<T, kChains>, kSteps, sink.at());
  result("mma_rate_" + type, many / kSteps / kChains / kWarps, "cycles",
         "a product of a multiprocessor with 8 warps");
}

enum class Function { kExp, kTanh, kSigmoid, kCell };

template <Function kFunction>
__global__ void function_kernel(long long* found, int steps, float start, float* sink) {
  using lstm_ext::cuda::Math;
  float x = start + 0.001f * threadIdx.x, c = x;
  const long long begin = clock64();
  for (int step = 0; step < steps; ++step) {
    if constexpr (kFunction == Function::kExp) {
      x = expf(-x);
    } else if constexpr (kFunction == Function::kTanh) {
      x = tanhf(x);
    } else if constexpr (kFunction == Function::kSigmoid) {
      x = Math::sigmoid(x);
    } else {
      float h, next;
      const lstm_ext::Gates<float> pre = {x, x + 0.1f, x - 0.1f, 0.5f * x};
      lstm_ext::PlainCell::forward<Math>(pre, c, static_cast<const float*>(nullptr), next, h);
      c = next, x = h;
    }
  }
  sink[threadIdx.x] = x + c;
  if (threadIdx.x == 0) *found = (clock64() - begin) / steps;
}

inline void measure_functions() {
  Array<float> sink(kThreads);
  for (const int threads : {32, kThreads}) {
    const auto measure = [&](const char* name, auto kernel) {
      result(std::string(name) + "_threads_" + std::to_string(threads),
             cycles({1, threads}, kernel, 500, 0.7f, sink.at()), "cycles",
             "each waits for the last");
    };
    measure("expf", function_kernel<Function::kExp>);
    measure("tanhf", function_kernel<Function::kTanh>);
    measure("sigmoid", function_kernel<Function::kSigmoid>);
    measure("cell", function_kernel<Function::kCell>);
  }
}

}  // namespace micro
