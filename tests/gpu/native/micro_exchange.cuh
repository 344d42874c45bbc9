// How long blocks take to give each other h, one step after another, in five ways.
//
// Each step every block writes its part of some 32-bit words (two halves each) and then reads all
// of them. Words alternate between two buffers, so that none is written while it is still read.
#pragma once

#include <cooperative_groups.h>

#include "micro_common.cuh"

namespace micro {

enum class Way { kGridSync, kCounter, kFlags, kFarFlags, kPackets };

inline const char* name_of(Way way) {
  switch (way) {
    case Way::kGridSync:
      return "grid_sync";
    case Way::kCounter:
      return "one_counter";
    case Way::kFlags:
      return "flag_a_block";
    case Way::kFarFlags:
      return "flag_a_block_128_bytes_apart";
    default:
      return "packets_with_tags";
  }
}

__device__ inline void store_release(unsigned* to, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
__device__ inline void add_release(unsigned* to, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
__device__ inline unsigned load_acquire(const unsigned* from) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ inline void store_packet(uint64_t* to, unsigned data, unsigned tag) {
  const uint64_t packet = static_cast<uint64_t>(tag) << 32 | data;
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(packet) : "memory");
}
__device__ inline uint64_t load_packet(const uint64_t* from) {
  uint64_t packet;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(packet) : "l"(from) : "memory");
  return packet;
}
__device__ inline unsigned tag_of(uint64_t packet) { return static_cast<unsigned>(packet >> 32); }

__device__ inline bool wait_for(const unsigned* flag, unsigned value) {
  const long long begin = clock64();
  while (static_cast<int>(load_acquire(flag) - value) < 0)
    if (too_long(begin)) return false;
  return true;
}

// words: a multiple of the threads of a block, or 0: the meeting alone.
struct Exchange {
  unsigned* flags;     // [blocks * 32]
  uint64_t* memory;    // [2][words], packets, or words of half the size
  unsigned* failures;  // waits that were given up
  int words, steps;
};

constexpr int kAtOnce = 8;  // packets that a thread asks for before it looks at the first

__device__ inline bool read_packets(const uint64_t* packets, int words, unsigned tag,
                                    unsigned& sum) {
  const long long begin = clock64();
  for (int first = static_cast<int>(threadIdx.x); first < words; first += kAtOnce * kThreads) {
    uint64_t found[kAtOnce];
    bool all = false;
    while (!all) {
      all = true;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        if (first + k * kThreads < words) found[k] = load_packet(packets + first + k * kThreads);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        if (first + k * kThreads < words) all = all && tag_of(found[k]) == tag;
      if (!all && too_long(begin)) return false;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (first + k * kThreads < words) sum += static_cast<unsigned>(found[k]);
  }
  return true;
}

template <Way kWay>
__device__ inline bool meet(const Exchange& exchange, unsigned step) {
  const int thread = static_cast<int>(threadIdx.x), blocks = static_cast<int>(gridDim.x);
  bool came = true;
  if constexpr (kWay == Way::kGridSync) {
    cooperative_groups::this_grid().sync();
  } else if constexpr (kWay == Way::kCounter) {
    __syncthreads();
    if (thread == 0) {
      add_release(exchange.flags, 1);
      came = wait_for(exchange.flags, step * gridDim.x);
    }
  } else {
    constexpr int kApart = kWay == Way::kFarFlags ? 32 : 1;
    __syncthreads();
    if (thread == 0) store_release(exchange.flags + blockIdx.x * kApart, step);
    if (thread < blocks) came = wait_for(exchange.flags + thread * kApart, step);
  }
  return __syncthreads_or(!came) == 0;
}

template <Way kWay>
__global__ void __launch_bounds__(kThreads) exchange_kernel(Exchange exchange, unsigned* sink) {
  const int thread = static_cast<int>(threadIdx.x), blocks = static_cast<int>(gridDim.x);
  const int block = static_cast<int>(blockIdx.x), words = exchange.words;
  const int first = words * block / blocks, last = words * (block + 1) / blocks;
  unsigned sum = 0;
  for (unsigned step = 1; step <= static_cast<unsigned>(exchange.steps); ++step) {
    bool all = true;
    if constexpr (kWay == Way::kPackets) {
      uint64_t* const packets = exchange.memory + step % 2 * words;
      for (int k = first + thread; k < last; k += kThreads)
        store_packet(packets + k, sum + step, step);
      all = __syncthreads_or(!read_packets(packets, words, step, sum)) == 0;
    } else {
      auto* const data = reinterpret_cast<unsigned*>(exchange.memory) + step % 2 * words;
      for (int k = first + thread; k < last; k += kThreads) __stcg(data + k, sum + step);
      all = meet<kWay>(exchange, step);
      for (int from = thread; from < words; from += kAtOnce * kThreads) {
        unsigned found[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
          if (from + k * kThreads < words) found[k] = __ldcg(data + from + k * kThreads);
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
          if (from + k * kThreads < words) sum += found[k];
      }
    }
    if (!all) {
      if (thread == 0) atomicAdd(exchange.failures, 1);
      break;
    }
  }
  sink[block * kThreads + thread] = sum;
}

template <Way kWay>
void measure_exchange(int blocks, int words) {
  const std::string name = std::string("exchange_") + name_of(kWay) + "_blocks_" +
                           std::to_string(blocks) + "_words_" + std::to_string(words);
  constexpr int kSteps = 500;
  Array<unsigned> flags(blocks * 32), failures(1), sink(blocks * kThreads);
  Array<uint64_t> memory(std::max(1, 2 * words));
  const Exchange exchange = {flags.at(), memory.at(), failures.at(), words, kSteps};
  std::vector<double> found;
  try {
    for (int k = 0; k < 4; ++k) {
      flags.clear();
      memory.clear();
      found.push_back(microseconds([&] {
        launch({blocks, kThreads, 0, true}, exchange_kernel<kWay>, exchange, sink.at());
      }));
    }
  } catch (const std::exception& error) {
    cudaGetLastError();
    return no_result(name, error.what());
  }
  if (failures.first() != 0) return no_result(name, "a wait was given up");
  result(name, 1000 * *std::min_element(found.begin() + 1, found.end()) / kSteps, "ns",
         "a step: all blocks write their words and read all words");
}

inline void measure_exchanges() {
  for (const int words : {0, 512, 8192})
    for (const int blocks : {8, 32, 66, 96, 132}) {
      measure_exchange<Way::kGridSync>(blocks, words);
      measure_exchange<Way::kCounter>(blocks, words);
      measure_exchange<Way::kFlags>(blocks, words);
      measure_exchange<Way::kFarFlags>(blocks, words);
      if (words > 0) measure_exchange<Way::kPackets>(blocks, words);
    }
}

// Two blocks, each lane with a packet of its own to and fro.
__global__ void ping_pong_kernel(long long* found, uint64_t* packets, unsigned* failures,
                                 int steps) {
  const bool first = blockIdx.x == 0;
  uint64_t* const to = packets + (first ? 0 : kThreads) + threadIdx.x;
  const uint64_t* const from = packets + (first ? kThreads : 0) + threadIdx.x;
  const long long begin = clock64();
  for (unsigned step = 1; step <= static_cast<unsigned>(steps); ++step) {
    if (first) store_packet(to, step, step);
    const long long since = clock64();
    while (tag_of(load_packet(from)) != step)
      if (too_long(since)) {
        atomicAdd(failures, 1);
        return;
      }
    if (!first) store_packet(to, step, step);
  }
  if (first && threadIdx.x == 0) *found = (clock64() - begin) / steps / 2;
}

inline void measure_ping_pong() {
  for (const int threads : {32, 256}) {
    Array<uint64_t> packets(2 * kThreads);
    Array<long long> found(1);
    Array<unsigned> failures(1);
    for (int k = 0; k < 2; ++k) {
      packets.clear();
      launch({2, threads, 0, true}, ping_pong_kernel, found.at(), packets.at(), failures.at(),
             1000);
    }
    const std::string name = "packet_one_way_threads_" + std::to_string(threads);
    if (failures.first() != 0)
      no_result(name, "a wait was given up");
    else
      result(name, static_cast<double>(found.first()), "cycles",
             "between two blocks, by way of L2");
  }
}

}  // namespace micro
