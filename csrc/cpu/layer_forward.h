// Forward of an LSTM layer, over weights packed as the panels of panel.h.
#pragma once

#include "cpu/cell_finish.h"
#include "cpu/layer_kernels.h"
#include "cpu/panel.h"

namespace lstm_ext::cpu {
namespace {

template <class S>
int64_t unit_blocks(int64_t H) {
  return blocks(H, kWidthOf<S>);
}

template <class S>
int64_t sums_per_row(int64_t H) {
  return unit_blocks<S>(H) * kGates * kWidthOf<S>;
}

// Elements of one block of packed weights, K deep.
template <class S>
LSTM_EXT_INLINE int64_t block_size(int64_t K) {
  return blocks(K, kDepthOfFactor<S>) * Panel<FactorType<S>>::kColumns;
}

template <class S>
int64_t packed_gates(int64_t K, int64_t H) {
  return unit_blocks<S>(H) * block_size<S>(K);
}

// A packed block as pack_transposed and pack_columns write it.
template <class S>
using PackedRows = FactorType<S> (*)[kPanelVectors][kWidthOf<S>];

template <class S>
void pack_gates(const void* w, int64_t K, int64_t H, void* packed, int64_t first, int64_t last) {
  const GateLayout layout = gate_layout<S>(H);
  for (int64_t block = first; block < last; ++block) {
    const int64_t unit = block * kWidthOf<S>;
    int64_t lanes[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v)
      lanes[v] = at_most(kWidthOf<S>, layout.dense ? kGates * H - v * kWidthOf<S> : H - unit);
    pack_transposed<S>(static_cast<const S*>(w) + unit * K, K, (layout.dense ? kWidthOf<S> : H) * K,
                       lanes, K,
                       reinterpret_cast<PackedRows<S>>(static_cast<FactorType<S>*>(packed) +
                                                       block * block_size<S>(K)));
  }
}

// One row times several panels side by side: more streams of weights to fetch ahead, and more sums
// to cover the latency of FMA. Added up as if one came after the other.
constexpr int kSidePanels = LSTM_EXT_VECTOR_BYTES == 64 ? 4 : 2;

template <class F, class R>
void side_panels(const F* a, const F* b, const Result<R>& result) {
  constexpr int width = Vector<F>::kWidth;
  constexpr int64_t apart = kPanelDepth * Panel<F>::kColumns;
  using V = typename Vector<SumTypeOf<F>>::type;
  V sum[kSidePanels][kPanelVectors] = {};
  for (int k = 0; k < kPanelDepth; ++k, ++a, b += Panel<F>::kColumns)
#pragma GCC unroll 4
    for (int p = 0; p < kSidePanels; ++p) {
      const auto a_k = broadcast(a[p * kPanelDepth]);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v)
        sum[p][v] = multiply_add<F>(sum[p][v], a_k, load(b + p * apart + v * width));
    }
#pragma GCC unroll 4
  for (int v = 0; v < kPanelVectors; ++v) {
    const int64_t n = result.columns - v * width;
    if (n <= 0) continue;
    V total = result.accumulate ? load(result.data + v * width, n) + sum[0][v] : sum[0][v];
    for (int p = 1; p < kSidePanels; ++p) total += sum[p][v];
    store(result.data + v * width, total, n);
  }
}

// result = or += a times a packed block, depth of K.
template <class S, class R>
LSTM_EXT_INLINE void packed_product(int64_t rows, const FactorType<S>* a, const FactorType<S>* b,
                                    int64_t K, int vectors, Result<R> result) {
  const int64_t factors = blocks(K, kDepthOfFactor<S>);
  for (int64_t row = 0; row < rows; row += kPanelRows) {
    Result<R> part = result;
    part.data += row * result.row_stride;
    int64_t k = 0;
    if (rows == 1)
      for (; k + kSidePanels * kPanelDepth <= factors; k += kSidePanels * kPanelDepth) {
        side_panels(a + k, b + k * Panel<FactorType<S>>::kColumns, part);
        part.accumulate = true;
      }
    while (k < factors) {
      panel_product(at_most(kPanelRows, rows - row),
                    Broadcast<FactorType<S>>{a + row * factors + k, factors, 1},
                    b + k * Panel<FactorType<S>>::kColumns, at_most(kPanelDepth, factors - k),
                    vectors, part);
      part.accumulate = true;
      k += kPanelDepth;
    }
  }
}

template <class S>
LSTM_EXT_INLINE ComputeType<S>* block_sums_of(const GateSums& sums, int64_t block, int64_t row) {
  return static_cast<ComputeType<S>*>(sums.data) + (block * sums.rows + row) * kGates * kWidthOf<S>;
}

template <class S>
void gate_product(const GateProductArgs& args, int64_t first_block, int64_t last_block) {
  constexpr int64_t stride = kGates * kWidthOf<S>;
  const int vectors = gate_layout<S>(args.H).vectors;
  for (int64_t block = first_block; block < last_block; ++block)
    packed_product<S>(
        args.rows, static_cast<const FactorType<S>*>(args.x),
        static_cast<const FactorType<S>*>(args.packed) + block * block_size<S>(args.K), args.K,
        vectors,
        Result<ComputeType<S>>{block_sums_of<S>(args.sums, block, args.first_row), stride, stride,
                               args.accumulate});
}

template <class S>
void step(const StepArgs& args, int64_t first_block, int64_t last_block) {
  const int64_t H = args.H;
  const CellRows<S> cells = {H,
                             static_cast<const S*>(args.b_ih),
                             static_cast<const S*>(args.b_hh),
                             static_cast<const S*>(args.c),
                             static_cast<S*>(args.c),
                             static_cast<S*>(args.output),
                             static_cast<FactorElement<S>*>(args.h_factors),
                             static_cast<S*>(args.gates),
                             static_cast<S*>(args.c_before),
                             args.reset_next};
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t unit = block * kWidthOf<S>;
    finish_cells<S>(cells, args.rows, unit, static_cast<int>(at_most(kWidthOf<S>, H - unit)),
                    gate_layout<S>(H).gate_stride,
                    block_sums_of<S>(args.sums, block, args.first_row));
  }
}

}  // namespace
}  // namespace lstm_ext::cpu
