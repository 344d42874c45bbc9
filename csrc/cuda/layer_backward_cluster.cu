// Backward of a layer in clusters of blocks (Hopper), as its forward (layer_cluster.cu): a cluster
// holds all of W_hh, in registers and in shared memory, and takes some rows of the batch through
// all steps; clusters never meet.
//
// A block has the rows of W_hh of its kUnits units' gates, as in forward. It makes the gradients of
// those gates, multiplies them with its rows, and so has a part of the gradient of h of every unit.
// It sends each part to the block that has the unit, where it counts at a barrier; that block adds
// up the parts of all blocks, in their order. Nothing else keeps them apart: whoever sends parts of
// step t has had those of the step before from all, who have thus read what lay where they go.
#include "cuda/backward_elements.cuh"
#include "cuda/cluster.cuh"
#include "cuda/quick_math.cuh"

namespace lstm_ext::cuda {
namespace {

// kBlocks: of a cluster. kTiles: of a warp, 16 units of the gradient of h each; kChunks chunks of k
// each, of whose halves kKept lie in registers; kColumns: eight rows of the batch each.
template <class T_, int kBlocks_, int kTiles_, int kChunks_, int kKept_, int kColumns_>
struct BackwardShape {
  using T = T_;
  static constexpr int kBlocks = kBlocks_, kTiles = kTiles_, kChunks = kChunks_, kKept = kKept_;
  static constexpr int kColumns = kColumns_, kRows = 8 * kColumns, kFar = 2 * kChunks - kKept;
  static constexpr int kStep = kFullVector<T>, kChunk = 4 * kStep, kUnits = kChunks * kChunk / 4;
  // Rows begin where other rows' lanes find other banks.
  static constexpr int kStride = (kChunks | 1) * kChunk;
  static constexpr int kTilesOfBlock = kUnits / 16, kOwners = kTiles / kTilesOfBlock;
  static_assert(kUnits % 16 == 0 && kTiles % 2 == 0 && kTiles % kTilesOfBlock == 0 && kFar >= 0);
  static_assert(16 * kTiles * kWarps == kBlocks * kUnits);
  // A warp's elements come 16 units of two rows at a time.
  static constexpr int kItems = kTilesOfBlock * kRows / 2;
  static constexpr int kElements = (kItems + kWarps - 1) / kWarps;
  static_assert(kOwners > 0 && kElements > 0);

