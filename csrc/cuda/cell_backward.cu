// Gradients of the pre-activations, of c, and of the biases, before the products with the weights.
//
// A block adds up the biases' gradients of its rows, each thread its own rows first, then the
// threads in their order. Where rows are spread over several blocks, a second launch adds up the
// blocks' sums in theirs: the same bits at every call, without atomics.
#include "cuda/cell_policy.cuh"
#include "cuda/elementwise.cuh"
#include "cuda/gate_tiles.cuh"
#include "cuda/kernels.h"

namespace lstm_ext::cuda {
namespace {

template <class T>
struct BiasGradients {
  T *b_ih, *b_hh;  // [4H] or null

  __device__ void store(int at, Sum<T> sum) const {
    if (b_ih != nullptr) b_ih[at] = narrow<T>(sum);
    if (b_hh != nullptr) b_hh[at] = narrow<T>(sum);
  }
};

template <class T, int kVector>
__device__ inline Vector<T, kVector> load_or_zeros(const T* numbers, int64_t at) {
  if (numbers != nullptr) return *reinterpret_cast<const Vector<T, kVector>*>(numbers + at);
  return load_each<kVector, T>(nullptr, 0, 0);
}

// The sum of term(0) .. term(count - 1): eight sums side by side, which round less than one, and
// then in pairs.
template <class Term>
__device__ inline auto sum_of(int64_t count, const Term& term) {
  constexpr int kSums = 8;
  decltype(term(0)) sums[kSums] = {};
  for (int64_t first = 0; first < count; first += kSums)
#pragma unroll
    for (int j = 0; j < kSums; ++j)
      if (first + j < count) sums[j] += term(first + j);
#pragma unroll
  for (int apart = kSums / 2; apart > 0; apart /= 2)
#pragma unroll
    for (int j = 0; j < apart; ++j) sums[j] += sums[j + apart];
  return sums[0];
}

// partial [row blocks, 4H], or null: not wanted, or one block has all rows.
template <class T, class Cell, int kVector>
__global__ void __launch_bounds__(kElementwiseThreads)
    cell_backward_kernel(CellBackward<T> cell, Sum<T>* partial, int64_t rows_per_block) {
  using S = Sum<T>;
  using Numbers = Vector<T, kVector>;
  LSTM_EXT_DYNAMIC_SHARED(S, shared);  // [blockDim.y][4][blockDim.x][kVector]
  const int H = cell.H;
  const int unit = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kVector;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows_per_block;
  const int64_t last = unit < H ? min(first + rows_per_block, cell.N) : first;
  UnitWeights<Cell, S> own[kVector] = {};
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    if (unit < H) own[j] = unit_weights<Cell>(cell.unit_weights, H, unit + j);
  S sums[kGates][kVector] = {};
  for (int64_t row = first + threadIdx.y; row < last; row += blockDim.y) {
    const int64_t at = row * H + unit, at_gates = row * kGates * H + unit;
    Numbers gates[kGates], grads[kGates], grad_c;
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate)
      gates[gate] = *reinterpret_cast<const Numbers*>(cell.gates + at_gates + gate * H);
    const auto c = *reinterpret_cast<const Numbers*>(cell.cx + at);
    const auto grad_hy = load_or_zeros<T, kVector>(cell.grad_hy, at);
    const auto grad_cy = load_or_zeros<T, kVector>(cell.grad_cy, at);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      S grad_cx;
      const Gates<S> grad = Cell::template backward<Math>(
          Gates<S>{widen(gates[0].at[j]), widen(gates[1].at[j]), widen(gates[2].at[j]),
                   widen(gates[3].at[j])},
          widen(c.at[j]), own[j].at, widen(grad_hy.at[j]), widen(grad_cy.at[j]), grad_cx);
      const S of_gates[kGates] = {grad.i, grad.f, grad.g, grad.o};
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        sums[gate][j] += of_gates[gate];
        grads[gate].at[j] = narrow<T>(of_gates[gate]);
      }
      grad_c.at[j] = narrow<T>(grad_cx);
    }
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate)
      *reinterpret_cast<Numbers*>(cell.grad_gates + at_gates + gate * H) = grads[gate];
    if (cell.grad_cx != nullptr) *reinterpret_cast<Numbers*>(cell.grad_cx + at) = grad_c;
  }
  const BiasGradients<T> biases = {cell.grad_b_ih, cell.grad_b_hh};
  if (biases.b_ih == nullptr && biases.b_hh == nullptr) return;

  const int across = static_cast<int>(blockDim.x) * kVector;
