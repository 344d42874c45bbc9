// A whole layer in one launch: w_hh is read once and stays on the chip, in shared memory.
//
// Where it fits into one multiprocessor, each block has all of it, takes some rows of the batch
// through all steps and meets nobody. Else each block keeps the rows of its own hidden units, takes
// the whole batch, and all blocks meet once a step, to exchange h by way of memory. Two copies of h
// take turns: a block writes the next while another may still read the last.
#include <algorithm>

#include "cuda/gate_tiles.cuh"
#include "cuda/kernels.h"

namespace lstm_ext::cuda {
namespace {

// How a layer is spread over blocks, and how a block's shared memory is.
struct Plan {
  int units, unit_blocks;    // of a block; and blocks that make up the H units
  int64_t rows, row_blocks;  // the same of the batch
  int split;                 // warps that share a sum
  int weight_stride;         // numbers from one row of weights to the next
  size_t shared;
};

// Rows of weights begin 64 bytes apart modulo 128, so that lanes that read two rows at a time find
// them in different banks.
template <class T>
int weight_stride(int H) {
  constexpr int kNumbers = 128 / sizeof(T);
  return (H + kNumbers - 1) / kNumbers * kNumbers + kNumbers / 2;
}

template <class Tile>
Plan make_plan(int H, int units, int64_t N, int64_t rows) {
  using T = typename Tile::T;
  Plan plan = {};
  plan.units = units;
  plan.unit_blocks = (H + units - 1) / units;
  plan.rows = rows;
  plan.row_blocks = (N + rows - 1) / rows;
  plan.split = kWarps;
  while (plan.split > 1 && kWarps / plan.split * Tile::kUnits < units) plan.split /= 2;
  plan.weight_stride = weight_stride<T>(H);
  const size_t sums = size_t{kGates} * plan.split * Tile::kRows * units + kGates * units +
                      static_cast<size_t>(rows) * units;
  plan.shared = sizeof(T) * kGates * units * plan.weight_stride + sizeof(typename Tile::S) * sums;
  return plan;
}

template <class T>
__device__ int64_t offset_of(const LayerForward<T>& layer, int64_t t) {
  return layer.offsets != nullptr ? layer.offsets[t] : t * layer.N;
}

// The rows of a step; none before the first step or after the last.
template <class T>
__device__ int64_t rows_at(const LayerForward<T>& layer, int64_t step) {
  if (step >= layer.L) return 0;
  const int64_t t = layer.reverse ? layer.L - 1 - step : step;
  return offset_of(layer, t + 1) - offset_of(layer, t);
}

template <class T>
__device__ bool is_reset(const LayerForward<T>& layer, int64_t step, int64_t row) {
  if (layer.reset == nullptr || step >= layer.L) return false;
  const int64_t t = layer.reverse ? layer.L - 1 - step : step;
  return layer.reset[t * layer.N + row];
}

template <class Tile, bool kVectors>
__global__ void __launch_bounds__(kThreads, 1)
    layer_forward_kernel(LayerForward<typename Tile::T> layer, Plan plan) {
  using T = typename Tile::T;
  using S = typename Tile::S;
  LSTM_EXT_DYNAMIC_SHARED(unsigned char, shared);
  const int H = layer.H, units = plan.units, stride = plan.weight_stride;
  T* const weights = reinterpret_cast<T*>(shared);  // [4][units][stride]
  S* const biases = reinterpret_cast<S*>(weights + size_t{kGates} * units * stride);  // [4][units]
  S* const states = biases + kGates * units;  // c [rows][units]
  const PartialSums<S> partial{states + plan.rows * units, Tile::kRows, units};

  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int first_unit = static_cast<int>(blockIdx.x) % plan.unit_blocks * units;
  const int own_units = min(units, H - first_unit);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) / plan.unit_blocks * plan.rows;
  const int64_t end_row = min(first_row + plan.rows, layer.N);
  const int64_t state_size = layer.N * H;

  for (int at = thread; at < kGates * own_units * H; at += kThreads) {
    const int gate = at / (own_units * H), unit = at / H % own_units, k = at % H;
    weights[(gate * units + unit) * stride + k] =
        layer.w_hh[(static_cast<int64_t>(gate) * H + first_unit + unit) * H + k];
  }
  for (int at = thread; at < kGates * own_units; at += kThreads) {
    const int gate = at / own_units, unit = at % own_units, column = gate * H + first_unit + unit;
    biases[gate * units + unit] = sum_of_biases(layer.b_ih, layer.b_hh, column);
  }
  // What a row starts from: h where the product of its first step reads it, and c.
  const auto begin = [&](int64_t row, int unit, int64_t step) {
    const int64_t at = row * H + first_unit + unit;
    const bool reset = is_reset(layer, step, row);
    layer.h_buffers[step % 2 * state_size + at] = reset ? narrow<T>(0) : layer.hx[at];
    states[(row - first_row) * units + unit] = reset ? S(0) : widen(layer.cx[at]);
  };
  const int64_t at_first = min(end_row, rows_at(layer, 0));
  for (int64_t at = thread; at < (at_first - first_row) * own_units; at += kThreads)
    begin(first_row + at / own_units, static_cast<int>(at % own_units), 0);
  const auto meet = [&] {
    if (plan.unit_blocks > 1)
      cooperative_groups::this_grid().sync();
    else
      __syncthreads();
  };
  meet();

