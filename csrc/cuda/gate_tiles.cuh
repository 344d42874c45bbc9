// How a warp multiplies: the four gates of some hidden units, for some rows of the batch.
//
// A tile adds up, over the columns k of one operand (the input with W_ih, h with W_hh), a warp's
// share: every split'th chunk from its own on. Both kinds read each number straight into the
// registers of the lane that needs it, 16 bytes at a time where kVectors: of the operand's rows
// kAhead chunks before they are multiplied. kPut: the weights lie in shared memory as the tile's
// put has put them, with zeros up to a multiple of kPad numbers.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/numbers.cuh"

namespace lstm_ext::cuda {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;  // of a block

// A block's rows of the batch, of K numbers, times rows of the weights. The row of a unit's gate
// begins at weights + gate * gate_stride + unit * unit_stride.
template <class T>
struct Operand {
  const T* rows;
  const T* weights;
  int K;
  int64_t unit_stride, gate_stride;
};

// Where a tile lies in the operand's rows and units, of so many, and this warp's share of the sum.
// What lies beyond the last row or unit is computed as if it were the last, and not kept.
struct TilePlace {
  int first_row, rows;
  int first_unit, units;
  int slice, split;
};

// Of one unit and row, read and written 16 bytes at a time.
template <class S>
struct alignas(16) GateSums {
  S gate[kGates];
};

// Partial sums of a block in shared memory: [split][row][row_units].
template <class S>
struct PartialSums {
  GateSums<S>* at;
  int rows, row_units;

  __device__ GateSums<S>& operator()(int slice, int row, int unit) const {
    return at[(slice * rows + row) * row_units + unit];
  }

  __device__ PartialSums from_row(int row) const { return {at + row * row_units, rows, row_units}; }

  __device__ GateSums<S> sum(int split, int row, int unit) const {
    GateSums<S> sums = {};
    for_slices(split, [&](int slice) {
      const GateSums<S> part = (*this)(slice, row, unit);
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) sums.gate[gate] += part.gate[gate];
    });
    return sums;
  }

  __device__ S sum(int split, int gate, int row, int unit) const {
    S sum = 0;
    for_slices(split, [&](int slice) { sum += (*this)(slice, row, unit).gate[gate]; });
    return sum;
  }

 private:
  // In small tasks all warps share each sum: then without a loop.
  template <class Body>
  __device__ static void for_slices(int split, const Body& body) {
    if (split == kWarps) {
#pragma unroll
      for (int slice = 0; slice < kWarps; ++slice) body(slice);
    } else {
#pragma unroll 1
      for (int slice = 0; slice < split; ++slice) body(slice);
    }
  }
};

// Units of a row of partial sums: one more than are used, so that lanes that write to different
// rows find them in different banks.
inline int sum_row_units(int units) { return units + 1; }

template <int kCount, bool kVectors, class T>
__device__ inline Vector<T, kCount> load(const T* row, int k, int K) {
  if constexpr (kVectors)
    return load<kCount>(row, k, K);
  else
    return load_each<kCount>(row, k, K);
}

// Sums over the lanes of kCount numbers each, a power of two; lane l gets number l % kCount.
// (Recursive, so that every index is a constant and the numbers stay in registers.)
template <int kCount, int kBit = kWarpSize / 2, class S>
__device__ inline S sum_over_lanes(S (&numbers)[kCount], int lane) {
  if constexpr (kBit == 0) {
    return numbers[0];
  } else if constexpr (kBit >= kCount) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) numbers[j] += __shfl_xor_sync(kAllLanes, numbers[j], kBit);
    return sum_over_lanes<kCount, kBit / 2>(numbers, lane);
  } else {
    // Lanes in pairs: one goes on with the lower half of the numbers, the other with the upper.
    const bool upper = (lane & kBit) != 0;
#pragma unroll
    for (int j = 0; j < kBit; ++j) {
      const S give = upper ? numbers[j] : numbers[j + kBit];
      const S keep = upper ? numbers[j + kBit] : numbers[j];
      numbers[j] = keep + __shfl_xor_sync(kAllLanes, give, kBit);
    }
    return sum_over_lanes<kCount, kBit / 2>(numbers, lane);
  }
}

// multiply(k, numbers_of) for k = first, first + stride .. below K, where numbers_of(row) are those
// of load(row, k). With kAhead, they are loaded so many k before, and wait in registers.
template <int kAhead, int kRows, class Numbers, class Load, class Multiply>
__device__ inline void in_stages(int first, int stride, int K, const Load& load,
                                 const Multiply& multiply) {
  if constexpr (kAhead == 0) {
    [[maybe_unused]] constexpr int kUnroll = kRows == 1 ? 4 : 1;
#pragma unroll kUnroll
    for (int k = first; k < K; k += stride) multiply(k, [&](int row) { return load(row, k); });
  } else {
    Numbers staged[kAhead][kRows];
#pragma unroll
    for (int stage = 0; stage < kAhead; ++stage)
#pragma unroll
      for (int row = 0; row < kRows; ++row) staged[stage][row] = load(row, first + stage * stride);
    for (int k = first;;) {
#pragma unroll
      for (int stage = 0; stage < kAhead; ++stage) {
        if (k >= K) return;
        Numbers now[kRows];
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          now[row] = staged[stage][row];
          staged[stage][row] = load(row, k + kAhead * stride);
        }
        multiply(k, [&](int row) { return now[row]; });
        k += stride;
      }
    }
  }
}

