// How the kernels of a whole layer spread over blocks, and where a sequence's steps lie.
//
// w_hh is read once and stays on the chip, in shared memory. Where it fits into one multiprocessor,
// each block has all of it, takes some rows of the batch through all steps and meets nobody. Else
// each block keeps the weights of its own units, takes the whole batch or a share of it, and all
// blocks meet once a step, to exchange what the others need by way of memory.
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
  int group;                 // rows that are multiplied between two barriers of the block
  int split;                 // warps that share a sum
  int row_units;             // of a row of partial sums
  int weight_stride;         // numbers from one row of weights to the next
  size_t shared;
};

// What there is to do in a step.
struct Work {
  int units, K;
  int64_t N;
  int elements_a_unit;  // of a row
  // What a block keeps beside weights and partial sums, in numbers of the type of sums.
  int kept_a_unit, kept_a_unit_and_row;
  bool widely;       // over more blocks where multiprocessors would have none, and over all threads
  bool split_units;  // then, if there are not enough rows, with tiles not full
};

// Rows of weights begin 64 bytes apart modulo 128, so that lanes that read two rows at a time find
// them in different banks.
template <class T>
int weight_stride(int K) {
  constexpr int kNumbers = 128 / sizeof(T);
  return (K + kNumbers - 1) / kNumbers * kNumbers + kNumbers / 2;
}

// units and rows: of a block.
template <class Tile>
Plan make_plan(const Work& work, int units, int64_t rows, int group) {
  using T = typename Tile::T;
  Plan plan = {};
  plan.units = units;
  plan.unit_blocks = (work.units + units - 1) / units;
  plan.rows = rows;
  plan.row_blocks = (work.N + rows - 1) / rows;
  plan.group = group;
  plan.split = kWarps;
  while (plan.split > 1 && kWarps / plan.split * Tile::kUnits < units) plan.split /= 2;
  plan.row_units = sum_row_units((units + Tile::kUnits - 1) / Tile::kUnits * Tile::kUnits);
  plan.weight_stride = weight_stride<T>(work.K);
  const size_t sums = size_t{kGates} * plan.split * group * plan.row_units +
                      static_cast<size_t>(work.kept_a_unit) * units +
                      static_cast<size_t>(work.kept_a_unit_and_row) * rows * units;
  plan.shared = sizeof(T) * kGates * units * plan.weight_stride + sizeof(typename Tile::S) * sums;
  return plan;
}

inline bool fits(const Plan& plan, const Device& device) {
  return plan.shared <= static_cast<size_t>(device.shared_per_block) &&
         plan.row_blocks <= 0x7fffffff;
}

// Each block has all weights. units = 0: it does not fit.
template <class Tile>
Plan plan_alone(const Work& work, const Device& device) {
  const Plan plan = make_plan<Tile>(work, work.units, Tile::kRows, Tile::kRows);
  return fits(plan, device) ? plan : Plan{};
}

// Each block has all rows, and the weights of its units.
template <class Tile>
Plan plan_together(const Work& work, const Device& device) {
  // Beyond so many rows a step is work enough for the library, whose products take more at a time.
  constexpr int64_t kMostRows = 128;
  if (work.N > kMostRows) return {};
  Plan plan;
  const auto spread = [&](int units) {
    plan = make_plan<Tile>(work, units, work.N, Tile::kRows);
    return plan.unit_blocks <= device.multiprocessors && fits(plan, device);
  };
  for (int units = Tile::kUnits; units <= kWarps * Tile::kUnits; units *= 2)
    if (spread(units)) return plan;
  // Tiles not full, where shared memory is what is short.
  for (int units = Tile::kUnits / 2; units > 0; units /= 2)
    if (spread(units)) return plan;
  return {};
}

