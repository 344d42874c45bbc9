// A layer of few hidden units (layer_small.cuh) in float32, by multiply-adds. TF32 would be no
// faster: it was tried, and eight columns of a tile are more rows than a block has.
#include "cuda/latency.cuh"
#include "cuda/layer_small.cuh"
#include "cuda/quick_math.cuh"

namespace lstm_ext::cuda {
namespace {

using Activations = std::conditional_t<latency::kQuickFloat, QuickMath, Math>;

// A unit has kSplit lanes side by side, each kVectors times four numbers along k of all four gates;
// those from kKept on lie in shared memory.
template <int kRows_, int kSplit_, int kVectors_, int kKept_>
struct FmaShape {
  static constexpr int kRows = kRows_, kSplit = kSplit_, kVectors = kVectors_, kKept = kKept_;
  static constexpr int K = kSplit * kVectors * 4, kFar = kVectors - kKept;
  static constexpr int kElements = kRows > kSplit ? kRows / kSplit : 1;  // of a lane
  static constexpr int kSame = kRows < kSplit ? kSplit / kRows : 1;  // lanes that have the same one
  static constexpr int kMostThreads = K * kSplit;
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kMostThreads, 1)
    layer_small_fma_kernel(LayerForward<float> layer) {
  constexpr int kRows = Shape::kRows, kSplit = Shape::kSplit, kVectors = Shape::kVectors;
  constexpr int K = Shape::K, kKept = Shape::kKept, kFar = Shape::kFar, kSame = Shape::kSame;
  constexpr int kElements = Shape::kElements;
  using Numbers = Vector<float, 4>;
  LSTM_EXT_DYNAMIC_SHARED(float, h);                                           // [2][kRows][K]
  Numbers* const far_weights = reinterpret_cast<Numbers*>(h + 2 * kRows * K);  // [..][gate][thread]

  const int H = layer.H, threads = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x), unit = thread / kSplit, slice = thread % kSplit;
  const int64_t first_row = int64_t{blockIdx.x} * kRows;
  Numbers near_weights[kKept][kGates];
  const int aligned = alignment_of(layer.w_hh, H);
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      Numbers numbers = {};
      if (unit < H)
        numbers = weights_at<4>(layer.w_hh + (static_cast<int64_t>(gate) * H + unit) * H,
                                (v * kSplit + slice) * 4, H, aligned);
      if (v < kKept)
        near_weights[v < kKept ? v : 0][gate] = numbers;
      else
        far_weights[((v - kKept) * kGates + gate) * threads + thread] = numbers;
    }
  begin_h<kRows>(layer, first_row, h, K, [](float number) { return number; });
  const int first_own = slice / kSame * kElements;
  const bool owns = slice % kSame == 0;
  Elements<float, Activations, kElements> elements(
      layer, first_row, [&](int e) { return Place{first_own + e, unit, owns}; });

  __syncthreads();
  const int64_t L = layer.sequence.L;
  for_steps(L, [&](auto parity, int64_t step) {
    constexpr int kSet = decltype(parity)::value;
    const float* const h_read = h + kSet * kRows * K + slice * 4;
    float sums[kRows][kGates] = {}, known[kElements][kGates];
    const auto add = [&](int v, const Numbers(&weights)[kGates]) {
      Numbers x[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row)
        x[row] = *reinterpret_cast<const Numbers*>(h_read + row * K + v * kSplit * 4);
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int row = 0; row < kRows; ++row)
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate)
            sums[row][gate] += weights[gate].at[j] * x[row].at[j];
    };
    // Where the multiply-adds leave time for it.
    const auto meanwhile = [&] {
      if (step > 0) elements.store();
      elements.take(kSet, known);
      elements.read(kSet, step + 2 < L);
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
        Numbers weights[kGates];
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate)
          weights[gate] = far_weights[(far * kGates + gate) * threads + thread];
#pragma unroll
        for (int v = 0; v < kKept; ++v)
          if (v * kFar / kKept == far) add(v, near_weights[v]);
        add(kKept + far, weights);
        if (far == kFar - 1) meanwhile();
        // Else the compiler reads all of it first, into more registers than there are.
        __syncwarp();
      }
    }
    sum_over_split<kSplit / 2, kRows>(sums, slice);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      float pre[kGates];
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) pre[gate] = known[e][gate] + sums[e][gate];
      const float to = elements.advance(e, pre);
      if (unit < K && owns) h[((1 - kSet) * kRows + first_own + e) * K + unit] = to;
    }
    __syncthreads();
  });
  elements.store_last();
}

template <class Shape>
Launch launch_of(const LayerForward<float>& layer) {
  const int lanes = layer.H * Shape::kSplit;
  const auto threads = static_cast<unsigned>((lanes + kWarpSize - 1) / kWarpSize * kWarpSize);
  Launch how = {blocks_for(layer.sequence.N, Shape::kRows), dim3(threads)};
  how.shared = sizeof(float) * 2 * Shape::kRows * Shape::K +
               size_t{Shape::kFar} * kGates * threads * sizeof(Vector<float, 4>);
  return how;
}

constexpr int kMostUnits = 128, kFewUnits = 64;

// With more of either, a thread had not registers enough.
int most_rows(int H) { return H <= kFewUnits ? 4 : 2; }

template <int kRows, class Body>
auto with_few_units(int H, const Body& body) {
  if (H <= 32) return body(FmaShape<kRows, 4, 2, 2>());
  if (H <= 48) return body(FmaShape<kRows, 4, 3, 3>());
  return body(FmaShape<kRows, 4, 4, 4>());
}

// body(shape)
template <class Body>
auto with_shape(const LayerForward<float>& layer, const Device& device, const Body& body) {
  const int H = layer.H, rows = rows_a_block(layer.sequence.N, device, 1, most_rows(H));
  // A thread may have 255 registers in all; four numbers along k are 16 of them.
  if (H > kFewUnits)
    return rows == 1 ? body(FmaShape<1, 2, 16, 8>()) : body(FmaShape<2, 2, 16, 7>());
  if (rows == 1) return with_few_units<1>(H, body);
  return rows == 2 ? with_few_units<2>(H, body) : with_few_units<4>(H, body);
}

}  // namespace

template <>
bool layer_forward_small_fits<float>(const LayerForward<float>& layer, const Device& device) {
  return layer.H <= kMostUnits && few_turns(layer.sequence.N, device, most_rows(layer.H)) &&
         with_shape(layer, device, [&](auto shape) {
           return launch_of<decltype(shape)>(layer).shared <=
                  static_cast<size_t>(device.shared_per_block);
         });
}

template <>
cudaError_t layer_forward_small<float>(const LayerForward<float>& layer, const Device& device,
                                       cudaStream_t stream) {
  if (layer.H > kMostUnits) return cudaErrorInvalidValue;
  return with_shape(layer, device, [&](auto shape) {
    Launch how = launch_of<decltype(shape)>(layer);
    how.stream = stream;
    return launch(how, layer_small_fma_kernel<decltype(shape)>, layer);
  });
}

}  // namespace lstm_ext::cuda
