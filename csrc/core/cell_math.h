// The gate maths of one element of an LSTM cell, forward and backward. Defined
// once: the CPU kernels apply it to vectors, the CUDA kernels to scalars.
//
//   i, f, o = sigmoid of their pre-activations,  g = tanh of its own
//   c' = f * c + i * g          h' = o * tanh(c')
//
// (Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000, as in
// torch.nn.LSTMCell.) M supplies sigmoid(V) and tanh(V) for the value type V.
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

// In: pre-activations and c. Out: the activated gates, c' and h'.
template <class M, class V>
LSTM_EXT_INLINE Gates<V> cell_forward(const Gates<V>& pre, V c, V& c_next, V& h_next) {
  const Gates<V> gate = {M::sigmoid(pre.i), M::sigmoid(pre.f), M::tanh(pre.g), M::sigmoid(pre.o)};
  c_next = next_cell_state(gate, c);
  h_next = gate.o * M::tanh(c_next);
  return gate;
}

// In: the activated gates, c, and the gradients of h' and c'. Out: the gradients
// of the four pre-activations and of c. c' and tanh(c') are computed anew: two
// numbers fewer to keep for every element, and c' may be overwritten meanwhile.
template <class M, class V>
LSTM_EXT_INLINE Gates<V> cell_backward(const Gates<V>& gate, V c, V grad_h, V grad_c_next,
                                       V& grad_c) {
  const V tanh_c = M::tanh(next_cell_state(gate, c));
  const V grad_state = grad_c_next + grad_h * gate.o * (1 - tanh_c * tanh_c);
  grad_c = grad_state * gate.f;
  return {grad_state * gate.g * gate.i * (1 - gate.i), grad_state * c * gate.f * (1 - gate.f),
          grad_state * gate.i * (1 - gate.g * gate.g), grad_h * tanh_c * gate.o * (1 - gate.o)};
}

}  // namespace lstm_ext
