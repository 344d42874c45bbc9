// Backward of a whole layer in one launch, from the last step to the first (layer_blocks.cuh).
//
// Blocks exchange the gradients of the pre-activations, which are a result anyway: each computes
// those of its hidden units, and then reads all of a row to multiply with its columns of w_hh.
#include "cuda/cell_policy.cuh"
#include "cuda/kernels.h"
#include "cuda/layer_blocks.cuh"

namespace lstm_ext::cuda {
namespace {

// A block's hidden units come in four parts, one in the place of each of a tile's gates.
constexpr int kInUnit = kGates;

using namespace latency;

// Columns first .. first + own of w_hh [K, H] to shared memory, [4][units][stride], kCount numbers
// of a row of w_hh at a time; zeros beyond own.
template <class Tile, int kCount, class T>
__device__ inline void fill(const T* w_hh, int K, int H, int first, int own, T* weights, int units,
                            int stride) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int hidden = 0; hidden < kInUnit * units; hidden += kCount) {
    int part[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) part[j] = (hidden + j) / units;
#pragma unroll 4
    for (int k = thread; k < K; k += kThreads) {
      const auto numbers = load<kCount>(w_hh + static_cast<int64_t>(k) * H + first, hidden, own);
#pragma unroll
      for (int j = 0; j < kCount; ++j)
        Tile::put(weights + (hidden + j - part[j] * units) * stride, units * stride, part[j], k,
                  numbers.at[j]);
    }
  }
}

// What an element of a step reads that no other block writes.
template <class T>
struct Known {
  T gates[kGates], c_before, grad_output;
  bool reset;
};

template <class Tile, class Cell, bool kVectors>
__global__ void __launch_bounds__(kThreads, 1)
    layer_backward_kernel(LayerBackward<typename Tile::T> layer, Plan plan) {
  using T = typename Tile::T;
  using S = typename Tile::S;
  LSTM_EXT_DYNAMIC_SHARED(unsigned char, shared);
  const DeviceSequence& sequence = layer.sequence;
  const int H = layer.H, K = kGates * H, most = plan.units * kInUnit, stride = plan.weight_stride;
  const PartialSums<S> partial = partial_sums<S>(plan, shared);
  T* const weights =
      reinterpret_cast<T*>(shared + partial_sums_size<S>(plan));  // columns of w_hh: [most][stride]
  S* const grads_h =
      reinterpret_cast<S*>(weights + static_cast<size_t>(most) * stride);  // [rows][most]
  S* const grads_c = grads_h + plan.rows * most;                           // [rows][most]
  S* const own_weights = grads_c + plan.rows * most;                       // [P][most]

  const int thread = static_cast<int>(threadIdx.x);
  const Part part = part_of_block(plan, (H + kInUnit - 1) / kInUnit, sequence.N);
  const auto [first_unit, units, first_row, own_rows] = part;
  const int first = first_unit * kInUnit, own = min(units * kInUnit, H - first);

  // What lies beyond H is multiplied, and not kept.
  if constexpr (kWideFill) {
    constexpr int kVector = kFullVector<T>;
    if (H % kVector == 0 && most % kVector == 0 &&
        reinterpret_cast<uintptr_t>(layer.w_hh) % 16 == 0)
      fill<Tile, kVector>(layer.w_hh, K, H, first, own, weights, units, stride);
    else
      fill<Tile, 1>(layer.w_hh, K, H, first, own, weights, units, stride);
    pad_weights<Tile>(weights, units, stride, K);
  } else {
    for (int at = thread; at < units * kInUnit * K; at += kThreads) {
      const int hidden = at % (units * kInUnit), k = at / (units * kInUnit);
      weights[hidden * stride + k] =
          hidden < own ? layer.w_hh[static_cast<int64_t>(k) * H + first + hidden] : narrow<T>(0);
    }
  }
  for (int at = thread; at < own_rows * own; at += kThreads) {
    const int row = at / own, hidden = at % own, kept = row * most + hidden;
    const int64_t of_state = (first_row + row) * H + first + hidden;
    grads_h[kept] = layer.grad_hy != nullptr ? widen(layer.grad_hy[of_state]) : S(0);
    grads_c[kept] = layer.grad_cy != nullptr ? widen(layer.grad_cy[of_state]) : S(0);
  }
  for (int at = thread; at < Cell::kUnitWeights * own; at += kThreads) {
    const int p = at / own, hidden = at % own;
    own_weights[p * most + hidden] = widen(layer.unit_weights[p * H + first + hidden]);
  }
  const Spots spots(own);
  const int first_quarter = spots.first().column / units;  // mostly of all of a thread's elements
  const auto read = [&](int64_t step, const StepRows& rows, Spot spot) {
    Known<T> known = {};
    if (spot.row >= rows.count) return known;
    const int64_t row = rows.begin + spot.row;
    const int column = first + spot.column;
    const T* const gates = layer.gates + row * K + column;
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) known.gates[gate] = gates[gate * H];
    known.c_before = layer.c_before[row * H + column];
    if (layer.grad_output != nullptr) known.grad_output = layer.grad_output[row * H + column];
    known.reset = is_reset(sequence, step, first_row + spot.row);
    return known;
  };
  StepRows now = rows_of(sequence, sequence.L - 1, part);
  Known<T> ahead = {};
  if constexpr (kLoadsFirst) ahead = read(sequence.L - 1, now, spots.first());
  Meeting meeting(plan);
  const WarpShare share = share_of_warp<Tile>(plan);
  __syncthreads();

  for (int64_t step = sequence.L - 1; step >= 0; --step) {
    const StepRows next = rows_of(sequence, step - 1, part);
    T* const grad_gates = layer.grad_gates + now.begin * K;
    for (Spot spot = spots.first(); spot.row < now.count;) {
      const auto [row, hidden] = spot;
      const int own_at = row * most + hidden;
      const Known<T> known = kLoadsFirst ? ahead : read(step, now, spot);
      spot = spots.after(spot);
      if constexpr (kLoadsFirst) ahead = read(step, now, spot);
      S grad_h = grads_h[own_at], grad_c;
      if (layer.grad_output != nullptr) grad_h += widen(known.grad_output);
      const auto of_unit = unit_weights<Cell>(own_weights, most, hidden);
      const Gates<S> grad = Cell::template backward<Math>(
          Gates<S>{widen(known.gates[0]), widen(known.gates[1]), widen(known.gates[2]),
                   widen(known.gates[3])},
          widen(known.c_before), of_unit.at, grad_h, grads_c[own_at], grad_c);
      store_gates(grad_gates + row * K + first + hidden, H, grad);
      grads_c[own_at] = known.reset ? S(0) : grad_c;
    }
    if (step == 0 && layer.grad_hx == nullptr) break;
    if constexpr (kPublishFirst) meeting.arrive();
    if constexpr (kLoadsFirst) ahead = read(step - 1, next, spots.first());
    if constexpr (!kPublishFirst) meeting.arrive();
    meeting.wait();
    const Operand<T> operand = {grad_gates, weights, K, stride, int64_t{units} * stride};
    for (int group = 0; group < now.count; group += plan.group) {
      multiply<Tile, kVectors, kStageNext<T, true>>(plan, share, operand, group, now.count, units,
                                                    partial);
      __syncthreads();
      const int rows = min(now.count - group, plan.group);
      for (Spot spot = spots.first(); spot.row < rows; spot = spots.after(spot)) {
        const auto [in_group, hidden] = spot;
        const int row = group + in_group;
        const int quarter = hidden == spots.first().column ? first_quarter : hidden / units;
        grads_h[row * most + hidden] =
            is_reset(sequence, step, first_row + row)
                ? S(0)
                : partial.sum(plan.split, quarter, in_group, hidden - quarter * units);
      }
      __syncthreads();
    }
    now = next;
  }

  __syncthreads();
  for (int at = thread; at < own_rows * own; at += kThreads) {
    const int row = at / own, hidden = at % own, kept = row * most + hidden;
    const int64_t of_state = (first_row + row) * H + first + hidden;
    if (layer.grad_hx != nullptr) layer.grad_hx[of_state] = narrow<T>(grads_h[kept]);
    if (layer.grad_cx != nullptr) layer.grad_cx[of_state] = narrow<T>(grads_c[kept]);
  }
}