#pragma unroll
  for (int gate = 0; gate < kGates; ++gate)
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      shared[(threadIdx.y * kGates + gate) * across + threadIdx.x * kVector + j] = sums[gate][j];
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int first_unit = static_cast<int>(blockIdx.y) * across;
  for (int element = thread; element < kGates * across; element += kElementwiseThreads) {
    const int gate = element / across, at_unit = first_unit + element % across;
    if (at_unit >= H) continue;
    const S sum = sum_of(static_cast<int>(blockDim.y),
                         [&](int64_t y) { return shared[y * kGates * across + element]; });
    if (partial != nullptr)
      partial[(static_cast<int64_t>(blockIdx.x) * kGates + gate) * H + at_unit] = sum;
    else
      biases.store(gate * H + at_unit, sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kElementwiseThreads)
    add_up_kernel(const Sum<T>* partial, int64_t count, int columns, BiasGradients<T> biases) {
  const int column = static_cast<int>(blockIdx.x) * kElementwiseThreads + threadIdx.x;
  if (column >= columns) return;
  biases.store(column, sum_of(count, [&](int64_t k) { return partial[k * columns + column]; }));
}

template <class T>
bool all_in_vectors(const CellBackward<T>& cell) {
  return cell.H % kFullVector<T> == 0 &&
         in_vectors(cell.grad_hy, cell.grad_cy, cell.cx, cell.gates, cell.grad_gates, cell.grad_cx);
}

template <class T>
Spread spread_of(const CellBackward<T>& cell) {
  return spread(cell.N, cell.H, all_in_vectors(cell) ? kFullVector<T> : 1);
}

template <class T>
bool wants_biases(const CellBackward<T>& cell) {
  return cell.grad_b_ih != nullptr || cell.grad_b_hh != nullptr;
}

}  // namespace

template <class T>
size_t cell_backward_workspace(const CellBackward<T>& cell) {
  if (!wants_biases(cell) || cell.N == 0 || cell.H == 0) return 0;
  const int64_t blocks = spread_of(cell).row_blocks;
  return blocks == 1 ? 0 : sizeof(Sum<T>) * blocks * kGates * cell.H;
}

template <class T>
cudaError_t cell_backward(const CellBackward<T>& cell, cudaStream_t stream) {
  if (cell.H == 0) return cudaSuccess;
  const int columns = kGates * cell.H;
  const BiasGradients<T> biases = {cell.grad_b_ih, cell.grad_b_hh};
  const Launch second = {
      dim3(static_cast<unsigned>((columns + kElementwiseThreads - 1) / kElementwiseThreads)),
      dim3(kElementwiseThreads), 0, false, stream};
  if (cell.N == 0)  // sums of nothing
    return wants_biases(cell)
               ? launch(second, add_up_kernel<T>, static_cast<const Sum<T>*>(nullptr), int64_t{0},
                        columns, biases)
               : cudaSuccess;
  const bool vectors = all_in_vectors(cell);
  const Spread how = spread_of(cell);
  const size_t shared = wants_biases(cell) ? sizeof(Sum<T>) * kGates * kElementwiseThreads *
                                                 (vectors ? kFullVector<T> : 1)
                                           : 0;
  auto* const partial =
      cell_backward_workspace(cell) == 0 ? nullptr : static_cast<Sum<T>*>(cell.partial_sums);
  const cudaError_t error = with_cell_of<T>(cell.variant, [&](auto policy) {
    using Cell = decltype(policy);
    const auto kernel =
        vectors ? cell_backward_kernel<T, Cell, kFullVector<T>> : cell_backward_kernel<T, Cell, 1>;
    return launch({how.grid, how.block, shared, false, stream}, kernel, cell, partial,
                  how.rows_per_block);
  });
  if (error != cudaSuccess || partial == nullptr) return error;
  return launch(second, add_up_kernel<T>, static_cast<const Sum<T>*>(partial), how.row_blocks,
                columns, biases);
}

#define LSTM_EXT_INSTANTIATE(T)                                       \
  template size_t cell_backward_workspace<T>(const CellBackward<T>&); \
  template cudaError_t cell_backward<T>(const CellBackward<T>&, cudaStream_t);
LSTM_EXT_EACH_TYPE(LSTM_EXT_INSTANTIATE)
#undef LSTM_EXT_INSTANTIATE

}  // namespace lstm_ext::cuda
