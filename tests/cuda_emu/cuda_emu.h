// Runs CUDA kernels on the CPU, from the sources that nvcc compiles: a checker, not a fast one.
//
// A CUDA thread is a fiber, a block an OS thread that switches between its fibers. They run in an
// order drawn from a seed and change places only where they wait for each other, so that a missing
// barrier shows as a wrong number; to ThreadSanitizer fibers are threads, and barriers alone order
// them, so that it names both lines of a race. Dynamic shared memory starts as NaN.
//
// A grid's barrier in two parts orders what is done before the first and after the second, no more.
// Blocks of a cluster run at once, one cluster after another (cluster_emu.h).
//
// Found and reported: threads that miss a barrier or leave before it, or do the parts of a barrier
// out of turn, warp functions whose mask names absent lanes, launches beyond the hardware's limits.
// Not modelled: rounding of device functions, memory fences, registers, speed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include "cluster_state.h"
#include "stacks.h"

#undef __launch_bounds__
#define __launch_bounds__(...)

namespace cuda_emu {

// What a launch may ask for: those of an H100 unless a test narrows them.
struct Limits {
  unsigned threads_per_block = 1024;
  size_t shared_per_block = 227 * 1024;
  unsigned multiprocessors = 132;
  unsigned threads_per_multiprocessor = 2048;
  size_t shared_per_multiprocessor = 228 * 1024;
  unsigned blocks_per_multiprocessor = 32;
  unsigned blocks_per_cluster = 16;
};
inline Limits limits;
// LSTM_EXT_EMU_MULTIPROCESSORS: fewer than the launchers are told of, so that launches are refused.
inline const bool limits_from_environment = [] {
  const char* const count = std::getenv("LSTM_EXT_EMU_MULTIPROCESSORS");
  if (count != nullptr) limits.multiprocessors = static_cast<unsigned>(std::atoi(count));
  return true;
}();
// 0: threads run in the order of their numbers.
inline unsigned seed = 0;
// Launches since the start of the program, and what the last of them asked for.
inline unsigned long launches = 0;
struct Asked {
  dim3 grid, block;
  size_t shared;
  bool cooperative;
  unsigned cluster;
};
inline Asked asked;
// Whether launches are run, or only looked at.
inline bool runs = true;

// Functions of the emulator itself, which ThreadSanitizer is not to look into.
#define CUDA_EMU_INTERNAL __attribute__((noinline, no_sanitize("thread")))

constexpr unsigned kWarp = 32;
constexpr size_t kSlot = 64;  // bytes that a lane can show to its warp at once

struct Meeting {  // of all threads of a block
  unsigned arrived = 0, round = 0;
  char order = 0;  // an address by which ThreadSanitizer knows this barrier
};

struct WarpMeeting {  // of the lanes of a mask
  unsigned mask = 0, arrived = 0, round = 0;
  char order = 0;
  // Two sets: a lane may show its next value while another still reads the last one.
  unsigned char slots[2][kWarp][kSlot];
};

struct GridPart {  // a block's part of a grid's barrier
  unsigned arrived = 0, waiting = 0, arrivals = 0, passed = 0;
};

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  uint3 index;
  unsigned number = 0;
  bool done = false, started = false;
  bool arrived = false;  // at the grid's barrier, and has not yet waited
  const char* waits_in = nullptr;
  int line = 0;
  unsigned round = 0;  // that it waits to end
  void* tsan = nullptr;
  void* fake_stack = nullptr;
};

struct Grid {
  dim3 grid, block;
  size_t shared;
  bool cooperative;
  unsigned seed;
  std::function<void()> body;
  // The grid's barrier: blocks that have arrived, rounds that have ended.
  unsigned blocks = 0, arrived = 0, round = 0;
  char order[2] = {};  // as Meeting's, of even rounds and odd: some arrive while others still wait
};

constexpr unsigned kMasks = 4;  // different ones that a kernel may use in a warp

