// Threads that go through a time loop together.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/denormals.h"

namespace lstm_ext::cpu {

// A barrier for shares of work, each of which arrives once a round; a thread may hold several.
class Barrier {
 public:
  explicit Barrier(int64_t shares) : shares_(shares) {}

  // Arrives for some shares in their round'th round (counted from 1), and waits for all others.
  void wait(int64_t shares, int64_t round) {
    if (shares == shares_) return;
    arrived_.fetch_add(shares, std::memory_order_acq_rel);
    for (int64_t spins = 0; arrived_.load(std::memory_order_acquire) < round * shares_; ++spins) {
      // A step takes microseconds; if it takes much longer, another thread wants this core.
      if (spins < kSpins)
        pause();
      else
        std::this_thread::yield();
    }
  }

 private:
  static constexpr int64_t kSpins = 10000;
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
  }

  const int64_t shares_;
  std::atomic<int64_t> arrived_{0};
};

// Threads that run at the same time, so that they may wait for each other: those of OpenMP do.
inline int64_t team_size() {
#if AT_PARALLEL_OPENMP
  return at::in_parallel_region() ? 1 : at::get_num_threads();
#else
  return 1;
#endif
}

// body(first, last) for the shares of a team, in one parallel region. All of them end up in one
// call where the threads cannot be had.
template <class Body>
void run_team(int64_t shares, const Body& body) {
  at::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    const FlushDenormals guard;
    body(first, last);
  });
}

}  // namespace lstm_ext::cpu
