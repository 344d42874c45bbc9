// Forward of an LSTM layer, over weights packed as the panels of panel.h.
#pragma once

#include "cpu/cell_finish.h"
#include "cpu/layer_kernels.h"
#include "cpu/panel.h"
#include "cpu/weight_types.h"

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

template <class S, class W>
int64_t block_bytes(int64_t K) {
  return block_size<S>(K) * static_cast<int64_t>(sizeof(typename W::Element));
}

// A packed block as pack_transposed and pack_columns write it.
template <class S, class E = FactorType<S>>
using PackedRows = E (*)[kPanelVectors][kWidthOf<S>];

template <class S, class W>
void pack_gates(const void* w, int64_t K, int64_t H, void* packed, int64_t first, int64_t last) {
  using Element = typename W::Element;
  const GateLayout layout = gate_layout<S>(H);
  for (int64_t block = first; block < last; ++block) {
    const int64_t unit = block * kWidthOf<S>;
    int64_t lanes[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v)
      lanes[v] = at_most(kWidthOf<S>, layout.dense ? kGates * H - v * kWidthOf<S> : H - unit);
    pack_transposed<S>(static_cast<const S*>(w) + unit * K, K, (layout.dense ? kWidthOf<S> : H) * K,
                       lanes, K,
                       reinterpret_cast<PackedRows<S, Element>>(
                           static_cast<Element*>(packed) + (block - first) * block_size<S>(K)));
  }
}

// One row times several panels side by side: more streams of weights to fetch ahead, and more sums
// to cover the latency of FMA. The panels are of neighbouring blocks (ByBlock), whose results lie
// result_apart from each other, or follow each other in depth and are added up in that order:
// either way each result is summed as if one panel came after the other.
constexpr int kSidePanels = LSTM_EXT_VECTOR_BYTES == 64 ? 4 : 2;
static_assert(kSideBlocks % kSidePanels == 0);

template <bool ByBlock, class F, class E, class R>
void side_panels(const F* a, const E* b, int64_t apart, int64_t depth, const Result<R>& result,
                 int64_t result_apart) {
  constexpr int width = Vector<F>::kWidth;
  using V = typename Vector<SumTypeOf<F>>::type;
  V sum[kSidePanels][kPanelVectors] = {};
  for (int64_t k = 0; k < depth; ++k, ++a, b += Panel<F>::kColumns)
#pragma GCC unroll 4
    for (int p = 0; p < kSidePanels; ++p) {
      const auto a_k = broadcast(a[ByBlock ? 0 : p * depth]);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v)
        sum[p][v] = multiply_add<F>(sum[p][v], a_k, load(b + p * apart + v * width));
    }
#pragma GCC unroll 4
  for (int p = 0; p < kSidePanels; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      const int column = (ByBlock ? p * kPanelVectors : 0) + v;
      const int64_t n = result.columns - column * width;
      if (n > 0)
        store_result(result.data + (ByBlock ? p * result_apart : 0) + v * width, sum[p][v], n,
                     result.accumulate || (!ByBlock && p > 0));
    }
}

// Several packed blocks and what multiplies them.
template <class S, class R, class E>
struct PackedProduct {
  int64_t rows, K;
  const FactorType<S>* a;  // [rows, K] as factors
  const E* b;              // the first block
  Result<R> result;        // of the first block; its columns are those of all blocks
  int64_t result_apart;    // from one block's result to the next one's
};

// A single row, as many blocks as lie side by side.
template <class S, class R, class E>
LSTM_EXT_INLINE void row_product(const PackedProduct<S, R, E>& product) {
  const int64_t factors = blocks(product.K, kDepthOfFactor<S>);
  Result<R> result = product.result;
  for (int64_t k = 0; k < factors; k += kPanelDepth) {
    side_panels<true>(product.a + k, product.b + k * Panel<FactorType<S>>::kColumns,
                      block_size<S>(product.K), at_most(kPanelDepth, factors - k), result,
                      product.result_apart);
    result.accumulate = true;
  }
}

