// Products over panels of a matrix's columns: the gradient of h in every layer, and where h is
// projected, the projection and its gradient.
#pragma once

#include "cpu/layer_forward.h"
#include "cpu/layer_kernels.h"

namespace lstm_ext::cpu {
namespace {

// The columns of some blocks.
struct PanelColumns {
  int64_t first, count;
};
template <class S>
LSTM_EXT_INLINE PanelColumns panel_columns(const ColumnPanels& panels, int64_t first_block,
                                           int64_t last_block) {
  const int64_t width = panels.vectors * kWidthOf<S>, first = first_block * width;
  return {first, at_most(last_block * width, panels.columns) - first};
}

// A block as pack_columns and pack_transposed write it.
template <class S>
LSTM_EXT_INLINE PackedRows<S> panel_at(const ColumnPanels& panels, void* packed, int64_t block) {
  return reinterpret_cast<PackedRows<S>>(static_cast<FactorType<S>*>(packed) +
                                         block * block_size<S>(panels.depth));
}

template <class S>
void pack_column_panels(const ColumnPanels& panels, const void* m, void* packed, int64_t first,
                        int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    const PanelColumns own = panel_columns<S>(panels, block, block + 1);
    pack_columns<S>(static_cast<const S*>(m) + own.first, panels.columns, own.count, panels.depth,
                    panel_at<S>(panels, packed, block - first));
  }
}

// m is the transpose, [columns, depth].
template <class S>
void pack_row_panels(const ColumnPanels& panels, const void* m, void* packed, int64_t first,
                     int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    const PanelColumns own = panel_columns<S>(panels, block, block + 1);
    int64_t lanes[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) lanes[v] = own.count - v * kWidthOf<S>;
    pack_transposed<S>(static_cast<const S*>(m) + own.first * panels.depth, panels.depth,
                       kWidthOf<S> * panels.depth, lanes, panels.depth,
                       panel_at<S>(panels, packed, block - first));
  }
}

// out [rows, columns] = x m, of some blocks' columns; x are factors, out is in the compute type,
// its rows out_stride apart.
template <class S>
LSTM_EXT_INLINE void column_product(const ColumnPanels& panels, int64_t rows, const void* x,
                                    const void* packed, void* out, int64_t out_stride,
                                    int64_t first_block, int64_t last_block) {
  using T = ComputeType<S>;
  using F = FactorType<S>;
  const PanelColumns own = panel_columns<S>(panels, first_block, last_block);
  PackedProduct<S, T, F> product = {
      rows,
      panels.depth,
      static_cast<const F*>(x),
      static_cast<const F*>(packed),
      {static_cast<T*>(out) + own.first, out_stride, own.count, false},
      Panel<F>::kColumns};
  if (panels.vectors == kPanelVectors) return packed_product<S>(product, last_block - first_block);
  const int64_t width = panels.vectors * kWidthOf<S>;
  for (int64_t left = own.count; left > 0; left -= width) {
    product.result.columns = at_most(width, left);
    packed_product<S>(product, 1);
    product.b += block_size<S>(panels.depth);
    product.result.data += width;
  }
}

template <class S>
void project(const ProjectionArgs& args, int64_t first_block, int64_t last_block) {
  using T = ComputeType<S>;
  const int64_t P = args.panels.columns, stride = factor_row<S>(P);
  const PanelColumns own = panel_columns<S>(args.panels, first_block, last_block);
  column_product<S>(args.panels, args.rows, args.r, args.packed, args.sums, P, first_block,
                    last_block);
  for (int64_t r = 0; r < args.rows; ++r) {
    const bool reset = args.reset_next && args.reset_next[r];
    for (int64_t j = 0; j < own.count; j += kWidthOf<S>) {
      const int64_t at = own.first + j, n = own.count - j;
      auto h = load(static_cast<const T*>(args.sums) + r * P + at, n);
      store(static_cast<S*>(args.output) + r * P + at, h, n);
      if (reset) h = zeros<VectorOf<S>>();
      store(static_cast<FactorElement<S>*>(args.h_factors) + r * stride + at, h, n);
    }
  }
}

template <class S>
void multiply_columns(const ColumnProductArgs& args, int64_t first_block, int64_t last_block) {
  column_product<S>(args.panels, args.rows, args.x, args.packed, args.out, args.out_stride,
                    first_block, last_block);
}

template <class S>
void output_gradient(const OutputGradientArgs& args, int64_t first_vector, int64_t last_vector) {
  using T = ComputeType<S>;
  const int64_t P = args.P, end = at_most(last_vector * kWidthOf<S>, P);
  for (int64_t r = 0; r < args.rows; ++r)
    for (int64_t j = first_vector * kWidthOf<S>; j < end; j += kWidthOf<S>) {
      const int64_t at = r * P + j, n = end - j;
      auto sum = load(static_cast<const T*>(args.grad_h) + at, n);
      if (args.grad_output) sum += load(static_cast<const S*>(args.grad_output) + at, n);
      store(static_cast<T*>(args.sum) + at, sum, n);
      if (args.factors) store(static_cast<S*>(args.factors) + r * factor_row<S>(P) + j, sum, n);
    }
}

}  // namespace
}  // namespace lstm_ext::cpu