// Plain pointers, not containers: their functions would be ThreadSanitizer's business.
struct Block {
  Grid* launch = nullptr;
  uint3 index;
  unsigned threads = 0, alive = 0;
  Fiber* fibers = nullptr;
  WarpMeeting* meetings = nullptr;  // [warps][kMasks]
  Meeting all;
  GridPart grid;
  char* dynamic_shared = nullptr;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  unsigned long progress = 0;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
};
inline thread_local Block* block = nullptr;

CUDA_EMU_INTERNAL inline Fiber& self() { return *block->current; }

[[noreturn]] CUDA_EMU_INTERNAL inline void fail(const char* what, int line) {
  const Fiber& fiber = *block->current;
  unsigned left = 0;
  for (unsigned k = 0; k < block->threads; ++k) left += block->fibers[k].done;
  std::fprintf(stderr, "cuda_emu: %s (line %d, block %u, thread %u; %u of %u threads have left)\n",
               what, line, block->index.x, fiber.number, left, block->threads);
  for (unsigned k = 0; k < block->threads; ++k)
    if (const Fiber& other = block->fibers[k]; !other.done && other.waits_in != nullptr) {
      std::fprintf(stderr, "  thread %u waits in %s at line %d\n", other.number, other.waits_in,
                   other.line);
      break;
    }
  std::abort();
}

inline constexpr char kSyncThreads[] = "__syncthreads";

CUDA_EMU_INTERNAL inline void yield_to_scheduler() {
  Fiber& fiber = self();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, block->stack_bottom,
                                 block->stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  // To change places is no synchronisation, but to leave is.
  __tsan_switch_to_fiber(block->tsan, fiber.done ? 0 : __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&fiber.context, &block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

CUDA_EMU_INTERNAL inline void leave_order(char& order) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&order);
#else
  (void)order;
#endif
}

CUDA_EMU_INTERNAL inline void enter_order(char& order) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&order);
#else
  (void)order;
#endif
}

CUDA_EMU_INTERNAL inline void wait_for_round(const unsigned& round, unsigned old, const char* what,
                                             int line) {
  Fiber& fiber = self();
  fiber.waits_in = what;
  fiber.line = line;
  fiber.round = old;
  while (round == old) yield_to_scheduler();
  fiber.waits_in = nullptr;
}

CUDA_EMU_INTERNAL inline void sync_block(int line) {
  Meeting& all = block->all;
  if (block->alive != block->threads) fail("__syncthreads that some threads cannot reach", line);
  for (unsigned k = 0; k < block->threads; ++k)
    if (const Fiber& other = block->fibers[k]; &other != &self() &&
                                               other.waits_in == kSyncThreads &&
                                               other.round == all.round && other.line != line)
      fail("two different __syncthreads at a time", line);
  leave_order(all.order);
  const unsigned round = all.round;
  if (++all.arrived == block->threads) {
    all.arrived = 0;
    ++all.round;
    ++block->progress;
  } else {
    wait_for_round(all.round, round, kSyncThreads, line);
  }
  enter_order(all.order);
}

CUDA_EMU_INTERNAL inline unsigned lane() { return self().number % kWarp; }

CUDA_EMU_INTERNAL inline WarpMeeting& warp_meeting(unsigned mask, int line) {
  const unsigned warp = self().number / kWarp;
  const unsigned after = block->threads - warp * kWarp, lanes = after < kWarp ? after : kWarp;
  const unsigned there = lanes == kWarp ? ~0u : (1u << lanes) - 1;
  if ((mask & (1u << lane())) == 0) fail("a warp mask without the calling lane", line);
  if ((mask & ~there) != 0) fail("a warp mask with lanes that the block does not have", line);
  for (unsigned k = 0; k < lanes; ++k)
    if ((mask & (1u << k)) != 0 && block->fibers[warp * kWarp + k].done)
      fail("a warp mask with a lane that has left", line);
  for (unsigned k = 0; k < kMasks; ++k) {
    WarpMeeting& meeting = block->meetings[warp * kMasks + k];
    if (meeting.mask == 0) meeting.mask = mask;
    if (meeting.mask == mask) return meeting;
  }
  fail("more different warp masks than this emulator keeps", line);
}

