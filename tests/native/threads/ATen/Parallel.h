// at::parallel_for by threads of the standard library, in the place of OpenMP's, which
// ThreadSanitizer cannot follow. For tests/test_native.py.
#pragma once

#include <ATen/Config.h>

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace at {

inline thread_local bool in_region = false;

inline int get_num_threads() { return 4; }
inline bool in_parallel_region() { return in_region; }

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const int64_t pieces =
      std::min<int64_t>(get_num_threads(), (end - begin) / std::max<int64_t>(1, grain));
  if (pieces <= 1 || in_region) {
    if (end > begin) f(begin, end);
    return;
  }
  const int64_t size = (end - begin + pieces - 1) / pieces;
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += size)
    threads.emplace_back([&f, first, last = std::min(end, first + size)] {
      in_region = true;
      f(first, last);
    });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace at
