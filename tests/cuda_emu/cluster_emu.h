// What csrc/cuda/cluster.cuh has, in the emulator.
#pragma once

#include <atomic>
#include <chrono>

#include "cuda_emu.h"

namespace lstm_ext::cuda::cluster {

using ::cuda_emu::clusters;
using ::cuda_emu::ClusterState;
using Lock = std::lock_guard<std::mutex>;

// An address: a block's window, and the place in its shared memory.
constexpr unsigned kWindow = 1u << 24;

inline unsigned shared_address(const void* pointer) {
  const auto offset = static_cast<const char*>(pointer) - ::cuda_emu::block->dynamic_shared;
  return static_cast<unsigned>(offset) + (blockIdx.x + 1) * kWindow;
}

inline unsigned rank() { return blockIdx.x % clusters.size; }

inline unsigned address_in(unsigned shared, unsigned rank) {
  if (rank >= clusters.size) ClusterState::fail("a rank beyond the cluster");
  const unsigned first = blockIdx.x / clusters.size * clusters.size;
  return shared % kWindow + (first + rank + 1) * kWindow;
}

// The scheduler's own count, for which ThreadSanitizer knows no order of fibers.
CUDA_EMU_INTERNAL inline void count_progress() { ++::cuda_emu::block->progress; }

// Until done(), asked with the mutex held; fails where nothing has happened for long.
template <class Done>
void wait_until(const char* what, const Done& done) {
  using Clock = std::chrono::steady_clock;
  constexpr auto kLong = std::chrono::seconds(30);
  // Events, by any thread of this block: fibers of one thread, which ThreadSanitizer tells apart.
  thread_local std::atomic<unsigned long> seen = 0;
  unsigned long events = 0;
  Clock::time_point last = Clock::now();
  for (;;) {
    bool idle = false;
    {
      const Lock lock(clusters.mutex);
      if (done()) return;
      if (clusters.events != events) events = clusters.events, last = Clock::now();
      idle = seen == clusters.events;
      seen = clusters.events;
    }
    if (Clock::now() - last > kLong) ClusterState::fail(what);
    count_progress();  // of others, for all that this block knows
    ::cuda_emu::yield_to_scheduler();
    // Others have the processor meanwhile.
    if (idle) std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
}

inline void sync() {
  const unsigned cluster = blockIdx.x / clusters.size;
  unsigned round = 0;
  {
    const Lock lock(clusters.mutex);
    clusters.shared[blockIdx.x] = ::cuda_emu::block->dynamic_shared;
    round = clusters.rounds[cluster];
    if (++clusters.arrived[cluster] == clusters.size * blockDim.x) {
      clusters.arrived[cluster] = 0;
      ++clusters.rounds[cluster];
    }
    ++clusters.events;
  }
  wait_until("a cluster's barrier that some threads never reach",
             [&] { return clusters.rounds[cluster] != round; });
}

inline const char* key_of(const uint64_t* barrier) {
  return reinterpret_cast<const char*>(barrier);
}

inline void init(uint64_t* barrier) {
  const Lock lock(clusters.mutex);
  clusters.barriers[key_of(barrier)] = {};
}

inline void show_barriers() {}

inline void expect(uint64_t* barrier, unsigned bytes) {
  const Lock lock(clusters.mutex);
  ::cuda_emu::ByteBarrier& one = clusters.barriers.at(key_of(barrier));
  if (one.expects) ClusterState::fail("expected twice in a phase");
  one.expects = true;
  one.bytes += bytes;
  one.look();
  ++clusters.events;
}

inline void send(unsigned to, const uint4& words, unsigned barrier) {
  const Lock lock(clusters.mutex);
  const auto pointer = [&](unsigned address) {
    const auto found = clusters.shared.find(address / kWindow - 1);
    if (found == clusters.shared.end()) ClusterState::fail("sent to a block that is not there");
    if (address % kWindow >= ::cuda_emu::block->launch->shared)
      ClusterState::fail("sent beyond shared memory");
    return found->second + address % kWindow;
  };
  if (to % ::cuda_emu::Message::kBytes != 0) ClusterState::fail("sent off its alignment");
  ::cuda_emu::Message message;
  message.to = pointer(to);
  message.barrier = pointer(barrier);
  std::memcpy(message.bytes, &words, sizeof(words));
  clusters.under_way.push_back(message);
  ++clusters.events;
}

inline void wait(uint64_t* barrier, unsigned parity) {
  wait_until("waits for bytes that never come", [&] {
    clusters.deliver();
    return clusters.barriers.at(key_of(barrier)).phase % 2 != parity;
  });
}

}  // namespace lstm_ext::cuda::cluster