  // Bytes of shared memory, one thing after another.
  static constexpr size_t kWeightsAt = size_t{2} * kRows * kStride * sizeof(T);
  static constexpr size_t kPartsAt = kWeightsAt + size_t{kFar} * kTiles * kThreads * 16;
  static constexpr size_t kBytesOfPart = size_t{kTilesOfBlock} * kColumns * kWarpSize * 16;
  static constexpr size_t kBarriersAt = kPartsAt + 2 * kBlocks * kBytesOfPart;
  static constexpr size_t kShared = kBarriersAt + 2 * sizeof(uint64_t);
  static_assert(kWeightsAt % 16 == 0 && kShared <= 227 * 1024);
  // Sums of the biases lie where parts did, at the end.
  static_assert(2 * kBlocks * kBytesOfPart >= sizeof(float) * kRows * kGates * kUnits);
};

template <class Shape>
__global__ void __launch_bounds__(kThreads, 1)
    layer_backward_cluster_kernel(LayerBackward<typename Shape::T> layer) {
#if LSTM_EXT_HAS_CLUSTERS
  using T = typename Shape::T;
  constexpr int kBlocks = Shape::kBlocks, kTiles = Shape::kTiles, kChunks = Shape::kChunks;
  constexpr int kKept = Shape::kKept, kFar = Shape::kFar, kRows = Shape::kRows;
  constexpr int kUnits = Shape::kUnits, kStep = Shape::kStep, kChunk = Shape::kChunk;
  constexpr int kStride = Shape::kStride, kTilesOfBlock = Shape::kTilesOfBlock;
  constexpr int kElements = Shape::kElements, kItems = Shape::kItems, kOwners = Shape::kOwners;
  constexpr int kColumns = Shape::kColumns;
  constexpr int kPart = static_cast<int>(Shape::kBytesOfPart);
  LSTM_EXT_DYNAMIC_SHARED(unsigned char, shared);
  T* const grads = reinterpret_cast<T*>(shared);  // [2][kRows][kStride]: of own gates
  // [far half][tile][thread]
  uint4* const far_weights = reinterpret_cast<uint4*>(shared + Shape::kWeightsAt);
  // [2][block][tile][column][4][8 pairs of units][unit of the pair][row of two]
  float* const parts = reinterpret_cast<float*>(shared + Shape::kPartsAt);
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(shared + Shape::kBarriersAt);

  const int H = layer.H, thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int r = lane / 4, t = lane % 4, warp = thread / kWarpSize;
  const int rank = static_cast<int>(cluster::rank()), first_unit = rank * kUnits;
  const unsigned cluster_of_rows = blockIdx.x / kBlocks;
  const int64_t first_row = int64_t{cluster_of_rows} * kRows, L = layer.sequence.L;
  // Of the gradient of h, from the block's own on: not all blocks send to the same one at a time.
  const int first_tile = (warp + rank) % kWarps * kTiles;

  uint32_t near_weights[kKept][kTiles][4];
  const bool in_pairs = alignment_of(layer.w_hh, H) > 1;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const auto row_of = [&](int j) {
        const int k = chunk * kChunk + t * kStep + j, unit = first_unit + k % kUnits;
        const int64_t row = static_cast<int64_t>(k / kUnits) * H + unit;
        // NOLINTNEXTLINE(clang-analyzer-core.NullPointerArithm): w_hh is none of the null ones
        return unit < H ? layer.w_hh + row * H : nullptr;
      };
      uint32_t words[2][4], a[2][4];
      columns_of<T>(row_of, (first_tile + tile) * 16 + 2 * r, H, in_pairs, words[0], words[1]);
      operands_of(words[0], words[1], a);
#pragma unroll
      for (int part = 0; part < 2; ++part)
        if (const int half = 2 * chunk + part; half < kKept) {
#pragma unroll
          for (int j = 0; j < 4; ++j) near_weights[half < kKept ? half : 0][tile][j] = a[part][j];
        } else {
          far_weights[((half - kKept) * kTiles + tile) * kThreads + thread] =
              uint4{a[part][0], a[part][1], a[part][2], a[part][3]};
        }
    }

  // A warp's elements are those of two rows of 16 units.
  const auto there = [&](int e) { return e * kWarps + warp < kItems; };
  struct Item {
    int tile, two;
  };
  const auto item_of = [&](int e) {
    if constexpr (kWarps % kTilesOfBlock == 0) {  // a warp's have the same units, as is then known
      return Item{warp % kTilesOfBlock, warp / kTilesOfBlock + e * (kWarps / kTilesOfBlock)};
    } else {
      const int item = e * kWarps + warp;
      return Item{item % kTilesOfBlock, item / kTilesOfBlock};
    }
  };
  const auto place_of = [&](int e) {
    const auto [tile, two] = item_of(e);
    return Place{2 * two + lane / 16, first_unit + tile * 16 + lane % 16, there(e)};
  };
  // Where registers are short, one step is read ahead.
  constexpr int kSets = kFar > 0 || kColumns > 1 ? 1 : 2;
  constexpr int kRowsOfLane = kWarps % kTilesOfBlock == 0 ? kElements : 1;
  BackwardElements<T, QuickMath, kElements / kRowsOfLane, kRowsOfLane, kSets> elements(
      layer, first_row, place_of);
  float grad_h[kElements];
#pragma unroll
  for (int e = 0; e < kElements; ++e) grad_h[e] = elements.start(e);
  elements.prepare(0);

  // Parts go to the blocks of a warp's tiles.
  unsigned to[kOwners];
#pragma unroll
  for (int k = 0; k < kOwners; ++k)
    to[k] = cluster::address_in(cluster::shared_address(shared),
                                static_cast<unsigned>(first_tile / kTilesOfBlock + k));
  const unsigned own_part = static_cast<unsigned>(Shape::kPartsAt) +
                            static_cast<unsigned>(rank * kPart + (t * 8 + r) * 16);
  const int64_t sends = layer.grad_hx != nullptr ? L : L - 1;
  constexpr unsigned kBytes = static_cast<unsigned>(kBlocks * kPart);
  if (thread == 0) {
    cluster::init(&barriers[0]);
    cluster::init(&barriers[1]);
    cluster::show_barriers();
    if (sends > 0) cluster::expect(&barriers[0], kBytes);
    if (sends > 1) cluster::expect(&barriers[1], kBytes);
  }
  __syncthreads();
  cluster::sync();

