// The matrix product c = a * b where a has few rows or few columns, so that reading b (or writing
// c) once is what takes the time: whole rows of both pass by in order, nothing is packed.
//
//   c[r, j] += sum over 8 k of a[r, k] * b[k, j]
//
// Eight rows of b at a time keep the sums short and let eight loads share one load and store of c.
#pragma once

#include "cpu/cell_kernels.h"
#include "cpu/panel.h"

namespace lstm_ext::cpu {
namespace {

constexpr int kStreamDepth = 8;
constexpr int64_t kStreamRows = LSTM_EXT_STREAM_ROWS;  // few rows: up to this many
constexpr int64_t kStreamSums = 4096;    // partial results kept in the first-level cache
constexpr int64_t kStreamRowBlock = 64;  // rows of a task when the columns of a are few

LSTM_EXT_INLINE bool streams(int64_t rows, int64_t depth) {
  return depth > 0 && (rows <= kStreamRows || depth <= kStreamDepth);
}

// How a product is cut: by columns where rows are few, by rows where the depth is small.
struct StreamBlock {
  int64_t rows, columns;
};
LSTM_EXT_INLINE StreamBlock stream_block(int64_t rows, int64_t depth, int64_t columns) {
  if (depth <= kStreamDepth) return {kStreamRowBlock, columns};
  return {rows, at_most(1024, kStreamSums / rows)};
}

// out[j] = or += sum_k a[k] * b[k][j] for one vector of columns, or the first n of them.
template <class S, int Depth, bool First>
LSTM_EXT_INLINE VectorOf<S> stream_step(const ComputeType<S> (&a)[kStreamDepth], const S* b,
                                        int64_t ldb, VectorOf<S> sum, int64_t n) {
  VectorOf<S> group = zeros<VectorOf<S>>();
#pragma GCC unroll 8
  for (int k = 0; k < Depth; ++k) group += a[k] * load(b + k * ldb, n);
  return First ? group : sum + group;
}

// One row of a times Depth rows of b into a row of c.
template <class S, class Out, int Depth, bool First>
LSTM_EXT_INLINE void stream_row(const ComputeType<S> (&a)[kStreamDepth], const S* b, int64_t ldb,
                                int64_t columns, Out* out) {
  constexpr int width = kWidthOf<S>;
  using V = VectorOf<S>;
  int64_t j = 0;
  for (; j + width <= columns; j += width) {
    const V sum = First ? zeros<V>() : V(load(out + j));
    store(out + j, stream_step<S, Depth, First>(a, b + j, ldb, sum, width));
  }
  if (j < columns) {
    const V sum = First ? zeros<V>() : V(load(out + j, columns - j));
    store(out + j, stream_step<S, Depth, First>(a, b + j, ldb, sum, columns - j), columns - j);
  }
}

// The depths 1 .. kStreamDepth of the last group.
template <class S, class Out, bool First, int Depth = kStreamDepth>
LSTM_EXT_INLINE void stream_group(int64_t depth, const ComputeType<S> (&a)[kStreamDepth],
                                  const S* b, int64_t ldb, int64_t columns, Out* out) {
  if constexpr (Depth > 0) {
    if (depth == Depth)
      stream_row<S, Out, Depth, First>(a, b, ldb, columns, out);
    else
      stream_group<S, Out, First, Depth - 1>(depth, a, b, ldb, columns, out);
  }
}

template <class S, class Out, bool First>
void stream_rows(const ProductArgs& args, int64_t row, int64_t rows, int64_t k, int64_t column,
                 int64_t columns, Out* out, int64_t ldo) {
  using T = ComputeType<S>;
  const int64_t depth = at_most(kStreamDepth, args.depth - k);
  const T* a = static_cast<const T*>(args.a) + row * args.a_row_stride + k * args.a_k_stride;
  const S* b = static_cast<const S*>(args.b) + k * args.columns + column;
  for (int64_t r = 0; r < rows; ++r, a += args.a_row_stride, out += ldo) {
    T a_r[kStreamDepth];
    for (int64_t i = 0; i < depth; ++i) a_r[i] = a[i * args.a_k_stride];
    stream_group<S, Out, First>(depth, a_r, b, args.columns, columns, out);
  }
}

template <class S>
void stream_task(const ProductArgs& args, int64_t row, int64_t rows, int64_t column,
                 int64_t columns) {
  using T = ComputeType<S>;
  S* c = static_cast<S*>(args.c) + row * args.columns + column;
  if (args.depth <= kStreamDepth) {
    if (args.accumulate)
      stream_rows<S, S, false>(args, row, rows, 0, column, columns, c, args.columns);
    else
      stream_rows<S, S, true>(args, row, rows, 0, column, columns, c, args.columns);
    return;
  }
  alignas(64) T sums[kStreamSums];
  stream_rows<S, T, true>(args, row, rows, 0, column, columns, sums, columns);
  for (int64_t k = kStreamDepth; k < args.depth; k += kStreamDepth)
    stream_rows<S, T, false>(args, row, rows, k, column, columns, sums, columns);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; j += kWidthOf<S>)
      store_result(c + r * args.columns + j, load(sums + r * columns + j, columns - j), columns - j,
                   args.accumulate);
}

}  // namespace
}  // namespace lstm_ext::cpu
