// How packed weights in floating point are stored, apart from the type of the activations that they
// multiply.
//
// A weight type for activations S is a struct with
//   Element   what a weight takes in memory; load(const Element*) makes a vector of factors of it,
//             store(Element*, factors) the other way (simd.h)
// What multiplies, sums and rounds is the same for all: the factors of S.
#pragma once

#include "cpu/layer_kernels.h"
#include "cpu/simd.h"

namespace lstm_ext::cpu {
namespace {

// As the products take them.
template <class S>
struct WholeWeights {
  using Element = FactorType<S>;
};

// Rounded to bfloat16, half the bytes, for activations in float.
template <class S>
struct BFloat16Weights {
  using Element = BFloat16;
};

template <class... W>
struct WeightTypes {};
// In the order of WeightType (layer_kernels.h).
template <class S>
struct WeightTypesOf {
  using Type = WeightTypes<WholeWeights<S>>;
};
template <>
struct WeightTypesOf<float> {
  using Type = WeightTypes<WholeWeights<float>, BFloat16Weights<float>>;
};

}  // namespace
}  // namespace lstm_ext::cpu
