// Stacks for the emulator's fibers: to make one takes long, so that they are used again.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace cuda_emu {

constexpr size_t kStack = 64 * 1024;  // small: ASan clears its notes of a stack at every switch

// What a thread needs to run on.
struct Stack {
  std::unique_ptr<char[]> memory;
  void* tsan = nullptr;
};

class Stacks {
 public:
  std::vector<Stack> take(size_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Stack> taken(count);
    for (Stack& stack : taken) {
      if (!free_.empty()) {
        stack = std::move(free_.back());
        free_.pop_back();
        continue;
      }
      stack.memory.reset(new char[kStack]);
#if defined(__SANITIZE_THREAD__)
      stack.tsan = __tsan_create_fiber(0);
#endif
    }
    return taken;
  }
  void give_back(std::vector<Stack> taken) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Stack& stack : taken) free_.push_back(std::move(stack));
  }

 private:
  std::mutex mutex_;
  std::vector<Stack> free_;
};
inline Stacks stacks;

}  // namespace cuda_emu
