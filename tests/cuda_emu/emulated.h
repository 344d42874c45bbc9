// What the checks ask of the machine that runs the kernels, answered by the emulator. Its other
// answer, for a GPU, is tests/gpu/native/on_gpu.h.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda_emu.h"

namespace machine {

constexpr bool kEmulated = true;  // launches are counted, limits can be narrowed, all is slow
constexpr char kSameBits[] = "the same bits in another order of threads";

// How often a call is made, each time in another order of threads.
inline unsigned orders() { return 2; }
inline void use_order(unsigned order) { cuda_emu::seed = order; }

inline int multiprocessors() { return 132; }
inline int shared_per_block() { return 227 * 1024; }
inline bool has_clusters() { return true; }

// Memory of the kernels: exactly so many bytes for a sanitizer to watch, all of them NaN at first.
// Its first byte lies `shift` bytes beyond where memory usually begins.
class Memory {
 public:
  Memory(size_t bytes, size_t shift) : bytes_(bytes), shift_(shift) {
    const size_t all = bytes + shift;
    memory_.reset(static_cast<char*>(std::malloc(all == 0 ? 1 : all)));
    std::memset(memory_.get(), 0xff, all);
  }
  void* at() { return memory_.get() + shift_; }
  void write(const void* from) { std::memcpy(at(), from, bytes_); }
  void read(void* to) { std::memcpy(to, at(), bytes_); }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  size_t bytes_, shift_;
  std::unique_ptr<char, Free> memory_;
};

// Launches since this was made.
class Launches {
 public:
  unsigned long count() const { return cuda_emu::launches - before_; }
  // Of the last: how many blocks wait for each other.
  int blocks_together() const {
    return cuda_emu::asked.cooperative ? static_cast<int>(cuda_emu::asked.grid.x) : 0;
  }

 private:
  unsigned long before_ = cuda_emu::launches;
};

// Launches of more threads a block are errors while this lives.
class NarrowLimits {
 public:
  explicit NarrowLimits(unsigned threads_per_block) {
    cuda_emu::limits.threads_per_block = threads_per_block;
  }
  ~NarrowLimits() { cuda_emu::limits = {}; }
};

// Before anything else. What it returns ends the program, if it is not 0.
inline int start(bool /*few*/) { return 0; }

// Before a case: what to name if it hangs.
inline void watch(const std::string& /*where*/) {}

// After a call: what is wrong in the memory around it.
inline std::vector<std::string> strays() { return {}; }

inline std::string describe(cudaError_t error) {
  return "CUDA error " + std::to_string(static_cast<int>(error));
}

}  // namespace machine
