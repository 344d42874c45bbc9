// A layer of few hidden units in one launch: a block takes some rows of the batch through all steps
// and meets nobody. W_hh stays in registers, as far as they go, else in shared memory; h lies in
// shared memory, twice: a step reads one and writes the other, so that it needs one barrier.
//
// All four gates of a unit and a row end up in one lane: nothing else lies between products and h.
// The input's products are read two steps ahead, outputs are stored after h is published.
#pragma once

#include <type_traits>

#include "cuda/gate_tiles.cuh"
#include "cuda/kernels.h"
#include "quick_math.cuh"

namespace lstm_ext::cuda {

// Numbers k .. k + kCount of a row of K, zeros beyond it, so many at a time as lie aligned.
template <int kCount, class T>
__device__ inline Vector<T, kCount> weights_at(const T* row, int k, int K, int aligned) {
  if (aligned >= kCount) return load<kCount>(row, k, K);
  if constexpr (kCount > 4) {
    if (aligned >= 4) {
      Vector<T, kCount> numbers;
#pragma unroll
      for (int part = 0; part < kCount; part += 4) {
        const Vector<T, 4> four = load<4>(row, k + part, K);
#pragma unroll
        for (int j = 0; j < 4; ++j) numbers.at[part + j] = four.at[j];
      }
      return numbers;
    }
  }
  return load_each<kCount>(row, k, K);
}

// How many numbers, a power of two, one may read at a time from every row of K.
template <class T>
__device__ inline int alignment_of(const T* rows, int K) {
  int aligned = kFullVector<T>;
  while (K % aligned != 0 || reinterpret_cast<uintptr_t>(rows) % (aligned * sizeof(T)) != 0)
    aligned /= 2;
  return aligned;
}

// The kElements elements of a lane: where they lie, what they need and what becomes of them.
template <class T, int kElements, bool kTrain>
class Elements {
 public:
  // place(e): the row in the block, the unit, and whether it is there for this lane to store.
  template <class Place>
  __device__ Elements(const LayerForward<T>& layer, int64_t first_row, const Place& place)
      : layer_(layer), H_(layer.H) {
    const DeviceSequence& sequence = layer.sequence;
    const auto origin = place(0);
    of_state_ = (first_row + origin.row) * H_ + origin.unit;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const auto [row, unit, own] = place(e);
      own_[e] = own && unit < H_ && first_row + row < sequence.N;
      row_[e] = row - origin.row, unit_[e] = unit - origin.unit;
      c_[e] = own_[e] ? widen(layer.cx[in_state(e)]) : 0;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate)
        bias_[e][gate] = unit < H_ ? sum_of_biases(layer.b_ih, layer.b_hh, gate * H_ + unit) : 0;
    }
    const int64_t time = sequence.reverse ? sequence.L - 1 : 0;
    a_step_ = (sequence.reverse ? -sequence.N : sequence.N) * H_;
    const int64_t state = time * sequence.N * H_ + of_state_;
    const int64_t gates = (time * sequence.N + first_row + origin.row) * kGates * H_ + origin.unit;
    products_ = layer.products + gates;
    output_ = layer.output + state;
    if constexpr (kTrain) gates_ = layer.gates + gates, c_before_ = layer.c_before + state;
    read(0, true);
    read(1, sequence.L > 1);
  }

  // The next of the steps that have not been read, into a set.
  __device__ void read(int set, bool there) {
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      if (own_[e] && there) {
        const T* const products = products_ + in_gates(e);
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) ahead_[set][e][gate] = products[gate * H_];
      } else {
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) ahead_[set][e][gate] = narrow<T>(0);
      }
    products_ += kGates * a_step_;
  }

  // What a set has, which may then be read anew.
  __device__ void take(int set, float (&known)[kElements][kGates]) const {
#pragma unroll
    for (int e = 0; e < kElements; ++e)
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate)
        known[e][gate] = widen(ahead_[set][e][gate]) + bias_[e][gate];
  }

  // h, from the pre-activations.
  __device__ T advance(int e, const float (&pre)[kGates]) {
    float c, h;
    const Gates<float> gates =
        lstm_ext::cell_forward<QuickMath>(Gates<float>{pre[0], pre[1], pre[2], pre[3]}, c_[e], c, h);
    if constexpr (kTrain) {
      late_c_[e] = narrow<T>(c_[e]);
      late_gates_[e][0] = narrow<T>(gates.i), late_gates_[e][1] = narrow<T>(gates.f);
      late_gates_[e][2] = narrow<T>(gates.g), late_gates_[e][3] = narrow<T>(gates.o);
    }
    // As the cell rounds its c from step to step.
    c_[e] = widen(narrow<T>(c));
    return late_h_[e] = narrow<T>(h);
  }

  // What the last advance made.
  __device__ void store() {
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (!own_[e]) continue;
      output_[offset(e)] = late_h_[e];
      if constexpr (kTrain) {
        c_before_[offset(e)] = late_c_[e];
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate)
          gates_[in_gates(e) + gate * H_] = late_gates_[e][gate];
      }
    }
    output_ += a_step_;
    if constexpr (kTrain) c_before_ += a_step_, gates_ += kGates * a_step_;
  }

  __device__ void store_last() {
    store();
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      if (own_[e]) {
        layer_.hy[in_state(e)] = late_h_[e];
        layer_.cy[in_state(e)] = narrow<T>(c_[e]);
      }
  }

 private:
  // From the first element.
  __device__ int offset(int e) const { return row_[e] * H_ + unit_[e]; }
  __device__ int in_gates(int e) const { return row_[e] * kGates * H_ + unit_[e]; }
  __device__ int64_t in_state(int e) const { return of_state_ + offset(e); }

  const LayerForward<T>& layer_;
  int H_;
  int64_t a_step_, of_state_;
  const T* products_;
  T *output_, *gates_ = nullptr, *c_before_ = nullptr;
  bool own_[kElements];
  int row_[kElements], unit_[kElements];
  float c_[kElements], bias_[kElements][kGates];
  T ahead_[2][kElements][kGates];
  T late_h_[kElements], late_c_[kElements], late_gates_[kElements][kGates];
};

