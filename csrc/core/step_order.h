// Which step comes when: for hosts and kernels alike.
#pragma once

#include <cstdint>

#include "core/cell_math.h"

namespace lstm_ext {

// The time of the step'th step of L to be computed.
LSTM_EXT_INLINE int64_t time_of_step(int64_t step, int64_t L, bool reverse) {
  return reverse ? L - 1 - step : step;
}

}  // namespace lstm_ext
