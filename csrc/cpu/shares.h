// How threads share the steps of a sequence.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/sequence.h"
#include "cpu/team.h"

namespace lstm_ext::cpu {

// Rows that a thread needs to go on its own; with fewer the halves of the weights pay more.
inline constexpr int64_t kRowsOfAThread = 24;
// The same where h is projected: a step is two meetings then, and has fewer weights.
inline constexpr int64_t kRowsOfAProjectingThread = 8;
// Multiplications and additions of a step below which threads are not worth their meeting: 64
// hidden units and one row still gain a quarter.
inline constexpr int64_t kSharedStepWork = 16 * 1024;

// A sequence, and what threads that share its rows ask of it.
class SharedSequence : public Sequence {
 public:
  explicit SharedSequence(const LayerInputs& in) : Sequence(in) {
    // Rows come in order of falling length.
    length_.assign(N(), L());
    if (defined(in.batch_sizes)) {
      int64_t t = L();
      for (int64_t row = 0; row < N(); ++row) {
        while (t > 0 && rows(t - 1) <= row) --t;
        length_[row] = t;
      }
    }
    if (defined(in.reset)) set_reset(*in.reset);
  }

  // Rows [N] of a step that start from zero, or null.
  const bool* reset(int64_t step) const {
    return reset_ && step < L() ? reset_.get() + time(step) * N() : nullptr;
  }
  // Of a state that resets set, [N, H] or [L, N, H]: the row with which those of a step begin.
  int64_t reset_row(const at::Tensor& state, int64_t step) const {
    return state.dim() == 3 ? time(step) * N() : 0;
  }
  // The step with which a row begins, and the time at which it ends.
  int64_t first_step(int64_t row) const { return reverse() ? L() - length(row) : 0; }
  int64_t last_time(int64_t row) const { return reverse() ? 0 : length(row) - 1; }
  int64_t length(int64_t row) const { return length_[row]; }

  // A place to cut the rows so that a part of all steps lies above it.
  int64_t row_at(int64_t part, int64_t parts) const {
    if (part == parts) return N();
    int64_t steps = 0, row = 0;
    for (; row < N() && steps * parts < part * S(); ++row) steps += length(row);
    return row;
  }

 private:
  // A copy that says nothing of rows which have no such step.
  void set_reset(const at::Tensor& reset) {
    const at::Tensor dense = reset.contiguous();
    reset_ = std::make_unique<bool[]>(L() * N());
    for (int64_t t = 0; t < L(); ++t)
      for (int64_t row = 0; row < rows(t); ++row)
        reset_[t * N() + row] = dense.const_data_ptr<bool>()[t * N() + row];
  }

  std::vector<int64_t> length_;
  std::unique_ptr<bool[]> reset_;
};

// What a thread has of the time loop: rows of every step, and blocks of the weights.
struct Share {
  int64_t row, row_end, block, block_end;

  int64_t rows(const SharedSequence& sequence, int64_t t) const {
    return std::min(sequence.rows(t), row_end) - row;
  }
};

// How the time loop is cut into shares: by rows, each with all blocks, or by blocks, each with all
// rows.
struct Cut {
  bool by_rows;
  int64_t shares, blocks;

  Cut(const SharedSequence& sequence, int64_t H, int64_t all_blocks,
      int64_t rows_of_a_thread = kRowsOfAThread)
      : blocks(all_blocks) {
    const int64_t N = sequence.N(), threads = team_size();
    const bool worth_it = N * 4 * H * (H + 16) >= kSharedStepWork;
    by_rows = N >= 2 * rows_of_a_thread || blocks < 2 || threads == 1;
    shares = !worth_it ? 1
             : by_rows ? std::clamp<int64_t>(N / rows_of_a_thread, 1, threads)
                       : std::min(threads, blocks);
  }

  // Whether every block is read by one thread alone, who may then pack it for itself.
  bool own_blocks() const { return !by_rows || shares == 1; }
  // The shares from first to last as one.
  Share share(const SharedSequence& sequence, int64_t first, int64_t last) const {
    if (by_rows) return {sequence.row_at(first, shares), sequence.row_at(last, shares), 0, blocks};
    return {0, sequence.N(), blocks * first / shares, blocks * last / shares};
  }
};

// body(from, to) for pieces of [first, last), the other way round every second time: what a step
// read last is still in the near cache when the next one begins.
template <class Body>
void zigzag(int64_t first, int64_t last, int64_t piece, bool backwards, const Body& body) {
  const int64_t pieces = (last - first + piece - 1) / piece;
  for (int64_t k = 0; k < pieces; ++k) {
    const int64_t from = first + piece * (backwards ? pieces - 1 - k : k);
    body(from, std::min(from + piece, last));
  }
}

}  // namespace lstm_ext::cpu