// Both copies of h: the first step's from hx, else zeros. numbers(h) is what is kept of h.
template <int kRows, class T>
__device__ inline void begin_h(const LayerForward<T>& layer, int64_t first_row, T* h, int stride) {
  const int64_t N = layer.sequence.N;
  for (int at = static_cast<int>(threadIdx.x); at < 2 * kRows * stride;
       at += static_cast<int>(blockDim.x)) {
    const int64_t row = first_row + at / stride;
    const int k = at % stride;
    h[at] = at < kRows * stride && row < N && k < layer.H ? layer.hx[row * layer.H + k]
                                                          : narrow<T>(0);
  }
}

constexpr int kMostWarps = 8;

template <class T>
__device__ inline void words_of(const Vector<T, kFullVector<T>>& numbers, uint32_t (&words)[4]) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = to_tf32(numbers.at[j]);
  } else {
    memcpy(words, &numbers, sizeof(words));
  }
}

template <class T>
__device__ inline void mma_of(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float>)
    mma_tf32(d, a, b);
  else
    mma_16bit<T>(d, a, b);
}

// On tensor cores. A warp has 16 units: a tile of 16 rows of W_hh a gate, so that a lane's sums of
// the four tiles are those of the same units. A tile multiplies eight columns, and a block has
// fewer rows: columns then repeat them, and each lane takes other ones of its sums. A lane's
// fragments of a chunk of k are numbers that lie side by side, as in MmaTile. Chunks from kKept on
// lie in shared memory.
template <class T, int kRows, int kChunks, int kKept, bool kTrain>
__global__ void __launch_bounds__(kMostWarps * kWarpSize, 1)
    small_mma_kernel(LayerForward<T> layer) {
  constexpr int kStep = kFullVector<T>, kChunk = 4 * kStep;
  constexpr int kStride = (kChunks | 1) * kChunk;  // rows begin in the banks' other half
  constexpr int kElements = kRows == 8 ? 4 : kRows == 4 ? 2 : 1, kFar = kChunks - kKept;
  static_assert(kRows == 8 || kRows == 4 || kRows == 2);
  using Numbers = Vector<T, kStep>;
  LSTM_EXT_DYNAMIC_SHARED(unsigned char, shared);
  T* const h = reinterpret_cast<T*>(shared);  // [2][kRows][kStride]
  // [chunk][half of it][gate][thread], four words each
  uint4* const far_weights = reinterpret_cast<uint4*>(h + 2 * kRows * kStride);

  const int H = layer.H, threads = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int r = lane / 4, t = lane % 4, first_unit = thread / kWarpSize * 16;
  const int64_t first_row = int64_t{blockIdx.x} * kRows;

  uint32_t near_weights[kKept][2][kGates][4];
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
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const uint32_t a[4] = {words[0][2 * part], words[1][2 * part], words[0][2 * part + 1],
                               words[1][2 * part + 1]};
        if (chunk < kKept) {
#pragma unroll
          for (int j = 0; j < 4; ++j) near_weights[chunk < kKept ? chunk : 0][part][gate][j] = a[j];
        } else {
          far_weights[(((chunk - kKept) * 2 + part) * kGates + gate) * threads + thread] =
              uint4{a[0], a[1], a[2], a[3]};
        }
      }
    }
  begin_h<kRows>(layer, first_row, h, kStride);
  if constexpr (std::is_same_v<T, float>) {
    // What is multiplied is rounded once, here and where it is written.
    __syncthreads();
    for (int at = thread; at < kRows * kStride; at += threads) {
      const uint32_t rounded = to_tf32(h[at]);
      memcpy(&h[at], &rounded, sizeof(rounded));
    }
  }
  struct Spot {
    int row, unit;
    bool own;
  };
  // Of a lane's sums 0..3, columns 2t and 2t + 1 of units r and r + 8.
  Elements<T, kElements, kTrain> elements(layer, first_row, [&](int e) {
    if constexpr (kRows == 8)
      return Spot{2 * t + e % 2, first_unit + r + e / 2 * 8, true};
    else if constexpr (kRows == 4)
      return Spot{t % 2 * 2 + e, first_unit + r + t / 2 * 8, true};
    else
      return Spot{t % 2, first_unit + r + t / 2 * 8, true};
  });
  const auto pick = [&](const float (&d)[4], int e) {
    if constexpr (kRows == 8) return d[e];
    if constexpr (kRows == 4) return t / 2 != 0 ? d[2 + e] : d[e];
    const float low = t % 2 != 0 ? d[1] : d[0], high = t % 2 != 0 ? d[3] : d[2];
    return t / 2 != 0 ? high : low;
  };
  // Where a lane's elements go in h: the first, and from there to the others.
  T* const h_own = h + (kRows == 8 ? 2 * t : kRows == 4 ? t % 2 * 2 : t % 2) * kStride +
                   first_unit + r + (kRows == 8 ? 0 : t / 2 * 8);
  const T* const h_read = h + r % kRows * kStride + t * kStep;

  __syncthreads();
  const int64_t L = layer.sequence.L;
  const auto advance = [&](auto parity, int64_t step) {
    constexpr int kSet = decltype(parity)::value;
    const T* const h_now = h_read + kSet * kRows * kStride;
    float sums[kGates][4] = {}, known[kElements][kGates];
    // Here, where the tensor cores have something to do.
    const auto meanwhile = [&] {
      if (step > 0) elements.store();
      elements.take(kSet, known);
      elements.read(kSet, step + 2 < L);
    };
    if constexpr (kFar == 0) {
      Numbers x[kChunks];
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk)
        x[chunk] = *reinterpret_cast<const Numbers*>(h_now + chunk * kChunk);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        uint32_t words[4];
        memcpy(words, &x[chunk], sizeof(words));
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const uint32_t b[2] = {words[2 * part], words[2 * part + 1]};
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate)
            mma_of<T>(sums[gate], near_weights[chunk][part][gate], b);
        }
        if (chunk == 0) meanwhile();
      }
    } else {
      const auto half_of = [&](int half, uint32_t (&b)[2]) {
        memcpy(b, h_now + half * kChunk / 2 + (half % 2 != 0 ? -kChunk / 2 + kStep / 2 : 0),
               sizeof(b));
      };
      // In turns: shared memory is as busy as the tensor cores.
#pragma unroll
      for (int far = 0; far < 2 * kFar; ++far) {
        uint4 words[kGates];
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate)
          words[gate] = far_weights[(far * kGates + gate) * threads + thread];
        uint32_t b[2];
#pragma unroll
        for (int half = 0; half < 2 * kKept; ++half) {
          if (half * kFar / kKept != far) continue;
          half_of(half, b);
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate)
            mma_of<T>(sums[gate], near_weights[half / 2][half % 2][gate], b);
        }
        half_of(2 * kKept + far, b);
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) {
          const uint32_t a[4] = {words[gate].x, words[gate].y, words[gate].z, words[gate].w};
          mma_of<T>(sums[gate], a, b);
        }
        if (far == 2 * kFar - 1) meanwhile();
        // Else the compiler reads all of it first, into more registers than there are.
        __syncwarp();
      }
    }
    T* const h_next = h_own + (1 - kSet) * kRows * kStride;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      float pre[kGates];
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) pre[gate] = known[e][gate] + pick(sums[gate], e);
      const T to = elements.advance(e, pre);
      T* const at = h_next + e % 2 * kStride + e / 2 * 8;
      if constexpr (std::is_same_v<T, float>) {
        const uint32_t rounded = to_tf32(to);
        memcpy(at, &rounded, sizeof(rounded));
      } else {
        *at = to;
      }
    }
    __syncthreads();
  };
  for (int64_t step = 0; step < L; step += 2) {
    advance(std::integral_constant<int, 0>(), step);
    if (step + 1 < L) advance(std::integral_constant<int, 1>(), step + 1);
  }
  elements.store_last();
}

