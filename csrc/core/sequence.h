// The steps of a padded or packed sequence: their order, and where the rows of each lie.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/step_order.h"
#include "ops/layer.h"

namespace lstm_ext {

// The numbers of batch_sizes, dense: of the tensor that transforms of torch.func have wrapped.
at::Tensor plain_batch_sizes(const at::Tensor& batch_sizes);

// Rows of all steps, S of them, lie one step after the other in order of time; within a step, the
// longest sequences come first.
class Sequence {
 public:
  // in: as check_sequence finds it right.
  explicit Sequence(const LayerInputs& in);

  int64_t N() const { return N_; }
  int64_t L() const { return static_cast<int64_t>(offset_.size()) - 1; }
  int64_t S() const { return offset_.back(); }
  bool reverse() const { return reverse_; }
  int64_t rows(int64_t t) const { return offset_[t + 1] - offset_[t]; }
  int64_t offset(int64_t t) const { return offset_[t]; }
  const std::vector<int64_t>& offsets() const { return offset_; }  // L + 1, S at last
  int64_t time(int64_t step) const { return time_of_step(step, L(), reverse_); }
  // Of the rows at the time of a step, how many the step before had too. Those of the others begin
  // here, in reverse.
  int64_t rows_going_on(int64_t step) const {
    return step == 0 ? 0 : std::min(rows(time(step)), rows(time(step - 1)));
  }

  // The rows of time t, of a tensor with those of all steps.
  at::Tensor of(const at::Tensor& rows_of_all, int64_t t) const {
    return rows_of_all.narrow(0, offset(t), rows(t));
  }

 private:
  int64_t N_;
  bool reverse_;
  std::vector<int64_t> offset_;
};

}  // namespace lstm_ext
