#include "core/sequence.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/select.h>

namespace lstm_ext {

at::Tensor plain_batch_sizes(const at::Tensor& batch_sizes) {
  if (batch_sizes.has_storage()) return batch_sizes.contiguous();
  // torch has no public header for what is wrapped: number by number.
  const int64_t L = batch_sizes.size(0);
  const at::Tensor plain = at::detail::empty_cpu({L}, at::dtype(at::kLong));
  for (int64_t t = 0; t < L; ++t)
    plain.mutable_data_ptr<int64_t>()[t] = batch_sizes.select(0, t).item<int64_t>();
  return plain;
}

Sequence::Sequence(const LayerInputs& in) : N_(in.hx.size(0)), reverse_(in.reverse) {
  const bool packed = defined(in.batch_sizes);
  const at::Tensor dense = packed ? plain_batch_sizes(*in.batch_sizes) : at::Tensor();
  const int64_t L = packed ? dense.size(0) : in.input.size(0);
  const auto* sizes = packed ? dense.const_data_ptr<int64_t>() : nullptr;
  offset_.assign(L + 1, 0);
  for (int64_t t = 0; t < L; ++t) offset_[t + 1] = offset_[t] + (packed ? sizes[t] : N_);
}

}  // namespace lstm_ext