// Sums over the kSplit lanes of a unit: each lane ends up with those of its rows, from first on.
template <int kBit, int kCount, int kRows>
__device__ inline void sum_over_split(float (&sums)[kRows][kGates], int slice) {
  if constexpr (kBit > 0) {
    if constexpr (kCount == 1) {
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate)
        sums[0][gate] += __shfl_xor_sync(kAllLanes, sums[0][gate], kBit);
      sum_over_split<kBit / 2, 1>(sums, slice);
    } else {
      const bool upper = (slice & kBit) != 0;
#pragma unroll
      for (int row = 0; row < kCount / 2; ++row)
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) {
          const float low = sums[row][gate], high = sums[row + kCount / 2][gate];
          sums[row][gate] =
              (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, kBit);
        }
      sum_over_split<kBit / 2, kCount / 2>(sums, slice);
    }
  }
}

// float by multiply-adds. A unit has kSplit lanes side by side, each kVectors times four numbers
// along k of all four gates; those from kKept on lie in shared memory.
template <int kRows, int kSplit, int kVectors, int kKept, int kThreads_, bool kTrain>
__global__ void __launch_bounds__(kThreads_, 1) small_fma_kernel(LayerForward<float> layer) {
  constexpr int K = kSplit * kVectors * 4, kElements = kRows > kSplit ? kRows / kSplit : 1;
  // Lanes that have the same element.
  constexpr int kSame = kRows < kSplit ? kSplit / kRows : 1, kFar = kVectors - kKept;
  using Numbers = Vector<float, 4>;
  LSTM_EXT_DYNAMIC_SHARED(float, h);                            // [2][kRows][K]
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
  begin_h<kRows>(layer, first_row, h, K);
  struct Spot {
    int row, unit;
    bool own;
  };
  const int first_own = slice / kSame * kElements;
  Elements<float, kElements, kTrain> elements(layer, first_row, [&](int e) {
    return Spot{first_own + e, unit, slice % kSame == 0};
  });
  __syncthreads();
  const int64_t L = layer.sequence.L;
  const auto advance = [&](auto parity, int64_t step) {
    constexpr int kSet = decltype(parity)::value;
    const float* const h_read = h + kSet * kRows * K + slice * 4;
    float sums[kRows][kGates] = {}, known[kElements][kGates];
    const auto add = [&](int v, const Numbers (&weights)[kGates]) {
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
      if (unit < K && slice % kSame == 0)
        h[((1 - kSet) * kRows + first_own + e) * K + unit] = to;
    }
    __syncthreads();
  };
  for (int64_t step = 0; step < L; step += 2) {
    advance(std::integral_constant<int, 0>(), step);
    if (step + 1 < L) advance(std::integral_constant<int, 1>(), step + 1);
  }
  elements.store_last();
}

