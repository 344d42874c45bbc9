// Between tensors and kernels: memory, dtypes and threads, for everything on the CPU floor.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>

#include "core/path_log.h"
#include "cpu/denormals.h"
#include "cpu/kernels.h"
#include "ops/cell.h"

namespace lstm_ext::cpu {

using at::Tensor;

// Multiplications and additions, in their thousands, below which a second thread costs more
// than it brings.
inline constexpr int64_t kForkWork = 64 * 1024;

inline void log_cpu_path(const char* operation, const Tensor& input, const Tensor& hx) {
  if (verbose())
    log_path(operation, input, hx, std::string("the CPU's kernels, ") + active_instruction_set());
}

inline Dtype kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return Dtype::kFloat;
    case at::kDouble:
      return Dtype::kDouble;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      return Dtype::kHalf;
  }
}

inline at::ScalarType compute_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// The rows of x [N, K] as factors.
inline Tensor to_factors(const ProductKernels& kernels, const Tensor& x) {
  if (!kernels.pair_rows) return x.to(compute_type(x.scalar_type())).contiguous();
  return x.size(1) % 2 ? at::constant_pad_nd(x, {0, 1}) : x.contiguous();
}

// The tensor itself where it is dense, borrowed, else a copy; null where it is undefined.
class Dense {
 public:
  explicit Dense(const Tensor& tensor)
      : tensor_(tensor.defined() ? tensor.expect_contiguous()
                                 : c10::MaybeOwned<Tensor>::borrowed(tensor)) {}
  explicit Dense(const std::optional<Tensor>& tensor)
      : tensor_(defined(tensor) ? tensor->expect_contiguous()
                                : c10::MaybeOwned<Tensor>::owned(std::in_place)) {}
  const void* data() const { return tensor_->defined() ? tensor_->const_data_ptr() : nullptr; }

 private:
  const c10::MaybeOwned<Tensor> tensor_;
};

inline Tensor dense(const std::optional<Tensor>& tensor) {
  return defined(tensor) ? tensor->contiguous() : Tensor();
}

// What makes a cell one of its kind, for the kernels.
class DenseCell {
 public:
  explicit DenseCell(const CellInputs& in)
      : variant_(static_cast<int>(in.variant)), unit_weights_(in.unit_weights) {}
  CellKind kind() const { return {variant_, unit_weights_.data()}; }

 private:
  const int variant_;
  const Dense unit_weights_;
};

// A new dense tensor; at::empty, less its way through the dispatcher.
inline Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::detail::empty_cpu(sizes, at::dtype(dtype));
}

// Byte offsets into raw memory.
template <class T>
T* advance(T* base, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return base ? reinterpret_cast<Byte*>(base) + bytes : nullptr;
}
// An element size with the pointers that go with it.
struct Elements {
  int64_t size;
  explicit Elements(at::ScalarType dtype) : size(static_cast<int64_t>(elementSize(dtype))) {}
  template <class T>
  T* at(T* base, int64_t count) const {
    return advance(base, count * size);
  }
};

// The same for much memory that is written once and read soon: in huge pages where the system has
// them on request. To fault in 4 KiB at a time takes longer than to pack the weights of a layer.
inline Tensor empty_large(at::IntArrayRef sizes, at::ScalarType dtype) {
  Tensor tensor = empty(sizes, dtype);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kHugePage = size_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (begin + tensor.nbytes()) / kHugePage * kHugePage;
  // Advice: that it may be refused is no error.
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

template <class Kernel>
void run(int64_t tasks, int64_t work, const Kernel& kernel) {
  const int64_t work_per_task = std::max<int64_t>(1, work / std::max<int64_t>(1, tasks));
  const int64_t grain = std::max<int64_t>(1, kForkWork / work_per_task);
  at::parallel_for(0, tasks, grain, [&](int64_t first, int64_t last) {
    const FlushDenormals guard;
    kernel(first, last);
  });
}

}  // namespace lstm_ext::cpu
