// How the kernels without products spread over [N, H]: a block takes blockDim.x vectors of units
// and, in steps of blockDim.y, some rows.
#pragma once

#include <algorithm>

#include "cuda/numbers.cuh"

namespace lstm_ext::cuda {

constexpr int kElementwiseThreads = 256;

struct Spread {
  dim3 grid, block;
  int64_t rows_per_block;  // a multiple of block.y
  int64_t row_blocks;
};

// By sizes alone, not by the device: the order of sums follows from it.
inline Spread spread(int64_t N, int H, int vector) {
  constexpr int64_t kBlocks = 512;  // some for every multiprocessor
  const int vectors = (H + vector - 1) / vector;
  unsigned across = 1;
  while (across < kWarpSize && static_cast<int>(across) < vectors) across *= 2;
  const unsigned down = kElementwiseThreads / across;
  const int64_t unit_blocks = (vectors + across - 1) / across;
  const int64_t most = std::max<int64_t>(1, kBlocks / unit_blocks);
  const int64_t steps = (N + down - 1) / down;
  const int64_t rows_per_block = (steps + most - 1) / most * down;
  const int64_t row_blocks = (N + rows_per_block - 1) / rows_per_block;
  return {dim3(static_cast<unsigned>(row_blocks), static_cast<unsigned>(unit_blocks)),
          dim3(across, down), rows_per_block, row_blocks};
}

}  // namespace lstm_ext::cuda
