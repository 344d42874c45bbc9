// A layer of few hidden units (layer_small.cuh) on tensor cores, in the 16-bit types.
#include "cuda/layer_small.cuh"
#include "cuda/quick_math.cuh"

namespace lstm_ext::cuda {
namespace {

constexpr int kUnitsOfWarp = 16, kMostUnits = 128, kMostRows = 8;
constexpr int kMostThreads = kMostUnits / kUnitsOfWarp * kWarpSize;

constexpr int kChunk = 32;
// From row to row of h an odd count of chunks, so that rows begin in the banks' other half.
template <int kChunks>
constexpr int kRowOfH = (kChunks | 1) * kChunk;

// A warp has 16 units: a tile of 16 rows of w_hh a gate, so that a lane's sums of the four tiles
// are those of the same units. A tile multiplies eight columns, and a block may have fewer rows:
// columns then repeat them, and each lane takes other ones of its sums.
template <class T, int kRows, int kChunks>
__global__ void __launch_bounds__(kMostThreads, 1) layer_small_mma_kernel(LayerForward<T> layer) {
  constexpr int kStep = kFullVector<T>, kStride = kRowOfH<kChunks>;
  constexpr int kElements = kRows == 8 ? 4 : kRows == 4 ? 2 : 1;
  static_assert(kRows == 8 || kRows == 4 || kRows == 2);
  static_assert(kChunk == 4 * kStep);
  using Numbers = Vector<T, kStep>;
  LSTM_EXT_DYNAMIC_SHARED(T, h);  // [2][kRows][kStride]

  const int H = layer.H, thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int r = lane / 4, t = lane % 4, first_unit = thread / kWarpSize * kUnitsOfWarp;
  const int64_t first_row = int64_t{blockIdx.x} * kRows;

  uint32_t weights[kChunks][kGates][2][4];
  const int aligned = alignment_of(layer.w_hh, H);
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      uint32_t words[2][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (const int unit = first_unit + r + 8 * half; unit < H)
          words_of(weights_at<kStep>(layer.w_hh + (static_cast<int64_t>(gate) * H + unit) * H,
                                     chunk * kChunk + t * kStep, H, aligned),
                   words[half]);
      operands_of(words[0], words[1], weights[chunk][gate]);
    }
  begin_h<kRows>(layer, first_row, h, kStride, [](T number) { return number; });
  // Of a lane's sums 0..3, columns 2t and 2t + 1 of units r and r + 8.
  const auto place_of = [&](int e) {
    if constexpr (kRows == 8)
      return Place{2 * t + e % 2, first_unit + r + e / 2 * 8, true};
    else if constexpr (kRows == 4)
      return Place{t % 2 * 2 + e, first_unit + r + t / 2 * 8, true};
    else
      return Place{t % 2, first_unit + r + t / 2 * 8, true};
  };
  const auto pick = [&](const float (&d)[4], int e) {
    if constexpr (kRows == 8) return d[e];
    if constexpr (kRows == 4) return t / 2 != 0 ? d[2 + e] : d[e];
    const float low = t % 2 != 0 ? d[1] : d[0], high = t % 2 != 0 ? d[3] : d[2];
    return t / 2 != 0 ? high : low;
  };
  Elements<T, QuickMath, kElements> elements(layer, first_row, place_of);
  // Where a lane's first element goes in h; from there to the others it is a constant.
  T* const h_own = h + place_of(0).row * kStride + place_of(0).unit;
  const T* const h_read = h + r % kRows * kStride + t * kStep;

  __syncthreads();
  const int64_t L = layer.sequence.L;
  for_steps(L, [&](auto parity, int64_t step) {
    constexpr int kSet = decltype(parity)::value;
    float sums[kGates][4] = {}, known[kElements][kGates];
    Numbers x[kChunks];
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk)
      x[chunk] =
          *reinterpret_cast<const Numbers*>(h_read + kSet * kRows * kStride + chunk * kChunk);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      uint32_t words[4];
      words_of(x[chunk], words);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const uint32_t b[2] = {words[2 * part], words[2 * part + 1]};
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate)
          mma_of<T>(sums[gate], weights[chunk][gate][part], b);
      }
      if (chunk > 0) continue;
      // Here, where the tensor cores have something to do.
      if (step > 0) elements.store();
      elements.take(kSet, known);
      elements.read(kSet, step + 2 < L);
    }
    T* const h_next = h_own + (1 - kSet) * kRows * kStride;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      float pre[kGates];
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) pre[gate] = known[e][gate] + pick(sums[gate], e);
      h_next[e % 2 * kStride + e / 2 * 8] = elements.advance(e, pre);
    }
    __syncthreads();
  });
  elements.store_last();
}

template <class T, int kRows, int kChunks>
cudaError_t launch_chunks(const LayerForward<T>& layer, cudaStream_t stream) {
  const int warps = (layer.H + kUnitsOfWarp - 1) / kUnitsOfWarp;
  Launch how = {blocks_for(layer.sequence.N, kRows),
                dim3(static_cast<unsigned>(warps * kWarpSize))};
  how.shared = sizeof(T) * 2 * kRows * kRowOfH<kChunks>;
  how.stream = stream;
  return launch(how, layer_small_mma_kernel<T, kRows, kChunks>, layer);
}

template <class T, int kRows>
cudaError_t launch_rows(const LayerForward<T>& layer, cudaStream_t stream) {
  if (layer.H <= 2 * kChunk) return launch_chunks<T, kRows, 2>(layer, stream);
  return launch_chunks<T, kRows, 4>(layer, stream);
}

}  // namespace

template <class T>
bool layer_forward_small_fits(const LayerForward<T>& layer, const Device& device) {
  constexpr int kMostShared = sizeof(T) * 2 * kMostRows * kRowOfH<kMostUnits / kChunk>;
  return layer.H <= kMostUnits && kMostShared <= device.shared_per_block &&
         few_turns(layer.sequence.N, device, kMostRows);
}

template <class T>
cudaError_t layer_forward_small(const LayerForward<T>& layer, const Device& device,
                                cudaStream_t stream) {
  if (layer.H > kMostUnits) return cudaErrorInvalidValue;
  switch (rows_a_block(layer.sequence.N, device, 2, kMostRows)) {
    case 2:
      return launch_rows<T, 2>(layer, stream);
    case 4:
      return launch_rows<T, 4>(layer, stream);
    default:
      return launch_rows<T, 8>(layer, stream);
  }
}

#define LSTM_EXT_INSTANTIATE(T)                                                     \
  template bool layer_forward_small_fits<T>(const LayerForward<T>&, const Device&); \
  template cudaError_t layer_forward_small<T>(const LayerForward<T>&, const Device&, cudaStream_t);
LSTM_EXT_INSTANTIATE(__half)
LSTM_EXT_INSTANTIATE(__nv_bfloat16)
#undef LSTM_EXT_INSTANTIATE

}  // namespace lstm_ext::cuda
