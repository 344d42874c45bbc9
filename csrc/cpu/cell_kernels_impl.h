// The CPU kernels of one LSTM cell over the vector type of simd.h. Included once
// by each cell_kernels_*.cpp, which names the instruction set by these macros:
//   LSTM_EXT_VECTOR_BYTES  width of a vector
//   LSTM_EXT_TILE_ROWS     rows of a register tile: 4 gates x rows accumulators
//   LSTM_EXT_TABLE         the table to define
#pragma once

#include "cpu/activations.h"
#include "cpu/cell_kernels.h"
#include "cpu/simd.h"

namespace lstm_ext::cpu {
namespace {

constexpr int kTileRows = LSTM_EXT_TILE_ROWS;
constexpr int kForwardRows = 48;  // rows of a forward task: a multiple of every kTileRows
constexpr int kGates = 4;

LSTM_EXT_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
LSTM_EXT_INLINE int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// (No lambdas: GCC compiles them for the file's own target, not the pragma's.)

// sum += the products of one vector along K, or of its first n elements.
template <class S, int Rows, int Units, bool Whole>
LSTM_EXT_INLINE void accumulate_step(const S* x, const S* w, int64_t K, int64_t H, int64_t n,
                                     VectorOf<S> (&sum)[Rows][Units][kGates]) {
  VectorOf<S> x_k[Rows];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) x_k[r] = Whole ? load(x + r * K) : load(x + r * K, n);
#pragma GCC unroll 8
  for (int u = 0; u < Units; ++u)
#pragma GCC unroll 4
    for (int gate = 0; gate < kGates; ++gate) {
      const S* w_row = w + (gate * H + u) * K;
      const VectorOf<S> w_k = Whole ? load(w_row) : load(w_row, n);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) sum[r][u][gate] += x_k[r] * w_k;
    }
}

// Dot products of Rows rows of x [*, K] with the four gate rows of Units hidden
// units, weights as they lie: w [4H, K]. Whatever the tile, one result is always
// summed in the same order, so that it does not depend on batch size or threads.
template <class S, int Rows, int Units>
LSTM_EXT_INLINE void accumulate(const S* x, const S* w, int64_t K, int64_t H,
                                VectorOf<S> (&sum)[Rows][Units][kGates]) {
  constexpr int width = kWidthOf<S>;
  int64_t k = 0;
  for (; k + width <= K; k += width)
    accumulate_step<S, Rows, Units, true>(x + k, w + k, K, H, width, sum);
  if (k < K) accumulate_step<S, Rows, Units, false>(x + k, w + k, K, H, K - k, sum);
}

// Pre-activations, without bias, of Rows x Units into pre [row][gate][unit].
template <class S, int Rows, int Units>
void tile(const CellForwardArgs& args, int64_t row, int64_t unit,
          ComputeType<S> (*pre)[kGates][kWidthOf<S>]) {
  using T = ComputeType<S>;
  VectorOf<S> sum[Rows][Units][kGates] = {};
  accumulate<S, Rows, Units>(static_cast<const S*>(args.input) + row * args.I,
                             static_cast<const S*>(args.w_ih) + unit * args.I, args.I, args.H, sum);
  accumulate<S, Rows, Units>(static_cast<const S*>(args.hx) + row * args.H,
                             static_cast<const S*>(args.w_hh) + unit * args.H, args.H, args.H, sum);
  for (int r = 0; r < Rows; ++r)
    for (int u = 0; u < Units; ++u)
      for (int gate = 0; gate < kGates; ++gate)
        pre[r][gate][u] = horizontal_sum<T>(sum[r][u][gate]);
}

// A forward task: one vector of hidden units for up to kForwardRows rows.
template <class S>
int64_t forward_tasks(int64_t N, int64_t H) {
  return blocks(N, kForwardRows) * blocks(H, kWidthOf<S>);
}

template <class S>
void forward_task(const CellForwardArgs& args, int64_t row_begin, int64_t unit_begin) {
  using T = ComputeType<S>;
  using V = VectorOf<S>;
  constexpr int width = kWidthOf<S>;
  const int64_t H = args.H;
  const int64_t rows = at_most(kForwardRows, args.N - row_begin);
  const int64_t units = at_most(width, H - unit_begin);

  T pre[kForwardRows][kGates][width];
  const int64_t tiled_rows = rows - rows % kTileRows;
  for (int64_t u = 0; u < units; ++u)
    for (int64_t r = 0; r < tiled_rows; r += kTileRows)
      tile<S, kTileRows, 1>(args, row_begin + r, unit_begin + u,
                            reinterpret_cast<T(*)[kGates][width]>(&pre[r][0][u]));
  for (int64_t r = tiled_rows; r < rows; ++r) {
    int64_t u = 0;
    for (; u + 3 <= units; u += 3)
      tile<S, 1, 3>(args, row_begin + r, unit_begin + u,
                    reinterpret_cast<T(*)[kGates][width]>(&pre[r][0][u]));
    for (; u < units; ++u)
      tile<S, 1, 1>(args, row_begin + r, unit_begin + u,
                    reinterpret_cast<T(*)[kGates][width]>(&pre[r][0][u]));
  }

  V bias[kGates] = {};
  for (int gate = 0; gate < kGates; ++gate) {
    const int64_t offset = gate * H + unit_begin;
    if (args.b_ih) bias[gate] += load(static_cast<const S*>(args.b_ih) + offset, units);
    if (args.b_hh) bias[gate] += load(static_cast<const S*>(args.b_hh) + offset, units);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t state = (row_begin + r) * H + unit_begin;
    const Gates<V> pre_r = {load(pre[r][0]) + bias[0], load(pre[r][1]) + bias[1],
                            load(pre[r][2]) + bias[2], load(pre[r][3]) + bias[3]};
    V c_next, h_next;
    const V c = load(static_cast<const S*>(args.cx) + state, units);
    const Gates<V> gate = cell_forward<Activations<T>>(pre_r, c, c_next, h_next);
    store(static_cast<S*>(args.cy) + state, c_next, units);
    store(static_cast<S*>(args.hy) + state, h_next, units);
    if (args.gates) {
      S* gates = static_cast<S*>(args.gates) + (row_begin + r) * kGates * H + unit_begin;
      store(gates, gate.i, units);
      store(gates + H, gate.f, units);
      store(gates + 2 * H, gate.g, units);
      store(gates + 3 * H, gate.o, units);
    }
  }
}