// All lanes of the mask meet. memory: whether that orders their accesses to memory, as __syncwarp
// does and the shuffles do not.
CUDA_EMU_INTERNAL inline void sync_warp(WarpMeeting& meeting, bool memory, int line) {
  if (memory) leave_order(meeting.order);
  const unsigned round = meeting.round, bit = 1u << lane();
  if ((meeting.arrived & bit) != 0) fail("a lane twice in one warp function", line);
  meeting.arrived |= bit;
  if (meeting.arrived == meeting.mask) {
    meeting.arrived = 0;
    ++meeting.round;
    ++block->progress;
  } else {
    wait_for_round(meeting.round, round, "a warp function", line);
  }
  if (memory) enter_order(meeting.order);
}

// Shows a value to the lanes of the mask; read(k) is lane k's, until the next call.
template <class T>
struct Shown {
  const unsigned char (*slots)[kSlot];
  unsigned mask;
  int line;

  CUDA_EMU_INTERNAL T read(unsigned k) const {
    if (k >= kWarp || (mask & (1u << k)) == 0) fail("a value of a lane outside the mask", line);
    T value;
    auto* bytes = reinterpret_cast<unsigned char*>(&value);
    for (size_t i = 0; i < sizeof(T); ++i) bytes[i] = slots[k][i];
    return value;
  }
};

template <class T>
CUDA_EMU_INTERNAL Shown<T> show(T value, unsigned mask, int line) {
  static_assert(sizeof(T) <= kSlot);
  WarpMeeting& meeting = warp_meeting(mask, line);
  auto& slots = meeting.slots[meeting.round % 2];
  const auto* bytes = reinterpret_cast<const unsigned char*>(&value);
  for (size_t i = 0; i < sizeof(T); ++i) slots[lane()][i] = bytes[i];
  sync_warp(meeting, false, line);
  return {slots, mask, line};
}

// The round in which the calling thread arrives. Nobody waits here.
CUDA_EMU_INTERNAL inline unsigned arrive_at_grid(int line) {
  Grid& grid = *block->launch;
  GridPart& part = block->grid;
  if (!grid.cooperative) fail("a grid's barrier in a launch that is not cooperative", line);
  if (block->alive != block->threads) fail("a grid's barrier that some threads cannot reach", line);
  if (self().arrived) fail("arrived twice at a grid's barrier", line);
  self().arrived = true;
  const unsigned round = part.arrivals;
  leave_order(grid.order[round % 2]);
  if (++part.arrived < block->threads) return round;
  part.arrived = 0;
  ++part.arrivals;
  ++block->progress;
  // By hand, for what ThreadSanitizer knows of would order more than the barrier does.
  if (__atomic_add_fetch(&grid.arrived, 1, __ATOMIC_ACQ_REL) == grid.blocks) {
    __atomic_store_n(&grid.arrived, 0, __ATOMIC_RELAXED);
    __atomic_add_fetch(&grid.round, 1, __ATOMIC_RELEASE);
    syscall(SYS_futex, &grid.round, FUTEX_WAKE_PRIVATE, grid.blocks, nullptr, nullptr, 0);
  }
  return round;
}

CUDA_EMU_INTERNAL inline void wait_for_grid(unsigned round, int line) {
  Grid& grid = *block->launch;
  GridPart& part = block->grid;
  if (!self().arrived) fail("waits at a grid's barrier without having arrived", line);
  // The last of a block waits for the other blocks.
  if (++part.waiting == block->threads) {
    while (__atomic_load_n(&grid.round, __ATOMIC_ACQUIRE) == round)
      syscall(SYS_futex, &grid.round, FUTEX_WAIT_PRIVATE, round, nullptr, nullptr, 0);
    part.waiting = 0;
    ++part.passed;
    ++block->progress;
  } else {
    wait_for_round(part.passed, round, "a grid's barrier", line);
  }
  self().arrived = false;
  enter_order(grid.order[round % 2]);
}

