// What the CPU kernels of matrix products take and how they are reached: raw pointers and sizes, no
// tensors. Every matrix is dense and row-major, unless strides are given.
#pragma once

#include <cstdint>

namespace lstm_ext::cpu {

enum class Dtype { kFloat, kDouble, kBFloat16, kHalf };
inline constexpr int kDtypes = 4;

// Sums are made in the "compute type": float for the two halves, else the dtype itself. The
// "factors" of the large products are in the compute type too, but for bfloat16 where the processor
// multiplies it: there a factor is two neighbouring k's, (0, 1), (2, 3), .., the last one padded
// with zero.
// c [rows, columns] = a [rows, depth] * b [depth, columns], or that added to c
struct ProductArgs {
  int64_t rows, columns, depth;
  // In the compute type, or in factors if packs(rows, depth): element [r, k] at
  // r * a_row_stride + k * a_k_stride.
  const void* a;
  int64_t a_row_stride, a_k_stride;
  const void* b;
  void* c;
  bool accumulate;
  int64_t threads;  // that will share the tasks
  // If packs(rows, depth) and factors are no pairs: rows of b from tail_row on lie here.
  const void* b_tail;
  int64_t tail_row;
};

// Work is cut into tasks, any range of which may run on any thread. No result depends on the number
// of threads.
struct ProductKernels {
  bool (*packs)(int64_t rows, int64_t depth);
  // If more than one, c is not the result: it takes as many terms of it [parts, rows, columns], in
  // the compute type, to be added up.
  int64_t (*parts)(int64_t rows, int64_t depth, int64_t columns);
  int64_t (*tasks)(const ProductArgs&);
  void (*run)(const ProductArgs&, int64_t first_task, int64_t last_task);
  // out [size] = or += the sum of parts [count, size], in the compute type, in a fixed order.
  void (*add_up)(const void* parts, int64_t count, int64_t size, void* out, bool accumulate);
  // Null unless factors are pairs. m [rows, columns] in the compute type, its rows two by two:
  // pairs [ceil(rows / 2), columns], of which those from first to last are written.
  void (*pair_rows)(const void* m, int64_t rows, int64_t columns, void* pairs, int64_t first,
                    int64_t last);
};

}  // namespace lstm_ext::cpu
