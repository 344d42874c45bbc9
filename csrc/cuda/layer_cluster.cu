// A layer in clusters of blocks (Hopper): a cluster holds all of W_hh, in registers and in shared
// memory, and takes some rows of the batch through all steps; clusters never meet.
//
// A block has the gates of kUnits units. It multiplies them with h, of which it has all in shared
// memory, twice; makes h of its units; and sends that to every block of the cluster, where it
// counts at a barrier. A block that has all of a step's h goes on. Nothing else keeps them apart:
// whoever sends h of step t + 1 has had h of step t from all, who have thus read that of t - 1,
// which lay where t + 1 goes.
#include "cuda/cluster.cuh"
#include "cuda/quick_math.cuh"
#include "cuda/register_weights.cuh"

namespace lstm_ext::cuda {
namespace {

// kBlocks: of a cluster. kTiles: of a warp, 16 gates each; kSplit: warps that share a sum, kChunks
// chunks of k each, of which kKept lie in registers; kColumns: eight rows of the batch each.
template <class T_, int kBlocks_, int kTiles_, int kSplit_, int kChunks_, int kKept_, int kColumns_>
struct ClusterShape {
  using T = T_;
  static constexpr int kBlocks = kBlocks_, kTiles = kTiles_, kSplit = kSplit_;
  static constexpr int kChunks = kChunks_, kKept = kKept_;
  static constexpr int kColumns = kColumns_, kRows = 8 * kColumns, kFar = kChunks - kKept;
  static constexpr int kStep = kFullVector<T>, kChunk = 4 * kStep, kK = kChunks * kChunk * kSplit;
  static constexpr int kGroups = kWarps / kSplit, kUnitsOfWarp = 4 * kTiles;
  static constexpr int kUnits = kGroups * kUnitsOfWarp;
  // Rows begin where other rows' lanes find other banks.
  static constexpr int kStride = (kChunks * kSplit | 1) * kChunk;
  static constexpr int kSumStride = (kUnits + 11) / 16 * 16 + 4;
  static_assert(kTiles % 2 == 0 && kUnits % kStep == 0 && kUnits * kRows % kWarpSize == 0);
  static_assert(kFar >= 0 && kSumStride >= kUnits);