template <class T>
Choice choice_for(const LayerBackward<T>& layer, const Device& device) {
  Work work = {};
  work.units = (layer.H + kInUnit - 1) / kInUnit;
  work.K = kGates * layer.H;
  work.N = layer.sequence.N;
  work.elements_a_unit = kInUnit;
  work.kept_a_unit = kInUnit * unit_weights_of(layer.variant);
  work.kept_a_unit_and_row = 2 * kInUnit;  // gradients of h and c
  work.widely = work.split_units = kSpreadBackward;
  return choose_plan<T>(work, device);
}

template <class Tile, class Cell>
cudaError_t launch_plan(const LayerBackward<typename Tile::T>& layer, const Plan& plan,
                        cudaStream_t stream) {
  constexpr int kVector = kFullVector<typename Tile::T>;
  const bool vectors = kGates * layer.H % kVector == 0 && in_vectors(layer.grad_gates);
  const auto kernel =
      vectors ? layer_backward_kernel<Tile, Cell, true> : layer_backward_kernel<Tile, Cell, false>;
  return launch(launch_of(plan, stream), kernel, layer, plan);
}

}  // namespace

template <class T>
bool layer_backward_shared_fits(const LayerBackward<T>& layer, const Device& device) {
  return choice_for(layer, device).plan.units > 0;
}

template <class T>
cudaError_t layer_backward_shared(const LayerBackward<T>& layer, const Device& device,
                                  cudaStream_t stream) {
  const Choice choice = choice_for(layer, device);
  return with_tile<T>(choice.tile_rows, device.tf32, [&](auto tile) {
    return with_cell_of<T>(layer.variant, [&](auto policy) {
      return launch_plan<decltype(tile), decltype(policy)>(layer, choice.plan, stream);
    });
  });
}

#define LSTM_EXT_INSTANTIATE(T)                                                         \
  template bool layer_backward_shared_fits<T>(const LayerBackward<T>&, const Device&);  \
  template cudaError_t layer_backward_shared<T>(const LayerBackward<T>&, const Device&, \
                                                cudaStream_t);
LSTM_EXT_EACH_TYPE(LSTM_EXT_INSTANTIATE)
#undef LSTM_EXT_INSTANTIATE

}  // namespace lstm_ext::cuda
