// The matrix product under every large cell: rows of A, broadcast element by element, times a
// panel of B four vectors wide, summed in registers.
//
//   sums[r][v] += sum_k A[r, k] * B[k, v]        v = 0..3, each a vector
//
// The four vectors are the gates i, f, g, o of one vector of hidden units in the forward, and
// 4 * width neighbouring columns in the backward products. Each result is summed over k in
// order, kPanelDepth at a time, whatever the tile: it depends neither on the number of rows nor on
// threads.
#pragma once

#include "cpu/factors.h"

namespace lstm_ext::cpu {
namespace {

constexpr int kTileRows = LSTM_EXT_TILE_ROWS;
constexpr int kPanelVectors = 4;
// k per panel. Small enough for the first-level cache (16 KiB with 512-bit vectors), and so that
// long sums are made of short ones: half the rounding error of one running sum over k = 256.
constexpr int kPanelDepth = 64;
constexpr int kPanelRows = 192;  // rows of A that share a panel; a multiple of every kTileRows

LSTM_EXT_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
LSTM_EXT_INLINE int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Rows in blocks that share a panel, as even as whole tiles allow.
struct RowBlocks {
  int64_t count, rows;
};
LSTM_EXT_INLINE RowBlocks row_blocks(int64_t rows) {
  const int64_t count = blocks(rows, kPanelRows);
  return {count, count ? blocks(blocks(rows, count), kTileRows) * kTileRows : 0};
}

template <class F>  // of factors
struct Panel {
  static constexpr int kWidth = Vector<F>::kWidth;
  static constexpr int kColumns = kPanelVectors * kWidth;

  alignas(64) F b[kPanelDepth][kPanelVectors][kWidth];
  alignas(64) SumTypeOf<F> sums[kPanelRows][kPanelVectors][kWidth];
};
// k's per panel
template <class S>
constexpr int64_t kPanelStep = kPanelDepth * kDepthOfFactor<S>;

// A: factor [r, k] lies at data[r * row_stride + k * k_stride].
template <class F>
struct Broadcast {
  const F* data;
  int64_t row_stride, k_stride;
};

// Where a product goes: element [r, j] = or += at data[r * row_stride + j]; its columns may end
// within the four vectors.
template <class S>
struct Result {
  S* data;
  int64_t row_stride, columns;
  bool accumulate;

