// A lane's elements of a layer's backward, where w_hh lies in registers: from the last step to the
// first, the gradients of the pre-activations from those of h, which the products bring to the lane
// that has the unit's gates. What a step reads is read a step or two ahead; what it makes is stored
// after others have it.
#pragma once

#include "cuda/layer_small.cuh"

namespace lstm_ext::cuda {

// The elements of a lane, kRows rows of each of kUnits units: where they lie, what they need and
// what becomes of them. kSets: as many steps are read ahead, 1 or 2.
template <class T, class Activations, int kUnits, int kRows, int kSets = 2>
class BackwardElements {
 public:
  static constexpr int kElements = kUnits * kRows, kRowsOfLane = kRows;

  // place(e): the place of an element; rows of one unit come one after another.
  template <class PlaceOf>
  __device__ BackwardElements(const LayerBackward<T>& layer, int64_t first_row,
                              const PlaceOf& place)
      : layer_(layer), H_(layer.H) {
    const DeviceSequence& sequence = layer.sequence;
    const Place origin = place(0);
    of_state_ = (first_row + origin.row) * H_ + origin.unit;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const auto [row, unit, own] = place(e);
      own_[e] = own && unit < H_ && first_row + row < sequence.N;
      row_[e] = row - origin.row, unit_[e] = unit - origin.unit;
      grad_c_[e] = own_[e] && layer.grad_cy != nullptr ? widen(layer.grad_cy[in_state(e)]) : 0;
    }
    const int64_t time = sequence.reverse ? 0 : sequence.L - 1;
    a_step_ = (sequence.reverse ? sequence.N : -sequence.N) * H_;
    const int64_t state = time * sequence.N * H_ + of_state_;
    const int64_t gates = (time * sequence.N + first_row + origin.row) * kGates * H_ + origin.unit;
    gates_ = layer.gates + gates;
    c_before_ = layer.c_before + state;
    if (gets_output()) grad_output_ = layer.grad_output + state;
    grad_gates_ = layer.grad_gates + gates;
#pragma unroll
    for (int set = 0; set < kSets; ++set) read(set, set < sequence.L);
  }

  // The gradient of h that an element starts with.
  __device__ float start(int e) const {
    return own_[e] && layer_.grad_hy != nullptr ? widen(layer_.grad_hy[in_state(e)]) : 0;
  }

  // parity: of a step, known when compiled. After the step, which needs it no more, what the one
  // kSets later needs.
  __device__ void read_after(int parity, int64_t step) {
    read(parity % kSets, step + kSets < layer_.sequence.L);
  }

  // What does not depend on a step's gradient of h: to be called while that is on its way.
  __device__ void prepare(int parity) {
    const int set = parity % kSets;
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      tanh_c_[e] =
          PlainCell::tanh_next<Activations>(gates_of(set, e), widen(ahead_[set][e].c_before));
  }

  // The gradients of the pre-activations, rounded, of a step that is prepared.
  __device__ void advance(int parity, int e, float grad_h, T (&grads)[kGates]) {
    const int set = parity % kSets;
    const Known& known = ahead_[set][e];
    float grad_c = 0;
    const Gates<float> grad =
        PlainCell::backward_from(gates_of(set, e), widen(known.c_before), tanh_c_[e],
                                 grad_h + widen(known.grad_output), grad_c_[e], grad_c);
    grad_c_[e] = grad_c;
    const float exact[kGates] = {grad.i, grad.f, grad.g, grad.o};
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      if (own_[e]) sums_[e / kRows][gate] += exact[gate];
      grads[gate] = late_[e][gate] = narrow<T>(exact[gate]);
    }
  }

  // What the last advance made.
  __device__ void store() {
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      if (own_[e])
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate)
          grad_gates_[in_gates(e) + gate * H_] = late_[e][gate];
    grad_gates_ += kGates * a_step_;
  }

  __device__ void store_last(const float (&grad_h)[kElements]) {
    store();
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (!own_[e]) continue;
      if (layer_.grad_hx != nullptr) layer_.grad_hx[in_state(e)] = narrow<T>(grad_h[e]);
      if (layer_.grad_cx != nullptr) layer_.grad_cx[in_state(e)] = narrow<T>(grad_c_[e]);
    }
  }

  // A unit's gradients of a pre-activation, added up over the lane's rows and all steps.
  __device__ float sum(int unit, int gate) const { return sums_[unit][gate]; }

 private:
  struct Known {
    T gates[kGates] = {narrow<T>(0), narrow<T>(0), narrow<T>(0), narrow<T>(0)};
    T c_before = narrow<T>(0), grad_output = narrow<T>(0);
  };

  // Into a set, the next step that has not been read.
  __device__ void read(int set, bool there) {
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      Known& known = ahead_[set][e];
      known = {};
      if (!own_[e] || !there) continue;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) known.gates[gate] = gates_[in_gates(e) + gate * H_];
      known.c_before = c_before_[offset(e)];
      if (gets_output()) known.grad_output = grad_output_[offset(e)];
    }
    gates_ += kGates * a_step_;
    c_before_ += a_step_;
    if (gets_output()) grad_output_ += a_step_;
  }

  __device__ bool gets_output() const { return layer_.grad_output != nullptr; }
  // From the first element.
  __device__ int offset(int e) const { return row_[e] * H_ + unit_[e]; }
  __device__ int in_gates(int e) const { return row_[e] * kGates * H_ + unit_[e]; }
  __device__ int64_t in_state(int e) const { return of_state_ + offset(e); }
  __device__ Gates<float> gates_of(int set, int e) const {
    const Known& known = ahead_[set][e];
    return {widen(known.gates[0]), widen(known.gates[1]), widen(known.gates[2]),
            widen(known.gates[3])};
  }

  const LayerBackward<T>& layer_;
  int H_;
  int64_t a_step_, of_state_;
  const T *gates_, *c_before_, *grad_output_ = nullptr;
  T* grad_gates_;
  bool own_[kElements];
  int row_[kElements], unit_[kElements];
  float grad_c_[kElements], tanh_c_[kElements], sums_[kUnits][kGates] = {};
  Known ahead_[kSets][kElements];
  T late_[kElements][kGates];
};

// The sums over a block's rows, in their order, at the end: its units from first on, to a row of
// bias_sums. part_of(row): the place of a lane's sums, by the first of its rows. of_rows is shared
// memory that nobody uses any more, [kBlockRows / rows of a lane][4][units].
template <int kBlockRows, class T, class Elements, class PlaceOf, class PartOf>
__device__ inline void store_bias_sums(const LayerBackward<T>& layer, const Elements& elements,
                                       const PlaceOf& place, const PartOf& part_of, int first,
                                       int units, unsigned to, float* of_rows) {
  if (layer.bias_sums == nullptr) return;
  constexpr int kRows = Elements::kRowsOfLane;
  __syncthreads();
#pragma unroll
  for (int e = 0; e < Elements::kElements; e += kRows) {
    const auto [row, unit, own] = place(e);
    if (!own || unit - first >= units) continue;
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate)
      of_rows[(part_of(row) * kGates + gate) * units + unit - first] =
          elements.sum(e / kRows, gate);
  }
  __syncthreads();
  const int threads = static_cast<int>(blockDim.x);
  for (int at = static_cast<int>(threadIdx.x); at < kGates * units; at += threads) {
    float sum = 0;
#pragma unroll
    for (int part = 0; part < kBlockRows / kRows; ++part)
      sum += of_rows[part * kGates * units + at];
    layer.bias_sums[(int64_t{to} * kGates + at / units) * layer.H + first + at % units] = sum;
  }
}

}  // namespace lstm_ext::cuda