  // The parts of a step's gradient of h, added up.
  const auto receive = [&](int set, int64_t step) {
    cluster::wait(&barriers[set], static_cast<unsigned>(step / 2 % 2));
    if (thread == 0 && step + 2 < sends) cluster::expect(&barriers[set], kBytes);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      grad_h[e] = 0;
      if (!there(e)) continue;
      const auto [tile, two] = item_of(e);
      const float* const own = parts + set * kBlocks * (kPart / 4) +
                               (tile * kColumns * kWarpSize + two * 8) * 4 + lane % 16 * 2 +
                               lane / 16;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) grad_h[e] += own[block * (kPart / 4)];
    }
  };
  for_steps(L, [&](auto parity, int64_t step) {
    constexpr int kSet = decltype(parity)::value;
    if (step > 0) receive(1 - kSet, step - 1);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (!there(e)) continue;
      T of_gates[kGates];
      elements.advance(kSet, e, grad_h[e], of_gates);
      const Place place = place_of(e);
      T* const own = grads + (kSet * kRows + place.row) * kStride + place.unit - first_unit;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) own[gate * kUnits] = factor_of(of_gates[gate]);
    }
    if constexpr (kSets == 1) elements.read_after(kSet, step);
    __syncthreads();
    if (step >= sends) return;
    const T* const read_grads = grads + (kSet * kRows + r) * kStride + t * kStep;
    float sums[kTiles][kColumns][4] = {};
    const auto load_half = [&](int half, uint32_t (&b)[kColumns][2]) {
#pragma unroll
      for (int column = 0; column < kColumns; ++column)
        std::memcpy(b[column],
                    read_grads + column * 8 * kStride + half / 2 * kChunk + half % 2 * (kStep / 2),
                    sizeof(b[column]));
    };
    const auto multiply = [&](int tile, const uint32_t (&a)[4], const uint32_t (&b)[kColumns][2]) {
#pragma unroll
      for (int column = 0; column < kColumns; ++column) mma_of<T>(sums[tile][column], a, b[column]);
    };
    const auto near_half = [&](int half) {
      uint32_t b[kColumns][2];
      load_half(half, b);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) multiply(tile, near_weights[half][tile], b);
    };
    if constexpr (kFar == 0) {
#pragma unroll
      for (int half = 0; half < kKept; ++half) near_half(half);
    } else {
      // In turns: shared memory is as busy as the tensor cores.
#pragma unroll
      for (int far = 0; far < kFar; ++far) {
        uint32_t b[kColumns][2];
        load_half(kKept + far, b);
#pragma unroll
        for (int tile = 0; tile < kTiles; tile += 2) {
          uint4 words[2];
#pragma unroll
          for (int j = 0; j < 2; ++j)
            words[j] = far_weights[(far * kTiles + tile + j) * kThreads + thread];
#pragma unroll
          for (int half = 0; half < kKept; ++half)
            if (half * (kFar * kTiles / 2) / kKept == far * (kTiles / 2) + tile / 2)
              near_half(half);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const uint32_t a[4] = {words[j].x, words[j].y, words[j].z, words[j].w};
            multiply(tile + j, a, b);
          }
          // Else the compiler reads all of it first, into more registers than there are.
          __syncwarp();
        }
      }
    }
    const unsigned barrier = static_cast<unsigned>(Shape::kBarriersAt + kSet * sizeof(uint64_t));
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        uint4 words;
        std::memcpy(&words, sums[tile][column], sizeof(words));
        const int slots = (tile % kTilesOfBlock * kColumns + column) * kWarpSize;
        const unsigned base = to[tile / kTilesOfBlock];
        const unsigned at = own_part + static_cast<unsigned>(kSet * kBlocks * kPart + slots * 16);
        cluster::send(base + at, words, base + barrier);
      }
    if (step + 1 < L) elements.store();
    if constexpr (kSets > 1) elements.read_after(kSet, step);
    elements.prepare(1 - kSet);
  });
  if (sends == L) receive(static_cast<int>((L - 1) % 2), L - 1);
  elements.store_last(grad_h);
  // A block may leave: all that is sent to it has come.
  const auto part_of = [](int row) { return row % (kRows / kRowsOfLane); };
  store_bias_sums<kRows>(layer, elements, place_of, part_of, first_unit,
                         min(kUnits, H - first_unit), cluster_of_rows, parts);
