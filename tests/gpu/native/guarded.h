// Memory with guards: bytes before and after it that nobody may write. All of it is NaN at first,
// so that what is read there shows too.
//
// Raw says where the memory is: allocate(bytes), release(pointer), fill(pointer, byte, bytes),
// copy(to, from, bytes), between the host and there.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace machine {

template <class Raw>
class Guarded {
 public:
  static constexpr size_t kGuard = 256;         // bytes, a multiple of what memory is aligned to
  static constexpr unsigned char kFill = 0xff;  // NaN in every type; arithmetic's NaN is another

  // Without guards it has exactly so many bytes: a sanitizer then sees more than guards do.
  static inline bool guards = true;

  // bytes to use, the first of them `shift` bytes beyond where memory usually begins.
  Guarded(size_t bytes, size_t shift)
      : bytes_(bytes), before_((guards ? kGuard : 0) + shift), after_(guards ? kGuard : 0) {
    all_ = static_cast<char*>(Raw::allocate(std::max<size_t>(1, before_ + bytes_ + after_)));
    Raw::fill(all_, kFill, before_ + bytes_ + after_);
    alive().insert(this);
  }
  ~Guarded() {
    alive().erase(this);
    Raw::release(all_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  void* at() { return all_ + before_; }
  void write(const void* from) { Raw::copy(at(), from, bytes_); }
  void read(void* to) { Raw::copy(to, at(), bytes_); }

  // What was written where nothing should be, in all memory that lives: a line each. The guards are
  // whole again afterwards, so that a stray write is said once.
  static std::vector<std::string> strays() {
    std::vector<std::string> found;
    for (Guarded* memory : alive()) {
      memory->look(memory->all_, memory->before_, "before", found);
      memory->look(memory->all_ + memory->before_ + memory->bytes_, memory->after_, "after", found);
    }
    return found;
  }

 private:
  static std::unordered_set<Guarded*>& alive() {
    static std::unordered_set<Guarded*> all;
    return all;
  }

  void look(char* guard, size_t count, const char* side, std::vector<std::string>& found) const {
    std::vector<unsigned char> bytes(count);
    Raw::copy(bytes.data(), guard, count);
    const auto changed = [](unsigned char byte) { return byte != kFill; };
    const auto many = std::count_if(bytes.begin(), bytes.end(), changed);
    if (many == 0) return;
    const auto first = std::find_if(bytes.begin(), bytes.end(), changed) - bytes.begin();
    found.push_back(std::to_string(many) + " bytes written " + side + " a buffer of " +
                    std::to_string(bytes_) + " bytes, the first at byte " + std::to_string(first) +
                    " of " + std::to_string(count) + " there");
    Raw::fill(guard, kFill, count);
  }

  size_t bytes_, before_, after_;
  char* all_ = nullptr;
};

}  // namespace machine
