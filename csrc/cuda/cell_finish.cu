// Pre-activations to states, after the library's products. Bound by memory: 7 numbers go by for
// each of the N H elements, and 4 more where gates are kept, 16 bytes at a time.
#include "cuda/cell_policy.cuh"
#include "cuda/elementwise.cuh"
#include "cuda/gate_tiles.cuh"
#include "cuda/kernels.h"

namespace lstm_ext::cuda {
namespace {

template <class T, class Cell, int kVector>
__global__ void __launch_bounds__(kElementwiseThreads)
    cell_finish_kernel(CellForward<T> cell, const T* products, int64_t rows_per_block) {
  using S = Sum<T>;
  using Numbers = Vector<T, kVector>;
  const int H = cell.H;
  const int unit = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kVector;
  if (unit >= H) return;
  S bias[kGates][kVector];
#pragma unroll
  for (int gate = 0; gate < kGates; ++gate)
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      bias[gate][j] = sum_of_biases(cell.b_ih, cell.b_hh, gate * H + unit + j);
  UnitWeights<Cell, S> own[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) own[j] = unit_weights<Cell>(cell.unit_weights, H, unit + j);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows_per_block;
  const int64_t last = min(first + rows_per_block, cell.N);
  for (int64_t row = first + threadIdx.y; row < last; row += blockDim.y) {
    const int64_t at = row * H + unit, at_gates = row * kGates * H + unit;
    S pre[kGates][kVector];
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      const auto sums = *reinterpret_cast<const Numbers*>(products + at_gates + gate * H);
#pragma unroll
      for (int j = 0; j < kVector; ++j) pre[gate][j] = bias[gate][j] + widen(sums.at[j]);
    }
    const auto c = *reinterpret_cast<const Numbers*>(cell.cx + at);
    Numbers hy, cy, kept[kGates];
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      S c_next, h_next;
      const Gates<S> gates =
          Cell::template forward<Math>(Gates<S>{pre[0][j], pre[1][j], pre[2][j], pre[3][j]},
                                       widen(c.at[j]), own[j].at, c_next, h_next);
      cy.at[j] = narrow<T>(c_next);
      hy.at[j] = narrow<T>(h_next);
      kept[0].at[j] = narrow<T>(gates.i);
      kept[1].at[j] = narrow<T>(gates.f);
      kept[2].at[j] = narrow<T>(gates.g);
      kept[3].at[j] = narrow<T>(gates.o);
    }
    *reinterpret_cast<Numbers*>(cell.cy + at) = cy;
    *reinterpret_cast<Numbers*>(cell.hy + at) = hy;
    if (cell.gates == nullptr) continue;
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate)
      *reinterpret_cast<Numbers*>(cell.gates + at_gates + gate * H) = kept[gate];
  }
}

}  // namespace

template <class T>
cudaError_t cell_finish(const CellForward<T>& cell, const T* products, cudaStream_t stream) {
  if (cell.N == 0 || cell.H == 0) return cudaSuccess;
  constexpr int kVector = kFullVector<T>;
  const bool vectors =
      cell.H % kVector == 0 && in_vectors(products, cell.cx, cell.cy, cell.hy, cell.gates);
  const Spread how = spread(cell.N, cell.H, vectors ? kVector : 1);
  return with_cell_of<T>(cell.variant, [&](auto policy) {
    using Cell = decltype(policy);
    const auto kernel =
        vectors ? cell_finish_kernel<T, Cell, kVector> : cell_finish_kernel<T, Cell, 1>;
    return launch({how.grid, how.block, 0, false, stream}, kernel, cell, products,
                  how.rows_per_block);
  });
}

#define LSTM_EXT_INSTANTIATE(T) \
  template cudaError_t cell_finish<T>(const CellForward<T>&, const T*, cudaStream_t);
LSTM_EXT_EACH_TYPE(LSTM_EXT_INSTANTIATE)
#undef LSTM_EXT_INSTANTIATE

}  // namespace lstm_ext::cuda
