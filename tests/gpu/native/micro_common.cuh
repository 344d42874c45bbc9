// What the microbenchmarks have in common: results as lines of JSON, times by events and by the
// multiprocessor's clock, and waits with an end.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "no_gpu.h"

namespace micro {

using native::must;

constexpr int kThreads = 256;
// No thread waits longer in one place; a millisecond or so.
constexpr long long kMostCycles = 2'000'000;

inline void result(const std::string& name, double value, const char* unit,
                   const std::string& note = "") {
  std::printf("{\"name\": \"%s\", \"value\": %.6g, \"unit\": \"%s\", \"note\": \"%s\"}\n",
              name.c_str(), value, unit, note.c_str());
  std::fflush(stdout);
}

inline void no_result(const std::string& name, const std::string& error) {
  std::printf("{\"name\": \"%s\", \"error\": \"%s\"}\n", name.c_str(), error.c_str());
  std::fflush(stdout);
}

// Memory on the device, zeros at first.
template <class T>
class Array {
 public:
  explicit Array(size_t count) : bytes_(count * sizeof(T)) {
    must(cudaMalloc(&at_, bytes_), "cudaMalloc");
    must(cudaMemset(at_, 0, bytes_), "cudaMemset");
  }
  ~Array() { cudaFree(at_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* at() { return at_; }
  T first() {
    T value;
    must(cudaMemcpy(&value, at_, sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return value;
  }
  void clear() { must(cudaMemset(at_, 0, bytes_), "cudaMemset"); }

 private:
  size_t bytes_;
  T* at_ = nullptr;
};

// Microseconds that the device takes for what body() puts into stream 0.
template <class Body>
double microseconds(const Body& body) {
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin), "cudaEventCreate");
  must(cudaEventCreate(&end), "cudaEventCreate");
  must(cudaEventRecord(begin), "cudaEventRecord");
  body();
  must(cudaEventRecord(end), "cudaEventRecord");
  must(cudaEventSynchronize(end), "cudaEventSynchronize");
  float milliseconds = 0;
  must(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return 1000.0 * milliseconds;
}

// The median of some tries after one that is not counted.
template <class Body>
double median_microseconds(const Body& body, int tries = 3) {
  body();
  std::vector<double> found;
  for (int k = 0; k < tries; ++k) found.push_back(microseconds(body));
  std::sort(found.begin(), found.end());
  return found[found.size() / 2];
}

struct How {
  int blocks = 1, threads = kThreads;
  size_t shared = 0;
  bool cooperative = false;
  int cluster = 1;
};

template <class... Parameters, class... Arguments>
void launch(const How& how, void (*kernel)(Parameters...), Arguments... arguments) {
  if (how.shared > 48 * 1024)
    must(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(how.shared)),
         "shared memory");
  if (how.cluster > 8)
    must(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
         "cluster size");
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = how.shared;
  config.attrs = attributes;
  if (how.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (how.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(how.cluster), 1, 1};
  }
  must(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
}

// Cycles a step, as a kernel of one measurement has written them.
template <class... Parameters, class... Arguments>
double cycles(const How& how, void (*kernel)(long long*, Parameters...), Arguments... arguments) {
  Array<long long> found(1);
  for (int k = 0; k < 2; ++k) launch(how, kernel, found.at(), arguments...);
  must(cudaDeviceSynchronize(), "kernel");
  return static_cast<double>(found.first());
}

// Whether a wait that began so long ago is to be given up.
__device__ inline bool too_long(long long begin) { return clock64() - begin > kMostCycles; }

}  // namespace micro