// The launchers. rows: of a block; 0: as few as leave no block without a multiprocessor.

inline int rows_a_block(int64_t N, int multiprocessors, int rows, int least, int most) {
  if (rows > 0) return rows < least ? least : rows > most ? most : rows;
  for (rows = least; rows < most && (N + rows - 1) / rows > multiprocessors;) rows *= 2;
  return rows;
}

template <int kRows, class T>
unsigned blocks_of(const LayerForward<T>& layer) {
  return static_cast<unsigned>((layer.sequence.N + kRows - 1) / kRows);
}

// With more rows and more weights, a thread has not registers enough for TF32.
template <class T>
constexpr int most_rows(int H) {
  return std::is_same_v<T, float> && H > 64 ? 4 : 8;
}

template <class T, int kRows, int kChunks, bool kTrain>
cudaError_t launch_small_mma(const LayerForward<T>& layer, cudaStream_t stream) {
  // A thread may have 255 registers in all; a chunk is 32 of them.
  constexpr int kMost = !std::is_same_v<T, float> ? 4
                        : kRows == 8              ? 3
                                     : (kRows == 4 ? 4 : 5) - (kTrain && kChunks == 8 ? 1 : 0);
  constexpr int kKept = kChunks < kMost ? kChunks : kMost;
  constexpr int kStride = (kChunks | 1) * 4 * kFullVector<T>;
  const unsigned threads = (layer.H + 15) / 16 * kWarpSize;
  const size_t shared =
      2 * kRows * kStride * sizeof(T) + size_t{kChunks - kKept} * 2 * kGates * threads * 16;
  return launch(Launch{dim3(blocks_of<kRows>(layer)), dim3(threads), shared, false, stream},
                small_mma_kernel<T, kRows, kChunks, kKept, kTrain>, layer);
}

