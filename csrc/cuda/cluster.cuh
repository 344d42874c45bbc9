// What a kernel needs of a cluster of blocks: its barrier, the address of a block's shared memory
// in another, barriers that count bytes, and stores that complete them.
#pragma once

#include "cuda/kernels.h"
#include "cuda/platform.cuh"

// Whether the code that is being compiled may use them: launch() runs none that may not.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define LSTM_EXT_HAS_CLUSTERS 0
#else
#define LSTM_EXT_HAS_CLUSTERS 1
#endif

#if defined(LSTM_EXT_CUDA_EMU)
#include "cluster_emu.h"
#else

namespace lstm_ext::cuda::cluster {

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Of the block in its cluster.
__device__ inline unsigned rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Of what lies at `shared` here, in the block of that rank.
__device__ inline unsigned address_in(unsigned shared, unsigned rank) {
  unsigned address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

// All threads of all blocks.
__device__ inline void sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// One thread: a barrier whose phase ends when expect() was called once, and the bytes have come.
__device__ inline void init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// After all init(), before the cluster's barrier.
__device__ inline void show_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void expect(uint64_t* barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// 16 bytes to another block's shared memory, which count at its barrier.
__device__ inline void send(unsigned to, const uint4& words, unsigned barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(barrier)
      : "memory");
}

// Until the phase of that parity has ended. Of the block's scope, though others send: what they
// send goes to this block's shared memory, and a wait of the cluster's scope would empty the
// first-level cache too.
__device__ inline void wait(uint64_t* barrier, unsigned parity) {
  unsigned done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (done == 0);
}

}  // namespace lstm_ext::cuda::cluster
#endif

namespace lstm_ext::cuda {

// How many clusters surely run at once: one fewer than the multiprocessors would do for, which lie
// in groups that a cluster cannot cross. (132 of an H100: 15 of 8 blocks, 7 of 16.)
inline int clusters_at_once(int blocks, const Device& device) {
  const int all = device.multiprocessors / blocks;
  return all > 1 ? all - 1 : all;
}

// In how many turns clusters of a shape take N rows.
template <class Shape>
int64_t turns_of(Shape /*shape*/, int64_t N, const Device& device) {
  const int64_t clusters = (N + Shape::kRows - 1) / Shape::kRows;
  const int at_once = clusters_at_once(Shape::kBlocks, device);
  return at_once > 0 ? (clusters + at_once - 1) / at_once : 0;
}

}  // namespace lstm_ext::cuda