  // Bytes of shared memory, one thing after another.
  static constexpr size_t kWeightsAt = size_t{2} * kRows * kStride * sizeof(T);
  static constexpr size_t kSumsAt = kWeightsAt + size_t{kFar} * 2 * kTiles * kThreads * 16;
  static constexpr size_t kBiasesAt =
      kSumsAt + size_t{kSplit} * kGates * kRows * kSumStride * sizeof(float);
  static constexpr size_t kBarriersAt = kBiasesAt + size_t{kGates} * kUnits * sizeof(float);
  static constexpr size_t kShared = kBarriersAt + 2 * sizeof(uint64_t);
  static_assert(kK <= kBlocks * kUnits);
  static_assert(kWeightsAt % 16 == 0 && kSumsAt % 16 == 0 && kBarriersAt % 8 == 0);
  static_assert(kShared <= 227 * 1024);
};

// 16 bytes of h that lie side by side, from as many lanes as that are numbers; each lane gets all.
template <class T>
__device__ inline uint4 side_by_side(T h, int lane) {
  if constexpr (std::is_same_v<T, float>) {
    const uint32_t mine = to_tf32(h), other = __shfl_xor_sync(kAllLanes, mine, 1);
    const uint32_t low = lane & 1 ? other : mine, high = lane & 1 ? mine : other;
    const uint32_t low2 = __shfl_xor_sync(kAllLanes, low, 2);
    const uint32_t high2 = __shfl_xor_sync(kAllLanes, high, 2);
    return lane & 2 ? uint4{low2, high2, low, high} : uint4{low, high, low2, high2};
  } else {
    uint16_t bits = 0;
    std::memcpy(&bits, &h, sizeof(bits));
    const uint32_t mine = bits, other = __shfl_xor_sync(kAllLanes, mine, 1);
    const uint32_t two = lane & 1 ? mine << 16 | other : other << 16 | mine;
    const uint32_t two2 = __shfl_xor_sync(kAllLanes, two, 2);
    const uint32_t low = lane & 2 ? two2 : two, high = lane & 2 ? two : two2;
    const uint32_t low2 = __shfl_xor_sync(kAllLanes, low, 4);
    const uint32_t high2 = __shfl_xor_sync(kAllLanes, high, 4);
    return lane & 4 ? uint4{low2, high2, low, high} : uint4{low, high, low2, high2};
  }
}

template <class Shape>
__global__ void __launch_bounds__(kThreads, 1)
    layer_cluster_kernel(LayerForward<typename Shape::T> layer) {
#if LSTM_EXT_HAS_CLUSTERS
  using T = typename Shape::T;
  constexpr int kBlocks = Shape::kBlocks;
  constexpr int kTiles = Shape::kTiles, kChunks = Shape::kChunks, kKept = Shape::kKept;
  constexpr int kColumns = Shape::kColumns, kRows = Shape::kRows, kUnits = Shape::kUnits;
  constexpr int kStep = Shape::kStep, kChunk = Shape::kChunk, kStride = Shape::kStride;
  constexpr int kSumStride = Shape::kSumStride, kFar = Shape::kFar;
  constexpr int kElements = (kUnits * kRows + kThreads - 1) / kThreads;  // of a thread
  using Numbers = Vector<T, kStep>;
  LSTM_EXT_DYNAMIC_SHARED(unsigned char, shared);
  T* const h = reinterpret_cast<T*>(shared);  // [2][kRows][kStride]
  // [far chunk][half of it][tile][thread]
  uint4* const far_weights = reinterpret_cast<uint4*>(shared + Shape::kWeightsAt);
  // [slice][gate][row][kSumStride]
  float* const sums_of_all = reinterpret_cast<float*>(shared + Shape::kSumsAt);
  float* const biases = reinterpret_cast<float*>(shared + Shape::kBiasesAt);  // [gate][unit]
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(shared + Shape::kBarriersAt);

  const DeviceSequence& sequence = layer.sequence;
  // Asked when it runs: the same code, and the same bits, either way.
  const bool keeps = layer.gates != nullptr;
  const int H = layer.H, thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int r = lane / 4, t = lane % 4, warp = thread / kWarpSize;
  const int group = warp % Shape::kGroups, slice = warp / Shape::kGroups;
  const int rank = static_cast<int>(cluster::rank()), first_unit = rank * kUnits;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / kBlocks) * kRows, L = sequence.L;