// The same work over more blocks: fewer rows in each, first of all, which then read less of what is
// exchanged; then fewer units. Products of so many row tiles at a time that all threads have
// something to do with them.
template <class Tile>
Plan plan_widely(const Work& work, const Device& device, int units, int64_t rows) {
  rows = std::min(work.N, (rows + Tile::kRows - 1) / Tile::kRows * Tile::kRows);
  const int64_t row_blocks = (work.N + rows - 1) / rows;
  const auto blocks = [&](int units) { return (work.units + units - 1) / units * row_blocks; };
  // Two units of a tensor-core tile are 128 bytes of weights at a time: fewer are read no faster.
  constexpr int kLeast = std::max(1, Tile::kUnits / 4);
  if (work.split_units)
    while (units > kLeast && blocks(units / 2) <= device.multiprocessors) units /= 2;
  int group = Tile::kRows;
  while (group < rows && group * units * work.elements_a_unit < kThreads) group += Tile::kRows;
  const Plan plan = make_plan<Tile>(work, units, rows, group);
  return fits(plan, device) ? plan : make_plan<Tile>(work, units, rows, Tile::kRows);
}

// A plan, and for how many rows its tile is chosen (with_tile).
struct Choice {
  Plan plan;
  int64_t tile_rows;
};

// units = 0: it does not fit.
template <class T>
Choice choose_plan(const Work& work, const Device& device) {
  const auto rows_of_a_block = [&](int64_t row_blocks) {
    return (work.N + row_blocks - 1) / row_blocks;
  };
  const auto with = [&](int64_t rows, const auto& plan) -> Choice {
    return with_tile<T>(rows, device.tf32, [&](auto tile) { return Choice{plan(tile), rows}; });
  };
  const int64_t rows = work.widely ? rows_of_a_block(device.multiprocessors) : work.N;
  const Choice alone =
      with(rows, [&](auto tile) { return plan_alone<decltype(tile)>(work, device); });
  // With more than this a step of one block alone takes longer than a meeting of all (H200).
  constexpr size_t kQuickAlone = 80 * 1024;
  if (alone.plan.units > 0 && (alone.plan.shared <= kQuickAlone || !work.widely)) return alone;
  const Choice choice =
      with(work.N, [&](auto tile) { return plan_together<decltype(tile)>(work, device); });
  if (choice.plan.units == 0) return alone;
  if (!work.widely) return choice;
  // Blocks that wait for each other all run at once: no more than one on each multiprocessor.
  const int64_t fewer = rows_of_a_block(device.multiprocessors / choice.plan.unit_blocks);
  return with(fewer, [&](auto tile) {
    return plan_widely<decltype(tile)>(work, device, choice.plan.units, fewer);
  });
}

// A block's part; units count as in the plan.
struct Part {
  int first_unit, units;
  int64_t first_row;
  int rows;
};

__device__ inline Part part_of_block(const Plan& plan, int all_units, int64_t N) {
  const int first_unit = static_cast<int>(blockIdx.x) % plan.unit_blocks * plan.units;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) / plan.unit_blocks * plan.rows;
  return {first_unit, min(plan.units, all_units - first_unit), first_row,
          static_cast<int>(min(plan.rows, N - first_row))};
}

// The elements of a block's thread, kThreads apart, in rows of so many columns: without divisions
// in every step.
struct Spot {
  int row, column;
};

class Spots {
 public:
  __device__ explicit Spots(int columns)
      : columns_(columns),
        first_{static_cast<int>(threadIdx.x) / columns, static_cast<int>(threadIdx.x) % columns},
        step_{kThreads / columns, kThreads % columns} {}

  __device__ Spot first() const { return first_; }
  __device__ Spot after(Spot spot) const {
    spot.row += step_.row;
    spot.column += step_.column;
    if (spot.column >= columns_) ++spot.row, spot.column -= columns_;
    return spot;
  }

 private:
  int columns_;
  Spot first_, step_;
};

