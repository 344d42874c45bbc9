// A layer of few hidden units in one launch: a block takes some rows of the batch through all steps
// and meets nobody. w_hh stays in its threads' registers; h lies in shared memory, twice: a step
// reads one and writes the other, so that it needs one barrier.
//
// All four gates of a unit and a row end up in one lane: nothing else lies between products and h.
// The input's products are read two steps ahead, outputs are stored after h is published.
#pragma once

#include <type_traits>

#include "cuda/register_weights.cuh"

namespace lstm_ext::cuda {

// An element's place: its row in the block, and its unit; own: whether its lane is to store it.
struct Place {
  int row, unit;
  bool own;
};

// The kElements elements of a lane: where they lie, what they need and what becomes of them.
template <class T, class Activations, int kElements>
class Elements {
 public:
  // place(e): the place of an element.
  template <class PlaceOf>
  __device__ Elements(const LayerForward<T>& layer, int64_t first_row, const PlaceOf& place)
      : layer_(layer), H_(layer.H) {
    const DeviceSequence& sequence = layer.sequence;
    const Place origin = place(0);
    of_state_ = (first_row + origin.row) * H_ + origin.unit;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const auto [row, unit, own] = place(e);
      own_[e] = own && unit < H_ && first_row + row < sequence.N;
      row_[e] = row - origin.row, unit_[e] = unit - origin.unit;
      c_[e] = own_[e] ? widen(layer.cx[in_state(e)]) : 0;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate)
        bias_[e][gate] = unit < H_ ? sum_of_biases(layer.b_ih, layer.b_hh, gate * H_ + unit) : 0;
    }
    const int64_t time = sequence.reverse ? sequence.L - 1 : 0;
    a_step_ = (sequence.reverse ? -sequence.N : sequence.N) * H_;
    const int64_t state = time * sequence.N * H_ + of_state_;
    const int64_t gates = (time * sequence.N + first_row + origin.row) * kGates * H_ + origin.unit;
    products_ = layer.products + gates;
    output_ = layer.output + state;
    if (keeps()) gates_ = layer.gates + gates, c_before_ = layer.c_before + state;
    read(0, true);
    read(1, sequence.L > 1);
  }

  // The next of the steps that have not been read, into a set.
  __device__ void read(int set, bool there) {
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      if (own_[e] && there) {
        const T* const products = products_ + in_gates(e);
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) ahead_[set][e][gate] = products[gate * H_];
      } else {
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) ahead_[set][e][gate] = narrow<T>(0);
      }
    products_ += kGates * a_step_;
  }

  // What a set has, which may then be read anew.
  __device__ void take(int set, float (&known)[kElements][kGates]) const {
#pragma unroll
    for (int e = 0; e < kElements; ++e)
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate)
        known[e][gate] = widen(ahead_[set][e][gate]) + bias_[e][gate];
  }

  // h, from the pre-activations.
  __device__ T advance(int e, const float (&pre)[kGates]) {
    constexpr const float* no_weights = nullptr;
    float c = 0, h = 0;
    const Gates<float> gates = PlainCell::forward<Activations>(
        Gates<float>{pre[0], pre[1], pre[2], pre[3]}, c_[e], no_weights, c, h);
    late_c_[e] = narrow<T>(c_[e]);
    late_gates_[e][0] = narrow<T>(gates.i), late_gates_[e][1] = narrow<T>(gates.f);
    late_gates_[e][2] = narrow<T>(gates.g), late_gates_[e][3] = narrow<T>(gates.o);
    // As the cell rounds its c from step to step.
    c_[e] = widen(narrow<T>(c));
    return late_h_[e] = narrow<T>(h);
  }

  // What the last advance made.
  __device__ void store() {
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (!own_[e]) continue;
      output_[offset(e)] = late_h_[e];
      if (keeps()) {
        c_before_[offset(e)] = late_c_[e];
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate)
          gates_[in_gates(e) + gate * H_] = late_gates_[e][gate];
      }
    }
    output_ += a_step_;
    if (keeps()) c_before_ += a_step_, gates_ += kGates * a_step_;
  }

  __device__ void store_last() {
    store();
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      if (own_[e]) {
        layer_.hy[in_state(e)] = late_h_[e];
        layer_.cy[in_state(e)] = narrow<T>(c_[e]);
      }
  }

 private:
  // Gates and c for backward. Asked when it runs: the same code, and the same bits, either way.
  __device__ bool keeps() const { return layer_.gates != nullptr; }
  // From the first element.
  __device__ int offset(int e) const { return row_[e] * H_ + unit_[e]; }
  __device__ int in_gates(int e) const { return row_[e] * kGates * H_ + unit_[e]; }
  __device__ int64_t in_state(int e) const { return of_state_ + offset(e); }

  const LayerForward<T>& layer_;
  int H_;
  int64_t a_step_, of_state_;
  const T* products_;
  T *output_, *gates_ = nullptr, *c_before_ = nullptr;
  bool own_[kElements];
  int row_[kElements], unit_[kElements];
  float c_[kElements], bias_[kElements][kGates];
  T ahead_[2][kElements][kGates];
  T late_h_[kElements], late_c_[kElements], late_gates_[kElements][kGates];
};

// Steps in pairs, so that which copy of h is read is known when compiled: advance(parity, step).
template <class Advance>
__device__ inline void for_steps(int64_t L, const Advance& advance) {
  for (int64_t step = 0; step < L; step += 2) {
    advance(std::integral_constant<int, 0>(), step);
    if (step + 1 < L) advance(std::integral_constant<int, 1>(), step + 1);
  }
}

// Rows of a block, a power of two: as few as leave no block without a multiprocessor, for a step
// takes longer with more.
inline int rows_a_block(int64_t N, const Device& device, int least, int most) {
  int rows = least;
  while (rows < most && (N + rows - 1) / rows > device.multiprocessors) rows *= 2;
  return rows;
}

// More blocks than so many for each multiprocessor take more turns than the other ways' steps take.
inline bool few_turns(int64_t N, const Device& device, int most_rows) {
  constexpr int kMostTurns = 4;
  return (N + most_rows - 1) / most_rows <= int64_t{kMostTurns} * device.multiprocessors;
}

inline dim3 blocks_for(int64_t N, int rows) {
  return dim3(static_cast<unsigned>((N + rows - 1) / rows));
}

}  // namespace lstm_ext::cuda
