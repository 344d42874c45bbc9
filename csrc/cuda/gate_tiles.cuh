// How a warp multiplies: the four gates of some hidden units, for some rows of the batch.
//
// A tile adds up, over the columns k of one operand (the input with W_ih, h with W_hh), a warp's
// share: every split'th chunk from its own on. Both kinds read each number straight into the
// registers of the lane that needs it, 16 bytes at a time where kVectors: of the operand's rows
// kAhead chunks before they are multiplied. kPadded: rows of weights lie on 16 bytes, and have
// zeros up to a multiple of kPad numbers.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/numbers.cuh"

namespace lstm_ext::cuda {

constexpr int kGates = 4;
constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;  // of a block

// Rows of the batch [N, K] times rows of the weights, K numbers each. The row of a unit's gate
// begins at weights + gate * gate_stride + unit * unit_stride.
template <class T>
struct Operand {
  const T* rows;
  const T* weights;
  int K;
  int64_t unit_stride, gate_stride;
};

// Where a tile lies in the result, and this warp's share of the sum. What lies beyond the last row
// or unit is computed as if it were the last, and not kept.
struct TilePlace {
  int64_t first_row, rows;
  int first_unit, units;
  int slice, split;
};

// Partial sums of a block in shared memory: [split][gate][row][unit].
template <class S>
struct PartialSums {
  S* at;
  int rows, units;

  __device__ S& operator()(int slice, int gate, int row, int unit) const {
    return at[((slice * kGates + gate) * rows + row) * units + unit];
  }

  __device__ PartialSums from_row(int row) const { return {at + row * units, rows, units}; }

  __device__ S sum(int split, int gate, int row, int unit) const {
    S sum = 0;
    for (int slice = 0; slice < split; ++slice) sum += (*this)(slice, gate, row, unit);
    return sum;
  }
};

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

  template <bool kVectors, int kAhead = 0, bool kPadded = false>
  __device__ void add(const Operand<T>& operand, const TilePlace& place, int lane) {
    constexpr int kStep = kVectors ? kFullVector<T> : 1;
    using Numbers = Vector<T, kStep>;
    const int K = operand.K, unit = min(place.first_unit, place.units - 1);
    const T* const weights = operand.weights + unit * operand.unit_stride;
    const T* const rows = operand.rows + place.first_row * K;
    const int last_row = static_cast<int>(min(place.rows - place.first_row, int64_t{kRows})) - 1;
    in_stages<kAhead, kRows, Numbers>(
        (place.slice * kWarpSize + lane) * kStep, place.split * kWarpSize * kStep, K,
        [&](int row, int k) {
          return load<kStep, kVectors>(rows + static_cast<int64_t>(min(row, last_row)) * K, k, K);
        },
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

  __device__ void store(const PartialSums<S>& partial, int slice, int unit, int lane) {
    const S sum = sum_over_lanes<kGates * kRows>(sums, lane);
    if (lane < kGates * kRows) partial(slice, lane / kRows, lane % kRows, unit) = sum;
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

  template <bool kVectors, int kAhead = 0, bool kPadded = false>
  __device__ void add(const Operand<T>& operand, const TilePlace& place, int lane) {
    constexpr int kStep = kFullVector<T>, kChunk = 4 * kStep;
    using Numbers = Vector<T, kStep>;
    static_assert(kPad == kChunk);
    const int K = operand.K, row = lane / 4, offset = lane % 4 * kStep;
    const int unit = min(place.first_unit + row, place.units - 1);
    const T* const weights = operand.weights + unit * operand.unit_stride;
    const T* rows[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column)
      rows[column] = operand.rows + min(place.first_row + 8 * column + row, place.rows - 1) * K;
    in_stages<kAhead, kColumns, Numbers>(
        place.slice * kChunk, place.split * kChunk, K,
        [&](int column, int chunk) {
          return load<kStep, kVectors>(rows[column], chunk + offset, K);
        },
        [&](int chunk, const auto& numbers_of) {
          uint32_t w[kGates][4], x[kColumns][4];
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) {
            const T* const row = weights + gate * operand.gate_stride;
            Numbers numbers;  // a copy: 16 bytes at a time
            if constexpr (kPadded)
              numbers = *reinterpret_cast<const Numbers*>(row + chunk + offset);
            else
              numbers = load<kStep, kVectors>(row, chunk + offset, K);
            to_words(numbers, w[gate]);
          }
#pragma unroll
          for (int column = 0; column < kColumns; ++column) to_words(numbers_of(column), x[column]);
#pragma unroll
          for (int half = 0; half < 4; half += 2)
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
              const uint32_t a[4] = {w[2 * pair][half], w[2 * pair + 1][half],
                                     w[2 * pair][half + 1], w[2 * pair + 1][half + 1]};
#pragma unroll
              for (int column = 0; column < kColumns; ++column) {
                const uint32_t b[2] = {x[column][half], x[column][half + 1]};
                multiply(sums[pair][column], a, b);
              }
            }
        });
  }

  __device__ void store(const PartialSums<S>& partial, int slice, int first_unit, int lane) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair)
#pragma unroll
      for (int column = 0; column < kColumns; ++column)
#pragma unroll
        for (int part = 0; part < 4; ++part)
          partial(slice, 2 * pair + part / 2, 8 * column + lane % 4 * 2 + part % 2,
                  first_unit + lane / 4) = sums[pair][column][part];
  }

 private:
  __device__ static void to_words(const Vector<T, kFullVector<T>>& numbers, uint32_t (&words)[4]) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int j = 0; j < 4; ++j) words[j] = to_tf32(numbers.at[j]);
    } else {
      memcpy(words, &numbers, sizeof(words));
    }
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