  // Tiles in pairs: gates i and f of eight units, then g and o.
  uint32_t near_weights[kKept][kTiles][2][4];
  const int aligned = alignment_of(layer.w_hh, H);
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int unit = first_unit + group * Shape::kUnitsOfWarp + tile / 2 * 8 + r;
      const int k = (slice * kChunks + chunk) * kChunk + t * kStep;
      uint32_t words[2][4] = {};
      if (unit < H)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int gate = tile % 2 * 2 + half;
          words_of(weights_at<kStep>(layer.w_hh + (static_cast<int64_t>(gate) * H + unit) * H, k, H,
                                     aligned),
                   words[half]);
        }
      if (chunk < kKept) {
        operands_of(words[0], words[1], near_weights[chunk < kKept ? chunk : 0][tile]);
        continue;
      }
      uint32_t a[2][4];
      operands_of(words[0], words[1], a);
#pragma unroll
      for (int part = 0; part < 2; ++part)
        far_weights[(((chunk - kKept) * 2 + part) * kTiles + tile) * kThreads + thread] =
            uint4{a[part][0], a[part][1], a[part][2], a[part][3]};
    }
  begin_h<kRows>(layer, first_row, h, kStride, factor_of<T>);
  for (int at = thread; at < kGates * kUnits; at += kThreads) {
    const int gate = at / kUnits, unit = first_unit + at % kUnits;
    biases[at] = unit < H ? sum_of_biases(layer.b_ih, layer.b_hh, gate * H + unit) : 0;
  }

  // A thread's elements: the same unit and row in every step.
  // Kept as one number each: registers are what is short.
  int places[kElements] = {};  // row of the cluster, unit of the block, and whether it is there
  float c[kElements];
  T last_h[kElements], ahead[kElements][kGates];
  const int64_t rows_a_step = sequence.reverse ? -sequence.N : sequence.N;
  int64_t rows_before = (sequence.reverse ? L - 1 : 0) * sequence.N + first_row;
  constexpr int kOwn = 1 << 20;
  struct Place {
    int row, unit;
    bool own;
  };
  const auto place_of = [&](int e) {
    return Place{places[e] >> 8 & 0xff, places[e] & 0xff, places[e] >= kOwn};
  };
  const auto there = [&](int e) {  // of a whole warp
    return (e + 1) * kThreads <= kUnits * kRows || e * kThreads + thread < kUnits * kRows;
  };
  const auto in_state = [&](const Place& place) {
    return (first_row + place.row) * H + first_unit + place.unit;
  };
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    const int at = e * kThreads + thread, row = at / kUnits, unit = at % kUnits;
    const bool own = there(e) && first_row + row < sequence.N && first_unit + unit < H;
    places[e] = row << 8 | unit | (own ? kOwn : 0);
    c[e] = own ? widen(layer.cx[in_state(place_of(e))]) : 0;
    last_h[e] = narrow<T>(0);
  }
  const auto read = [&](bool wanted) {
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const Place place = place_of(e);
      const T* const products =
          layer.products + (rows_before + place.row) * kGates * H + first_unit + place.unit;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate)
        ahead[e][gate] = place.own && wanted ? products[gate * H] : narrow<T>(0);
    }
  };
  read(true);

  // To whom this lane sends: the lanes that have the same 16 bytes share the blocks.
  constexpr int kSends = (kBlocks + kStep - 1) / kStep;
  unsigned to[kSends];
#pragma unroll
  for (int k = 0; k < kSends; ++k) {
    const int other = lane % kStep + k * kStep;
    to[k] = cluster::address_in(cluster::shared_address(shared),
                                static_cast<unsigned>((other + rank) % kBlocks));
  }
  const bool sends = kBlocks >= kStep || lane % kStep < kBlocks;
  constexpr unsigned kBytes = static_cast<unsigned>(kBlocks * kUnits * kRows * sizeof(T));
  if (thread == 0) {
    cluster::init(&barriers[0]);
    cluster::init(&barriers[1]);
    cluster::show_barriers();
    if (L > 1) cluster::expect(&barriers[1], kBytes);
    if (L > 2) cluster::expect(&barriers[0], kBytes);
  }
  __syncthreads();
  cluster::sync();

  for (int64_t step = 0; step < L; ++step) {
    const int set = static_cast<int>(step % 2);
    if (step > 0) {
      cluster::wait(&barriers[set], static_cast<unsigned>((step - 1) / 2 % 2));
      if (thread == 0 && step + 2 < L) cluster::expect(&barriers[set], kBytes);
    }
    const T* const h_now = h + (set * kRows + r) * kStride + slice * kChunks * kChunk + t * kStep;
    float sums[kTiles][kColumns][4] = {};
    const auto load_half = [&](int half, uint32_t (&b)[kColumns][2]) {
#pragma unroll
      for (int column = 0; column < kColumns; ++column)
        std::memcpy(b[column],
                    h_now + column * 8 * kStride + half / 2 * kChunk + half % 2 * (kStep / 2),
                    sizeof(b[column]));
    };
    const auto multiply = [&](int tile, const uint32_t (&a)[4], const uint32_t (&b)[kColumns][2]) {
#pragma unroll
      for (int column = 0; column < kColumns; ++column) mma_of<T>(sums[tile][column], a, b[column]);
    };
    const auto near_chunk = [&](int chunk) {
      uint32_t words[kColumns][4];
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        const Numbers x =
            *reinterpret_cast<const Numbers*>(h_now + column * 8 * kStride + chunk * kChunk);
        std::memcpy(words[column], &x, sizeof(x));
      }
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        uint32_t b[kColumns][2];
#pragma unroll
        for (int column = 0; column < kColumns; ++column)
          b[column][0] = words[column][2 * part], b[column][1] = words[column][2 * part + 1];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
          multiply(tile, near_weights[chunk][tile][part], b);
      }
    };
    if constexpr (kFar == 0) {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) near_chunk(chunk);
    } else {
      // In turns: shared memory is as busy as the tensor cores.
#pragma unroll
      for (int far = 0; far < 2 * kFar; ++far) {
        uint32_t far_b[kColumns][2];
        load_half(2 * kKept + far, far_b);
#pragma unroll
        for (int tile = 0; tile < kTiles; tile += 2) {
          uint4 words[2];
#pragma unroll
          for (int j = 0; j < 2; ++j)
            words[j] = far_weights[(far * kTiles + tile + j) * kThreads + thread];
#pragma unroll
          for (int half = 0; half < 2 * kKept; ++half) {
            if (half * (kFar * kTiles) / (2 * kKept) != far * (kTiles / 2) + tile / 2) continue;
            uint32_t b[kColumns][2];
            load_half(half, b);
#pragma unroll
            for (int near = 0; near < kTiles; ++near)
              multiply(near, near_weights[half / 2][near][half % 2], b);
          }
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const uint32_t a[4] = {words[j].x, words[j].y, words[j].z, words[j].w};
            multiply(tile + j, a, far_b);
          }
          // Else the compiler reads all of it first, into more registers than there are.
          __syncwarp();
        }
      }
    }
    float* const own_sums = sums_of_all + slice * kGates * kRows * kSumStride + 2 * t * kSumStride +
                            group * Shape::kUnitsOfWarp + r;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int column = 0; column < kColumns; ++column)
