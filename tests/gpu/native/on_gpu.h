// What the checks of tests/cuda_emu ask of the machine that runs the kernels, answered by a GPU.
#pragma once

#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "guarded.h"
#include "no_gpu.h"

namespace machine {

constexpr bool kEmulated = false;
constexpr char kSameBits[] = "the same bits when called again";

// How often a call is made: the GPU draws the order of threads.
inline unsigned calls = 4;
inline unsigned orders() { return calls; }
inline void use_order(unsigned /*order*/) {}

inline int multiprocessors() {
  static const int count = native::attribute(cudaDevAttrMultiProcessorCount);
  return count;
}
inline int shared_per_block() {
  static const int bytes = native::attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return bytes;
}
inline bool has_clusters() {
  static const int major = native::attribute(cudaDevAttrComputeCapabilityMajor);
  return major == 9;
}

struct OnDevice {
  static void* allocate(size_t bytes) {
    void* memory = nullptr;
    native::must(cudaMalloc(&memory, bytes), "cudaMalloc");
    return memory;
  }
  static void release(void* memory) {
    // After an error that stopped a check this one only repeats it.
    if (const cudaError_t error = cudaFree(memory);
        error != cudaSuccess && std::uncaught_exceptions() == 0) {
      std::printf("cudaFree: %s\n", cudaGetErrorString(error));
      std::fflush(stdout);
      std::_Exit(1);
    }
  }
  static void fill(void* memory, int byte, size_t bytes) {
    if (bytes != 0) native::must(cudaMemset(memory, byte, bytes), "cudaMemset");
  }
  static void copy(void* to, const void* from, size_t bytes) {
    if (bytes != 0) native::must(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "cudaMemcpy");
  }
};

using Memory = Guarded<OnDevice>;

struct Launches {
  unsigned long count() const { return 0; }
  int blocks_together() const { return 0; }  // not known
};

struct NarrowLimits {
  explicit NarrowLimits(unsigned /*threads_per_block*/) {}
};

inline unsigned watch_seconds = 30;
inline char watched[256] = "before the first case";

// A kernel whose blocks wait for each other may do so for ever.
inline void end_hung_program(int /*signal*/) {
  constexpr char kWhat[] = ": hangs, cut off\n";
  (void)!write(STDOUT_FILENO, watched, std::strlen(watched));
  (void)!write(STDOUT_FILENO, kWhat, sizeof(kWhat) - 1);
  _exit(124);
}

inline void watch(const std::string& where) {
  alarm(0);
  std::snprintf(watched, sizeof(watched), "%s", where.c_str());
  std::fflush(stdout);
  alarm(watch_seconds);
}

inline int start(bool few) {
  signal(SIGALRM, end_hung_program);
  alarm(watch_seconds);
  if (const int status = native::find_gpu(); status != 0) return status;
  // Few cases are for sanitizers: they see strays by themselves, and take their time.
  Memory::guards = !few;
  if (few) watch_seconds = 120, calls = 2;
  return 0;
}

inline std::vector<std::string> strays() {
  native::must(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return Memory::strays();
}

inline std::string describe(cudaError_t error) {
  cudaGetLastError();  // so that the next call is not blamed for it
  return cudaGetErrorString(error);
}

}  // namespace machine
