// Weights that a kernel keeps in registers from its start on, and the h that they multiply.
//
// On tensor cores a lane's numbers of a chunk of k lie side by side, those of two products: which
// k is which does not matter to a sum, as long as weights and h agree.
#pragma once

#include <cstring>

#include "cuda/gate_tiles.cuh"
#include "cuda/kernels.h"

namespace lstm_ext::cuda {

// How many numbers, a power of two, one may read at a time from every row of K.
template <class T>
__device__ inline int alignment_of(const T* rows, int K) {
  int aligned = kFullVector<T>;
  while (aligned > 1 &&
         (K % aligned != 0 || reinterpret_cast<uintptr_t>(rows) % (aligned * sizeof(T)) != 0))
    aligned /= 2;
  return aligned;
}

// Numbers k .. k + kCount of a row of K, zeros beyond it, so many at a time as lie aligned.
template <int kCount, class T>
__device__ inline Vector<T, kCount> weights_at(const T* row, int k, int K, int aligned) {
  if (aligned >= kCount) return load<kCount>(row, k, K);
  if constexpr (kCount > 4) {
    if (aligned >= 4) {
      Vector<T, kCount> numbers;
#pragma unroll
      for (int part = 0; part < kCount; part += 4) {
        const Vector<T, 4> four = load<4>(row, k + part, K);
#pragma unroll
        for (int j = 0; j < 4; ++j) numbers.at[part + j] = four.at[j];
      }
      return numbers;
    }
  }
  return load_each<kCount>(row, k, K);
}

// As the tensor cores want them: 16-bit numbers in pairs, float rounded to TF32.
template <class T>
__device__ inline void words_of(const Vector<T, kFullVector<T>>& numbers, uint32_t (&words)[4]) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = to_tf32(numbers.at[j]);
  } else {
    std::memcpy(words, &numbers, sizeof(words));
  }
}

// A factor as the tensor cores want it, in the place of its number: float rounded to TF32.
template <class T>
__device__ inline T factor_of(T number) {
  if constexpr (std::is_same_v<T, float>) {
    const uint32_t rounded = to_tf32(number);
    std::memcpy(&number, &rounded, sizeof(rounded));
  }
  return number;
}

template <class T>
__device__ inline void mma_of(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float>)
    mma_tf32(d, a, b);
  else
    mma_16bit<T>(d, a, b);
}

// The two products' operands A of a lane: of its row and of the one eight further.
__device__ inline void operands_of(const uint32_t (&row)[4], const uint32_t (&other)[4],
                                   uint32_t (&products)[2][4]) {
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    products[part][0] = row[2 * part], products[part][1] = other[2 * part];
    products[part][2] = row[2 * part + 1], products[part][3] = other[2 * part + 1];
  }
}

// 16 bytes of numbers of two columns of a matrix that lie side by side, of rows of H; zeros beyond.
// row_of(j): the row of a column's j-th number, or null. in_pairs: both may be read at once.
template <class T, class RowOf>
__device__ inline void columns_of(const RowOf& row_of, int column, int H, bool in_pairs,
                                  uint32_t (&first)[4], uint32_t (&second)[4]) {
  constexpr int kStep = kFullVector<T>;
  Vector<T, kStep> numbers[2];
#pragma unroll
  for (int j = 0; j < kStep; ++j) {
    Vector<T, 2> pair = {narrow<T>(0), narrow<T>(0)};
    const T* const row = row_of(j);
    if (row != nullptr && column < H) {
      if (in_pairs) {
        pair = *reinterpret_cast<const Vector<T, 2>*>(row + column);
      } else {
        pair.at[0] = row[column];
        if (column + 1 < H) pair.at[1] = row[column + 1];
      }
    }
    numbers[0].at[j] = pair.at[0], numbers[1].at[j] = pair.at[1];
  }
  words_of(numbers[0], first);
  words_of(numbers[1], second);
}

// Sums over lanes side by side, twice kBit of them, of kRows rows of sums: each lane ends up with
// those of its rows, from the first on.
template <int kBit, int kCount, int kRows, int kWide>
__device__ inline void sum_over_split(float (&sums)[kRows][kWide], int slice) {
  if constexpr (kBit > 0 && kCount == 1) {
#pragma unroll
    for (int j = 0; j < kWide; ++j) sums[0][j] += __shfl_xor_sync(kAllLanes, sums[0][j], kBit);
    sum_over_split<kBit / 2, 1>(sums, slice);
  } else if constexpr (kBit > 0) {
    const bool upper = (slice & kBit) != 0;
#pragma unroll
    for (int row = 0; row < kCount / 2; ++row)
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        const float low = sums[row][j], high = sums[row + kCount / 2][j];
        sums[row][j] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, kBit);
      }
    sum_over_split<kBit / 2, kCount / 2>(sums, slice);
  }
}

// Both copies of h, [2][kRows][stride]: the first step's from hx, else zeros. to(h): what is kept.
template <int kRows, class T, class To>
__device__ inline void begin_h(const LayerForward<T>& layer, int64_t first_row, T* h, int stride,
                               const To& to) {
  const int64_t N = layer.sequence.N;
  for (int at = static_cast<int>(threadIdx.x); at < 2 * kRows * stride;
       at += static_cast<int>(blockDim.x)) {
    const int64_t row = first_row + at / stride;
    const int k = at % stride;
    const bool there = at < kRows * stride && row < N && k < layer.H;
    h[at] = there ? to(layer.hx[row * layer.H + k]) : narrow<T>(0);
  }
}

}  // namespace lstm_ext::cuda
