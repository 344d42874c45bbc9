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

#include "cpu/simd.h"

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

template <class T>
struct Panel {
  static constexpr int kWidth = Vector<T>::kWidth;
  static constexpr int kColumns = kPanelVectors * kWidth;

  alignas(64) T b[kPanelDepth][kPanelVectors][kWidth];
  alignas(64) T sums[kPanelRows][kPanelVectors][kWidth];
};

// A in the compute type: element [r, k] lies at data[r * row_stride + k * k_stride].
template <class T>
struct Broadcast {
  const T* data;
  int64_t row_stride, k_stride;
};

// Vectors of the four that a tile computes: fewer for matrices of few columns, with more rows.
template <class T, int Rows, int Vectors>
LSTM_EXT_INLINE void tile_product(const Broadcast<T>& a, const T* b, int64_t depth,
                                  T (*sums)[kPanelVectors][Vector<T>::kWidth]) {
  using V = typename Vector<T>::type;
  V sum[Rows][Vectors] = {};
  const T* a_k = a.data;
  for (int64_t k = 0; k < depth; ++k, a_k += a.k_stride, b += Panel<T>::kColumns) {
    V b_k[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) b_k[v] = load(b + v * Vector<T>::kWidth);
#pragma GCC unroll 32
    for (int r = 0; r < Rows; ++r) {
      const T a_rk = a_k[r * a.row_stride];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] += a_rk * b_k[v];
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) store(sums[r][v], load(sums[r][v]) + sum[r][v]);
}

// Whole tiles first, then ever smaller ones for the rows left over.
template <class T, int Rows, int Vectors>
LSTM_EXT_INLINE void tiles(int64_t rows, Broadcast<T> a, const T* b, int64_t depth,
                           T (*sums)[kPanelVectors][Vector<T>::kWidth]) {
  for (; rows >= Rows; rows -= Rows, a.data += Rows * a.row_stride, sums += Rows)
    tile_product<T, Rows, Vectors>(a, b, depth, sums);
  if constexpr (Rows > 1)
    tiles<T, (Rows > 6 ? Rows / 2 : Rows - 1), Vectors>(rows, a, b, depth, sums);
}

// sums [rows][4] += A [rows, depth] * B [depth, 4 vectors], rows <= kPanelRows. Only the first
// `vectors` of the four are wanted.
template <class T>
void panel_product(int64_t rows, const Broadcast<T>& a, const Panel<T>& panel, int64_t depth,
                   int vectors, T (*sums)[kPanelVectors][Vector<T>::kWidth]) {
  const T* b = panel.b[0][0];
  if (vectors == 1)
    tiles<T, 4 * kTileRows, 1>(rows, a, b, depth, sums);
  else if (vectors == 2)
    tiles<T, 2 * kTileRows, 2>(rows, a, b, depth, sums);
  else
    tiles<T, kTileRows, kPanelVectors>(rows, a, b, depth, sums);
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
// lanes_of[v] lanes, zero in the others.
template <class S>
void pack_transposed(const S* w, int64_t ldw, int64_t vector_stride,
                     const int64_t (&lanes_of)[kPanelVectors], int64_t depth,
                     ComputeType<S> (*b)[kPanelVectors][kWidthOf<S>]) {
  using T = ComputeType<S>;
  constexpr int width = kWidthOf<S>;
  for (int v = 0; v < kPanelVectors; ++v, w += vector_stride) {
    const int64_t lanes = lanes_of[v];
    int64_t k = 0;
    if (lanes == width)
      for (; k + width <= depth; k += width) {
        VectorOf<S> rows[width];
#pragma GCC unroll 16
        for (int lane = 0; lane < width; ++lane) rows[lane] = load(w + lane * ldw + k);
        transpose(rows);
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) store(b[k + i][v], rows[i]);
      }
    for (; k < depth; ++k)
      for (int lane = 0; lane < width; ++lane)
        b[k][v][lane] = lane < lanes ? to_compute(w[lane * ldw + k]) : T(0);
  }
}

// Panel of neighbouring columns: b[k][v][lane] = m[k * ldm + v * width + lane], zero beyond
// `columns`.
template <class S>
void pack_columns(const S* m, int64_t ldm, int64_t columns, int64_t depth,
                  ComputeType<S> (*b)[kPanelVectors][kWidthOf<S>]) {
  constexpr int width = kWidthOf<S>;
  for (int64_t k = 0; k < depth; ++k, m += ldm)
    for (int v = 0; v < kPanelVectors; ++v) {
      const int64_t left = columns - v * width;
      store(b[k][v], left > 0 ? load(m + v * width, left) : zeros<VectorOf<S>>());
    }
}

}  // namespace
}  // namespace lstm_ext::cpu
