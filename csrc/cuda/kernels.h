// The CUDA launchers: raw pointers, sizes and a stream in, an error out. Tensors stay outside.
//
// N batch, I input, H hidden; all matrices dense and row by row; weights and gates in the order
// i, f, g, o. T is float, double, __half or __nv_bfloat16; sums are kept in float, or double.
// variant and unit_weights [P, H] (null where P is 0): core/cells.h. Other cells than torch's are
// compiled for fewer types: has_cell.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/cells.h"
#include "core/step_order.h"

namespace lstm_ext::cuda {

// What sums of a type are kept in.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Whether the launchers know a cell in a type.
template <class T>
bool has_cell(int variant) {
  return variant == kPlainCell || (is_cell(variant) && !std::is_same_v<T, __half>);
}

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
  int variant = kPlainCell;
  const T* unit_weights = nullptr;
};

// The device that a stream belongs to, as far as the launchers choose by it.
struct Device {
  int multiprocessors;
  int shared_per_block;   // bytes of shared memory that a block may ask for
  bool tf32;              // float products may round their factors to TF32
  bool clusters = false;  // blocks may send to each other's shared memory: compute capability 9.x
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

// The steps of one layer in one direction, L of N rows each, or fewer where packed; S rows in all.
struct DeviceSequence {
  const int64_t* offsets;  // [L + 1] on the device: the rows before each step; null: t N
  const bool* reset;       // [L, N]: states are zero before these steps; or null
  int64_t L, N;
  bool reverse;
};

// Numbers of the host, which may be gone before the copy is made, and of the device.
cudaError_t copy_numbers(const int64_t* from, int64_t count, int64_t* to, cudaStream_t stream);

template <class T>
struct LayerForward {
  DeviceSequence sequence;
  const T* products;     // [S, 4H]: of the input with w_ih, without biases
  const T* hx;           // [N, H]
  const T* cx;           // [N, H]
  const T* w_hh;         // [4H, H]
  const T *b_ih, *b_hh;  // [4H] or null
  T* output;             // [S, H]
  T *hy, *cy;            // [N, H]
  T* gates;              // [S, 4H] or null; may be products
  T* c_before;           // [S, H], what each step started from; or null
  T* h_buffers;          // [2, N, H], to exchange h in
  int H;
  int variant = kPlainCell;
  const T* unit_weights = nullptr;
};

// How a layer makes all steps in one launch, w_hh read once; what is faster comes first.
enum class LayerWay : uint8_t {
  kSmall,    // w_hh in the registers of each block, which takes some rows (layer_small.cuh)
  kCluster,  // in registers and shared memory of a cluster of blocks (layer_cluster.cu)
  kShared,   // in shared memory, of each block or of all together (layer_forward.cu)
  kNone      // it does not fit: step by step
};

// The way that is estimated to be the fastest for a layer.
template <class T>
LayerWay layer_forward_way(const LayerForward<T>& layer, const Device& device);

// All steps by that way. L and N positive.
template <class T>
cudaError_t layer_forward(const LayerForward<T>& layer, const Device& device, LayerWay way,
                          cudaStream_t stream);

// The ways one by one. The first two are made for float and the 16-bit types, the plain cell, all
// rows at every step and no resets.

// H up to 128.
template <class T>
bool layer_forward_small_fits(const LayerForward<T>& layer, const Device& device);
template <class T>
cudaError_t layer_forward_small(const LayerForward<T>& layer, const Device& device,
                                cudaStream_t stream);

// In how many turns clusters take all rows, if not all run at once; 0: none is made for that.
// cudaErrorNotSupported: the device runs no such clusters as it is; nothing was launched.
template <class T>
int64_t layer_forward_cluster_turns(const LayerForward<T>& layer, const Device& device);
template <class T>
cudaError_t layer_forward_cluster(const LayerForward<T>& layer, const Device& device,
                                  cudaStream_t stream);

template <class T>
bool layer_forward_shared_fits(const LayerForward<T>& layer, const Device& device);
template <class T>
cudaError_t layer_forward_shared(const LayerForward<T>& layer, const Device& device,
                                 cudaStream_t stream);

template <class T>
struct LayerBackward {
  DeviceSequence sequence;
  const T* grad_output;        // [S, H] or null: zero
  const T *grad_hy, *grad_cy;  // [N, H] or null: zero
  const T* gates;              // [S, 4H], activated
  const T* c_before;           // [S, H]
  const T* w_hh;               // [4H, H]
  T* grad_gates;               // [S, 4H]: of the pre-activations
  T *grad_hx, *grad_cx;        // [N, H] or null: not wanted
  int H;
  // [layer_backward_sums, 4H]: together the gradient of a bias; or null: not wanted
  float* bias_sums = nullptr;
  int variant = kPlainCell;
  const T* unit_weights = nullptr;
};

// The way that is estimated to be the fastest for a layer.
template <class T>
LayerWay layer_backward_way(const LayerBackward<T>& layer, const Device& device);

// All steps in one launch by that way, as in layer_forward. The gradients of the weights are
// products of grad_gates, left to the library, and so are those of the biases where a way makes no
// sums of its own.
template <class T>
cudaError_t layer_backward(const LayerBackward<T>& layer, const Device& device, LayerWay way,
                           cudaStream_t stream);

// How many rows of bias_sums a way makes: 0 if none.
template <class T>
int64_t layer_backward_sums(const LayerBackward<T>& layer, const Device& device, LayerWay way);

// The ways one by one, made for what those of layer_forward are made for. The small one and the
// one in clusters make a row of bias_sums for every block or cluster.
template <class T>
bool layer_backward_small_fits(const LayerBackward<T>& layer, const Device& device);
template <class T>
int64_t layer_backward_small_blocks(const LayerBackward<T>& layer, const Device& device);
template <class T>
cudaError_t layer_backward_small(const LayerBackward<T>& layer, const Device& device,
                                 cudaStream_t stream);

template <class T>
int64_t layer_backward_cluster_turns(const LayerBackward<T>& layer, const Device& device);
template <class T>
int64_t layer_backward_clusters(const LayerBackward<T>& layer, const Device& device);
template <class T>
cudaError_t layer_backward_cluster(const LayerBackward<T>& layer, const Device& device,
                                   cudaStream_t stream);

template <class T>
bool layer_backward_shared_fits(const LayerBackward<T>& layer, const Device& device);
template <class T>
cudaError_t layer_backward_shared(const LayerBackward<T>& layer, const Device& device,
                                  cudaStream_t stream);

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
  int variant = kPlainCell;
  const T* unit_weights = nullptr;
};

// Bytes that cell_backward needs for the sums of the biases.
template <class T>
size_t cell_backward_workspace(const CellBackward<T>& cell);

// The gradients of the pre-activations, of c, and of the biases: their sums over N have the same
// order, and so the same bits, at every call.
template <class T>
cudaError_t cell_backward(const CellBackward<T>& cell, cudaStream_t stream);

}  // namespace lstm_ext::cuda
