// Denormal numbers slow arithmetic down many times over on most processors, and decaying states
// produce them. While one of these lives, its thread reads and writes them as zero.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <cstdint>

namespace lstm_ext::cpu {

class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(_mm_getcsr()) {
    _mm_setcsr(before_ | kFlushToZero | kDenormalsAreZero);
  }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  static constexpr uint32_t kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  uint32_t before_;
#elif defined(__aarch64__)
  FlushDenormals() : before_(get()) { set(before_ | kFlushToZero); }
  ~FlushDenormals() { set(before_); }

 private:
  static constexpr uint64_t kFlushToZero = uint64_t{1} << 24;
  static uint64_t get() {
    uint64_t fpcr;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(fpcr));
    return fpcr;
  }
  static void set(uint64_t fpcr) { __asm__ __volatile__("msr fpcr, %0" : : "r"(fpcr)); }
  uint64_t before_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}

 private:
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

}  // namespace lstm_ext::cpu
