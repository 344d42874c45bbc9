// Backward of a layer of few hidden units on tensor cores, in the 16-bit types, as its forward
// (layer_small.cuh): a block takes some rows of the batch through all steps and meets nobody. The
// gradients of a step's pre-activations lie in shared memory, twice: a step writes one and reads
// it, the next one writes the other, so that a step needs one barrier.
#include "cuda/backward_elements.cuh"
#include "cuda/quick_math.cuh"

namespace lstm_ext::cuda {
namespace {

constexpr int kUnitsOfWarp = 16, kMostUnits = 128, kFewUnits = 64;
constexpr int kMostThreads = kMostUnits / kUnitsOfWarp * kWarpSize;

constexpr int kChunk = 32;
// From row to row of gradients an odd count of chunks, so that rows begin in the banks' other half.
template <int kChunks>
constexpr int kRowOfGrads = (kChunks | 1) * kChunk;

// A warp has 16 units: a tile of 16 columns of w_hh, of which a lane's two are neighbours. A tile
// multiplies eight rows of the batch, and a block may have fewer: columns then repeat them, and
// each lane takes other ones of its sums.
template <class T, int kRows, int kChunks>
__global__ void __launch_bounds__(kMostThreads, 1)
    layer_backward_small_mma_kernel(LayerBackward<T> layer) {
  constexpr int kStep = kFullVector<T>, kStride = kRowOfGrads<kChunks>;
  constexpr int kUnits = kRows == 8 ? 2 : 1, kRowsOfLane = kRows == 2 ? 1 : 2;
  constexpr int kElements = kUnits * kRowsOfLane;
  // Sums that do not wait for each other.
  constexpr int kSums = 4;
  static_assert(kRows == 8 || kRows == 4 || kRows == 2);
  static_assert(kChunk == 4 * kStep && kChunks % 2 == 0);
  using Numbers = Vector<T, kStep>;
  LSTM_EXT_DYNAMIC_SHARED(T, grads);  // [2][kRows][kStride], of the pre-activations

  const int H = layer.H, K = kGates * H, thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, r = lane / 4, t = lane % 4;
  const int first_unit = thread / kWarpSize * kUnitsOfWarp;
  const int64_t first_row = int64_t{blockIdx.x} * kRows;

  uint32_t weights[kChunks][2][4];
  const bool in_pairs = alignment_of(layer.w_hh, H) > 1;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    uint32_t words[2][4];
    const auto row_of = [&](int j) {
      const int k = chunk * kChunk + t * kStep + j;
      return k < K ? layer.w_hh + static_cast<int64_t>(k) * H : nullptr;
    };
    columns_of<T>(row_of, first_unit + 2 * r, H, in_pairs, words[0], words[1]);
    operands_of(words[0], words[1], weights[chunk]);
  }
  for (int at = thread; at < 2 * kRows * kStride; at += static_cast<int>(blockDim.x))
    grads[at] = narrow<T>(0);
  // Of a lane's sums 0..3, columns 2t and 2t + 1 of the first unit, and of the second.
  const auto place_of = [&](int e) {
    if constexpr (kRows == 8)
      return Place{2 * t + e % 2, first_unit + 2 * r + e / 2, true};
    else if constexpr (kRows == 4)
      return Place{t % 2 * 2 + e, first_unit + 2 * r + t / 2, true};
    else
      return Place{t % 2, first_unit + 2 * r + t / 2, true};
  };
  const auto pick = [&](const float (&d)[4], int e) {
    if constexpr (kRows == 8) return d[e];
    if constexpr (kRows == 4) return t / 2 != 0 ? d[2 + e] : d[e];
    const float low = t % 2 != 0 ? d[1] : d[0], high = t % 2 != 0 ? d[3] : d[2];
    return t / 2 != 0 ? high : low;
  };
  BackwardElements<T, QuickMath, kUnits, kRowsOfLane> elements(layer, first_row, place_of);
  const Place origin = place_of(0);
  T* const own_grads = grads + origin.row * kStride + origin.unit;
  const T* const read_grads = grads + r % kRows * kStride + t * kStep;
  float grad_h[kElements];
#pragma unroll
  for (int e = 0; e < kElements; ++e) grad_h[e] = elements.start(e);
  elements.prepare(0);