#pragma unroll
        for (int part = 0; part < 4; ++part)
          own_sums[((tile % 2 * 2 + part / 2) * kRows + column * 8 + part % 2) * kSumStride +
                   tile / 2 * 8] = sums[tile][column][part];
    __syncthreads();

#if !defined(LSTM_EXT_CUDA_EMU)
    // So that what follows from them is computed here, and not kept.
#pragma unroll
    for (int e = 0; e < kElements; ++e) asm volatile("" : "+r"(places[e]));
#endif
    T late_c[kElements] = {}, late_gates[kElements][kGates] = {};
    // Elements side by side: one waits while another computes.
    const auto advance = [&](auto many) {
      constexpr int kMany = decltype(many)::value;
#pragma unroll
      for (int e = 0; e < kMany; ++e) {
        const Place place = place_of(e);
        float pre[kGates];
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) {
          pre[gate] = widen(ahead[e][gate]) + biases[gate * kUnits + place.unit];
#pragma unroll
          for (int other = 0; other < Shape::kSplit; ++other)
            pre[gate] += sums_of_all[((other * kGates + gate) * kRows + place.row) * kSumStride +
                                     place.unit];
        }
        constexpr const float* no_weights = nullptr;
        float c_next = 0, h_next = 0;
        const Gates<float> gates = PlainCell::forward<QuickMath>(
            Gates<float>{pre[0], pre[1], pre[2], pre[3]}, c[e], no_weights, c_next, h_next);
        late_c[e] = narrow<T>(c[e]);
        late_gates[e][0] = narrow<T>(gates.i), late_gates[e][1] = narrow<T>(gates.f);
        late_gates[e][2] = narrow<T>(gates.g), late_gates[e][3] = narrow<T>(gates.o);
        // As the cell rounds its c from step to step.
        c[e] = widen(narrow<T>(c_next));
        last_h[e] = narrow<T>(h_next);
      }
      if (step + 1 >= L) return;
      // A lane sends for its neighbours: they are done with the sums, which the next step replaces.
      __syncwarp();
      const unsigned barrier =
          static_cast<unsigned>(Shape::kBarriersAt + (1 - set) * sizeof(uint64_t));