// Zeros behind the K numbers of each row of weights in shared memory: [4][units][stride].
template <class Tile>
__device__ inline void pad_weights(typename Tile::T* weights, int units, int stride, int K) {
  using T = typename Tile::T;
  const int end = (K + Tile::kPad - 1) / Tile::kPad * Tile::kPad;
  for (int row = static_cast<int>(threadIdx.x); row < kGates * units; row += kThreads)
    for (int k = K; k < end; ++k)
      Tile::put(weights + row % units * stride, units * stride, row / units, k, narrow<T>(0));
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
      // NOLINTNEXTLINE(performance-move-const-arg): the toolkit takes it no other way
      cooperative_groups::this_grid().barrier_wait(std::move(token_));
    else
      __syncthreads();
  }

 private:
  bool of_grid_;
  cooperative_groups::grid_group::arrival_token token_ = {};
};

// They come first in shared memory; what follows them is on 16 bytes too.
template <class S>
__device__ inline PartialSums<S> partial_sums(const Plan& plan, unsigned char* shared) {
  return {reinterpret_cast<GateSums<S>*>(shared), plan.group, plan.row_units};
}

template <class S>
__device__ inline size_t partial_sums_size(const Plan& plan) {
  return sizeof(GateSums<S>) * plan.split * plan.group * plan.row_units;
}

// A warp's part in a block's sums: its share of them, and its tiles of units.
struct WarpShare {
  int slice, first_unit, next_unit;
};

template <class Tile>
__device__ inline WarpShare share_of_warp(const Plan& plan) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  return {warp % plan.split, warp / plan.split * Tile::kUnits, kWarps / plan.split * Tile::kUnits};
}

// The block's sums for a group of its rows, from `row` on: sums of the warps' shares are left to
// who reads them, after a __syncthreads. kStage: as in kStageNext.
template <class Tile, bool kVectors, bool kStage>
__device__ inline void multiply(const Plan& plan, const WarpShare& share,
                                const Operand<typename Tile::T>& operand, int row, int rows,
                                int own_units, const PartialSums<typename Tile::S>& partial) {
  constexpr int kAhead = kStage && kVectors ? Tile::kMostAhead : 0;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int unit = share.first_unit; unit < plan.units; unit += share.next_unit)
    for (int in_group = 0; in_group < plan.group && row + in_group < rows;
         in_group += Tile::kRows) {
      const TilePlace place = {row + in_group, rows, unit, own_units, share.slice, plan.split};
      Tile sums;
      sums.template add<kVectors, kAhead, latency::kWideFill>(operand, place, lane);
      sums.store(partial.from_row(in_group), place.slice, unit, lane);
    }
}

__device__ inline int64_t time_of(const DeviceSequence& sequence, int64_t step) {
  return time_of_step(step, sequence.L, sequence.reverse);
}

// A block's rows of a step: where they begin in memory, and how many there are. None beyond the
// first step and the last.
struct StepRows {
  int64_t begin;
  int count;
};

__device__ inline StepRows rows_of(const DeviceSequence& sequence, int64_t step, const Part& part) {
  if (step < 0 || step >= sequence.L) return {0, 0};
  const int64_t t = time_of(sequence, step);
  if (sequence.offsets == nullptr) return {t * sequence.N + part.first_row, part.rows};
  const int64_t before = sequence.offsets[t];
  const int64_t rows = sequence.offsets[t + 1] - before - part.first_row;
  return {before + part.first_row,
          static_cast<int>(max(min(rows, int64_t{part.rows}), int64_t{0}))};
}

__device__ inline bool is_reset(const DeviceSequence& sequence, int64_t step, int64_t row) {
  if (sequence.reset == nullptr || step >= sequence.L) return false;
  return sequence.reset[time_of(sequence, step) * sequence.N + row];
}

inline Launch launch_of(const Plan& plan, cudaStream_t stream) {
  return {dim3(static_cast<unsigned>(plan.row_blocks * plan.unit_blocks)), dim3(kThreads),
          plan.shared, plan.unit_blocks > 1, stream};
}

}  // namespace lstm_ext::cuda