CUDA_EMU_INTERNAL inline void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->stack_bottom, &block->stack_size);
#endif
  // All begin before any goes on: none is to see what another has done until it ended.
  ++block->progress;
  yield_to_scheduler();
  block->launch->body();
  if (self().arrived) fail("left before it waited at a grid's barrier", self().line);
  block->current->done = true;
  --block->alive;
  ++block->progress;
  yield_to_scheduler();
}

CUDA_EMU_INTERNAL inline void resume(Block& running, Fiber& fiber) {
  running.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&running.fake_stack, fiber.stack, kStack);
#endif
#if defined(__SANITIZE_THREAD__)
  // A thread sees what was written before the launch.
  __tsan_switch_to_fiber(fiber.tsan, fiber.started ? __tsan_switch_to_fiber_no_sync : 0);
#endif
  fiber.started = true;
  swapcontext(&running.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(running.fake_stack, nullptr, nullptr);
#endif
}

CUDA_EMU_INTERNAL inline void run_block(Grid& grid, unsigned number) {
  Block running;
  block = &running;
  running.launch = &grid;
  running.index = {number % grid.grid.x, number / grid.grid.x % grid.grid.y,
                   number / (grid.grid.x * grid.grid.y)};
  running.threads = running.alive = grid.block.x * grid.block.y * grid.block.z;
  std::vector<Fiber> fibers(running.threads);
  std::vector<WarpMeeting> meetings((running.threads + kWarp - 1) / kWarp * kMasks);
  std::vector<Stack> taken = stacks.take(running.threads);
  running.fibers = fibers.data();
  running.meetings = meetings.data();
  // malloc and not a vector: what lies beyond must be ASan's.
  std::unique_ptr<char, void (*)(void*)> shared(
      static_cast<char*>(std::aligned_alloc(128, (grid.shared + 127) / 128 * 128 + 128)),
      std::free);
  running.dynamic_shared = shared.get();
  std::memset(shared.get(), 0xff, grid.shared);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(shared.get() + grid.shared, 128);
#endif
#if defined(__SANITIZE_THREAD__)
  running.tsan = __tsan_get_current_fiber();
#endif
  for (unsigned k = 0; k < running.threads; ++k) {
    Fiber& fiber = fibers[k];
    fiber.number = k;
    fiber.index = {k % grid.block.x, k / grid.block.x % grid.block.y,
                   k / (grid.block.x * grid.block.y)};
    fiber.stack = taken[k].memory.get();
    fiber.tsan = taken[k].tsan;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  std::vector<Fiber*> order;
  for (Fiber& fiber : fibers) order.push_back(&fiber);
  std::mt19937 random(grid.seed * 7919u + number);
  while (running.alive != 0) {
    const unsigned long before = running.progress;
    if (grid.seed != 0) std::shuffle(order.begin(), order.end(), random);
    for (Fiber* fiber : order)
      if (!fiber->done) resume(running, *fiber);
    if (running.progress == before)
      fail("some threads wait for others that never come", running.current->line);
  }
  stacks.give_back(std::move(taken));
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(shared.get() + grid.shared, 128);
#endif
  block = nullptr;
}

inline unsigned resident_blocks(unsigned threads, size_t shared) {
  const auto each = static_cast<unsigned>(limits.shared_per_multiprocessor / (shared + 1024));
  return limits.multiprocessors * std::min({limits.blocks_per_multiprocessor,
                                            limits.threads_per_multiprocessor / threads, each});
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared,
                   bool cooperative, unsigned cluster, Arguments... arguments) {
  const size_t count = size_t{threads.x} * threads.y * threads.z;
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  if (count == 0 || count > limits.threads_per_block || threads.z > 64 || blocks == 0 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (shared > limits.shared_per_block) return cudaErrorInvalidValue;
  // Registers are not modelled: a block of these kernels may need half of a multiprocessor's.
  if (cooperative && (blocks > limits.multiprocessors ||
                      blocks > resident_blocks(static_cast<unsigned>(count), shared)))
    return cudaErrorCooperativeLaunchTooLarge;
  if (grid.x % cluster != 0) return cudaErrorInvalidConfiguration;
  if (cluster > limits.blocks_per_cluster || cluster > limits.multiprocessors)
    return cudaErrorNotSupported;
  ++launches;
  asked = {grid, threads, shared, cooperative, cluster};
  if (!runs) return cudaSuccess;
  Grid run{grid, threads, shared, cooperative, seed, [=] { kernel(arguments...); }};
  run.blocks = static_cast<unsigned>(blocks);
  // Blocks that wait for each other need a thread each; of others some at a time are enough, in an
  // order of their own.
  const size_t together = cooperative   ? blocks
                          : cluster > 1 ? cluster
                                        : std::min<size_t>(blocks, 4);
  std::vector<unsigned> numbers(blocks);
  for (size_t k = 0; k < blocks; ++k) numbers[k] = static_cast<unsigned>(k);
  std::mt19937 random(seed);
  if (seed != 0 && cluster == 1) std::shuffle(numbers.begin(), numbers.end(), random);
  clusters.begin(cluster, seed);
  std::vector<std::thread> workers;
  for (size_t worker = 0; worker < together; ++worker)
    workers.emplace_back([&run, &numbers, worker, together] {
      for (size_t k = worker; k < numbers.size(); k += together) run_block(run, numbers[k]);
    });
  for (std::thread& worker : workers) worker.join();
  clusters.end();
  return cudaSuccess;
}

// One tensor-core product of a warp, D[16, 8] += A[16, K] B[K, 8], by the layout that the PTX
// manual gives for mma.sync.m16n8k16 (16-bit numbers, two a register) and m16n8k8 (tf32).
// decode(word, k) is the k'th number of a register.
template <int kPerWord, class Decode>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Decode decode, int line) {
  struct Registers {
    uint32_t a[4], b[2];
  };
  Registers mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  const Shown<Registers> shown = show(mine, ~0u, line);
  const unsigned row = lane() / 4, pair = lane() % 4;
  for (int part = 0; part < 4; ++part) {
    const unsigned m = row + (part >= 2 ? 8 : 0), n = 2 * pair + part % 2;
    float sum = 0;
    for (unsigned half = 0; half < 2; ++half)
      for (unsigned t = 0; t < 4; ++t) {
        const Registers of_a = shown.read(m % 8 * 4 + t), of_b = shown.read(n * 4 + t);
        for (int k = 0; k < kPerWord; ++k)
          sum += decode(of_a.a[m / 8 + 2 * half], k) * decode(of_b.b[half], k);
      }
    d[part] += sum;
  }
}

}  // namespace cuda_emu

#define threadIdx (::cuda_emu::self().index)
#define blockIdx (::cuda_emu::block->index)
#define blockDim (::cuda_emu::block->launch->block)
#define gridDim (::cuda_emu::block->launch->grid)

inline void __syncthreads(int line = __builtin_LINE()) { cuda_emu::sync_block(line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  cuda_emu::sync_warp(cuda_emu::warp_meeting(mask, line), true, line);
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  return cuda_emu::show(value, mask, line).read(cuda_emu::lane() ^ static_cast<unsigned>(lanes));
}

namespace cooperative_groups {
struct grid_group {
  using arrival_token = unsigned;
  arrival_token barrier_arrive(int line = __builtin_LINE()) const {
    return cuda_emu::arrive_at_grid(line);
  }
  void barrier_wait(arrival_token&& round, int line = __builtin_LINE()) const {
    cuda_emu::wait_for_grid(round, line);
  }
  void sync(int line = __builtin_LINE()) const { barrier_wait(barrier_arrive(line), line); }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups
