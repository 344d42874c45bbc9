// Weights in 8 bits: both factors of a product are rounded to integers, whose sums in 32 bits are
// exact, whatever the order, the instruction set and the number of threads.
//
//   x W^T [row, column] = x_scale[row] w_scale[column] sum_k x_q[row, k] w_q[column, k]
//   w_scale = max |w| / 127 over the column's K weights,     w_q = round(w / w_scale)
//   x_scale = max |x| / levels over the row's K elements,    x_q = round(x / x_scale)
//
// The rows are rounded anew at each step, to 8 bits or, for accuracy, to 16. A scale is NaN where
// something is infinite or NaN, and so is then all that it scales.
#pragma once

#include "cpu/cell_finish.h"
#include "cpu/layer_kernels.h"
#include "cpu/panel.h"

namespace lstm_ext::cpu {
namespace {

constexpr int32_t kWeightLevels = 127;
// Rows and columns of smaller numbers count as zero: the inverse of their scale would overflow.
constexpr float kSmallest = 0x1p-100f;

struct Int8Activations {
  static int32_t levels(int64_t /*K*/) { return 127; }
};
// As many as leave room for the sum of K products.
struct Int16Activations {
  static int32_t levels(int64_t K) {
    const int64_t most = std::numeric_limits<int32_t>::max() / (kWeightLevels * (K > 0 ? K : 1));
    return static_cast<int32_t>(at_most(most, std::numeric_limits<int16_t>::max()));
  }
};

// A weight in memory, for each type of the factors that it is multiplied by.
template <class F>
struct IntegerWeight;
template <>
struct IntegerWeight<Int16Pair> {
  static constexpr int kDepth = 2;
  static constexpr int32_t kOffset = 0;  // of the other factor
  int8_t k[kDepth];
};
template <>
struct IntegerWeight<UInt8Quad> {
  static constexpr int kDepth = 4;
  static constexpr int32_t kOffset = 128;
  int8_t k[kDepth];
};
template <>
struct IntegerWeight<Int8Quad> {
  static constexpr int kDepth = 4;
  static constexpr int32_t kOffset = 0;
  int8_t k[kDepth];
};
// Of rows in 8 bits, where the processor has no product of its own for them.
using ByteFactor = std::conditional_t<LSTM_EXT_VECTOR_BYTES == 32, Int8Quad, Int16Pair>;

LSTM_EXT_INLINE Int32s load(const IntegerWeight<Int16Pair>* p) {
  typedef int8_t Int8s __attribute__((vector_size(LSTM_EXT_VECTOR_BYTES / 2)));
  typedef int16_t Int16s __attribute__((vector_size(LSTM_EXT_VECTOR_BYTES)));
  Int8s v;
  std::memcpy(&v, p, sizeof(v));
  return bit_cast<Int32s>(__builtin_convertvector(v, Int16s));
}
LSTM_EXT_INLINE Int32s load(const IntegerWeight<UInt8Quad>* p) {
  return load(reinterpret_cast<const int32_t*>(p));
}
LSTM_EXT_INLINE Int32s load(const IntegerWeight<Int8Quad>* p) {
  return load(reinterpret_cast<const int32_t*>(p));
}

// A block of packed weights: one vector of hidden units with all gates, or all units if few.
template <class F>
struct IntegerBlock {
  using Weight = IntegerWeight<F>;
  static constexpr int64_t kColumns = Panel<F>::kColumns;

  float* scales;         // [kColumns]
  int32_t* corrections;  // [kColumns]: what the offset adds to each sum, with its sign turned
  Weight* weights;       // [factors][kColumns]

  explicit IntegerBlock(const void* block)
      : scales(static_cast<float*>(const_cast<void*>(block))),
        corrections(reinterpret_cast<int32_t*>(scales + kColumns)),
        weights(reinterpret_cast<Weight*>(corrections + kColumns)) {}

  static int64_t factors(int64_t K) { return blocks(K, Weight::kDepth); }
  static int64_t bytes(int64_t K) {
    const auto column = static_cast<int64_t>(sizeof(float) + sizeof(int32_t));
    return kColumns * (column + factors(K) * static_cast<int64_t>(sizeof(Weight)));
  }
};

LSTM_EXT_INLINE bool is_number(float v) { return v - v == 0.0f; }

// A number's scale and the inverse, by which numbers become integers of so many levels.
struct Scale {
  float scale, inverse;

  Scale(float most, int32_t levels)
      : scale(most / static_cast<float>(levels)), inverse(static_cast<float>(levels) / most) {
    if (is_number(most) && most >= kSmallest) return;
    scale = is_number(most) ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    inverse = 0.0f;
  }
};

template <class F>
void pack_integer_gates(const void* w, int64_t K, int64_t H, void* packed, int64_t first,
                        int64_t last) {
  using Weight = IntegerWeight<F>;
  constexpr int64_t width = Vector<F>::kWidth;
  const GateLayout layout = gate_layout<float>(H);
  for (int64_t b = first; b < last; ++b) {
    const IntegerBlock<F> block(static_cast<char*>(packed) +
                                (b - first) * IntegerBlock<F>::bytes(K));
    std::memset(block.scales, 0, IntegerBlock<F>::bytes(K));
    for (int64_t column = 0; column < IntegerBlock<F>::kColumns; ++column) {
      const int64_t gate = column / width, unit = b * width + column % width;
      if (layout.dense ? column >= kGates * H : unit >= H) continue;
      const float* row =
          static_cast<const float*>(w) + (layout.dense ? column : gate * H + unit) * K;
      float most = 0;
      for (int64_t k = 0; k < K; ++k) {
        const float size = row[k] < 0 ? -row[k] : row[k];
        most = is_number(most) && !(size <= most) ? size : most;
      }
      const Scale scale(most, kWeightLevels);
      block.scales[column] = scale.scale;
      if (!is_number(most)) continue;
      int32_t sum = 0;
      for (int64_t k = 0; k < K; ++k) {
        const auto q = static_cast<int32_t>(__builtin_nearbyintf(row[k] * scale.inverse));
        sum += q;
        block.weights[k / Weight::kDepth * IntegerBlock<F>::kColumns + column]
            .k[k % Weight::kDepth] = static_cast<int8_t>(q);
      }
      block.corrections[column] = -Weight::kOffset * sum;
    }
  }
}

// Rows as they are multiplied: their scale, then their factors, as many as whole vectors hold.
template <class F>
struct IntegerRows {
  static constexpr int64_t kHeader = 16;  // bytes

  static int64_t bytes(int64_t K) {
    constexpr int64_t width = Vector<float>::kWidth;
    return kHeader +
           blocks(K, width) * width / IntegerWeight<F>::kDepth * static_cast<int64_t>(sizeof(F));
  }
};

// To the nearest, ties to even, as everywhere: an addition and a multiplication that become one
// would round otherwise.
LSTM_EXT_INLINE Int32s nearest(Floats v) {
#if LSTM_EXT_VECTOR_BYTES == 64
  return bit_cast<Int32s>(_mm512_maskz_cvtps_epi32(0xffff, bit_cast<__m512>(v)));
#elif LSTM_EXT_VECTOR_BYTES == 32
  return bit_cast<Int32s>(_mm256_cvtps_epi32(bit_cast<__m256>(v)));
#elif defined(__SSE2__)
  return bit_cast<Int32s>(_mm_cvtps_epi32(bit_cast<__m128>(v)));
#else
  Int32s q;
  for (int lane = 0; lane < Vector<float>::kWidth; ++lane)
    q[lane] = static_cast<int32_t>(__builtin_nearbyintf(v[lane]));
  return q;
#endif
}

template <class F>
LSTM_EXT_INLINE void store_integers(Int32s q, char* to) {
  if constexpr (std::is_same_v<F, Int16Pair>) {
    typedef int16_t Int16s __attribute__((vector_size(LSTM_EXT_VECTOR_BYTES / 2)));
    const Int16s narrow = __builtin_convertvector(q, Int16s);
    std::memcpy(to, &narrow, sizeof(narrow));
  } else {
    typedef uint8_t UInt8s __attribute__((vector_size(LSTM_EXT_VECTOR_BYTES / 4)));
    const UInt8s narrow =
        __builtin_convertvector(bit_cast<UInt32s>(q + IntegerWeight<F>::kOffset), UInt8s);
    std::memcpy(to, &narrow, sizeof(narrow));
  }
}

template <class F, class Activations>
void integer_rows(const void* x, int64_t rows, int64_t K, void* out) {
  constexpr int64_t width = Vector<float>::kWidth;
  const float* row = static_cast<const float*>(x);
  char* to = static_cast<char*>(out);
  const int32_t levels = Activations::levels(K);
  for (int64_t r = 0; r < rows; ++r, row += K, to += IntegerRows<F>::bytes(K)) {
    // Bits of numbers without their sign are in the numbers' order, with NaN beyond infinity.
    Int32s most = {};
    for (int64_t k = 0; k < K; k += width) {
      const Int32s bits = bit_cast<Int32s>(load(row + k, K - k)) & 0x7fffffff;
      most = bits > most ? bits : most;
    }
    int32_t greatest = 0;
    for (int lane = 0; lane < width; ++lane)
      greatest = most[lane] > greatest ? most[lane] : greatest;
    const Scale scale(bit_cast<float>(greatest), levels);
    std::memcpy(to, &scale.scale, sizeof(scale.scale));
    const bool numbers = is_number(scale.scale);
    for (int64_t k = 0; k < K; k += width) {
      const Floats v = load(row + k, K - k);
      store_integers<F>(numbers ? nearest(v * scale.inverse) : Int32s{},
                        to + IntegerRows<F>::kHeader +
                            k / IntegerWeight<F>::kDepth * static_cast<int64_t>(sizeof(F)));
    }
  }
}

// Where sums of integers go: scaled, = or +=.
struct ScaledSums {
  float* data;
  int64_t row_stride;
  bool accumulate;
  const char* rows;  // IntegerRows, for their scales
  int64_t row_bytes;
  const float* scales;
  const int32_t* corrections;

