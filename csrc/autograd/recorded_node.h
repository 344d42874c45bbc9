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
#include <tuple>
#include <type_traits>
#include <typeinfo>
#include <utility>
#include <vector>

#include "autograd/inputs.h"
#include "ops/cell.h"

namespace lstm_ext {

// The fields of a group of arguments: its tensors, and its options, which are what is none.
template <class Group>
struct FieldsOfGroup {
  using Fields = operators::FieldsOf<const Group&>;
  static constexpr size_t kCount = std::tuple_size_v<Fields>;
  static constexpr auto kAll = std::make_index_sequence<kCount>();

  template <size_t k>
  static constexpr bool kIsTensor = std::is_reference_v<std::tuple_element_t<k, Fields>>;
  // How many of the first fields are tensors.
  template <size_t... k>
  static constexpr size_t count_tensors(size_t first, std::index_sequence<k...> /*fields*/) {
    return (size_t{k < first && kIsTensor<k>} + ... + 0);
  }
  template <size_t k>
  static constexpr size_t kTensorsBefore = count_tensors(k, kAll);
  static constexpr size_t kTensors = count_tensors(kCount, kAll);

  template <size_t k>
  static auto option(const Fields& fields) {
    if constexpr (kIsTensor<k>)
      return std::tuple<>();
    else
      return std::make_tuple(std::get<k>(fields));
  }
  template <size_t... k>
  static auto options(const Fields& fields, std::index_sequence<k...> /*fields*/) {
    return std::tuple_cat(option<k>(fields)...);
  }
  static auto options(const Group& group) { return options(group.fields(), kAll); }
  using Options = decltype(options(std::declval<const Group&>()));

  // The group, of the tensors and options of before.
  template <size_t k>
  static decltype(auto) field(const std::optional<at::Tensor>* tensors, const Options& options) {
    if constexpr (std::is_same_v<std::tuple_element_t<k, Fields>, const at::Tensor&>)
      return (*tensors[kTensorsBefore<k>]);
    else if constexpr (kIsTensor<k>)
      return (tensors[kTensorsBefore<k>]);
    else
      return (std::get<k - kTensorsBefore<k>>(options));
  }
  template <size_t... k>
  static Group group(const std::optional<at::Tensor>* tensors, const Options& options,
                     std::index_sequence<k...> /*fields*/) {
    return operators::make_group<Group>(field<k>(tensors, options)...);
  }
  static Group group(const std::optional<at::Tensor>* tensors, const Options& options) {
    return group(tensors, options, kAll);
  }
};

// Derived has
//   static variable_list gradients(const variable_list& grads, const Kept& kept,
//                                  const Wanted& wanted);
// with the gradients that Wanted names, of tensors of Inputs, which begins with those of
// CellInputs, or is of another kind. Results is what the forward kept beside them.
template <class Derived, class Inputs, class Results, class Wanted = lstm_ext::Wanted>
struct RecordedNode : public torch::autograd::Node {
  using variable_list = torch::autograd::variable_list;
  using Mask = typename Wanted::Mask;
  using OfInputs = FieldsOfGroup<Inputs>;
  using OfResults = FieldsOfGroup<Results>;
  static constexpr size_t kTensors = OfInputs::kTensors + OfResults::kTensors;
  static constexpr bool kHasBiases = std::is_base_of_v<CellInputs, Inputs>;

  // What the node keeps, while it is used.
  struct Kept {
    std::array<std::optional<at::Tensor>, kTensors> tensors;
    typename OfInputs::Options options;

    Inputs inputs() const { return OfInputs::group(tensors.data(), options); }
    Results results() const { return OfResults::group(tensors.data() + OfInputs::kTensors, {}); }
  };

  void keep(const Inputs& in, const Results& results) {
    size_t k = 0;
    const auto save = [&](const auto& field) {
      using Field = std::decay_t<decltype(field)>;
      if constexpr (std::is_same_v<Field, at::Tensor> ||
                    std::is_same_v<Field, std::optional<at::Tensor>>)
        saved_[k++] = torch::autograd::SavedVariable(or_undefined(field), false);
    };
    const auto save_all = [&](const auto&... field) { (save(field), ...); };
    std::apply(save_all, in.fields());
    std::apply(save_all, results.fields());
    if constexpr (kHasBiases) biases_ = {or_undefined(in.b_ih), or_undefined(in.b_hh)};
    options_ = OfInputs::options(in);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved_) variable.reset_data();
    for (auto& bias : biases_) bias.reset();
  }

  Kept unpack() const {
    const bool checked = at::GradMode::is_enabled();
    Kept kept = {{}, options_};
    for (size_t k = 0; k < kTensors; ++k) {
      const bool bias = kHasBiases && (k == kFirstBias || k == kFirstBias + 1);
      kept.tensors[k] = or_none(bias && !checked ? biases_[k - kFirstBias] : saved_[k].unpack());
    }
    return kept;
  }

  Wanted wanted() const { return Wanted(mask()); }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const auto& variable : saved_) args.collect(variable, /*is_output=*/false);
    std::apply([&](const auto&... option) { (args.collect(option), ...); }, options_);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    for (auto& variable : saved_) swap.before(variable);
    KeptList kept;
    for (const auto& variable : saved_) kept.push_back(or_none(variable.unpack()));
    PackedArgs args;
    args.pack(kept);
    args.pack(mask());
    std::vector<at::TypePtr> types = {IValuePacker<KeptList>::packed_type(),
                                      IValuePacker<Mask>::packed_type()};
    const auto pack_option = [&](auto option) {
      args.pack(option);
      types.push_back(IValuePacker<decltype(option)>::packed_type());
    };
    std::apply([&](const auto&... option) { (pack_option(option), ...); }, options_);
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
    for (auto& variable : saved_) swap.after(variable);
    return gradients;
  }

 private:
  using KeptList = std::vector<std::optional<at::Tensor>>;

  Mask mask() const {
    Mask mask;
    for (size_t k = 0; k < mask.size(); ++k) mask[k] = task_should_compute_output(k);
    return mask;
  }

  // The call as it is made later, with the tensors of then.
  static variable_list recorded(const variable_list& grads,
                                const std::vector<c10::IValue>& packed) {
    torch::dynamo::autograd::PackedArgs args(packed);
    const auto list = args.unpack<KeptList>();
    Kept kept;
    for (size_t k = 0; k < kTensors; ++k)
      if (defined(list[k])) kept.tensors[k] = list[k];
    const Wanted wanted(args.unpack<Mask>());
    std::apply(
        [&](auto&... option) { ((option = args.unpack<std::decay_t<decltype(option)>>()), ...); },
        kept.options);
    return Derived::gradients(grads, kept, wanted);
  }

  std::array<torch::autograd::SavedVariable, kTensors> saved_;
  // b_ih and b_hh themselves, beside the saved ones that notice a change in place: only a graph of
  // the backward depends on what is in them, and torch's modules let them change before.
  std::array<at::Tensor, 2> biases_;
  typename OfInputs::Options options_;
};

}  // namespace lstm_ext