// float and double by multiply-adds: one unit, the lanes side by side along k.
template <class T_, int kRows_>
struct FmaTile {
  using T = T_;
  using S = Sum<T>;
  static constexpr int kRows = kRows_, kUnits = 1;
  static constexpr int kMostAhead = kRows == 1 ? 4 : kRows == 4 ? 2 : 1, kPad = 1;
  static_assert(kGates * kRows <= kWarpSize);

  S sums[kGates * kRows] = {};

  template <bool kVectors, int kAhead = 0, bool kPut = false>
  __device__ void add(const Operand<T>& operand, const TilePlace& place, int lane) {
    constexpr int kStep = kVectors ? kFullVector<T> : 1;
    using Numbers = Vector<T, kStep>;
    const int K = operand.K, unit = min(place.first_unit, place.units - 1);
    const T* const weights = operand.weights + unit * operand.unit_stride;
    const T* const rows = operand.rows + place.first_row * K;
    const int last_row = min(place.rows - place.first_row, kRows) - 1;
    in_stages<kAhead, kRows, Numbers>(
        (place.slice * kWarpSize + lane) * kStep, place.split * kWarpSize * kStep, K,
        [&](int row, int k) { return load<kStep, kVectors>(rows + min(row, last_row) * K, k, K); },
        [&](int k, const auto& numbers_of) {
          Numbers w[kGates];
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate)
            w[gate] = load<kStep, kVectors>(weights + gate * operand.gate_stride, k, K);
#pragma unroll
          for (int row = 0; row < kRows; ++row) {
            const Numbers x = numbers_of(row);
#pragma unroll
            for (int gate = 0; gate < kGates; ++gate)
#pragma unroll
              for (int j = 0; j < kStep; ++j)
                sums[gate * kRows + row] += widen(w[gate].at[j]) * widen(x.at[j]);
          }
        });
  }

  // One number, or 16 bytes of each gate, to the weights of a unit in shared memory.
  __device__ static void put(T* unit, int gate_stride, int gate, int k, T number) {
    unit[gate * gate_stride + k] = number;
  }
  __device__ static void put(T* unit, int gate_stride, int k,
                             const Vector<T, kFullVector<T>> (&numbers)[kGates]) {
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate)
      *reinterpret_cast<Vector<T, kFullVector<T>>*>(unit + gate * gate_stride + k) = numbers[gate];
  }

  __device__ void store(const PartialSums<S>& partial, int slice, int unit, int lane) {
    const S sum = sum_over_lanes<kGates * kRows>(sums, lane);
    if (lane < kGates * kRows) partial(slice, lane % kRows, unit).gate[lane / kRows] = sum;
  }
};

// The 16-bit types, and float as TF32, on tensor cores: eight units. The rows of A are those units'
// gates i and f, then g and o, so that lane 4 u + t ends up with all four gates of unit u for two
// rows of the batch. Both factors take k in the same order, so that any does: a lane takes
// numbers that lie side by side.
template <class T_, int kRows_>
struct MmaTile {
  using T = T_;
  using S = float;
  static constexpr int kRows = kRows_, kUnits = 8, kColumns = kRows / 8;
  static constexpr int kMostAhead = kColumns == 4 ? 2 : 4, kPad = 4 * kFullVector<T>;

  float sums[2][kColumns][4] = {};

