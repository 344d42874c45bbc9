// Backward of a layer of few hidden units in float32, by multiply-adds, as that on tensor cores
// (layer_backward_small_mma.cu).
#include "cuda/backward_elements.cuh"
#include "cuda/latency.cuh"
#include "cuda/quick_math.cuh"

namespace lstm_ext::cuda {
namespace {

using Activations = std::conditional_t<latency::kQuickFloat, QuickMath, Math>;

// Four units have kSplit lanes side by side, each kVectors times four numbers along k of all four
// columns of w_hh; those from kKept on lie in shared memory.
template <int kRows_, int kSplit_, int kVectors_, int kKept_>
struct FmaShape {
  static constexpr int kUnits = 4;
  static constexpr int kRows = kRows_, kSplit = kSplit_, kVectors = kVectors_, kKept = kKept_;
  static constexpr int K = kSplit * kVectors * 4, kFar = kVectors - kKept;
  static constexpr int kCount = kRows * kUnits;
  static constexpr int kElements = kCount > kSplit ? kCount / kSplit : 1;  // of a lane
  static constexpr int kSame = kCount < kSplit ? kSplit / kCount : 1;  // lanes that have the same
  static_assert(kElements <= kUnits);
  static constexpr int kMostThreads = K / kGates / kUnits * kSplit;
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kMostThreads, 1)
    layer_backward_small_fma_kernel(LayerBackward<float> layer) {
  constexpr int kRows = Shape::kRows, kSplit = Shape::kSplit, kVectors = Shape::kVectors;
  constexpr int kStride = Shape::K, kKept = Shape::kKept, kFar = Shape::kFar;
  constexpr int kUnits = Shape::kUnits, kCount = Shape::kCount, kElements = Shape::kElements;
  using Numbers = Vector<float, 4>;
  LSTM_EXT_DYNAMIC_SHARED(float, grads);  // [2][kRows][kStride], of the pre-activations
  // [far vector][its number][thread]
  Numbers* const far_weights = reinterpret_cast<Numbers*>(grads + 2 * kRows * kStride);

  const int H = layer.H, K = kGates * H, threads = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x), slice = thread % kSplit;
  const int first_unit = thread / kSplit * kUnits;
  const int64_t first_row = int64_t{blockIdx.x} * kRows;
  Numbers near_weights[kKept][4];  // of a k, those of the four units
  const int aligned = alignment_of(layer.w_hh, H);
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int k = (v * kSplit + slice) * 4 + j;
      Numbers numbers = {};
      if (k < K && first_unit < H)
        numbers = weights_at<4>(layer.w_hh + static_cast<int64_t>(k) * H, first_unit, H, aligned);
      if (v < kKept)
        near_weights[v < kKept ? v : 0][j] = numbers;
      else
        far_weights[((v - kKept) * 4 + j) * threads + thread] = numbers;
    }
  for (int at = thread; at < 2 * kRows * kStride; at += threads) grads[at] = 0;
  const int first_own = slice / Shape::kSame * kElements;
  const bool owns = slice % Shape::kSame == 0;
  const auto place_of = [&](int e) {
    return Place{(first_own + e) / kUnits, first_unit + (first_own + e) % kUnits, owns};
  };
  BackwardElements<float, Activations, kElements, 1> elements(layer, first_row, place_of);
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
      float of_gates[kGates];
      elements.advance(kSet, e, grad_h[e], of_gates);
      const auto [row, unit, own] = place_of(e);
      if (!own || unit >= H) continue;
      float* const to = grads + (kSet * kRows + row) * kStride + unit;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) to[gate * H] = of_gates[gate];
    }
    __syncthreads();
    const float* const read_grads = grads + kSet * kRows * kStride + slice * 4;
    float sums[kCount][1] = {};
    const auto add = [&](int v, const Numbers(&weights)[4]) {
      Numbers x[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row)
        x[row] = *reinterpret_cast<const Numbers*>(read_grads + row * kStride + v * kSplit * 4);
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int row = 0; row < kRows; ++row)
#pragma unroll
          for (int unit = 0; unit < kUnits; ++unit)
            sums[row * kUnits + unit][0] += weights[j].at[unit] * x[row].at[j];
    };
    // Where the multiply-adds leave time for it.
    const auto meanwhile = [&] {
      if (step + 1 < L) elements.store();
      elements.read_after(kSet, step);
      elements.prepare(1 - kSet);
    };
    if constexpr (kFar == 0) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        add(v, near_weights[v]);
        if (v == 0) meanwhile();
      }
    } else {
      // In turns: shared memory is as busy as the multiply-adds.
#pragma unroll
      for (int far = 0; far < kFar; ++far) {
        Numbers weights[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) weights[j] = far_weights[(far * 4 + j) * threads + thread];
#pragma unroll
        for (int v = 0; v < kKept; ++v)
          if (v * kFar / kKept == far) add(v, near_weights[v]);
        add(kKept + far, weights);
        if (far == kFar - 1) meanwhile();
        // Else the compiler reads all of it first, into more registers than there are.
        __syncwarp();
      }
    }
    sum_over_split<kSplit / 2, kCount>(sums, slice);