#pragma unroll
      for (int e = 0; e < kMany; ++e) {
        const Place place = place_of(e);
        const uint4 words = side_by_side(last_h[e], lane);
        const unsigned at = static_cast<unsigned>(
            (((1 - set) * kRows + place.row) * kStride + first_unit + place.unit - lane % kStep) *
            static_cast<int>(sizeof(T)));
        if (sends)
#pragma unroll
          for (int k = 0; k < kSends; ++k) cluster::send(to[k] + at, words, to[k] + barrier);
      }
    };
    if (there(kElements - 1))
      advance(std::integral_constant<int, kElements>());
    else
      advance(std::integral_constant<int, kElements - 1>());
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const Place place = place_of(e);
      if (!place.own) continue;
      const int64_t row = rows_before + place.row, unit = first_unit + place.unit;
      layer.output[row * H + unit] = last_h[e];
      if (keeps) {
        layer.c_before[row * H + unit] = late_c[e];
        T* const gates = layer.gates + row * kGates * H + unit;
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) gates[gate * H] = late_gates[e][gate];
      }
    }
    rows_before += rows_a_step;
    read(step + 1 < L);
  }
#pragma unroll
  for (int e = 0; e < kElements; ++e)
    if (const Place place = place_of(e); place.own) {
      layer.hy[in_state(place)] = last_h[e];
      layer.cy[in_state(place)] = narrow<T>(c[e]);
    }
  // No block leaves while another may still write to it.
  cluster::sync();
#endif
}

template <class Shape>
cudaError_t launch_shape(const LayerForward<typename Shape::T>& layer, cudaStream_t stream) {
  Launch how = {};
  how.cluster = Shape::kBlocks;
  how.grid = dim3(static_cast<unsigned>((layer.sequence.N + Shape::kRows - 1) / Shape::kRows) *
                  how.cluster);
  how.block = dim3(kThreads);
  how.shared = Shape::kShared;
  how.stream = stream;
  return launch(how, layer_cluster_kernel<Shape>, layer);
}

// body(shape) for the shape of a layer, none(); those compiled are the fastest ones measured. With
// H of 512, us a step on an H100, 16-bit: 16 blocks take eight rows in 1.5, eight blocks in 2.2,
// but of those more run at once; TF32: eight rows in 2.4, 16 in 3.6. With H of 768, more chunks in
// registers are slower: 2.6 us instead of 2.3.
template <class T, class Body, class None>
auto with_shape(const LayerForward<T>& layer, const Device& device, const Body& body,
                const None& none) {
  const int H = layer.H;
  const int64_t N = layer.sequence.N;
  if constexpr (std::is_same_v<T, float>) {
    using Eight = ClusterShape<T, 16, 4, 4, 8, 5, 1>;
    if (!device.tf32) return none();
    if (H <= 256) return body(ClusterShape<T, 8, 2, 2, 8, 8, 1>());
    if (H <= 512 && turns_of(Eight(), N, device) == 1) return body(Eight());
    if (H <= 512) return body(ClusterShape<T, 16, 4, 4, 8, 5, 2>());
  } else {
    using Wide = ClusterShape<T, 16, 4, 4, 4, 4, 1>;
    if (H <= 256) return body(ClusterShape<T, 8, 2, 2, 4, 4, 1>());
    if (H <= 512 && turns_of(Wide(), N, device) == 1) return body(Wide());
    if (H <= 512) return body(ClusterShape<T, 8, 4, 2, 8, 6, 1>());
    if (H <= 768) return body(ClusterShape<T, 16, 6, 4, 6, 3, 1>());
  }
  return none();
}

}  // namespace

template <class T>
int64_t layer_forward_cluster_turns(const LayerForward<T>& layer, const Device& device) {
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
cudaError_t layer_forward_cluster(const LayerForward<T>& layer, const Device& device,
                                  cudaStream_t stream) {
  return with_shape(
      layer, device, [&](auto shape) { return launch_shape<decltype(shape)>(layer, stream); },
      [] { return cudaErrorNotSupported; });
}

#define LSTM_EXT_INSTANTIATE(T)                                                           \
  template int64_t layer_forward_cluster_turns<T>(const LayerForward<T>&, const Device&); \
  template cudaError_t layer_forward_cluster<T>(const LayerForward<T>&, const Device&,    \
                                                cudaStream_t);
LSTM_EXT_INSTANTIATE(float)
LSTM_EXT_INSTANTIATE(__half)
LSTM_EXT_INSTANTIATE(__nv_bfloat16)
#undef LSTM_EXT_INSTANTIATE

}  // namespace lstm_ext::cuda