  LSTM_EXT_INLINE void skip_rows(int64_t count) {
    data += count * row_stride;
    rows += count * row_bytes;
  }
};
LSTM_EXT_INLINE void put(const ScaledSums& result, int r, int v, Int32s sum) {
  const int64_t column = v * Vector<float>::kWidth;
  float row_scale;
  std::memcpy(&row_scale, result.rows + r * result.row_bytes, sizeof(row_scale));
  const Floats scale = load(result.scales + column) * row_scale;
  const Floats whole = __builtin_convertvector(sum + load(result.corrections + column), Floats);
  float* to = result.data + r * result.row_stride + column;
  Floats scaled = apart(whole * scale);
  if (result.accumulate) scaled += load(to);
  store(to, scaled);
}

// A register tile: of 16 registers, fewer are left for the sums than the products of floats have.
constexpr int kIntegerTileRows = LSTM_EXT_VECTOR_BYTES == 64 ? kTileRows : 2;

// One row times blocks side by side, for more sums than one block has.
template <class F, int kSide>
void integer_row_product(const F* a, const void* packed, int64_t K, ScaledSums result,
                         int64_t result_apart) {
  const int64_t apart = IntegerBlock<F>::bytes(K), factors = IntegerBlock<F>::factors(K);
  const char* first = static_cast<const char*>(packed);
  Int32s sum[kSide][kPanelVectors] = {};
  const auto* b = IntegerBlock<F>(first).weights;
  for (int64_t k = 0; k < factors; ++k, b += IntegerBlock<F>::kColumns) {
    const Int32s a_k = broadcast(a[k]);
#pragma GCC unroll 4
    for (int side = 0; side < kSide; ++side) {
      const auto* block = reinterpret_cast<const IntegerWeight<F>*>(
          reinterpret_cast<const char*>(b) + side * apart);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v)
        sum[side][v] = multiply_add<F>(sum[side][v], a_k, load(block + v * Vector<F>::kWidth));
    }
  }
#pragma GCC unroll 4
  for (int side = 0; side < kSide; ++side) {
    const IntegerBlock<F> block(first + side * apart);
    result.scales = block.scales;
    result.corrections = block.corrections;
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) put(result, 0, v, sum[side][v]);
    result.data += result_apart;
  }
}

template <class F>
void integer_gate_product(const GateProductArgs& args, int64_t first_block, int64_t last_block) {
  constexpr int64_t stride = kGates * Vector<float>::kWidth;
  constexpr int kSide = LSTM_EXT_VECTOR_BYTES == 64 ? 4 : 2;
  const int64_t K = args.K, block_bytes = IntegerBlock<F>::bytes(K);
  const int64_t row_bytes = IntegerRows<F>::bytes(K), result_apart = args.sums.rows * stride;
  const int vectors = gate_layout<float>(args.H).vectors;
  const F* a =
      reinterpret_cast<const F*>(static_cast<const char*>(args.x) + IntegerRows<F>::kHeader);
  const char* packed = static_cast<const char*>(args.packed);
  ScaledSums result = {};
  result.data = static_cast<float*>(args.sums.data) +
                (first_block * args.sums.rows + args.first_row) * stride;
  result.row_stride = stride;
  result.accumulate = args.accumulate;
  result.rows = static_cast<const char*>(args.x);
  result.row_bytes = row_bytes;
  for (int64_t block = first_block; block < last_block;) {
    const bool side_by_side = args.rows == 1 && last_block - block >= kSide;
    const IntegerBlock<F> b(packed);
    result.scales = b.scales;
    result.corrections = b.corrections;
    if (side_by_side)
      integer_row_product<F, kSide>(a, packed, K, result, result_apart);
    else
      panel_product<F, kIntegerTileRows>(
          args.rows, Broadcast<F>{a, row_bytes / static_cast<int64_t>(sizeof(F)), 1}, b.weights,
          IntegerBlock<F>::factors(K), vectors, result);
    const int done = side_by_side ? kSide : 1;
    block += done;
    packed += done * block_bytes;
    result.data += done * result_apart;
  }
}

template <class F, class Activations>
constexpr WeightKernels integer_weights() {
  WeightKernels kernels = {};
  kernels.block_bytes = IntegerBlock<F>::bytes;
  kernels.row_bytes = IntegerRows<F>::bytes;
  kernels.pack_gates = pack_integer_gates<F>;
  kernels.make_rows = integer_rows<F, Activations>;
  kernels.gate_product = integer_gate_product<F>;
  return kernels;
}

}  // namespace
}  // namespace lstm_ext::cpu
