// How the kernels of a whole layer spread over blocks, and where a sequence's steps lie.
//
// w_hh is read once and stays on the chip, in shared memory. Where it fits into one multiprocessor,
// each block has all of it, takes some rows of the batch through all steps and meets nobody. Else
// each block keeps the weights of its own units, takes the whole batch, and all blocks meet once a
// step, to exchange what the others need by way of memory.
#pragma once

#include <algorithm>
#include <utility>

#include "cuda/gate_tiles.cuh"
#include "cuda/kernels.h"
#include "cuda/latency.cuh"

namespace lstm_ext::cuda {

// A unit here is one of a tile: four sums of K products.
struct Plan {
  int units, unit_blocks;    // of a block; and blocks that make up all units
  int64_t rows, row_blocks;  // the same of the batch
  int split;                 // warps that share a sum
  int tile_units;            // units, and what the last tile has beyond them
  int weight_stride;         // numbers from one row of weights to the next
  size_t shared;
};

// What a block keeps beside weights and partial sums, in numbers of the type of sums.
struct Numbers {
  int a_unit, a_unit_and_row;
};

// Rows of weights begin 64 bytes apart modulo 128, so that lanes that read two rows at a time find
// them in different banks.
template <class T>
int weight_stride(int K) {
  constexpr int kNumbers = 128 / sizeof(T);
  return (K + kNumbers - 1) / kNumbers * kNumbers + kNumbers / 2;
}

template <class Tile>
Plan make_plan(int all_units, int units, int K, int64_t N, int64_t rows, const Numbers& numbers) {
  using T = typename Tile::T;
  Plan plan = {};
  plan.units = units;
  plan.unit_blocks = (all_units + units - 1) / units;
  plan.rows = rows;
  plan.row_blocks = (N + rows - 1) / rows;
  plan.split = kWarps;
  while (plan.split > 1 && kWarps / plan.split * Tile::kUnits < units) plan.split /= 2;
  plan.tile_units = (units + Tile::kUnits - 1) / Tile::kUnits * Tile::kUnits;
  plan.weight_stride = weight_stride<T>(K);
  const size_t sums = size_t{kGates} * plan.split * Tile::kRows * plan.tile_units +
                      static_cast<size_t>(numbers.a_unit) * units +
                      static_cast<size_t>(numbers.a_unit_and_row) * rows * units;
  plan.shared = sizeof(T) * kGates * units * plan.weight_stride + sizeof(typename Tile::S) * sums;
  return plan;
}

// units = 0: it does not fit.
template <class Tile>
Plan plan_blocks(int all_units, int K, int64_t N, const Numbers& numbers, const Device& device) {
  const auto fits = [&](const Plan& plan) {
    return plan.shared <= static_cast<size_t>(device.shared_per_block) &&
           plan.row_blocks <= 0x7fffffff;
  };
  Plan plan = make_plan<Tile>(all_units, all_units, K, N, Tile::kRows, numbers);
  if (fits(plan)) return plan;
  // Beyond so many rows a step is work enough for the library, whose products take more at a time.
  constexpr int64_t kMostRows = 128;
  if (N > kMostRows) return {};
  const auto spread = [&](int units) {
    plan = make_plan<Tile>(all_units, units, K, N, N, numbers);
    return plan.unit_blocks <= device.multiprocessors && fits(plan);
  };
  for (int units = Tile::kUnits; units <= kWarps * Tile::kUnits; units *= 2)
    if (spread(units)) return plan;
  // Tiles not full, where shared memory is what is short.
  for (int units = Tile::kUnits / 2; units > 0; units /= 2)
    if (spread(units)) return plan;
  return {};
}

// A block's part; units count as in the plan.
struct Part {
  int first_unit, units;
  int64_t first_row, end_row;
};

__device__ inline Part part_of_block(const Plan& plan, int all_units, int64_t N) {
  const int first_unit = static_cast<int>(blockIdx.x) % plan.unit_blocks * plan.units;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) / plan.unit_blocks * plan.rows;
  return {first_unit, min(plan.units, all_units - first_unit), first_row,
          min(first_row + plan.rows, N)};
}

// What a block wrote before it arrived, those that share its rows may read once they have waited.
// All of its threads arrive, and then wait.
class Meeting {
 public:
  __device__ explicit Meeting(const Plan& plan) : of_grid_(plan.unit_blocks > 1) {}

  __device__ void arrive() {
    if (of_grid_) token_ = cooperative_groups::this_grid().barrier_arrive();
  }
  __device__ void wait() {
    if (of_grid_)
      cooperative_groups::this_grid().barrier_wait(std::move(token_));
    else
      __syncthreads();
  }

 private:
  bool of_grid_;
  cooperative_groups::grid_group::arrival_token token_ = {};
};

// The block's sums for some rows of the batch, from row_tile on: sums of the warps' shares are left
// to who reads them, after a __syncthreads.
template <class Tile, bool kVectors>
__device__ inline void multiply(const Plan& plan, const Operand<typename Tile::T>& operand,
                                int64_t row_tile, int64_t end_row, int own_units,
                                const PartialSums<typename Tile::S>& partial) {
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
  constexpr int kAhead = latency::kStageNext && kVectors ? Tile::kMostAhead : 0;
  for (int tile = warp / plan.split * Tile::kUnits; tile < plan.units;
       tile += kWarps / plan.split * Tile::kUnits) {
    const TilePlace place = {row_tile, end_row, tile, own_units, warp % plan.split, plan.split};
    Tile sums;
    sums.template add<kVectors, kAhead>(operand, place, lane);
    sums.store(partial, place.slice, tile, lane);
  }
}

__device__ inline int64_t time_of(const Sequence& sequence, int64_t step) {
  return sequence.reverse ? sequence.L - 1 - step : step;
}

// The rows of a step: how many there are before them in memory, and the end of a block's own, which
// are below end_row of the batch. None beyond the first step and the last.
struct StepRows {
  int64_t before, end;
};

__device__ inline StepRows rows_of(const Sequence& sequence, int64_t step, int64_t end_row) {
  if (step < 0 || step >= sequence.L) return {0, 0};
  const int64_t t = time_of(sequence, step);
  if (sequence.offsets == nullptr) return {t * sequence.N, end_row};
  const int64_t before = sequence.offsets[t];
  return {before, min(end_row, sequence.offsets[t + 1] - before)};
}

__device__ inline bool is_reset(const Sequence& sequence, int64_t step, int64_t row) {
  if (sequence.reset == nullptr || step >= sequence.L) return false;
  return sequence.reset[time_of(sequence, step) * sequence.N + row];
}

inline Launch launch_of(const Plan& plan, cudaStream_t stream) {
  return {dim3(static_cast<unsigned>(plan.row_blocks * plan.unit_blocks)), dim3(kThreads),
          plan.shared, plan.unit_blocks > 1, stream};
}

}  // namespace lstm_ext::cuda
