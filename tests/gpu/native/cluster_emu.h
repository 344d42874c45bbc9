// Clusters in the emulator (cluster_parts.cuh): blocks are OS threads that all run at once, a
// barrier is a record beside its address, and what is sent arrives later, in an order drawn anew
// whenever somebody waits.
#pragma once

#include <sched.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <vector>

#include "cuda_emu.h"

struct ClusterEmu {
  struct Barrier {
    bool armed = false;
    long bytes = 0;  // that are still to come
    unsigned phase = 0;
    void look() {
      if (!armed || bytes != 0) return;
      armed = false;
      ++phase;
    }
  };
  struct Message {
    char* to;
    char* barrier;
    uint4 words;
  };
  std::mutex mutex;
  std::map<const void*, Barrier> barriers;
  std::vector<Message> under_way;
  std::map<unsigned, char*> shared;  // by block
  std::map<unsigned, unsigned> arrived, rounds;  // at a cluster's barrier, by cluster
  std::mt19937 random{1};
  unsigned blocks_a_cluster = 1;
  unsigned long sent = 0;
  static constexpr unsigned kWindow = 1u << 24;  // addresses of a block's shared memory

  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "cluster_emu: %s\n", what);
    std::abort();
  }
  void deliver(bool all) {
    while (!under_way.empty()) {
      const size_t k = random() % under_way.size();
      const Message message = under_way[k];
      under_way[k] = under_way.back();
      under_way.pop_back();
      std::memcpy(message.to, &message.words, sizeof(message.words));
      const auto found = barriers.find(message.barrier);
      if (found == barriers.end()) fail("sent to a barrier that is none");
      found->second.bytes -= sizeof(message.words);
      found->second.look();
      if (!all && random() % 4 == 0) return;
    }
  }
  static ClusterEmu& one() {
    static ClusterEmu emulated;
    return emulated;
  }
};

namespace lstm_ext::cuda::cluster {

inline unsigned shared_address(const void* pointer) {
  const auto offset = static_cast<const char*>(pointer) - ::cuda_emu::block->dynamic_shared;
  return static_cast<unsigned>(offset) + (blockIdx.x + 1) * ClusterEmu::kWindow;
}
inline unsigned rank() { return blockIdx.x % ClusterEmu::one().blocks_a_cluster; }
inline unsigned address_in(unsigned shared, unsigned other) {
  const unsigned size = ClusterEmu::one().blocks_a_cluster;
  if (other >= size) ClusterEmu::fail("a rank beyond the cluster");
  return shared % ClusterEmu::kWindow +
         (blockIdx.x / size * size + other + 1) * ClusterEmu::kWindow;
}
inline void yield() {
  ++::cuda_emu::block->progress;
  ::cuda_emu::yield_to_scheduler();
  sched_yield();
}
inline void sync() {
  ClusterEmu& all = ClusterEmu::one();
  const unsigned cluster = blockIdx.x / all.blocks_a_cluster;
  unsigned round;
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.shared[blockIdx.x] = ::cuda_emu::block->dynamic_shared;
    round = all.rounds[cluster];
    if (++all.arrived[cluster] == all.blocks_a_cluster * blockDim.x) {
      all.arrived[cluster] = 0;
      ++all.rounds[cluster];
    }
  }
  for (;;) {
    {
      const std::lock_guard<std::mutex> lock(all.mutex);
      if (all.rounds[cluster] != round) return;
    }
    yield();
  }
}
inline void init(uint64_t* barrier) {
  ClusterEmu& all = ClusterEmu::one();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.barriers[barrier] = {};
}
inline void show_barriers() {}
inline void expect(uint64_t* barrier, unsigned bytes) {
  ClusterEmu& all = ClusterEmu::one();
  const std::lock_guard<std::mutex> lock(all.mutex);
  ClusterEmu::Barrier& one = all.barriers.at(barrier);
  if (one.armed) ClusterEmu::fail("expected twice in a phase");
  one.armed = true;
  one.bytes += bytes;
  one.look();
}
inline void send(unsigned to, const uint4& words, unsigned barrier) {
  ClusterEmu& all = ClusterEmu::one();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto pointer = [&](unsigned address) {
    const auto found = all.shared.find(address / ClusterEmu::kWindow - 1);
    if (found == all.shared.end()) ClusterEmu::fail("sent to a block that has left");
    return found->second + address % ClusterEmu::kWindow;
  };
  if (to % 16 != 0) ClusterEmu::fail("sent off its alignment");
  all.under_way.push_back({pointer(to), pointer(barrier), words});
  ++all.sent;
}
inline void wait(uint64_t* barrier, unsigned parity, volatile unsigned* given_up) {
  ClusterEmu& all = ClusterEmu::one();
  const auto begin = std::chrono::steady_clock::now();
  for (;;) {
    {
      const std::lock_guard<std::mutex> lock(all.mutex);
      all.deliver(false);
      if (all.barriers.at(barrier).phase % 2 != parity) return;
    }
    if (*given_up != 0) return;
    if (std::chrono::steady_clock::now() - begin > std::chrono::seconds(20)) *given_up = 1;
    yield();
  }
}

template <class... Parameters, class... Arguments>
cudaError_t launch(const Launch& how, unsigned blocks_a_cluster, int* active,
                   void (*kernel)(Parameters...), Arguments... arguments) {
  ClusterEmu& all = ClusterEmu::one();
  all.blocks_a_cluster = blocks_a_cluster;
  all.barriers.clear(), all.shared.clear(), all.arrived.clear(), all.rounds.clear();
  all.random.seed(::cuda_emu::seed + 1);
  if (active != nullptr) *active = 132 / static_cast<int>(blocks_a_cluster);
  if (how.grid.x % blocks_a_cluster != 0) return cudaErrorInvalidConfiguration;
  // A cluster at a time would do, but its blocks have to run at once.
  const cudaError_t error =
      ::cuda_emu::launch(kernel, how.grid, how.block, how.shared, true, arguments...);
  if (!all.under_way.empty()) ClusterEmu::fail("sent and never waited for");
  return error;
}

}  // namespace lstm_ext::cuda::cluster