#pragma unroll
    for (int e = 0; e < kElements; ++e) grad_h[e] = sums[e][0];
  });
  elements.store_last(grad_h);
  store_bias_sums<kRows>(
      layer, elements, place_of, [](int row) { return row; }, 0, H, blockIdx.x, grads);
}

template <class Shape>
Launch launch_of(const LayerBackward<float>& layer) {
  const int groups = (layer.H + Shape::kUnits - 1) / Shape::kUnits, lanes = groups * Shape::kSplit;
  const auto threads = static_cast<unsigned>((lanes + kWarpSize - 1) / kWarpSize * kWarpSize);
  Launch how = {blocks_for(layer.sequence.N, Shape::kRows), dim3(threads)};
  how.shared = sizeof(float) * 2 * Shape::kRows * Shape::K +
               size_t{Shape::kFar} * 4 * threads * sizeof(Vector<float, 4>);
  return how;
}

constexpr int kMostUnits = 128, kFewUnits = 64;

// With more of either, a thread had not registers enough.
int most_rows(int H) { return H <= kFewUnits ? 4 : 2; }

// body(shape)
template <class Body>
auto with_shape(const LayerBackward<float>& layer, const Device& device, const Body& body) {
  const int H = layer.H, rows = rows_a_block(layer.sequence.N, device, 1, most_rows(H));
  // A thread may have 255 registers in all; four numbers along k are 16 of them.
  if (H > kFewUnits)
    return rows == 1 ? body(FmaShape<1, 8, 16, 8>()) : body(FmaShape<2, 8, 16, 7>());
  if (H <= 32) {
    if (rows == 1) return body(FmaShape<1, 16, 2, 2>());
    return rows == 2 ? body(FmaShape<2, 16, 2, 2>()) : body(FmaShape<4, 16, 2, 2>());
  }
  if (rows == 1) return body(FmaShape<1, 16, 4, 4>());
  return rows == 2 ? body(FmaShape<2, 16, 4, 4>()) : body(FmaShape<4, 16, 4, 4>());
}

}  // namespace

template <>
bool layer_backward_small_fits<float>(const LayerBackward<float>& layer, const Device& device) {
  return layer.H <= kMostUnits && few_turns(layer.sequence.N, device, most_rows(layer.H)) &&
         with_shape(layer, device, [&](auto shape) {
           return launch_of<decltype(shape)>(layer).shared <=
                  static_cast<size_t>(device.shared_per_block);
         });
}

template <>
int64_t layer_backward_small_blocks<float>(const LayerBackward<float>& layer,
                                           const Device& device) {
  return with_shape(layer, device,
                    [&](auto shape) { return int64_t{launch_of<decltype(shape)>(layer).grid.x}; });
}

template <>
cudaError_t layer_backward_small<float>(const LayerBackward<float>& layer, const Device& device,
                                        cudaStream_t stream) {
  if (layer.H > kMostUnits) return cudaErrorInvalidValue;
  return with_shape(layer, device, [&](auto shape) {
    Launch how = launch_of<decltype(shape)>(layer);
    how.stream = stream;
    return launch(how, layer_backward_small_fma_kernel<decltype(shape)>, layer);
  });
}

}  // namespace lstm_ext::cuda