  template <bool kVectors, int kAhead = 0, bool kPut = false>
  __device__ void add(const Operand<T>& operand, const TilePlace& place, int lane) {
    constexpr int kStep = kFullVector<T>, kChunk = 4 * kStep;
    static_assert(kPad == kChunk);
    const int K = operand.K, row = lane / 4, offset = lane % 4 * kStep;
    const int unit = min(place.first_unit + row, place.units - 1);
    const T* const weights = operand.weights + unit * operand.unit_stride;
    const T* rows[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column)
      rows[column] =
          operand.rows + int64_t{min(place.first_row + 8 * column + row, place.rows - 1)} * K;
    in_stages<kAhead, kColumns, Words>(
        place.slice * kChunk, place.split * kChunk, K,
        [&](int column, int chunk) {
          return load_words<kVectors>(rows[column] + chunk + offset, chunk + offset, K);
        },
        [&](int chunk, const auto& numbers_of) {
          Words w[kGates], x[kColumns];
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) {
            const T* const at = weights + gate * operand.gate_stride + chunk + offset;
            if constexpr (kPut)
              w[gate] = words_at(at);
            else
              w[gate] = round_words(load_words<kVectors>(at, chunk + offset, K));
          }
#pragma unroll
          for (int column = 0; column < kColumns; ++column)
            x[column] = round_words(numbers_of(column));
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
              const Words a =
                  kPut ? w[2 * pair + half] : fragment(w[2 * pair], w[2 * pair + 1], half);
#pragma unroll
              for (int column = 0; column < kColumns; ++column) {
                const uint32_t b[2] = {x[column].at[2 * half], x[column].at[2 * half + 1]};
                multiply(sums[pair][column], a.at, b);
              }
            }
        });
  }

  // As FmaTile's, in the order in which lanes read them: of a pair of gates, what the first product
  // takes in the place of one, what the second takes in that of the other.
  __device__ static void put(T* unit, int gate_stride, int gate, int k, T number) {
    constexpr int kStep = kFullVector<T>, kInWord = 4 / sizeof(T);
    const int word = k % kStep / kInWord;
    const int at = k - k % kStep + (word % 2 * 2 + gate % 2) * kInWord + k % kInWord;
    if constexpr (std::is_same_v<T, float>) {
      const uint32_t bits = to_tf32(number);
      memcpy(&number, &bits, sizeof(bits));
    }
    unit[(gate / 2 * 2 + word / 2) * gate_stride + at] = number;
  }
  __device__ static void put(T* unit, int gate_stride, int k,
                             const Vector<T, kFullVector<T>> (&numbers)[kGates]) {
    Words w[kGates];
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      memcpy(&w[gate], &numbers[gate], sizeof(w[gate]));
      w[gate] = round_words(w[gate]);
    }
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      *reinterpret_cast<Words*>(unit + gate * gate_stride + k) =
          fragment(w[gate / 2 * 2], w[gate / 2 * 2 + 1], gate % 2);
    }
  }

  __device__ void store(const PartialSums<S>& partial, int slice, int first_unit, int lane) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column)
#pragma unroll
      for (int row = 0; row < 2; ++row)
        partial(slice, 8 * column + lane % 4 * 2 + row, first_unit + lane / 4) = {
            sums[0][column][row], sums[0][column][2 + row], sums[1][column][row],
            sums[1][column][2 + row]};
  }

 private:
  // 16 bytes of numbers as they go to the tensor cores: as words from the start, for the compiler
  // moves 16-bit numbers about one by one.
  using Words = Vector<uint32_t, 4>;

  __device__ static Words words_at(const T* numbers) {
    return *reinterpret_cast<const Words*>(numbers);
  }

  // Those at k of a row of K.
  template <bool kVectors>
  __device__ static Words load_words(const T* at, int k, int K) {
    Words words = {};
    if constexpr (kVectors) {
      if (k < K) words = words_at(at);
    } else {
      const auto numbers = load_each<kFullVector<T>>(at - k, k, K);
      memcpy(&words, &numbers, sizeof(words));
    }
    return words;
  }

  // A of the first or the second product with these 16 bytes of two gates.
  __device__ static Words fragment(const Words& gate, const Words& next, int half) {
    return {gate.at[2 * half], next.at[2 * half], gate.at[2 * half + 1], next.at[2 * half + 1]};
  }

  __device__ static Words round_words(Words words) {
    if constexpr (std::is_same_v<T, float>)
#pragma unroll
      for (uint32_t& word : words.at) {
        float number = 0;
        memcpy(&number, &word, sizeof(word));
        word = to_tf32(number);
      }
    return words;
  }

  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, float>)
      mma_tf32(d, a, b);
    else
      mma_16bit<T>(d, a, b);
  }
};

template <class T, class Body>
auto with_mma_tile(int64_t N, const Body& body) {
  if (N <= 8) return body(MmaTile<T, 8>());
  if (N <= 16) return body(MmaTile<T, 16>());
  return body(MmaTile<T, 32>());
}

// body(tile) with the tile that suits the type and the batch.
template <class T, class Body>
auto with_tile(int64_t N, bool tf32, const Body& body) {
  if constexpr (std::is_same_v<T, double>) {
    return N == 1 ? body(FmaTile<T, 1>()) : body(FmaTile<T, 4>());
  } else if constexpr (std::is_same_v<T, float>) {
    if (tf32) return with_mma_tile<T>(N, body);
    if (N == 1) return body(FmaTile<T, 1>());
    if (N <= 4) return body(FmaTile<T, 4>());
    return body(FmaTile<T, 8>());
  } else {
    return with_mma_tile<T>(N, body);
  }
}

template <class T>
__device__ inline Sum<T> sum_of_biases(const T* b_ih, const T* b_hh, int column) {
  Sum<T> sum = 0;
  if (b_ih != nullptr) sum += widen(b_ih[column]);
  if (b_hh != nullptr) sum += widen(b_hh[column]);
  return sum;
}

// To the gates of one unit in a row [4H].
template <class T>
__device__ inline void store_gates(T* unit, int H, const Gates<Sum<T>>& gates) {
  unit[0] = narrow<T>(gates.i);
  unit[H] = narrow<T>(gates.f);
  unit[2 * H] = narrow<T>(gates.g);
  unit[3 * H] = narrow<T>(gates.o);
}

}  // namespace lstm_ext::cuda