  LSTM_EXT_INLINE void skip_rows(int64_t rows) { data += rows * row_stride; }
};
// The v'th vector of row r.
template <class S, class V>
LSTM_EXT_INLINE void put(const Result<S>& result, int r, int v, V sum) {
  constexpr int width = kWidthOf<S>;
  const int64_t n = result.columns - v * width;
  if (n > 0)
    store_result(result.data + r * result.row_stride + v * width, sum, n, result.accumulate);
}
// The panel's own sums, to be replaced (first) or added to.
template <class F>
LSTM_EXT_INLINE Result<SumTypeOf<F>> panel_sums(Panel<F>& panel, bool first) {
  return {panel.sums[0][0], Panel<F>::kColumns, Panel<F>::kColumns, !first};
}

// Vectors of the four that a tile computes: fewer for matrices of few columns, with more rows.
// B is stored as factors, or as E, which load makes factors of (weight_types.h).
template <int Rows, int Vectors, class F, class E, class To>
LSTM_EXT_INLINE void tile_product(const Broadcast<F>& a, const E* b, int64_t depth,
                                  const To& result) {
  using V = typename Vector<F>::type;
  typename Vector<SumTypeOf<F>>::type sum[Rows][Vectors] = {};
  const F* a_k = a.data;
  for (int64_t k = 0; k < depth; ++k, a_k += a.k_stride, b += Panel<F>::kColumns) {
    V b_k[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) b_k[v] = load(b + v * Vector<F>::kWidth);
#pragma GCC unroll 32
    for (int r = 0; r < Rows; ++r) {
      const V a_rk = broadcast(a_k[r * a.row_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] = multiply_add<F>(sum[r][v], a_rk, b_k[v]);
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) put(result, r, v, sum[r][v]);
}

// Whole tiles first, then ever smaller ones for the rows left over.
template <int Rows, int Vectors, class F, class E, class To>
LSTM_EXT_INLINE void tiles(int64_t rows, Broadcast<F> a, const E* b, int64_t depth, To result) {
  for (; rows >= Rows; rows -= Rows) {
    tile_product<Rows, Vectors>(a, b, depth, result);
    a.data += Rows * a.row_stride;
    result.skip_rows(Rows);
  }
  if constexpr (Rows > 1)
    tiles<(Rows > 6 ? Rows / 2 : Rows - 1), Vectors>(rows, a, b, depth, result);
}

// result [rows, 4 vectors] = or += A [rows, depth] * B [depth, 4 vectors], depth in factors. Only
// the first `vectors` of the four are wanted.
template <class F, int TileRows = kTileRows, class E, class To>
void panel_product(int64_t rows, const Broadcast<F>& a, const E* b, int64_t depth, int vectors,
                   const To& result) {
  if (vectors == 1)
    tiles<4 * TileRows, 1>(rows, a, b, depth, result);
  else if (vectors == 2)
    tiles<2 * TileRows, 2>(rows, a, b, depth, result);
  else
    tiles<TileRows, kPanelVectors>(rows, a, b, depth, result);
}

// rows[i][j] <-> rows[j][i], by log2(width) rounds of perfect shuffles.
template <class V, int Width>
LSTM_EXT_INLINE void transpose(V (&rows)[Width]) {
#pragma GCC unroll 4
  for (int round = 1; round < Width; round *= 2) {
    V next[Width];
#pragma GCC unroll 8
    for (int i = 0; i < Width / 2; ++i) {
      next[2 * i] = interleave_lower(rows[i], rows[i + Width / 2]);
      next[2 * i + 1] = interleave_upper(rows[i], rows[i + Width / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Width; ++i) rows[i] = next[i];
  }
}

// Panel of the transposed: b[k][v][lane] = w[v * vector_stride + lane * ldw + k] for the first
// lanes_of[v] lanes, zero in the others. Returns its depth in factors.
template <class S, class E>
int64_t pack_transposed(const S* w, int64_t ldw, int64_t vector_stride,
                        const int64_t (&lanes_of)[kPanelVectors], int64_t depth,
                        E (*b)[kPanelVectors][kWidthOf<S>]) {
  constexpr int width = kWidthOf<S>, per_factor = kDepthOfFactor<S>;
  const int64_t factors = blocks(depth, per_factor);
  for (int v = 0; v < kPanelVectors; ++v, w += vector_stride) {
    const int64_t lanes = lanes_of[v];
    for (int64_t k = 0; k < factors; k += width) {
      const S* column = w + k * per_factor;
      const int64_t n = at_most(width * per_factor, depth - k * per_factor);
      FactorVectorOf<S> rows[width];
#pragma GCC unroll 16
      for (int lane = 0; lane < width; ++lane)
        rows[lane] = load_factors<S>(column + lane * ldw, lane < lanes ? n : 0);
      transpose(rows);
      if (k + width <= factors) {
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) store(b[k + i][v], rows[i]);
      } else {
        for (int i = 0; k + i < factors; ++i) store(b[k + i][v], rows[i]);
      }
    }
  }
  return factors;
}

// Factors of one vector of columns: those of row k, or of rows k and k + 1.
template <class S>
LSTM_EXT_INLINE FactorVectorOf<S> column_factors(const S* row, int64_t ldm, int64_t rows_left,
                                                 int64_t n) {
  if constexpr (kPaired<S>) {
    const UInt32s low = bit_cast<UInt32s>(load(row, n)) >> 16;
    return rows_left > 1 ? low | bit_cast<UInt32s>(load(row + ldm, n)) : low;
  } else {
    return load(row, n);
  }
}

// Panel of neighbouring columns: b[k][v][lane] = m[k * ldm + v * width + lane], zero beyond
// `columns`.
template <class S>
void pack_columns(const S* m, int64_t ldm, int64_t columns, int64_t depth,
                  FactorType<S> (*b)[kPanelVectors][kWidthOf<S>]) {
  constexpr int width = kWidthOf<S>, per_factor = kDepthOfFactor<S>;
  int64_t factors = 0;
  for (int64_t k = 0; k < depth; k += per_factor, m += per_factor * ldm, ++factors)
    for (int v = 0; v < kPanelVectors; ++v) {
      const int64_t left = columns - v * width;
      store(b[factors][v], left > 0 ? column_factors(m + v * width, ldm, depth - k, left)
                                    : zeros<FactorVectorOf<S>>());
    }
}

}  // namespace
}  // namespace lstm_ext::cpu
