// One declaration per operator. From it come the argument lists of the schema, of calls through the
// dispatcher and of the functions that are registered:
//
//   struct lstm_cell : Operator<lstm_cell, CellOutputs(const CellInputs&)> {
//     static constexpr char kSchema[] = "lstm_cell(Tensor input, ...) -> (Tensor, Tensor)";
//   };
//   lstm_cell::call(in)                  // through the dispatcher
//   lstm_cell::implement<function>(m)    // CellOutputs function(const CellInputs&)
//
// A part of the signature is an argument of the schema, or a group of them: a struct whose
// fields() returns them as a tuple, and that is made of them in the same order. A result may be a
// struct with results() in the same way. torch compares schema and signature when they meet.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace lstm_ext {

namespace operators {

template <class T, class = void>
struct IsGroup : std::false_type {};
template <class T>
struct IsGroup<T, std::void_t<decltype(std::declval<const T&>().fields())>> : std::true_type {};

// The arguments of a part, in a tuple.
template <class Part>
auto fields_of(const std::remove_reference_t<Part>& part) {
  if constexpr (IsGroup<std::remove_reference_t<Part>>::value)
    return part.fields();
  else
    return std::tuple<Part>(part);
}
template <class Part>
using FieldsOf = decltype(fields_of<Part>(std::declval<Part>()));

template <class Result, class = void>
struct Returned {
  using Flat = Result;
  static Flat flat(Result&& result) { return std::move(result); }
  static Result whole(Flat&& result) { return std::move(result); }
};
template <class Result>
struct Returned<Result, std::void_t<decltype(std::declval<Result&>().results())>> {
  using Flat = decltype(std::declval<Result&>().results());
  static Flat flat(Result&& result) { return result.results(); }
  static Result whole(Flat&& result) {
    return std::apply([](auto&... part) { return Result{std::move(part)...}; }, result);
  }
};

// A part of the signature, from the arguments that begin at position kAt.
template <class Part, size_t kAt, class Arguments, size_t... k>
decltype(auto) part_of(Arguments& arguments, std::index_sequence<k...> /*of its fields*/) {
  using Plain = std::remove_cv_t<std::remove_reference_t<Part>>;
  if constexpr (IsGroup<Plain>::value)
    return Plain{std::get<kAt + k>(arguments)...};
  else
    return std::get<kAt>(arguments);
}

template <class... Parts>
struct Signature {
  using Arguments = decltype(std::tuple_cat(std::declval<FieldsOf<Parts>>()...));

  static constexpr size_t position(size_t part) {
    constexpr size_t sizes[] = {std::tuple_size_v<FieldsOf<Parts>>..., 0};
    size_t sum = 0;
    for (size_t k = 0; k < part; ++k) sum += sizes[k];
    return sum;
  }
  template <class Function, class... First, size_t... k>
  static decltype(auto) invoke(Function* function, Arguments& arguments,
                               std::index_sequence<k...> /*parts*/, First... first) {
    return function(
        first...,
        part_of<Parts, position(k)>(
            arguments, std::make_index_sequence<std::tuple_size_v<FieldsOf<Parts>>>())...);
  }
};

}  // namespace operators

template <class Derived, class Signature>
class Operator;

template <class Derived, class Result, class... Parts>
class Operator<Derived, Result(Parts...)> {
  using Signature = operators::Signature<Parts...>;
  using Arguments = typename Signature::Arguments;
  using Returned = operators::Returned<Result>;
  using Flat = typename Returned::Flat;
  static constexpr auto kParts = std::make_index_sequence<sizeof...(Parts)>();

  template <class Tuple>
  struct Functions;
  template <class... Argument>
  struct Functions<std::tuple<Argument...>> {
    using Type = Flat(Argument...);
    template <auto function>
    static Flat plain(Argument... argument) {
      Arguments arguments(std::forward<Argument>(argument)...);
      return Returned::flat(Signature::invoke(function, arguments, kParts));
    }
    template <auto function>
    static Flat with_keys(c10::DispatchKeySet keys, Argument... argument) {
      Arguments arguments(std::forward<Argument>(argument)...);
      return Returned::flat(Signature::invoke(function, arguments, kParts, keys));
    }
  };
  using Flattened = Functions<Arguments>;

  static const auto& handle() {
    static const auto typed = c10::Dispatcher::singleton()
                                  .findSchemaOrThrow(("lstm_ext::" + name()).c_str(), "")
                                  .template typed<typename Flattened::Type>();
    return typed;
  }

 public:
  static std::string name() {
    const std::string schema = Derived::kSchema;
    return schema.substr(0, schema.find('('));
  }

  static void define(torch::Library& library) { library.def(Derived::kSchema); }

  // Registers Result function(Parts...).
  template <auto function>
  static void implement(torch::Library& library) {
    library.impl(name().c_str(), TORCH_FN(Flattened::template plain<function>));
  }
  // Registers Result function(c10::DispatchKeySet, Parts...), which may redispatch.
  template <auto function>
  static void implement_with_keys(torch::Library& library) {
    library.impl(name().c_str(), TORCH_FN(Flattened::template with_keys<function>));
  }

  static Result call(Parts... parts) {
    return std::apply(
        [](auto&&... argument) {
          return Returned::whole(handle().call(std::forward<decltype(argument)>(argument)...));
        },
        std::tuple_cat(operators::fields_of<Parts>(parts)...));
  }
  static Result redispatch(c10::DispatchKeySet keys, Parts... parts) {
    return std::apply(
        [keys](auto&&... argument) {
          return Returned::whole(
              handle().redispatch(keys, std::forward<decltype(argument)>(argument)...));
        },
        std::tuple_cat(operators::fields_of<Parts>(parts)...));
  }
};

template <class... Operators>
void define(torch::Library& library) {
  (Operators::define(library), ...);
}

inline bool defined(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined();
}
inline const at::Tensor& or_undefined(const at::Tensor& tensor) { return tensor; }
inline const at::Tensor& or_undefined(const std::optional<at::Tensor>& tensor) {
  static const at::Tensor none;
  return tensor.has_value() ? *tensor : none;
}

// visit(tensor) for every tensor of groups and arguments, but for optional ones that are not there.
template <class Visit, class... Parts>
void for_each_tensor(const Visit& visit, const Parts&... parts) {
  const auto one = [&](const auto& field) {
    using Field = std::decay_t<decltype(field)>;
    if constexpr (std::is_same_v<Field, at::Tensor>) visit(field);
    if constexpr (std::is_same_v<Field, std::optional<at::Tensor>>)
      if (defined(field)) visit(*field);
  };
  const auto part = [&](const auto& fields) {
    std::apply([&](const auto&... field) { (one(field), ...); }, fields);
  };
  (part(operators::fields_of<const Parts&>(parts)), ...);
}
template <class Test, class... Parts>
bool any_tensor(const Test& test, const Parts&... parts) {
  bool any = false;
  for_each_tensor([&](const at::Tensor& tensor) { any = any || test(tensor); }, parts...);
  return any;
}

}  // namespace lstm_ext
