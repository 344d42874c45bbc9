// Kernels with a bug each, by which tests/test_cuda_emu.py makes sure that the emulator still finds
// such bugs. The argument is the number of the bug, 0 for none; the exit status 0 says that the
// numbers came out right in every order tried.
#include <string>

#include "buffer.h"
#include "cuda/platform.cuh"

namespace {

using namespace lstm_ext::cuda;

constexpr int kThreads = 128;

enum Bug {
  kNone,
  kNoBarrier,         // shared memory read before all have written it
  kNoWarpBarrier,     // the same within a warp, where a shuffle in between orders nothing
  kNoGridBarrier,     // the same between blocks
  kOutOfShared,       // beyond the end of dynamic shared memory
  kDivergentBarrier,  // not reached by all
  kTwoBarriers,       // each reached by some
  kLeftEarly,         // threads return before a barrier
  kAbsentLane,        // a shuffle whose mask names a lane that has left
  kForeignLane,       // a shuffle that reads a lane outside its mask
  kUnwritten,         // shared memory that nobody has written
  kNotCooperative,    // blocks wait for each other in an ordinary launch
  kTwoParts,          // none: the grid's barrier in two parts
  kStoredLate,        // what others wait for is stored after arriving
  kReadEarly,         // what others store is read before waiting
  kNotArrived,        // waits without having arrived
  kArrivedTwice,      // without waiting in between
  kNotWaited,         // arrives, and leaves
};

// y[block] = sum of x[block, :], and then, where asked, every block has all others' sums added.
template <int kBug>
__global__ void sums_kernel(const float* x, float* y, float* totals, int columns) {
  LSTM_EXT_DYNAMIC_SHARED(float, shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  if (kBug == kLeftEarly && thread == 5) return;
  if (kBug == kAbsentLane && lane == 31) return;
  float sum = 0, own_total = 0;
  for (int k = thread; k < columns; k += kThreads) sum += x[blockIdx.x * columns + k];
  for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
  if (kBug == kForeignLane && lane < 16) sum += 0 * __shfl_xor_sync(0xffff, sum, 16);
  if (lane == 0 && !(kBug == kUnwritten && warp == 2)) shared[warp] = sum;
  if (kBug == kDivergentBarrier) {
    if (thread < 16) __syncthreads();
  } else if (kBug == kTwoBarriers) {
    if (thread < 16)
      __syncthreads();
    else
      __syncthreads();
  } else if (kBug != kNoBarrier) {
    __syncthreads();
  }
  if (warp == 0) {
    const int at = lane + (kBug == kOutOfShared ? 1 : 0);
    float part = lane < kThreads / kWarpSize ? shared[at] : 0;
    // By way of shared memory, so that the order within a warp counts.
    __syncwarp();
    shared[kThreads / kWarpSize + lane] = part;
    if (kBug == kNoWarpBarrier)
      part += 0 * __shfl_xor_sync(kAllLanes, part, 1);
    else
      __syncwarp();
    if (lane == 0) {
      float total = 0;
      for (int k = 0; k < kWarpSize; ++k) total += shared[kThreads / kWarpSize + k];
      own_total = total;
      if (kBug != kStoredLate) y[blockIdx.x] = total;
    }
  }
  if (totals == nullptr) return;
  const auto grid = cooperative_groups::this_grid();
  const auto add_up = [&] {
    if (thread != 0) return;
    float total = 0;
    for (unsigned k = 0; k < gridDim.x; ++k) total += y[k];
    totals[blockIdx.x] = total;
  };
  if (kBug < kTwoParts) {
    if (kBug != kNoGridBarrier) grid.sync();
    add_up();
    return;
  }
  auto arrival = kBug == kNotArrived ? 0 : grid.barrier_arrive();
  if (kBug == kArrivedTwice) arrival = grid.barrier_arrive();
  if (kBug == kStoredLate && thread == 0) y[blockIdx.x] = own_total;
  if (kBug == kReadEarly) add_up();
  if (kBug == kNotWaited) return;
  grid.barrier_wait(std::move(arrival));
  if (kBug != kReadEarly) add_up();
}

template <int kBug>
int run() {
  constexpr int kBlocks = 3, kColumns = 300;
  const bool in_grid = kBug == kNone || kBug == kNoGridBarrier || kBug >= kNotCooperative;
  std::mt19937 random(1);
  const check::Values values = check::draw<float>(kBlocks * kColumns, 1, random);
  check::Values expected(kBlocks), total(kBlocks);
  for (int k = 0; k < kBlocks * kColumns; ++k) expected[k / kColumns] += values[k];
  for (int k = 0; k < kBlocks * kBlocks; ++k) total[k / kBlocks] += expected[k % kBlocks];
  check::Report report;
  for (cuda_emu::seed = 0; cuda_emu::seed < 4; ++cuda_emu::seed) {
    check::Buffer<float> x(values), y(kBlocks), totals(kBlocks);
    Launch how = {dim3(kBlocks), dim3(kThreads)};
    how.shared = sizeof(float) * (kThreads / kWarpSize + (kBug == kOutOfShared ? 0 : kWarpSize));
    how.cooperative = in_grid && kBug != kNotCooperative;
    const cudaError_t error = launch(how, sums_kernel<kBug>, static_cast<const float*>(x.at()),
                                     y.at(), in_grid ? totals.at() : nullptr, kColumns);
    report.that(error == cudaSuccess, "it ran");
    report.close(y.values(), expected, 1e-5, "sums");
    if (in_grid) report.close(totals.values(), total, 1e-5, "totals");
  }
  return report.finish();
}

}  // namespace

int main(int count, char** arguments) {
  switch (count > 1 ? std::atoi(arguments[1]) : 0) {
    case kNone:
      return run<kNone>();
    case kNoBarrier:
      return run<kNoBarrier>();
    case kNoWarpBarrier:
      return run<kNoWarpBarrier>();
    case kNoGridBarrier:
      return run<kNoGridBarrier>();
    case kOutOfShared:
      return run<kOutOfShared>();
    case kDivergentBarrier:
      return run<kDivergentBarrier>();
    case kTwoBarriers:
      return run<kTwoBarriers>();
    case kLeftEarly:
      return run<kLeftEarly>();
    case kAbsentLane:
      return run<kAbsentLane>();
    case kForeignLane:
      return run<kForeignLane>();
    case kUnwritten:
      return run<kUnwritten>();
    case kNotCooperative:
      return run<kNotCooperative>();
    case kTwoParts:
      return run<kTwoParts>();
    case kStoredLate:
      return run<kStoredLate>();
    case kReadEarly:
      return run<kReadEarly>();
    case kNotArrived:
      return run<kNotArrived>();
    case kArrivedTwice:
      return run<kArrivedTwice>();
    case kNotWaited:
      return run<kNotWaited>();
  }
  return 2;
}
