// The cells: the gate maths of one element, forward and backward, each written once. The CPU's
// kernels apply it to vectors, the CUDA kernels to scalars, ops/composite_cell.cpp to tensors.
//
// A cell is a struct with
//   kUnitWeights   how many weights each hidden unit has of its own, beside the matrices
//   forward        in: pre-activations, c, the unit's weights; out: the activated gates, c' and h'
//   backward       in: the activated gates, c, the unit's weights, the gradients of h' and c';
//                  out: the gradients of the four pre-activations and of c
//   add_unit_gradients   adds the gradients of the unit's weights to sums; in: the activated gates,
//                  c, and the gradients of the pre-activations
// V is the type of a value, M has its sigmoid(V) and tanh(V). What a backward needs of c' is
// computed anew: two numbers fewer to keep for every element, and c' may be overwritten meanwhile.
#pragma once

#if defined(__CUDACC__)
#define LSTM_EXT_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define LSTM_EXT_INLINE inline __attribute__((always_inline))
#else
#define LSTM_EXT_INLINE inline
#endif

namespace lstm_ext {

template <class V>
struct Gates {
  V i, f, g, o;
};

template <class V>
LSTM_EXT_INLINE V next_cell_state(const Gates<V>& gate, V c) {
  return gate.f * c + gate.i * gate.g;
}

// The LSTM of torch.nn (Hochreiter & Schmidhuber 1997, the forget gate of Gers et al. 2000):
//   i, f, o = sigmoid of their pre-activations,  g = tanh of its own
//   c' = f * c + i * g          h' = o * tanh(c')
struct PlainCell {
  static constexpr int kUnitWeights = 0;

  template <class M, class V>
  static LSTM_EXT_INLINE Gates<V> forward(const Gates<V>& pre, V c, const V* /*weights*/, V& c_next,
                                          V& h_next) {
    const Gates<V> gate = activate<M>(pre);
    c_next = next_cell_state(gate, c);
    h_next = gate.o * M::tanh(c_next);
    return gate;
  }

  template <class M, class V>
  static LSTM_EXT_INLINE Gates<V> backward(const Gates<V>& gate, V c, const V* /*weights*/,
                                           V grad_h, V grad_c_next, V& grad_c) {
    return backward_from(gate, c, tanh_next<M>(gate, c), grad_h, grad_c_next, grad_c);
  }

  // backward in two parts: tanh(c'), which needs no gradient, and the rest.
  template <class M, class V>
  static LSTM_EXT_INLINE V tanh_next(const Gates<V>& gate, V c) {
    return M::tanh(next_cell_state(gate, c));
  }
  template <class V>
  static LSTM_EXT_INLINE Gates<V> backward_from(const Gates<V>& gate, V c, V tanh_c, V grad_h,
                                                V grad_c_next, V& grad_c) {
    const V grad_state = grad_c_next + shown_gradient(gate, tanh_c, grad_h);
    return state_gradients(gate, c, grad_state, output_gradient(gate, tanh_c, grad_h), grad_c);
  }

  // And both in pieces, for steps that do something in between (ops/recurrence.h).
  template <class M, class V>
  static LSTM_EXT_INLINE Gates<V> activate(const Gates<V>& pre) {
    return {M::sigmoid(pre.i), M::sigmoid(pre.f), M::tanh(pre.g), M::sigmoid(pre.o)};
  }
  // Of o before its activation, and of what tanh_c is the tanh of.
  template <class V>
  static LSTM_EXT_INLINE V output_gradient(const Gates<V>& gate, V tanh_c, V grad_h) {
    return grad_h * tanh_c * gate.o * (1 - gate.o);
  }
  template <class V>
  static LSTM_EXT_INLINE V shown_gradient(const Gates<V>& gate, V tanh_c, V grad_h) {
    return grad_h * gate.o * (1 - tanh_c * tanh_c);
  }
  template <class V>
  static LSTM_EXT_INLINE Gates<V> state_gradients(const Gates<V>& gate, V c, V grad_state, V grad_o,
                                                  V& grad_c) {
    const Gates<V> grad = {grad_state * gate.g * gate.i * (1 - gate.i),
                           grad_state * c * gate.f * (1 - gate.f),
                           grad_state * gate.i * (1 - gate.g * gate.g), grad_o};
    grad_c = grad_state * gate.f;
    return grad;
  }

  template <class V>
  static LSTM_EXT_INLINE void add_unit_gradients(const Gates<V>& /*gate*/, V /*c*/,
                                                 const Gates<V>& /*grad*/, V* /*sums*/) {}
};

// With peepholes (Gers & Schmidhuber 2000, in the form of ONNX): i and f see c, o sees c'.
//   i, f = sigmoid(pre-activation + w c)      o = sigmoid(pre-activation + w c')
// The weights w of a unit are those of i, f and o.
struct PeepholeCell {
  static constexpr int kUnitWeights = 3;

  template <class M, class V>
  static LSTM_EXT_INLINE Gates<V> forward(const Gates<V>& pre, V c, const V* weights, V& c_next,
                                          V& h_next) {
    Gates<V> gate = {M::sigmoid(pre.i + weights[0] * c), M::sigmoid(pre.f + weights[1] * c),
                     M::tanh(pre.g), pre.o};
    c_next = next_cell_state(gate, c);
    gate.o = M::sigmoid(pre.o + weights[2] * c_next);
    h_next = gate.o * M::tanh(c_next);
    return gate;
  }

  template <class M, class V>
  static LSTM_EXT_INLINE Gates<V> backward(const Gates<V>& gate, V c, const V* weights, V grad_h,
                                           V grad_c_next, V& grad_c) {
    const V tanh_c = M::tanh(next_cell_state(gate, c));
    const V grad_o = grad_h * tanh_c * gate.o * (1 - gate.o);
    const V grad_state =
        grad_c_next + grad_h * gate.o * (1 - tanh_c * tanh_c) + grad_o * weights[2];
    const V grad_i = grad_state * gate.g * gate.i * (1 - gate.i);
    const V grad_f = grad_state * c * gate.f * (1 - gate.f);
    grad_c = grad_state * gate.f + grad_i * weights[0] + grad_f * weights[1];
    return {grad_i, grad_f, grad_state * gate.i * (1 - gate.g * gate.g), grad_o};
  }

  template <class V>
  static LSTM_EXT_INLINE void add_unit_gradients(const Gates<V>& gate, V c, const Gates<V>& grad,
                                                 V* sums) {
    sums[0] = sums[0] + grad.i * c;
    sums[1] = sums[1] + grad.f * c;
    sums[2] = sums[2] + grad.o * next_cell_state(gate, c);
  }
};

}  // namespace lstm_ext
