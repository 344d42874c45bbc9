// What differs between the supported torch versions in how an autograd node is held: by
// std::shared_ptr, or in newer ones by c10::intrusive_ptr.
#pragma once

#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>

#include <memory>
#include <type_traits>

namespace lstm_ext {

using NodePtr = decltype(torch::autograd::Edge::function);

template <class T, class Pointer = NodePtr>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    // deleteNode is found by its argument: newer versions do not declare it.
    return std::shared_ptr<T>(new T(), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>();
  }
}

}  // namespace lstm_ext
