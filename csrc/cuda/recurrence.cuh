// What the kernels of a recurrence have in common: how a row lies over threads, its sums, masks and
// clips.
#pragma once

#include <algorithm>

#include "cuda/numbers.cuh"
#include "cuda/recurrence.h"

namespace lstm_ext::cuda {

// A row that is normalised belongs to one block of up to so many threads, so that its sums do;
// others are spread over blocks of fewer. By the number of columns alone: the order of sums follows
// from it, and a row has the same bits in every batch.
constexpr int kRecurrenceThreads = 512, kSpreadThreads = 256;
// So many blocks a multiprocessor holds at least. (Without it, nvcc spills to hold four.)
constexpr int kRecurrenceBlocks = 2;

// In sums' type, at the beginning of a block's shared memory: two sets of places for two sums.
constexpr int kMostWarps = kRecurrenceThreads / kWarpSize;
constexpr int kSumPlaces = 2 * 2 * kMostWarps;

inline int threads_for(int columns, int most) {
  int threads = kWarpSize;
  while (threads < most && threads < columns) threads *= 2;
  return threads;
}

// Columns of so many rows, each for itself.
inline Launch over_columns(int64_t rows, int columns, cudaStream_t stream) {
  const int threads = threads_for(columns, kSpreadThreads);
  return {
      dim3(static_cast<unsigned>(rows), static_cast<unsigned>((columns + threads - 1) / threads)),
      dim3(static_cast<unsigned>(threads)), 0, false, stream};
}

// Beside the sums, four numbers for each unit of a row that is normalised.
template <class T>
size_t bytes_of_row(int H) {
  return sizeof(Sum<T>) * (kSumPlaces + static_cast<size_t>(kGates) * H);
}

// The units of so many rows, as the options want them.
template <class T>
Launch over_units(int64_t rows, const RecurrenceOptions<T>& options, cudaStream_t stream) {
  if (!options.has_norm()) return over_columns(rows, options.H, stream);
  const int threads = threads_for(options.H, kRecurrenceThreads);
  return {dim3(static_cast<unsigned>(rows)), dim3(static_cast<unsigned>(threads)),
          bytes_of_row<T>(options.H), false, stream};
}

// A thread's columns, from the first on.
struct Columns {
  __device__ Columns()
      : first(static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x)),
        stride(static_cast<int>(gridDim.y * blockDim.x)) {}
  const int first, stride;
};

// Sums over a block in one order: of the lanes of each warp, then of the warps. One barrier each,
// since the places of one sum are not those of the next.
template <class S>
class BlockSums {
 public:
  __device__ explicit BlockSums(S* places) : places_(places) {}

  // Replaces each thread's terms by the sums of all, kCount at once.
  template <int kCount>
  __device__ void add_up(S (&terms)[kCount]) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int warps = static_cast<int>(blockDim.x) / kWarpSize;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int bit = kWarpSize / 2; bit > 0; bit /= 2)
        terms[k] += __shfl_xor_sync(kAllLanes, terms[k], bit);
      if (lane == 0) places_[k * kMostWarps + warp] = terms[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      terms[k] = 0;
      for (int w = 0; w < warps; ++w) terms[k] += places_[k * kMostWarps + w];
    }
    places_ += second_ ? -kSumPlaces / 2 : kSumPlaces / 2;
    second_ = !second_;
  }

 private:
  S* places_;
  bool second_ = false;
};

__device__ inline float square_root(float v) { return sqrtf(v); }
__device__ inline double square_root(double v) { return sqrt(v); }

// A row's mean, and one over its deviation.
template <class S>
struct RowMoments {
  S mean, scale;
};

// Of the numbers value(k) of each thread's columns, size in all; sum: of the thread's own.
template <class S, class Each>
__device__ inline RowMoments<S> moments_of(BlockSums<S>& sums, S sum, int size, double eps,
                                           const Each& each) {
  S terms[1] = {sum};
  sums.add_up(terms);
  const S mean = terms[0] / static_cast<S>(size);
  S squares[1] = {};
  each([&](S value) { squares[0] += (value - mean) * (value - mean); });
  sums.add_up(squares);
  const S variance = squares[0] / static_cast<S>(size);
  return {mean, 1 / square_root(variance + static_cast<S>(eps))};
}

template <class S>
__device__ inline S clamp(S v, S limit) {
  v = v > limit ? limit : v;
  return v < -limit ? -limit : v;
}
// v where the value before a clip lay within it, else zero.
template <class S>
__device__ inline S where_within(S before, S limit, S v) {
  return before > limit || before < -limit ? S(0) : v;
}

template <class T>
__device__ inline Sum<T> mask_at(const StepMask<T>& mask, int64_t row, int column) {
  return widen(mask.data[row * mask.stride + column]);
}

__device__ inline bool is_set(const bool* rows, int64_t row) {
  return rows != nullptr && rows[row];
}

}  // namespace lstm_ext::cuda
