// The cell forward in one launch: gate products, activations, states.
//
// A block has eight warps and owns all four gates of its hidden units, for some rows of the batch.
// With few units a block, there are many blocks to fill the chip; the warps left over share the sum
// over k. The shares meet in shared memory and are added in their order: the same bits at every
// call, without atomics and without a second launch.
#include <algorithm>

#include "cuda/cell_policy.cuh"
#include "cuda/gate_tiles.cuh"
#include "cuda/kernels.h"

namespace lstm_ext::cuda {
namespace {

// split warps to a tile; kWarps / split tiles of units, side by side.
template <class Tile, class Cell, bool kVectors>
__global__ void __launch_bounds__(kThreads, 2)
    cell_forward_kernel(CellForward<typename Tile::T> cell, int split, int row_units,
                        int unit_blocks) {
  using T = typename Tile::T;
  using S = typename Tile::S;
  LSTM_EXT_DYNAMIC_SHARED(GateSums<S>, shared);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int units = kWarps / split * Tile::kUnits;
  const PartialSums<S> partial{shared, Tile::kRows, row_units};

  const int H = cell.H, first_unit = static_cast<int>(blockIdx.x) % unit_blocks * units;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) / unit_blocks * Tile::kRows;
  const int tile = warp / split * Tile::kUnits;
  const int rows = static_cast<int>(min(cell.N - first_row, int64_t{Tile::kRows}));
  const TilePlace place = {0, rows, first_unit + tile, H, warp % split, split};

  Tile sums;
  const int64_t I = cell.I;
  sums.template add<kVectors>({cell.input + first_row * I, cell.w_ih, cell.I, I, H * I}, place,
                              lane);
  sums.template add<kVectors>({cell.hx + first_row * H, cell.w_hh, H, H, int64_t{H} * H}, place,
                              lane);
  sums.store(partial, place.slice, tile, lane);
  __syncthreads();

  for (int element = static_cast<int>(threadIdx.x); element < Tile::kRows * units;
       element += kThreads) {
    const int unit = first_unit + element % units;
    const int64_t row = first_row + element / units;
    if (unit >= H || row >= cell.N) continue;
    const GateSums<S> sum = partial.sum(split, element / units, element % units);
    S pre[kGates];
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate)
      pre[gate] = sum_of_biases(cell.b_ih, cell.b_hh, gate * H + unit) + sum.gate[gate];
    const int64_t at = row * H + unit;
    const auto own = unit_weights<Cell>(cell.unit_weights, H, unit);
    S c, h;
    const Gates<S> gates = Cell::template forward<Math>(Gates<S>{pre[0], pre[1], pre[2], pre[3]},
                                                        widen(cell.cx[at]), own.at, c, h);
    cell.cy[at] = narrow<T>(c);
    cell.hy[at] = narrow<T>(h);
    if (cell.gates != nullptr) store_gates(cell.gates + row * kGates * H + unit, H, gates);
  }
}

template <class Tile, class Cell>
cudaError_t launch_tiles(const CellForward<typename Tile::T>& cell, const Device& device,
                         cudaStream_t stream) {
  using T = typename Tile::T;
  constexpr int kVector = kFullVector<T>;
  const bool vectors = cell.I % kVector == 0 && cell.H % kVector == 0 &&
                       in_vectors(cell.input, cell.hx, cell.w_ih, cell.w_hh);
  const int64_t row_blocks = (cell.N + Tile::kRows - 1) / Tile::kRows;
  // As many units a block, and as few shares of a sum, as leave two blocks to a multiprocessor.
  int split = kWarps;
  const auto unit_blocks = [&](int shares) {
    const int units = kWarps / shares * Tile::kUnits;
    return (cell.H + units - 1) / units;
  };
  while (split > 1 && row_blocks * unit_blocks(split / 2) >= 2 * device.multiprocessors) split /= 2;

  Launch how;
  const int64_t blocks = row_blocks * unit_blocks(split);
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  how.grid = dim3(static_cast<unsigned>(blocks));
  how.block = dim3(kThreads);
  const int row_units = sum_row_units(kWarps / split * Tile::kUnits);
  how.shared = sizeof(GateSums<typename Tile::S>) * split * Tile::kRows * row_units;
  how.stream = stream;
  const auto kernel =
      vectors ? cell_forward_kernel<Tile, Cell, true> : cell_forward_kernel<Tile, Cell, false>;
  return launch(how, kernel, cell, split, row_units, unit_blocks(split));
}

}  // namespace

template <class T>
cudaError_t cell_forward(const CellForward<T>& cell, const Device& device, cudaStream_t stream) {
  if (cell.N == 0 || cell.H == 0) return cudaSuccess;
  return with_tile<T>(cell.N, device.tf32, [&](auto tile) {
    return with_cell_of<T>(cell.variant, [&](auto policy) {
      return launch_tiles<decltype(tile), decltype(policy)>(cell, device, stream);
    });
  });
}

// Every block reads the weights of its units anew for each of its row blocks, from the second level
// cache; the library's kernels keep more rows a block. One launch saves two others and a round of
// pre-activations through memory, some 10 us. Reckoned, not measured: up to 64 rows (128 on tensor
// cores) those readings take less than that at H = 512.
template <class T>
bool cell_forward_pays(const CellForward<T>& cell, const Device& device) {
  const bool tensor_cores = sizeof(T) == 2 || (std::is_same_v<T, float> && device.tf32);
  if (cell.I + cell.H <= 256) return cell.N <= (tensor_cores ? 1024 : 512);
  return cell.N <= (tensor_cores ? 128 : 64);
}

#define LSTM_EXT_INSTANTIATE(T)                                                             \
  template cudaError_t cell_forward<T>(const CellForward<T>&, const Device&, cudaStream_t); \
  template bool cell_forward_pays<T>(const CellForward<T>&, const Device&);
LSTM_EXT_EACH_TYPE(LSTM_EXT_INSTANTIATE)
#undef LSTM_EXT_INSTANTIATE

}  // namespace lstm_ext::cuda
