#include "core/sequence.h"

namespace lstm_ext {

Sequence::Sequence(const LayerInputs& in) : N_(in.hx.size(0)), reverse_(in.reverse) {
  const bool packed = defined(in.batch_sizes);
  const int64_t L = packed ? in.batch_sizes->size(0) : in.input.size(0);
  const auto* sizes = packed ? in.batch_sizes->const_data_ptr<int64_t>() : nullptr;
  offset_.assign(L + 1, 0);
  for (int64_t t = 0; t < L; ++t)
    offset_[t + 1] = offset_[t] + (packed ? sizes[t * in.batch_sizes->stride(0)] : N_);
}

}  // namespace lstm_ext