  __syncthreads();
  const int64_t L = layer.sequence.L;
  for_steps(L, [&](auto parity, int64_t step) {
    constexpr int kSet = decltype(parity)::value;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      T of_gates[kGates];
      elements.advance(kSet, e, grad_h[e], of_gates);
      const auto [row, unit, own] = place_of(e);
      if (unit >= H) continue;
      T* const to = own_grads + (kSet * kRows + row - origin.row) * kStride + (unit - origin.unit);
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) to[gate * H] = of_gates[gate];
    }
    __syncthreads();
    float sums[kSums][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const Numbers x =
          *reinterpret_cast<const Numbers*>(read_grads + kSet * kRows * kStride + chunk * kChunk);
      uint32_t words[4];
      words_of(x, words);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const uint32_t b[2] = {words[2 * part], words[2 * part + 1]};
        mma_of<T>(sums[(2 * chunk + part) % kSums], weights[chunk][part], b);
      }
      if (chunk > 0) continue;
      // Here, where the tensor cores have something to do.
      if (step + 1 < L) elements.store();
      elements.read_after(kSet, step);
      elements.prepare(1 - kSet);
    }
    float all[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) all[j] = sums[0][j] + sums[1][j] + (sums[2][j] + sums[3][j]);
#pragma unroll
    for (int e = 0; e < kElements; ++e) grad_h[e] = pick(all, e);
  });
  elements.store_last(grad_h);
  store_bias_sums<kRows>(
      layer, elements, place_of, [](int row) { return row / kRowsOfLane; }, 0, H, blockIdx.x,
      reinterpret_cast<float*>(grads));
}

template <class T, int kRows, int kChunks>
cudaError_t launch_chunks(const LayerBackward<T>& layer, cudaStream_t stream) {
  const int warps = (layer.H + kUnitsOfWarp - 1) / kUnitsOfWarp;
  Launch how = {blocks_for(layer.sequence.N, kRows),
                dim3(static_cast<unsigned>(warps * kWarpSize))};
  // As much as sums of the biases take, which lie there at the end.
  static_assert(2 * sizeof(T) == sizeof(float));
  how.shared = sizeof(T) * 2 * kRows * kRowOfGrads<kChunks>;
  how.stream = stream;
  return launch(how, layer_backward_small_mma_kernel<T, kRows, kChunks>, layer);
}

template <int kUnits>
constexpr int kChunksOf = kGates * kUnits / kChunk;

// With more of either, a thread had not registers enough.
int most_rows(int H) { return H <= kFewUnits ? 8 : 4; }

template <class T>
int rows_of_block(const LayerBackward<T>& layer, const Device& device) {
  return rows_a_block(layer.sequence.N, device, 2, most_rows(layer.H));
}

}  // namespace

template <class T>
bool layer_backward_small_fits(const LayerBackward<T>& layer, const Device& device) {
  constexpr int kMostShared = sizeof(T) * 2 * 8 * kRowOfGrads<kChunksOf<kFewUnits>>;
  static_assert(kMostShared >= sizeof(T) * 2 * 4 * kRowOfGrads<kChunksOf<kMostUnits>>);
  return layer.H <= kMostUnits && kMostShared <= device.shared_per_block &&
         few_turns(layer.sequence.N, device, most_rows(layer.H));
}

template <class T>
int64_t layer_backward_small_blocks(const LayerBackward<T>& layer, const Device& device) {
  return blocks_for(layer.sequence.N, rows_of_block(layer, device)).x;
}

template <class T>
cudaError_t layer_backward_small(const LayerBackward<T>& layer, const Device& device,
                                 cudaStream_t stream) {
  constexpr int kFew = kChunksOf<kFewUnits>, kMost = kChunksOf<kMostUnits>;
  const bool few = layer.H <= kFewUnits;
  if (layer.H > kMostUnits) return cudaErrorInvalidValue;
  switch (rows_of_block(layer, device)) {
    case 2:
      return few ? launch_chunks<T, 2, kFew>(layer, stream)
                 : launch_chunks<T, 2, kMost>(layer, stream);
    case 4:
      return few ? launch_chunks<T, 4, kFew>(layer, stream)
                 : launch_chunks<T, 4, kMost>(layer, stream);
    default:
      return launch_chunks<T, 8, kFew>(layer, stream);
  }
}

#define LSTM_EXT_INSTANTIATE(T)                                                            \
  template bool layer_backward_small_fits<T>(const LayerBackward<T>&, const Device&);      \
  template int64_t layer_backward_small_blocks<T>(const LayerBackward<T>&, const Device&); \
  template cudaError_t layer_backward_small<T>(const LayerBackward<T>&, const Device&,     \
                                               cudaStream_t);
LSTM_EXT_INSTANTIATE(__half)
LSTM_EXT_INSTANTIATE(__nv_bfloat16)
#undef LSTM_EXT_INSTANTIATE

}  // namespace lstm_ext::cuda
