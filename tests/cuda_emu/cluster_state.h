// What the blocks of a launch in clusters know of each other: the emulator's side of cluster_emu.h.
//
// A barrier that counts bytes is a record beside its address. What is sent arrives later, in an
// order drawn anew whenever somebody waits.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <vector>

namespace cuda_emu {

struct ByteBarrier {
  bool expects = false;
  long bytes = 0;  // that are still to come; below zero where they came before they were expected
  unsigned phase = 0;

  void look() {
    if (!expects || bytes != 0) return;
    expects = false;
    ++phase;
  }
};

struct Message {
  static constexpr size_t kBytes = 16;
  char bytes[kBytes];
  char* to;
  const char* barrier;
};

struct ClusterState {
  std::mutex mutex;
  unsigned size = 1;                             // blocks of a cluster
  unsigned long events = 0;                      // that somebody may have waited for
  std::map<unsigned, char*> shared;              // by block
  std::map<unsigned, unsigned> arrived, rounds;  // at a cluster's barrier, by cluster
  std::map<const char*, ByteBarrier> barriers;
  std::vector<Message> under_way;
  std::mt19937 random;

  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "cuda_emu: %s\n", what);
    std::abort();
  }

  void begin(unsigned blocks, unsigned seed) {
    size = blocks;
    shared.clear(), arrived.clear(), rounds.clear(), barriers.clear(), under_way.clear();
    random.seed(seed + 1);
  }
  void end() const {
    if (!under_way.empty()) fail("sent to a block that waits for nothing more");
  }

  // Some of what is under way, with the mutex held.
  void deliver() {
    while (!under_way.empty()) {
      const size_t k = random() % under_way.size();
      const Message message = under_way[k];
      under_way[k] = under_way.back();
      under_way.pop_back();
      std::memcpy(message.to, message.bytes, Message::kBytes);
      const auto found = barriers.find(message.barrier);
      if (found == barriers.end()) fail("sent to a barrier that is none");
      found->second.bytes -= Message::kBytes;
      found->second.look();
      ++events;
      if (random() % 4 == 0) return;
    }
  }
};
inline ClusterState clusters;

}  // namespace cuda_emu