template <class S>
void forward(const CellForwardArgs& args, int64_t first_task, int64_t last_task) {
  const int64_t row_blocks = blocks(args.N, kForwardRows);
  for (int64_t task = first_task; task < last_task; ++task)
    forward_task<S>(args, task % row_blocks * kForwardRows, task / row_blocks * kWidthOf<S>);
}

// A backward task: one vector of hidden units for up to kBackwardRows rows.
template <class S>
int64_t backward_tasks(int64_t N, int64_t H) {
  return backward_row_blocks(N) * blocks(H, kWidthOf<S>);
}

template <class S>
LSTM_EXT_INLINE VectorOf<S> load_or_zero(const void* p, int64_t offset, int64_t n) {
  return p ? load(static_cast<const S*>(p) + offset, n) : zeros<VectorOf<S>>();
}

template <class S>
void backward_task(const CellBackwardArgs& args, int64_t row_block, int64_t unit_begin) {
  using T = ComputeType<S>;
  using V = VectorOf<S>;
  const int64_t H = args.H;
  const int64_t row_begin = row_block * kBackwardRows;
  const int64_t row_end = at_most(row_begin + kBackwardRows, args.N);
  const int64_t units = at_most(kWidthOf<S>, H - unit_begin);
  Gates<V> bias = {};
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t state = row * H + unit_begin;
    const S* gates = static_cast<const S*>(args.gates) + row * kGates * H + unit_begin;
    const Gates<V> gate = {load(gates, units), load(gates + H, units), load(gates + 2 * H, units),
                           load(gates + 3 * H, units)};
    V grad_c;
    const V c = load(static_cast<const S*>(args.cx) + state, units);
    const Gates<V> grad = cell_backward<Activations<T>>(gate, c, load_or_zero<S>(args.grad_hy, state, units),
                                                        load_or_zero<S>(args.grad_cy, state, units), grad_c);
    S* grad_gates = static_cast<S*>(args.grad_gates) + row * kGates * H + unit_begin;
    store(grad_gates, grad.i, units);
    store(grad_gates + H, grad.f, units);
    store(grad_gates + 2 * H, grad.g, units);
    store(grad_gates + 3 * H, grad.o, units);
    if (args.grad_cx) store(static_cast<S*>(args.grad_cx) + state, grad_c, units);
    bias.i += grad.i;
    bias.f += grad.f;
    bias.g += grad.g;
    bias.o += grad.o;
  }
  if (args.bias_sums) {
    T* sums = static_cast<T*>(args.bias_sums) + row_block * kGates * H + unit_begin;
    store(sums, bias.i, units);
    store(sums + H, bias.f, units);
    store(sums + 2 * H, bias.g, units);
    store(sums + 3 * H, bias.o, units);
  }
}

template <class S>
void backward(const CellBackwardArgs& args, int64_t first_task, int64_t last_task) {
  const int64_t row_blocks = backward_row_blocks(args.N);
  for (int64_t task = first_task; task < last_task; ++task)
    backward_task<S>(args, task % row_blocks, task / row_blocks * kWidthOf<S>);
}

template <class S>
void reduce_bias(const void* bias_sums, int64_t row_blocks, int64_t H, void* out_1, void* out_2) {
  using T = ComputeType<S>;
  const T* sums = static_cast<const T*>(bias_sums);
  for (int64_t j = 0; j < kGates * H; j += kWidthOf<S>) {
    const int64_t n = at_most(kWidthOf<S>, kGates * H - j);
    auto total = zeros<VectorOf<S>>();
    for (int64_t block = 0; block < row_blocks; ++block)
      total += load(sums + block * kGates * H + j, n);
    if (out_1) store(static_cast<S*>(out_1) + j, total, n);
    if (out_2) store(static_cast<S*>(out_2) + j, total, n);
  }
}

template <class S>
constexpr CellKernels table() {
  return {forward_tasks<S>, forward<S>, backward_tasks<S>, backward<S>, reduce_bias<S>};
}

}  // namespace

// In the order of Dtype.
const CellKernels LSTM_EXT_TABLE[kDtypes] = {table<float>(), table<double>(), table<BFloat16>(),
                                             table<Half>()};

}  // namespace lstm_ext::cpu
