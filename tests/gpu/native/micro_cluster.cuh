// Thread block clusters: barriers, and numbers put into another block's shared memory by st.async,
// which complete an mbarrier there.
#pragma once

#include "micro_common.cuh"

namespace micro {

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline unsigned address_in(unsigned shared, unsigned rank) {
  unsigned address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ inline void init_barrier(uint64_t* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
__device__ inline void show_barriers_to_cluster() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void expect_bytes(uint64_t* barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
__device__ inline void store_async(unsigned to, uint64_t value, unsigned barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(to),
      "l"(value), "r"(barrier)
      : "memory");
}
__device__ inline bool wait_phase(uint64_t* barrier, unsigned parity) {
  const long long begin = clock64();
  for (;;) {
    unsigned done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    if (done != 0) return true;
    if (too_long(begin)) return false;
  }
}

__global__ void __launch_bounds__(kThreads) cluster_barrier_kernel(long long* found, int steps) {
  cluster_arrive();
  cluster_wait();
  const long long begin = clock64();
  for (int step = 0; step < steps; ++step) {
    cluster_arrive();
    cluster_wait();
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *found = (clock64() - begin) / steps;
}

// Eight bytes from the first block to the last and back.
__global__ void cluster_ping_pong_kernel(long long* found, unsigned* failures, unsigned ranks,
                                         int steps) {
  __shared__ __align__(16) uint64_t barrier, slot;
  const unsigned rank = cluster_rank();
  if (threadIdx.x == 0) {
    init_barrier(&barrier, 1);
    show_barriers_to_cluster();
  }
  __syncthreads();
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0 && (rank == 0 || rank == ranks - 1)) {
    const unsigned peer = rank == 0 ? ranks - 1 : 0;
    const unsigned to = address_in(shared_address(&slot), peer);
    const unsigned to_barrier = address_in(shared_address(&barrier), peer);
    bool came = true;
    const long long begin = clock64();
    for (int step = 0; step < steps && came; ++step) {
      expect_bytes(&barrier, sizeof(slot));
      if (rank == 0) store_async(to, step, to_barrier);
      came = wait_phase(&barrier, step % 2);
      if (rank != 0 && came) store_async(to, slot, to_barrier);
    }
    if (!came) atomicAdd(failures, 1);
    if (rank == 0) *found = (clock64() - begin) / steps;
  }
  // No block leaves while another still writes to it.
  __syncthreads();
  cluster_arrive();
  cluster_wait();
}

// A step: every thread gives its eight bytes to every block of its cluster, and waits for all that
// come to its own. Two buffers and two barriers take turns.
__global__ void __launch_bounds__(kThreads)
    cluster_exchange_kernel(long long* found, unsigned* failures, uint64_t* sink, unsigned ranks,
                            int steps) {
  extern __shared__ __align__(16) uint64_t received[];  // [2][ranks][threads]
  __shared__ __align__(16) uint64_t barriers[2];
  const unsigned thread = threadIdx.x, rank = cluster_rank(), a_step = ranks * kThreads;
  if (thread == 0) {
    init_barrier(&barriers[0], 1);
    init_barrier(&barriers[1], 1);
    show_barriers_to_cluster();
  }
  __syncthreads();
  cluster_arrive();
  cluster_wait();
  uint64_t sum = thread;
  bool came = true;
  const long long begin = clock64();
  for (int step = 0; step < steps && came; ++step) {
    uint64_t* const barrier = &barriers[step % 2];
    uint64_t* const here = received + step % 2 * a_step;
    if (thread == 0) expect_bytes(barrier, static_cast<unsigned>(a_step * sizeof(uint64_t)));
    const unsigned at = shared_address(here + rank * kThreads + thread);
    for (unsigned to = 0; to < ranks; ++to)
      store_async(address_in(at, to), sum, address_in(shared_address(barrier), to));
    came = wait_phase(barrier, step / 2 % 2);
    for (unsigned from = 0; from < ranks; ++from) sum += here[from * kThreads + thread];
  }
  if (!came) atomicAdd(failures, 1);
  if (blockIdx.x == 0 && thread == 0) *found = (clock64() - begin) / steps;
  sink[blockIdx.x * kThreads + thread] = sum;
  __syncthreads();
  cluster_arrive();
  cluster_wait();
}

inline int most_clusters(int size, size_t shared) {
  const auto kernel = cluster_exchange_kernel;
  must(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                            static_cast<int>(shared)),
       "shared memory");
  must(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
       "cluster size");
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(size));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  must(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "occupancy");
  return clusters;
}

inline void measure_cluster(int size) {
  const std::string suffix = "_size_" + std::to_string(size);
  constexpr int kSteps = 1000;
  Array<unsigned> failures(1);
  const auto given_up = [&] {
    if (failures.first() == 0) return;
    throw std::runtime_error("a wait was given up");
  };
  How how;
  how.blocks = how.cluster = size;
  const auto try_one = [&](const std::string& name, const auto& body) {
    try {
      body(name);
    } catch (const std::exception& error) {
      cudaGetLastError();
      no_result(name, error.what());
    }
  };
  try_one("cluster_barrier" + suffix, [&](const std::string& name) {
    result(name, cycles(how, cluster_barrier_kernel, kSteps), "cycles", "arrive and wait");
  });
  try_one("cluster_round_trip" + suffix, [&](const std::string& name) {
    How few = how;
    few.threads = 32;
    const double found =
        cycles(few, cluster_ping_pong_kernel, failures.at(), static_cast<unsigned>(size), kSteps);
    given_up();
    result(name, found, "cycles", "st.async of 8 bytes to the last block and back");
  });
  const size_t shared = size_t{2} * size * kThreads * sizeof(uint64_t);
  for (const bool full : {false, true})
    try_one("cluster_exchange" + suffix + (full ? "_all_clusters" : "_one_cluster"),
            [&](const std::string& name) {
              const int clusters = full ? most_clusters(size, 200 * 1024) : 1;
              how.blocks = size * clusters;
              how.shared = full ? 200 * 1024 : shared;
              Array<uint64_t> sink(size_t{kThreads} * how.blocks);
              const double found = cycles(how, cluster_exchange_kernel, failures.at(), sink.at(),
                                          static_cast<unsigned>(size), kSteps);
              given_up();
              result(name, found, "cycles",
                     "a step: every block gives 2 KiB to every block of its cluster; clusters " +
                         std::to_string(clusters));
            });
  try_one("clusters_at_once" + suffix, [&](const std::string& name) {
    result(name, most_clusters(size, 200 * 1024), "clusters", "200 KiB of shared memory a block");
  });
}

}  // namespace micro
