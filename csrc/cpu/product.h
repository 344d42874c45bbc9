// Matrix products of a backward: how they are cut into tasks, and the tasks.
#pragma once

#include <cstring>

#include "cpu/panel.h"
#include "cpu/product_kernels.h"
#include "cpu/stream.h"

namespace lstm_ext::cpu {
namespace {

template <class S>
void add_up(const void* parts, int64_t count, int64_t size, void* out, bool accumulate) {
  const auto* terms = static_cast<const ComputeType<S>*>(parts);
  for (int64_t j = 0; j < size; j += kWidthOf<S>) {
    const int64_t n = at_most(kWidthOf<S>, size - j);
    // Four running sums: a quarter of the roundings in a row.
    VectorOf<S> sum[4] = {};
    for (int64_t part = 0; part < count; ++part) sum[part % 4] += load(terms + part * size + j, n);
    store_result(static_cast<S*>(out) + j, (sum[0] + sum[1]) + (sum[2] + sum[3]), n, accumulate);
  }
}

template <class S>
bool product_packs(int64_t rows, int64_t depth) {
  return !streams(rows, depth);
}

// How a packed product is cut: into blocks of rows, as even as whole tiles allow, groups of panels
// of columns, and, where that makes few tasks of great depth, parts of the depth, whose results are
// added up in the end. Threads decide about the groups alone, which no result depends on.
struct PanelPlan {
  RowBlocks rows;
  int64_t group, column_groups;  // panels of a group, and groups
  int64_t parts, part_depth;
};
constexpr int64_t kTasksWanted = 16;    // before the depth is cut
constexpr int64_t kTasksOfAThread = 4;  // before panels share the reading of A
constexpr int64_t kPanelGroup = 4;      // panels that do, at most
constexpr int64_t kPartPanels = 4;      // of depth, at least, in each part

// Panels of a group, so that there are still `tasks` of them, the groups as even as can be.
LSTM_EXT_INLINE int64_t panel_group(int64_t row_blocks, int64_t panels, int64_t tasks) {
  const int64_t group = at_most(row_blocks * panels / tasks, kPanelGroup);
  return group > 1 ? blocks(panels, blocks(panels, group)) : 1;
}

template <class S>
PanelPlan panel_plan(int64_t rows, int64_t depth, int64_t columns, int64_t threads) {
  PanelPlan plan;
  plan.rows = row_blocks(rows);
  const int64_t across = blocks(columns, Panel<FactorType<S>>::kColumns);
  plan.group = panel_group(plan.rows.count, across, kTasksOfAThread * threads);
  plan.column_groups = blocks(across, plan.group);
  const int64_t panels = depth > 0 ? blocks(depth, kPanelStep<S>) : 1;
  const int64_t tasks =
      plan.rows.count * blocks(across, panel_group(plan.rows.count, across, kTasksWanted));
  const int64_t most = at_most(panels / kPartPanels, kTasksWanted / tasks);
  const int64_t part_panels = most > 1 ? blocks(panels, most) : panels;
  plan.parts = blocks(panels, part_panels);
  plan.part_depth = part_panels * kPanelStep<S>;
  return plan;
}

template <class S>
int64_t product_parts(int64_t rows, int64_t depth, int64_t columns) {
  if (rows == 0 || columns == 0 || depth == 0 || streams(rows, depth)) return 1;
  return panel_plan<S>(rows, depth, columns, 1).parts;
}

template <class S>
int64_t product_tasks(const ProductArgs& args) {
  if (args.rows == 0 || args.columns == 0) return 0;
  if (streams(args.rows, args.depth)) {
    const StreamBlock block = stream_block(args.rows, args.columns);
    return blocks(args.rows, block.rows) * blocks(args.columns, block.columns);
  }
  const PanelPlan plan = panel_plan<S>(args.rows, args.depth, args.columns, args.threads);
  return plan.rows.count * plan.column_groups * plan.parts;
}

// What a task works with: a panel of B, a block of A if that is copied, and the sums of some
// panels.
template <class F>
struct ProductScratch {
  alignas(64) F b[kPanelDepth][kPanelVectors][Vector<F>::kWidth];
  alignas(64) F a[kPanelDepth][kPanelRows];
  alignas(64) SumTypeOf<F> sums[kPanelGroup][kPanelRows][Panel<F>::kColumns];
};

// A block of A for one panel: as it lies, or, if its rows are neighbours and every k is a page of
// its own, from a copy: the tiles would go through those pages once for every few rows.
template <class F>
LSTM_EXT_INLINE Broadcast<F> gather(const Broadcast<F>& a, int64_t rows, int64_t depth,
                                    F (*copy)[kPanelRows]) {
  constexpr int64_t kFar = 4096;
  if (a.row_stride != 1 || a.k_stride * static_cast<int64_t>(sizeof(F)) < kFar) return a;
  for (int64_t k = 0; k < depth; ++k)
    std::memcpy(copy[k], a.data + k * a.k_stride, rows * sizeof(F));
  return {copy[0], 1, kPanelRows};
}

// Panel of a product's b: rows from k on, which may go on in its tail.
template <class S>
LSTM_EXT_INLINE void pack_rows(const ProductArgs& args, int64_t k, int64_t depth, int64_t column,
                               int64_t columns,
                               FactorType<S> (*panel)[kPanelVectors][kWidthOf<S>]) {
  const int64_t ld = args.columns;
  const int64_t head = !args.b_tail        ? depth
                       : k < args.tail_row ? at_most(depth, args.tail_row - k)
                                           : 0;
  if (head > 0)
    pack_columns<S>(static_cast<const S*>(args.b) + k * ld + column, ld, columns, head, panel);
  if (head < depth)
    pack_columns<S>(static_cast<const S*>(args.b_tail) + (k + head - args.tail_row) * ld + column,
                    ld, columns, depth - head, panel + head);
}

// A task: one block of rows, a group of panels of columns, one part of the depth. All panels of the
// group take their turn before the next block of A is read.
template <class S>
void panel_task(const ProductArgs& args, const PanelPlan& plan, int64_t task,
                ProductScratch<FactorType<S>>& scratch) {
  using F = FactorType<S>;
  using T = ComputeType<S>;
  constexpr int64_t width = Panel<F>::kColumns;
  const int64_t part = task % plan.parts, block = task / plan.parts;
  const int64_t row = block % plan.rows.count * plan.rows.rows;
  const int64_t first_column = block / plan.rows.count * plan.group * width;
  const int64_t group_columns = at_most(plan.group * width, args.columns - first_column);
  const int64_t first_k = part * plan.part_depth;
  const int64_t end = at_most(first_k + plan.part_depth, args.depth);
  const int64_t rows = at_most(plan.rows.rows, args.rows - row);
  const F* a = static_cast<const F*>(args.a) + row * args.a_row_stride +
               first_k / kDepthOfFactor<S> * args.a_k_stride;
  const int64_t at = row * args.columns + first_column;
  S* c = static_cast<S*>(args.c) + at;
  // Not in 16 bits: tiles of their own for such results would be a fifth of the kernels' code.
  const bool one_panel = std::is_same_v<S, T> && plan.parts == 1 && args.depth <= kPanelStep<S>;
  int64_t k = first_k;
  do {  // once even without any depth: the result is zero then
    const int64_t depth_k = at_most(kPanelStep<S>, end - k);
    const int64_t depth = blocks(depth_k, kDepthOfFactor<S>);
    const Broadcast<F> left =
        gather<F>({a, args.a_row_stride, args.a_k_stride}, rows, depth, scratch.a);
    for (int64_t column = 0; column < group_columns; column += width) {
      const int64_t columns = at_most(width, group_columns - column);
      const int vectors = static_cast<int>(blocks(columns, kWidthOf<S>));
      pack_rows<S>(args, k, depth_k, first_column + column, columns, scratch.b);
      if constexpr (std::is_same_v<S, T>)
        if (one_panel) {
          panel_product(rows, left, scratch.b[0][0], depth, vectors,
                        Result<T>{c + column, args.columns, columns, args.accumulate});
          continue;
        }
      panel_product(rows, left, scratch.b[0][0], depth, vectors,
                    Result<T>{scratch.sums[column / width][0], width, width, k > first_k});
    }
    a += depth * args.a_k_stride;
    k += kPanelStep<S>;
  } while (k < end);
  if (one_panel) return;
  T* terms = static_cast<T*>(args.c) + part * args.rows * args.columns + at;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < group_columns; j += kWidthOf<S>) {
      const auto sum = load(&scratch.sums[j / width][r][j % width]);
      if (plan.parts > 1)
        store(terms + r * args.columns + j, sum, group_columns - j);
      else
        store_result(c + r * args.columns + j, sum, group_columns - j, args.accumulate);
    }
}

template <class S>
void product_panels(const ProductArgs& args, int64_t first_task, int64_t last_task) {
  const PanelPlan plan = panel_plan<S>(args.rows, args.depth, args.columns, args.threads);
  ProductScratch<FactorType<S>> scratch;
  for (int64_t task = first_task; task < last_task; ++task)
    panel_task<S>(args, plan, task, scratch);
}

template <class S>
void product(const ProductArgs& args, int64_t first_task, int64_t last_task) {
  if (first_task >= last_task) return;
  if (!streams(args.rows, args.depth)) return product_panels<S>(args, first_task, last_task);
  const StreamBlock block = stream_block(args.rows, args.columns);
  const int64_t row_blocks = blocks(args.rows, block.rows);
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t row = task % row_blocks * block.rows;
    const int64_t column = task / row_blocks * block.columns;
    stream_task<S>(args, row, at_most(block.rows, args.rows - row), column,
                   at_most(block.columns, args.columns - column));
  }
}

template <class S>
void pair_rows(const void* m, int64_t rows, int64_t columns, void* pairs, int64_t first,
               int64_t last) {
  const auto* row = static_cast<const ComputeType<S>*>(m) + 2 * first * columns;
  auto* out = static_cast<BFloat16Pair*>(pairs) + first * columns;
  for (int64_t pair = first; pair < last; ++pair, row += 2 * columns, out += columns)
    for (int64_t j = 0; j < columns; j += kWidthOf<S>) {
      const int64_t n = at_most(kWidthOf<S>, columns - j);
      const auto low = narrow(load(row + j, n), S{});
      const auto high = 2 * pair + 1 < rows ? narrow(load(row + columns + j, n), S{}) : UInt16s{};
      store(reinterpret_cast<float*>(out + j),
            bit_cast<Floats>(__builtin_convertvector(low, UInt32s) |
                             __builtin_convertvector(high, UInt32s) << 16),
            n);
    }
}

}  // namespace
}  // namespace lstm_ext::cpu
