// A whole layer in one launch (layer_blocks.cuh).
//
// Blocks exchange h. Two copies of it take turns: a block writes the next while another may still
// read the last.
#include "cuda/kernels.h"
#include "cuda/layer_blocks.cuh"

namespace lstm_ext::cuda {
namespace {

template <class Tile, bool kVectors>
__global__ void __launch_bounds__(kThreads, 1)
    layer_forward_kernel(LayerForward<typename Tile::T> layer, Plan plan) {
  using T = typename Tile::T;
  using S = typename Tile::S;
  LSTM_EXT_DYNAMIC_SHARED(unsigned char, shared);
  const Sequence& sequence = layer.sequence;
  const int H = layer.H, units = plan.units, stride = plan.weight_stride;
  T* const weights = reinterpret_cast<T*>(shared);  // [4][units][stride]
  S* const biases = reinterpret_cast<S*>(weights + size_t{kGates} * units * stride);  // [4][units]
  S* const states = biases + kGates * units;  // c [rows][units]
  const PartialSums<S> partial{states + plan.rows * units, Tile::kRows, plan.tile_units};

  const int thread = static_cast<int>(threadIdx.x);
  const auto [first_unit, own_units, first_row, end_row] = part_of_block(plan, H, sequence.N);
  const int64_t state_size = sequence.N * H;

  for (int at = thread; at < kGates * own_units * H; at += kThreads) {
    const int gate = at / (own_units * H), unit = at / H % own_units, k = at % H;
    weights[(gate * units + unit) * stride + k] =
        layer.w_hh[(static_cast<int64_t>(gate) * H + first_unit + unit) * H + k];
  }
  for (int at = thread; at < kGates * own_units; at += kThreads) {
    const int gate = at / own_units, unit = at % own_units, column = gate * H + first_unit + unit;
    biases[gate * units + unit] = sum_of_biases(layer.b_ih, layer.b_hh, column);
  }
  // What rows from..to start from: h where the product of their first step reads it, and c.
  const auto begin = [&](int64_t from, int64_t to, int64_t step) {
    for (int64_t element = thread; element < (to - from) * own_units; element += kThreads) {
      const int unit = static_cast<int>(element % own_units);
      const int64_t row = from + element / own_units, at = row * H + first_unit + unit;
      const bool reset = is_reset(sequence, step, row);
      layer.h_buffers[step % 2 * state_size + at] = reset ? narrow<T>(0) : layer.hx[at];
      states[(row - first_row) * units + unit] = reset ? S(0) : widen(layer.cx[at]);
    }
  };
  begin(first_row, min(end_row, rows_at(sequence, 0)), 0);
  meet(plan);

  for (int64_t step = 0; step < sequence.L; ++step) {
    const int64_t offset = offset_at(sequence, step);
    const int64_t here = min(end_row, rows_at(sequence, step));
    const int64_t next = min(end_row, rows_at(sequence, step + 1));
    for (int64_t row_tile = first_row; row_tile < here; row_tile += Tile::kRows) {
      const T* const h = layer.h_buffers + step % 2 * state_size;
      const Operand<T> operand = {h, weights, H, stride, int64_t{units} * stride};
      multiply<Tile, kVectors>(plan, operand, row_tile, here, own_units, partial);
      __syncthreads();
      for (int element = thread; element < Tile::kRows * own_units; element += kThreads) {
        const int unit = element % own_units, tile_row = element / own_units;
        const int64_t row = row_tile + tile_row;
        if (row >= here) continue;
        const int column = first_unit + unit;
        const T* const products = layer.products + (offset + row) * kGates * H + column;
        S pre[kGates];
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate)
          pre[gate] = biases[gate * units + unit] + widen(products[gate * H]) +
                      partial.sum(plan.split, gate, tile_row, unit);
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
        const bool reset = is_reset(sequence, step + 1, row);
        layer.h_buffers[(step + 1) % 2 * state_size + of_state] =
            reset ? narrow<T>(0) : narrow<T>(h_next);
        // As the cell rounds its c from step to step.
        state = reset ? S(0) : widen(narrow<T>(c));
      }
      __syncthreads();
    }
    // Sequences that begin at the next step, in reverse.
    begin(here > first_row ? here : first_row, next, step + 1);
    meet(plan);
  }
}

template <class Tile>
Plan plan_for(const LayerForward<typename Tile::T>& layer, const Device& device) {
  // Biases, and c.
  const Numbers numbers = {/*a_unit=*/kGates, /*a_unit_and_row=*/1};
  return plan_blocks<Tile>(layer.H, layer.H, layer.sequence.N, numbers, device);
}

template <class Tile>
cudaError_t launch_plan(const LayerForward<typename Tile::T>& layer, const Device& device,
                        cudaStream_t stream) {
  constexpr int kVector = kFullVector<typename Tile::T>;
  const Plan plan = plan_for<Tile>(layer, device);
  const bool vectors = layer.H % kVector == 0 && in_vectors(layer.h_buffers);
  const auto kernel =
      vectors ? layer_forward_kernel<Tile, true> : layer_forward_kernel<Tile, false>;
  return launch(launch_of(plan, stream), kernel, layer, plan);
}

}  // namespace

template <class T>
bool layer_forward_fits(const LayerForward<T>& layer, const Device& device) {
  return with_tile<T>(layer.sequence.N, device.tf32,
                      [&](auto tile) { return plan_for<decltype(tile)>(layer, device).units > 0; });
}

template <class T>
cudaError_t layer_forward(const LayerForward<T>& layer, const Device& device, cudaStream_t stream) {
  return with_tile<T>(layer.sequence.N, device.tf32, [&](auto tile) {
    return launch_plan<decltype(tile)>(layer, device, stream);
  });
}

#define LSTM_EXT_INSTANTIATE(T)                                               \
  template bool layer_forward_fits<T>(const LayerForward<T>&, const Device&); \
  template cudaError_t layer_forward<T>(const LayerForward<T>&, const Device&, cudaStream_t);
LSTM_EXT_EACH_TYPE(LSTM_EXT_INSTANTIATE)
#undef LSTM_EXT_INSTANTIATE

}  // namespace lstm_ext::cuda