template <class T, int kRows, bool kTrain>
cudaError_t small_mma_of_rows(const LayerForward<T>& layer, cudaStream_t stream) {
  constexpr int kEach = 32 / (4 * kFullVector<T>);  // chunks of 32 units
  if (layer.H <= 32) return launch_small_mma<T, kRows, kEach, kTrain>(layer, stream);
  if (layer.H <= 64) return launch_small_mma<T, kRows, 2 * kEach, kTrain>(layer, stream);
  if constexpr (kRows <= most_rows<T>(128)) {
    if (layer.H <= 96) return launch_small_mma<T, kRows, 3 * kEach, kTrain>(layer, stream);
    return launch_small_mma<T, kRows, 4 * kEach, kTrain>(layer, stream);
  }
  return cudaErrorInvalidValue;
}

template <int kRows, int kSplit, int kVectors, int kKept, int kThreads_, bool kTrain>
cudaError_t launch_small_fma(const LayerForward<float>& layer, cudaStream_t stream) {
  const unsigned threads = (layer.H * kSplit + kWarpSize - 1) / kWarpSize * kWarpSize;
  const size_t shared = 2 * kRows * kSplit * kVectors * 4 * sizeof(float) +
                        size_t{kVectors - kKept} * kGates * threads * 16;
  return launch(Launch{dim3(blocks_of<kRows>(layer)), dim3(threads), shared, false, stream},
                small_fma_kernel<kRows, kSplit, kVectors, kKept, kThreads_, kTrain>, layer);
}

template <int kRows, bool kTrain>
cudaError_t small_fma_of_rows(const LayerForward<float>& layer, cudaStream_t stream) {
  if (layer.H <= 32) return launch_small_fma<kRows, 4, 2, 2, 128, kTrain>(layer, stream);
  if (layer.H <= 48) return launch_small_fma<kRows, 4, 3, 3, 192, kTrain>(layer, stream);
  if (layer.H <= 64) return launch_small_fma<kRows, 4, 4, 4, 256, kTrain>(layer, stream);
  // A thread may have 255 registers in all; four numbers along k are 16 of them.
  constexpr int kMost = kRows == 4 ? 6 : kTrain ? 8 : kRows == 2 ? 9 : 10;
  if (layer.H <= 96) return launch_small_fma<kRows, 2, 12, kMost, 192, kTrain>(layer, stream);
  return launch_small_fma<kRows, 2, 16, kMost, 256, kTrain>(layer, stream);
}

template <class T>
cudaError_t small_layer_forward(const LayerForward<T>& layer, const Device& device, int rows,
                                cudaStream_t stream) {
  if (layer.H > 128) return cudaErrorInvalidValue;
  const int64_t N = layer.sequence.N;
  const bool train = layer.gates != nullptr;
  if constexpr (std::is_same_v<T, float>) {
    if (!device.tf32) {
      rows = rows_a_block(N, device.multiprocessors, rows, 1, 4);
      const auto with = [&](auto train) {
        constexpr bool kTrain = decltype(train)::value;
        if (rows == 1) return small_fma_of_rows<1, kTrain>(layer, stream);
        if (rows == 2) return small_fma_of_rows<2, kTrain>(layer, stream);
        return small_fma_of_rows<4, kTrain>(layer, stream);
      };
      return train ? with(std::true_type()) : with(std::false_type());
    }
  }
  rows = rows_a_block(N, device.multiprocessors, rows, 2, most_rows<T>(layer.H));
  const auto with = [&](auto train) {
    constexpr bool kTrain = decltype(train)::value;
    if (rows == 2) return small_mma_of_rows<T, 2, kTrain>(layer, stream);
    if (rows == 4) return small_mma_of_rows<T, 4, kTrain>(layer, stream);
    return small_mma_of_rows<T, 8, kTrain>(layer, stream);
  };
  return train ? with(std::true_type()) : with(std::false_type());
}

}  // namespace lstm_ext::cuda
