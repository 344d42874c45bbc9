// A whole layer in one launch, w_hh in shared memory (layer_blocks.cuh).
//
// Blocks exchange h. Two copies of it take turns: a block writes the next while another may still
// read the last.
#include "cuda/cell_policy.cuh"
#include "cuda/kernels.h"
#include "cuda/layer_blocks.cuh"

namespace lstm_ext::cuda {
namespace {

using namespace latency;

// w_hh of a block's units to shared memory, kCount numbers at a time: [4][units][stride].
template <class Tile, int kCount, class T>
__device__ inline void fill(const T* w_hh, int H, int first_unit, int own_units, T* weights,
                            int units, int stride) {
  const int in_row = H / kCount, thread = static_cast<int>(threadIdx.x);
  for (int at = thread; at < own_units * in_row; at += kThreads) {
    const int unit = at / in_row, k = at % in_row * kCount;
    Vector<T, kCount> numbers[kGates];
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate)
      numbers[gate] =
          load<kCount>(w_hh + (static_cast<int64_t>(gate) * H + first_unit + unit) * H, k, H);
    T* const of_unit = weights + unit * stride;
    if constexpr (kCount == 1)
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate)
        Tile::put(of_unit, units * stride, gate, k, numbers[gate].at[0]);
    else
      Tile::put(of_unit, units * stride, k, numbers);
  }
}

// What an element of a step reads that no other block writes.
template <class T>
struct Known {
  T products[kGates];
  bool reset_after;
};

// What becomes of it, apart from the h that others wait for.
template <class S>
struct Element {
  int row, column;
  Gates<S> gates;
  S c_before, c, h;
};

template <class Tile, class Cell, bool kVectors>
__global__ void __launch_bounds__(kThreads, 1)
    layer_forward_kernel(LayerForward<typename Tile::T> layer, Plan plan) {
  using T = typename Tile::T;
  using S = typename Tile::S;
  LSTM_EXT_DYNAMIC_SHARED(unsigned char, shared);
  const DeviceSequence& sequence = layer.sequence;
  const int H = layer.H, units = plan.units, stride = plan.weight_stride;
  const PartialSums<S> partial = partial_sums<S>(plan, shared);
  T* const weights =
      reinterpret_cast<T*>(shared + partial_sums_size<S>(plan));  // [4][units][stride]
  GateSums<S>* const biases =
      reinterpret_cast<GateSums<S>*>(weights + size_t{kGates} * units * stride);  // [units]
  S* const states = reinterpret_cast<S*>(biases + units);                         // c [rows][units]
  S* const own_weights = states + plan.rows * units;                              // [P][units]

  const int thread = static_cast<int>(threadIdx.x);
  const Part part = part_of_block(plan, H, sequence.N);
  const auto [first_unit, own_units, first_row, own_rows] = part;
  // The block's rows of h as the step reads it.
  const auto h_of = [&](int64_t step) {
    return layer.h_buffers + (step % 2 * sequence.N + first_row) * H;
  };

  if constexpr (kWideFill) {
    constexpr int kVector = kFullVector<T>;
    if (H % kVector == 0 && reinterpret_cast<uintptr_t>(layer.w_hh) % 16 == 0)
      fill<Tile, kVector>(layer.w_hh, H, first_unit, own_units, weights, units, stride);
    else
      fill<Tile, 1>(layer.w_hh, H, first_unit, own_units, weights, units, stride);
    pad_weights<Tile>(weights, units, stride, H);
  } else {
    for (int at = thread; at < kGates * own_units * H; at += kThreads) {
      const int gate = at / (own_units * H), unit = at / H % own_units, k = at % H;
      weights[(gate * units + unit) * stride + k] =
          layer.w_hh[(static_cast<int64_t>(gate) * H + first_unit + unit) * H + k];
    }
  }
  for (int at = thread; at < kGates * own_units; at += kThreads) {
    const int gate = at / own_units, unit = at % own_units, column = gate * H + first_unit + unit;
    biases[unit].gate[gate] = sum_of_biases(layer.b_ih, layer.b_hh, column);
  }
  for (int at = thread; at < Cell::kUnitWeights * own_units; at += kThreads) {
    const int p = at / own_units, unit = at % own_units;
    own_weights[p * units + unit] = widen(layer.unit_weights[p * H + first_unit + unit]);
  }
  // What rows from..to start from: h where the product of their first step reads it, and c.
  const auto begin = [&](int from, int to, int64_t step) {
#pragma unroll 1
    for (int element = thread; element < (to - from) * own_units; element += kThreads) {
      const int unit = element % own_units, row = from + element / own_units;
      const int own_at = row * H + first_unit + unit;
      const int64_t at = first_row * H + own_at;
      const bool reset = is_reset(sequence, step, first_row + row);
      h_of(step)[own_at] = reset ? narrow<T>(0) : layer.hx[at];
      states[row * units + unit] = reset ? S(0) : widen(layer.cx[at]);
    }
  };
  const Spots spots(own_units);
  const auto read = [&](int64_t step, const StepRows& rows, int group, Spot spot) {
    Known<T> known = {};
    const int row = group + spot.row;
    if (spot.row >= plan.group || row >= rows.count) return known;
    const T* const products =
        layer.products + (rows.begin + row) * kGates * H + first_unit + spot.column;
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) known.products[gate] = products[gate * H];
    known.reset_after = is_reset(sequence, step + 1, first_row + row);
    return known;
  };
  const auto store = [&](const Element<S>& done, const StepRows& rows, int going_on) {
    const int64_t row = rows.begin + done.row, at = row * H + done.column;
    if (layer.c_before != nullptr) layer.c_before[at] = narrow<T>(done.c_before);
    if (layer.gates != nullptr)
      store_gates(layer.gates + row * kGates * H + done.column, H, done.gates);
    layer.output[at] = narrow<T>(done.h);
    if (done.row < going_on) return;
    const int64_t of_state = (first_row + done.row) * H + done.column;
    layer.hy[of_state] = narrow<T>(done.h);
    layer.cy[of_state] = narrow<T>(done.c);
  };

  StepRows now = rows_of(sequence, 0, part);
  begin(0, now.count, 0);
  Meeting meeting(plan);
  const WarpShare share = share_of_warp<Tile>(plan);
  meeting.arrive();
  Known<T> ahead = {};
  if constexpr (kLoadsFirst) ahead = read(0, now, 0, spots.first());
  meeting.wait();

  for (int64_t step = 0; step < sequence.L; ++step) {
    const StepRows next = rows_of(sequence, step + 1, part);
    const bool goes_on = step + 1 < sequence.L;
    T* const h_next = h_of(step + 1);
    const Operand<T> operand = {h_of(step), weights, H, stride, int64_t{units} * stride};
    Element<S> late = {};
    bool is_late = false;
    for (int group = 0; group < now.count; group += plan.group) {
      multiply<Tile, kVectors, kStageNext<T, false>>(plan, share, operand, group, now.count,
                                                     own_units, partial);
      __syncthreads();
      const bool last_group = group + plan.group >= now.count;
      const int rows = min(now.count - group, plan.group);
      for (Spot spot = spots.first(); spot.row < rows;) {
        const auto [in_group, unit] = spot;
        spot = spots.after(spot);
        const int row = group + in_group, column = first_unit + unit;
        const T* const products = layer.products + (now.begin + row) * kGates * H + column;
        const Known<T> known = ahead;
        if constexpr (kLoadsFirst) ahead = read(step, now, group, spot);
        const GateSums<S> bias = biases[unit], sum = partial.sum(plan.split, in_group, unit);
        S pre[kGates];
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate)
          pre[gate] = bias.gate[gate] +
                      widen(kLoadsFirst ? known.products[gate] : products[gate * H]) +
                      sum.gate[gate];
        S& state = states[row * units + unit];
        Element<S> done = {row, column, {}, state, 0, 0};
        const auto own = unit_weights<Cell>(own_weights, units, unit);
        done.gates = Cell::template forward<Math>(Gates<S>{pre[0], pre[1], pre[2], pre[3]}, state,
                                                  own.at, done.c, done.h);
        const bool reset =
            kLoadsFirst ? known.reset_after : is_reset(sequence, step + 1, first_row + row);
        if (goes_on || !kSkipLastMeeting)
          h_next[row * H + column] = reset ? narrow<T>(0) : narrow<T>(done.h);
        // As the cell rounds its c from step to step.
        state = reset ? S(0) : widen(narrow<T>(done.c));
        is_late = kPublishFirst && last_group && spot.row >= rows;
        if (is_late)
          late = done;
        else
          store(done, now, next.count);
      }
      if (kPublishFirst && last_group) break;
      __syncthreads();
      if constexpr (kLoadsFirst) ahead = read(step, now, group + plan.group, spots.first());
    }
    // Sequences that begin at the next step, in reverse.
    begin(now.count, next.count, step + 1);
    const bool meets = goes_on || !kSkipLastMeeting;
    if (kPublishFirst && meets) meeting.arrive();
    if (is_late) store(late, now, next.count);
    if constexpr (kLoadsFirst) ahead = read(step + 1, next, 0, spots.first());
    if (!kPublishFirst && meets) meeting.arrive();
    if (meets) meeting.wait();
    now = next;
  }
}

