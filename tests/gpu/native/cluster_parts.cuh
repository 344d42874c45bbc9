// What a kernel needs of a cluster of blocks: its barrier, the address of a block's shared memory
// in another, barriers that count bytes, and stores that complete them. cluster_emu.h has the same
// for the emulator.
#pragma once

#include "cuda/platform.cuh"

#if defined(LSTM_EXT_CUDA_EMU)
#include "cluster_emu.h"
#else

namespace lstm_ext::cuda::cluster {

// No thread waits longer in one place: a tenth of a second or so, and then for nothing any more.
constexpr long long kMostCycles = 200'000'000;

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
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
// Of the block's scope, though others send: what they send goes to this block's shared memory, and a
// wait of the cluster's scope would empty the first-level cache too.
__device__ inline bool has_come(uint64_t* barrier, unsigned parity) {
  unsigned done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}
// Until the phase of that parity has ended. What gives up, or finds that another thread of the
// block has, says so in *given_up: nobody waits after that.
__device__ inline void wait(uint64_t* barrier, unsigned parity, volatile unsigned* given_up) {
  if (has_come(barrier, parity)) return;
  const long long begin = clock64();
  while (!has_come(barrier, parity)) {
    if (*given_up != 0) return;
    if (clock64() - begin > kMostCycles) *given_up = 1;
  }
}

// blocks: a multiple of the cluster's. Asked first whether one cluster fits at all.
template <class... Parameters, class... Arguments>
cudaError_t launch(const Launch& how, unsigned blocks_a_cluster, int* active,
                   void (*kernel)(Parameters...), Arguments... arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(how.shared));
  if (error == cudaSuccess && blocks_a_cluster > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {blocks_a_cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared;
  config.stream = how.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (active != nullptr) {
    error = cudaOccupancyMaxActiveClusters(active, kernel, &config);
    if (error != cudaSuccess) return error;
    if (*active == 0) return cudaErrorInvalidConfiguration;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace lstm_ext::cuda::cluster
#endif