  for (int64_t step = 0; step < layer.L; ++step) {
    const int64_t offset = offset_of(layer, layer.reverse ? layer.L - 1 - step : step);
    const int64_t here = min(end_row, rows_at(layer, step));
    const int64_t next = min(end_row, rows_at(layer, step + 1));
    for (int64_t row_tile = first_row; row_tile < here; row_tile += Tile::kRows) {
      const T* const h = layer.h_buffers + step % 2 * state_size;
      for (int tile = warp / plan.split * Tile::kUnits; tile < units;
           tile += kWarps / plan.split * Tile::kUnits) {
        const TilePlace place = {row_tile, here, tile, own_units, warp % plan.split, plan.split};
        Tile sums;
        sums.template add<kVectors>({h, weights, H, stride, int64_t{units} * stride}, place, lane);
        sums.store(partial, place.slice, tile, lane);
      }
      __syncthreads();
      for (int element = thread; element < Tile::kRows * own_units; element += kThreads) {
        const int unit = element % own_units, tile_row = element / own_units;
        const int64_t row = row_tile + tile_row;
        if (row >= here) continue;
        const int column = first_unit + unit;
        const T* const products = layer.products + (offset + row) * kGates * H + column;
        S pre[kGates];
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) {
          pre[gate] = biases[gate * units + unit] + widen(products[gate * H]);
          for (int slice = 0; slice < plan.split; ++slice)
            pre[gate] += partial(slice, gate, tile_row, unit);
        }
        S& state = states[(row - first_row) * units + unit];
        const int64_t at = (offset + row) * H + column;
        if (layer.c_before != nullptr) layer.c_before[at] = narrow<T>(state);
        S c, h_next;
        const Gates<S> gates = lstm_ext::cell_forward<Math>(
            Gates<S>{pre[0], pre[1], pre[2], pre[3]}, state, c, h_next);
        if (layer.gates != nullptr)
          store_gates(layer.gates + (offset + row) * kGates * H + column, H, gates);
        layer.output[at] = narrow<T>(h_next);
        const int64_t of_state = row * H + column;
        if (row >= next) {  // its last step
          layer.hy[of_state] = narrow<T>(h_next);
          layer.cy[of_state] = narrow<T>(c);
        }
        const bool reset = is_reset(layer, step + 1, row);
        layer.h_buffers[(step + 1) % 2 * state_size + of_state] =
            reset ? narrow<T>(0) : narrow<T>(h_next);
        // As the cell rounds its c from step to step.
        state = reset ? S(0) : widen(narrow<T>(c));
      }
      __syncthreads();
    }
    // Sequences that begin at the next step, in reverse.
    const int64_t begun = here > first_row ? here : first_row;
    for (int64_t at = thread; at < (next - begun) * own_units; at += kThreads)
      begin(begun + at / own_units, static_cast<int>(at % own_units), step + 1);
    meet();
  }
}

// units = 0: it does not fit.
template <class Tile>
Plan plan_for(const LayerForward<typename Tile::T>& layer, const Device& device) {
  const auto fits = [&](const Plan& plan) {
    return plan.shared <= static_cast<size_t>(device.shared_per_block);
  };
  const int whole = (layer.H + Tile::kUnits - 1) / Tile::kUnits * Tile::kUnits;
  Plan plan = make_plan<Tile>(layer.H, whole, layer.N, Tile::kRows);
  if (fits(plan) && plan.row_blocks <= 0x7fffffff) return plan;
  // Beyond so many rows a step is work enough for the library, whose products take more at a time.
  constexpr int64_t kMostRows = 128;
  if (layer.N <= kMostRows)
    for (int units = Tile::kUnits; units <= kWarps * Tile::kUnits; units *= 2) {
      plan = make_plan<Tile>(layer.H, units, layer.N, layer.N);
      if (plan.unit_blocks <= device.multiprocessors && fits(plan)) return plan;
    }
  return {};
}

template <class Tile>
cudaError_t launch_plan(const LayerForward<typename Tile::T>& layer, const Device& device,
                        cudaStream_t stream) {
  constexpr int kVector = kFullVector<typename Tile::T>;
  const Plan plan = plan_for<Tile>(layer, device);
  const bool vectors = layer.H % kVector == 0 && in_vectors(layer.h_buffers);
  Launch how;
  how.grid = dim3(static_cast<unsigned>(plan.row_blocks * plan.unit_blocks));
  how.block = dim3(kThreads);
  how.shared = plan.shared;
  how.cooperative = plan.unit_blocks > 1;
  how.stream = stream;
  const auto kernel =
      vectors ? layer_forward_kernel<Tile, true> : layer_forward_kernel<Tile, false>;
  return launch(how, kernel, layer, plan);
}

}  // namespace

template <class T>
bool layer_forward_fits(const LayerForward<T>& layer, const Device& device) {
  return with_tile<T>(layer.N, device.tf32,
                      [&](auto tile) { return plan_for<decltype(tile)>(layer, device).units > 0; });
}

template <class T>
cudaError_t layer_forward(const LayerForward<T>& layer, const Device& device, cudaStream_t stream) {
  return with_tile<T>(layer.N, device.tf32, [&](auto tile) {
    return launch_plan<decltype(tile)>(layer, device, stream);
  });
}

#define LSTM_EXT_INSTANTIATE(T)                                               \
  template bool layer_forward_fits<T>(const LayerForward<T>&, const Device&); \
  template cudaError_t layer_forward<T>(const LayerForward<T>&, const Device&, cudaStream_t);
LSTM_EXT_EACH_TYPE(LSTM_EXT_INSTANTIATE)
#undef LSTM_EXT_INSTANTIATE

}  // namespace lstm_ext::cuda