template <class T>
Choice choice_for(const LayerForward<T>& layer, const Device& device) {
  Work work = {};
  work.units = work.K = layer.H;
  work.N = layer.sequence.N;
  work.elements_a_unit = 1;
  work.kept_a_unit = kGates + unit_weights_of(layer.variant);  // biases too
  work.kept_a_unit_and_row = 1;                                // c
  work.widely = kSmallTiles;
  return choose_plan<T>(work, device);
}

template <class Tile, class Cell>
cudaError_t launch_plan(const LayerForward<typename Tile::T>& layer, const Plan& plan,
                        cudaStream_t stream) {
  constexpr int kVector = kFullVector<typename Tile::T>;
  const bool vectors = layer.H % kVector == 0 && in_vectors(layer.h_buffers);
  const auto kernel =
      vectors ? layer_forward_kernel<Tile, Cell, true> : layer_forward_kernel<Tile, Cell, false>;
  return launch(launch_of(plan, stream), kernel, layer, plan);
}

}  // namespace

template <class T>
bool layer_forward_shared_fits(const LayerForward<T>& layer, const Device& device) {
  return choice_for(layer, device).plan.units > 0;
}

template <class T>
cudaError_t layer_forward_shared(const LayerForward<T>& layer, const Device& device,
                                 cudaStream_t stream) {
  const Choice choice = choice_for(layer, device);
  return with_tile<T>(choice.tile_rows, device.tf32, [&](auto tile) {
    return with_cell_of<T>(layer.variant, [&](auto policy) {
      return launch_plan<decltype(tile), decltype(policy)>(layer, choice.plan, stream);
    });
  });
}

#define LSTM_EXT_INSTANTIATE(T)                                                      \
  template bool layer_forward_shared_fits<T>(const LayerForward<T>&, const Device&); \
  template cudaError_t layer_forward_shared<T>(const LayerForward<T>&, const Device&, cudaStream_t);
LSTM_EXT_EACH_TYPE(LSTM_EXT_INSTANTIATE)
#undef LSTM_EXT_INSTANTIATE

}  // namespace lstm_ext::cuda
