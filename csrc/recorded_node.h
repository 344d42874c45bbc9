// What the cell's and the layer's node of the autograd graph have in common: the tensors that they
// keep, and how compiled autograd records a call of theirs instead of making it.
#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <mutex>
#include <optional>
#include <string>
#include <typeinfo>
#include <vector>

#include "autograd_inputs.h"
#include "ops.h"

namespace lstm_ext {

// Derived has
//   static variable_list gradients(const variable_list& grads, const Kept& kept,
//                                  CellGradientMask mask, bool reverse);
// with the gradients of the kCellInputs inputs, which are the first tensors kept.
template <class Derived, size_t kKept>
struct RecordedNode : public torch::autograd::Node {
  using variable_list = torch::autograd::variable_list;
  using Kept = std::array<std::optional<at::Tensor>, kKept>;

  std::array<torch::autograd::SavedVariable, kKept> saved;
  // b_ih and b_hh themselves, beside the saved ones that notice a change in place: only a graph of
  // the backward depends on what is in them, and torch's modules let them change before.
  std::array<at::Tensor, 2> biases;
  bool reverse = false;

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
    for (auto& bias : biases) bias.reset();
  }

  Kept unpack() const {
    const bool checked = at::GradMode::is_enabled();
    Kept kept;
    for (size_t k = 0; k < kKept; ++k) {
      const bool bias = k == kFirstBias || k == kFirstBias + 1;
      kept[k] = or_none(bias && !checked ? biases[k - kFirstBias] : saved[k].unpack());
    }
    return kept;
  }

  CellGradientMask wanted() const {
    CellGradientMask mask;
    for (int k = 0; k < kCellInputs; ++k) mask[k] = task_should_compute_output(k);
    return mask;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const auto& variable : saved) args.collect(variable, /*is_output=*/false);
    args.collect(reverse);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    for (auto& variable : saved) swap.before(variable);
    Kept kept;
    for (size_t k = 0; k < kKept; ++k) kept[k] = or_none(saved[k].unpack());
    PackedArgs args;
    args.pack(KeptList(kept.begin(), kept.end()));
    args.pack(wanted());
    args.pack(reverse);
    const std::vector<at::TypePtr> types = {IValuePacker<KeptList>::packed_type(),
                                            IValuePacker<CellGradientMask>::packed_type(),
                                            IValuePacker<bool>::packed_type()};
    const auto& python = getPyCompilerInterface();
    const std::string function =
        python->bind_function(swap.get_py_compiler(), typeid(Derived).name(), recorded, types,
                              /*is_custom_function=*/true, /*is_traceable=*/true);
    const auto outputs =
        IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            get_input_metadata(next_edges()));
    variable_list gradients =
        python->call_function(swap.get_py_compiler(), "apply_functional", function, grads,
                              std::move(args).vec(), outputs);
    for (auto& variable : saved) swap.after(variable);
    return gradients;
  }

 private:
  static constexpr size_t kFirstBias = 5;  // in CellInputs
  using KeptList = std::vector<std::optional<at::Tensor>>;

  // The call as it is made later, with the tensors of then.
  static variable_list recorded(const variable_list& grads,
                                const std::vector<c10::IValue>& packed) {
    torch::dynamo::autograd::PackedArgs args(packed);
    const auto list = args.unpack<KeptList>();
    Kept kept;
    for (size_t k = 0; k < kKept; ++k)
      if (defined(list[k])) kept[k] = list[k];
    const auto mask = args.unpack<CellGradientMask>();
    return Derived::gradients(grads, kept, mask, args.unpack<bool>());
  }
};

}  // namespace lstm_ext