#endif
}

template <class Shape>
cudaError_t launch_shape(const LayerBackward<typename Shape::T>& layer, cudaStream_t stream) {
  Launch how = {};
  how.cluster = Shape::kBlocks;
  how.grid = dim3(static_cast<unsigned>((layer.sequence.N + Shape::kRows - 1) / Shape::kRows) *
                  how.cluster);
  how.block = dim3(kThreads);
  how.shared = Shape::kShared;
  how.stream = stream;
  return launch(how, layer_backward_cluster_kernel<Shape>, layer);
}

// body(shape) for the shape of a layer, none().
template <class T, class Body, class None>
auto with_shape(const LayerBackward<T>& layer, const Device& device, const Body& body,
                const None& none) {
  const int H = layer.H;
  const int64_t N = layer.sequence.N;
  if constexpr (std::is_same_v<T, float>) {
    using Eight = BackwardShape<T, 16, 4, 8, 8, 1>;
    if (!device.tf32) return none();
    if (H <= 256) return body(BackwardShape<T, 8, 2, 8, 16, 1>());
    if (H <= 512 && turns_of(Eight(), N, device) == 1) return body(Eight());
    if (H <= 512) return body(BackwardShape<T, 16, 4, 8, 7, 2>());
  } else {
    using Wide = BackwardShape<T, 16, 4, 4, 8, 1>;
    if (H <= 256) return body(BackwardShape<T, 8, 2, 4, 8, 1>());
    if (H <= 512 && turns_of(Wide(), N, device) == 1) return body(Wide());
    if (H <= 512) return body(BackwardShape<T, 16, 4, 4, 7, 2>());
    if (H <= 768) return body(BackwardShape<T, 16, 6, 6, 6, 1>());
  }
  return none();
}

}  // namespace

template <class T>
int64_t layer_backward_cluster_turns(const LayerBackward<T>& layer, const Device& device) {
  if (!device.clusters) return 0;
  return with_shape(
      layer, device,
      [&](auto shape) {
        const bool fits = decltype(shape)::kShared <= static_cast<size_t>(device.shared_per_block);
        return fits ? turns_of(shape, layer.sequence.N, device) : 0;
      },
      [] { return int64_t{0}; });
}

template <class T>
int64_t layer_backward_clusters(const LayerBackward<T>& layer, const Device& device) {
  return with_shape(
      layer, device,
      [&](auto shape) {
        constexpr int kRows = decltype(shape)::kRows;
        return (layer.sequence.N + kRows - 1) / kRows;
      },
      [] { return int64_t{0}; });
}

template <class T>
cudaError_t layer_backward_cluster(const LayerBackward<T>& layer, const Device& device,
                                   cudaStream_t stream) {
  return with_shape(
      layer, device, [&](auto shape) { return launch_shape<decltype(shape)>(layer, stream); },
      [] { return cudaErrorNotSupported; });
}

#define LSTM_EXT_INSTANTIATE(T)                                                             \
  template int64_t layer_backward_cluster_turns<T>(const LayerBackward<T>&, const Device&); \
  template int64_t layer_backward_clusters<T>(const LayerBackward<T>&, const Device&);      \
  template cudaError_t layer_backward_cluster<T>(const LayerBackward<T>&, const Device&,    \
                                                 cudaStream_t);
LSTM_EXT_INSTANTIATE(float)
LSTM_EXT_INSTANTIATE(__half)
LSTM_EXT_INSTANTIATE(__nv_bfloat16)
#undef LSTM_EXT_INSTANTIATE

}  // namespace lstm_ext::cuda
