// What vnni_by_hand.cpp makes: kernels to be used with the others of AVX2.
#pragma once

#include "cpu/kernels.h"

namespace lstm_ext::cpu {
extern const WeightKernels kIntegersByHand[kIntegerTypes];
}  // namespace lstm_ext::cpu
