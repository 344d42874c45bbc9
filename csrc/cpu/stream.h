// The matrix product c = a * b where a has few rows or few columns, so that reading b (or writing
// c) once is what takes the time: whole rows of both pass by in order, nothing is packed.
//
//   sums[r, j] += sum over 8 k of a[r, k] * b[k, j]
//
// Eight rows of b at a time keep the running sums short and let eight loads share one load and
// store of the sums, which stay in the first-level cache.
#pragma once

#include "cpu/panel.h"
#include "cpu/product_kernels.h"

namespace lstm_ext::cpu {
namespace {

constexpr int kStreamGroup = 8;
// Rows of a that share the loads of b: as many as leave their 8 elements each in registers.
constexpr int kStreamShare = LSTM_EXT_VECTOR_BYTES == 64 ? 2 : 1;
constexpr int64_t kStreamRows = LSTM_EXT_STREAM_ROWS;    // few rows: up to this many
constexpr int64_t kStreamDepth = LSTM_EXT_STREAM_DEPTH;  // few columns of a: up to this many
constexpr int64_t kStreamSums = 4096;                    // partial results of a task

LSTM_EXT_INLINE bool streams(int64_t rows, int64_t depth) {
  return depth > 0 && (rows <= kStreamRows || depth <= kStreamDepth);
}

// How a product is cut: into columns where rows are few, else into rows, whole if they fit.
struct StreamBlock {
  int64_t rows, columns;
};
LSTM_EXT_INLINE StreamBlock stream_block(int64_t rows, int64_t columns) {
  if (rows <= kStreamRows) return {rows, at_most(1024, kStreamSums / rows)};
  columns = at_most(columns, kStreamSums / kStreamShare);
  return {at_most(64, kStreamSums / columns), columns};
}

// For one vector of columns, or the first n: what Depth rows of b add to Rows rows of sums. These
// are the scratch of a task, or c itself when one group is all there is.
template <class S, int Rows, int Depth, bool First>
LSTM_EXT_INLINE void stream_vector(const ComputeType<S> (&a)[Rows][kStreamGroup], const S* b,
                                   int64_t ldb, ComputeType<S>* sums, int64_t ld, int64_t n) {
  VectorOf<S> group[Rows] = {};
#pragma GCC unroll 8
  for (int k = 0; k < Depth; ++k) {
    const VectorOf<S> b_k = load(b + k * ldb, n);
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r) group[r] += a[r][k] * b_k;
  }
#pragma GCC unroll 2
  for (int r = 0; r < Rows; ++r) {
    if (!First) group[r] += load(sums + r * ld, n);
    store(sums + r * ld, group[r], n);
  }
}

template <class S, int Rows, int Depth, bool First>
void stream_group(const ComputeType<S>* a_0, int64_t a_row_stride, int64_t a_k_stride, const S* b,
                  int64_t ldb, int64_t columns, ComputeType<S>* sums, int64_t ld) {
  constexpr int width = kWidthOf<S>;
  ComputeType<S> a[Rows][kStreamGroup];
  for (int r = 0; r < Rows; ++r)
    for (int k = 0; k < Depth; ++k) a[r][k] = a_0[r * a_row_stride + k * a_k_stride];
  int64_t j = 0;
  for (; j + width <= columns; j += width)
    stream_vector<S, Rows, Depth, First>(a, b + j, ldb, sums + j, ld, width);
  if (j < columns) stream_vector<S, Rows, Depth, First>(a, b + j, ldb, sums + j, ld, columns - j);
}

// The depths 1 .. 8: the last group may be a short one.
template <class S, int Rows, bool First, int Depth = kStreamGroup>
LSTM_EXT_INLINE void stream_depth(int64_t depth, const ComputeType<S>* a, int64_t a_row_stride,
                                  int64_t a_k_stride, const S* b, int64_t ldb, int64_t columns,
                                  ComputeType<S>* sums, int64_t ld) {
  if constexpr (Depth > 0) {
    if (depth == Depth)
      stream_group<S, Rows, Depth, First>(a, a_row_stride, a_k_stride, b, ldb, columns, sums, ld);
    else
      stream_depth<S, Rows, First, Depth - 1>(depth, a, a_row_stride, a_k_stride, b, ldb, columns,
                                              sums, ld);
  }
}

template <class S, bool First>
void stream_rows(const ProductArgs& args, int64_t row, int64_t rows, int64_t k, int64_t column,
                 int64_t columns, ComputeType<S>* sums, int64_t ld) {
  using T = ComputeType<S>;
  const int64_t depth = at_most(kStreamGroup, args.depth - k), stride = args.a_row_stride;
  const T* a = static_cast<const T*>(args.a) + row * stride + k * args.a_k_stride;
  const S* b = static_cast<const S*>(args.b) + k * args.columns + column;
  int64_t r = 0;
  for (; r + kStreamShare <= rows; r += kStreamShare)
    stream_depth<S, kStreamShare, First>(depth, a + r * stride, stride, args.a_k_stride, b,
                                         args.columns, columns, sums + r * ld, ld);
  for (; r < rows; ++r)
    stream_depth<S, 1, First>(depth, a + r * stride, stride, args.a_k_stride, b, args.columns,
                              columns, sums + r * ld, ld);
}

template <class S>
void stream_task(const ProductArgs& args, int64_t row, int64_t rows, int64_t column,
                 int64_t columns) {
  using T = ComputeType<S>;
  S* c = static_cast<S*>(args.c) + row * args.columns + column;
  // Not in 16 bits, for the same reason as in product.h.
  if constexpr (std::is_same_v<S, T>)
    if (args.depth <= kStreamGroup) {
      if (args.accumulate)
        stream_rows<S, false>(args, row, rows, 0, column, columns, c, args.columns);
      else
        stream_rows<S, true>(args, row, rows, 0, column, columns, c, args.columns);
      return;
    }
  alignas(64) T sums[kStreamSums];
  stream_rows<S, true>(args, row, rows, 0, column, columns, sums, columns);
  for (int64_t k = kStreamGroup; k < args.depth; k += kStreamGroup)
    stream_rows<S, false>(args, row, rows, k, column, columns, sums, columns);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; j += kWidthOf<S>)
      store_result(c + r * args.columns + j, load(sums + r * columns + j, columns - j), columns - j,
                   args.accumulate);
}

}  // namespace
}  // namespace lstm_ext::cpu
