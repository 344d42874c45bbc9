// What the operators on a GPU have in common: tensors on one side, pointers on the other.
//
// With the emulator, tests run the same operators on the CPU's tensors.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#if defined(LSTM_EXT_CUDA_EMU)
#include <cstdlib>
#define LSTM_EXT_CUDA_KEY CPU
#else
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define LSTM_EXT_CUDA_KEY CUDA
#endif

#include <limits>
#include <optional>

#include "core/path_log.h"
#include "cuda/kernels.h"
#include "ops/cell.h"

namespace lstm_ext::cuda {

using at::Tensor;

template <class T>
struct Type {
  using type = T;
};

// body(Type<T>) for the type T that the kernels have for a dtype of fusable().
template <class Body>
auto with_type(at::ScalarType dtype, const Body& body) {
  switch (dtype) {
    case at::kFloat:
      return body(Type<float>());
    case at::kDouble:
      return body(Type<double>());
    case at::kHalf:
      return body(Type<__half>());
    default:
      return body(Type<__nv_bfloat16>());
  }
}

template <class T>
const T* read(const Tensor& tensor) {
  return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}

template <class T>
T* write(const Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

inline Tensor dense(const Tensor& tensor) { return tensor.contiguous(); }
inline Tensor dense(const std::optional<Tensor>& tensor) {
  return defined(tensor) ? tensor->contiguous() : Tensor();
}

inline Tensor empty(at::IntArrayRef sizes, const Tensor& like) {
  return at::empty(sizes, like.options());
}

// Whether torch's switches let float32 products round their factors to TF32: a cell's as cuBLAS's
// do, a layer's as cuDNN's. (allowTF32CuBLAS and its like throw once the newer switches are used.)
inline bool may_round(const Tensor& tensor, at::Float32Op operation) {
  return tensor.scalar_type() == at::kFloat &&
         at::globalContext().float32Precision(at::Float32Backend::CUDA, operation) ==
             at::Float32Precision::TF32;
}

// Keeps the library's products within a layer from rounding where cuDNN's switch forbids it,
// whatever cuBLAS's says.
class LayerPrecision {
 public:
  explicit LayerPrecision(const Tensor& tensor) {
    if (!may_round(tensor, at::Float32Op::RNN)) exact_.emplace();
  }

 private:
  std::optional<at::NoTF32Guard> exact_;
};

#if defined(LSTM_EXT_CUDA_EMU)

struct OnDevice {
  explicit OnDevice(const Tensor& /*tensor*/) {}
};

inline cudaStream_t current_stream() { return nullptr; }

inline void check_launch(cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, "CUDA error ", error);
}

inline Device describe_device(const Tensor& tensor, at::Float32Op operation) {
  const char* const shared = std::getenv("LSTM_EXT_EMU_SHARED");
  return {132, shared != nullptr ? std::atoi(shared) : 227 * 1024, may_round(tensor, operation),
          true};
}

inline void forget_error() {}

#else

// On the tensors' device, and with their dtypes: what autocast does, it has done before.
struct OnDevice {
  explicit OnDevice(const Tensor& tensor)
      : device(tensor.device()), no_autocast(c10::DispatchKey::AutocastCUDA) {}
  const c10::cuda::CUDAGuard device;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast;
};

inline cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream(); }

inline void check_launch(cudaError_t error) { C10_CUDA_CHECK(error); }

inline Device describe_device(const Tensor& tensor, at::Float32Op operation) {
  Device device = {};
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount,
                                        tensor.get_device()));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(
      &device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, tensor.get_device()));
  device.tf32 = may_round(tensor, operation);
  int major = 0;
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, tensor.get_device()));
  device.clusters = major == 9;
  return device;
}

inline void forget_error() { static_cast<void>(cudaGetLastError()); }

#endif

// Whether the launchers take such a size (within a row, kernels count in int) and such a cell.
inline bool launchers_know(const CellInputs& in) {
  constexpr int64_t most = std::numeric_limits<int>::max() / 8;
  return in.w_ih.size(1) <= most && in.w_hh.size(0) <= most &&
         with_type(in.hx.scalar_type(), [&](auto type) {
           return has_cell<typename decltype(type)::type>(static_cast<int>(in.variant));
         });
}

// Whether a launch of blocks that wait for each other ran. It may be refused where the device does
// not have all its multiprocessors for this process (MPS, green contexts, another such kernel's
// share), or where clusters do not run: the caller then goes another way. Any other error is
// raised.
inline bool check_cooperative_launch(cudaError_t error) {
  switch (error) {
    case cudaErrorCooperativeLaunchTooLarge:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorNotSupported:
      forget_error();
      return false;
    default:
      check_launch(error);
      return true;
  }
}

// of_gates^T rows. Few rows of float32 are multiplied in parts, whose sums are added: the library's
// own sum of some hundred products has five times the error of cuDNN's, which adds up step by step.
inline Tensor weight_gradient(const Tensor& of_gates, const Tensor& rows) {
  constexpr int64_t kRows = 64, kMostRows = 128, kMost = int64_t{1} << 20;
  const int64_t S = of_gates.size(0), outputs = of_gates.size(1) * rows.size(1);
  int64_t parts = S / kRows;
  while (parts > 1 && S % parts != 0) --parts;
  const bool in_parts = of_gates.scalar_type() == at::kFloat && parts > 1 &&
                        S / parts <= kMostRows && parts * outputs <= kMost;
  if (!in_parts) return at::mm(of_gates.t(), rows);
  const Tensor gates = of_gates.view({parts, S / parts, of_gates.size(1)});
  return at::bmm(gates.transpose(1, 2), rows.reshape({parts, S / parts, rows.size(1)})).sum(0);
}

}  // namespace lstm_ext::cuda