// One block.
template <class S, class R, class E>
LSTM_EXT_INLINE void block_product(const PackedProduct<S, R, E>& product) {
  constexpr int64_t columns = Panel<FactorType<S>>::kColumns;
  const int64_t rows = product.rows, factors = blocks(product.K, kDepthOfFactor<S>);
  const int vectors =
      static_cast<int>(at_most(kPanelVectors, blocks(product.result.columns, kWidthOf<S>)));
  for (int64_t row = 0; row < rows; row += kPanelRows) {
    Result<R> part = product.result;
    part.data += row * part.row_stride;
    int64_t k = 0;
    if (rows == 1)
      for (; k + kSidePanels * kPanelDepth <= factors; k += kSidePanels * kPanelDepth) {
        side_panels<false>(product.a + k, product.b + k * columns, kPanelDepth * columns,
                           kPanelDepth, part, 0);
        part.accumulate = true;
      }
    while (k < factors) {
      panel_product(at_most(kPanelRows, rows - row),
                    Broadcast<FactorType<S>>{product.a + row * factors + k, factors, 1},
                    product.b + k * columns, at_most(kPanelDepth, factors - k), vectors, part);
      part.accumulate = true;
      k += kPanelDepth;
    }
  }
}

// The results of `count` blocks = or += a times each.
template <class S, class R, class E>
LSTM_EXT_INLINE void packed_product(PackedProduct<S, R, E> product, int64_t count) {
  while (count > 0) {
    const bool side_by_side = product.rows == 1 && count >= kSidePanels;
    if (side_by_side)
      row_product(product);
    else
      block_product(product);
    const int64_t done = side_by_side ? kSidePanels : 1;
    count -= done;
    product.b += done * block_size<S>(product.K);
    product.result.data += done * product.result_apart;
    product.result.columns -= done * Panel<FactorType<S>>::kColumns;
  }
}

template <class S>
LSTM_EXT_INLINE ComputeType<S>* block_sums_of(const GateSums& sums, int64_t block, int64_t row) {
  return static_cast<ComputeType<S>*>(sums.data) + (block * sums.rows + row) * kGates * kWidthOf<S>;
}

template <class S, class W>
void gate_product(const GateProductArgs& args, int64_t first_block, int64_t last_block) {
  using Element = typename W::Element;
  constexpr int64_t stride = kGates * kWidthOf<S>;
  const int64_t count = last_block - first_block;
  // Fewer than the four vectors only where one block is all.
  const int64_t columns = (count - 1) * stride + gate_layout<S>(args.H).vectors * kWidthOf<S>;
  packed_product<S>(
      PackedProduct<S, ComputeType<S>, Element>{
          args.rows,
          args.K,
          static_cast<const FactorType<S>*>(args.x),
          static_cast<const Element*>(args.packed),
          {block_sums_of<S>(args.sums, first_block, args.first_row), stride, columns,
           args.accumulate},
          args.sums.rows * stride},
      count);
}

template <class S>
void step(const StepArgs& args, int64_t first_block, int64_t last_block) {
  const int64_t H = args.H;
  CellRows<S> cells = {};
  cells.H = H;
  cells.b_ih = static_cast<const S*>(args.b_ih);
  cells.b_hh = static_cast<const S*>(args.b_hh);
  cells.cell = args.cell;
  cells.cx = static_cast<const S*>(args.c);
  cells.cy = static_cast<S*>(args.c);
  cells.hy = static_cast<S*>(args.output);
  cells.h_factors = static_cast<FactorElement<S>*>(args.h_factors);
  cells.gates = static_cast<S*>(args.gates);
  cells.c_before = static_cast<S*>(args.c_before);
  cells.cells = static_cast<S*>(args.cells);
  cells.reset_next = args.reset_next;
  cells.reset_h = static_cast<const S*>(args.reset_h);
  cells.reset_c = static_cast<const S*>(args.reset_c);
  cells.projects = args.projects;
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t unit = block * kWidthOf<S>;
    finish_cells<S>(Cells(), cells, args.rows, unit,
                    static_cast<int>(at_most(kWidthOf<S>, H - unit)), gate_layout<S>(H).gate_stride,
                    block_sums_of<S>(args.sums, block, args.first_row));
  }
}

}  // namespace
}  // namespace lstm_ext::cpu
