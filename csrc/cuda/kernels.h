// The CUDA launchers: raw pointers, sizes and a stream in, an error out. Tensors stay outside.
//
// N batch, I input, H hidden; all matrices dense and row by row; weights and gates in the order
// i, f, g, o. T is float, double, __half or __nv_bfloat16; sums are kept in float, or double.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace lstm_ext::cuda {

template <class T>
struct CellForward {
  const T* input;        // [N, I]
  const T* hx;           // [N, H]
  const T* cx;           // [N, H]
  const T* w_ih;         // [4H, I]
  const T* w_hh;         // [4H, H]
  const T *b_ih, *b_hh;  // [4H] or null
  T *hy, *cy;            // [N, H]; may be hx and cx only in cell_finish
  T* gates;              // [N, 4H], activated, or null: not wanted
  int64_t N;
  int I, H;
};

// The device that a stream belongs to, as far as the launchers choose by it.
struct Device {
  int multiprocessors;
  bool tf32;  // float products may round their factors to TF32
};

// Products, activations and states in one launch.
template <class T>
cudaError_t cell_forward(const CellForward<T>& cell, const Device& device, cudaStream_t stream);

// Whether that is faster than two library products and cell_finish.
template <class T>
bool cell_forward_pays(const CellForward<T>& cell, const Device& device);

// The rest, where the library made the products: pre-activations [N, 4H] without biases. They may
// lie where the gates go, and hx and cx where hy and cy do.
template <class T>
cudaError_t cell_finish(const CellForward<T>& cell, const T* products, cudaStream_t stream);

template <class T>
struct CellBackward {
  const T *grad_hy, *grad_cy;  // [N, H], or null: zero
  const T* cx;                 // [N, H]
  const T* gates;              // [N, 4H], activated
  T* grad_gates;               // [N, 4H]: of the pre-activations
  T* grad_cx;                  // [N, H] or null: not wanted
  T *grad_b_ih, *grad_b_hh;    // [4H] or null: not wanted
  void* partial_sums;          // cell_backward_workspace bytes
  int64_t N;
  int H;
};

// Bytes that cell_backward needs for the sums of the biases.
template <class T>
size_t cell_backward_workspace(const CellBackward<T>& cell);

// The gradients of the pre-activations, of c, and of the biases: their sums over N have the same
// order, and so the same bits, at every call.
template <class T>
cudaError_t cell_backward(const CellBackward<T>& cell, cudaStream_t stream);

}  // namespace lstm_ext::cuda
