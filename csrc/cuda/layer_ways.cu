// Which way a layer takes through all its steps. Microseconds are those of an H100.
#include "cuda/kernels.h"
#include "cuda/latency.cuh"

namespace lstm_ext::cuda {
namespace {

template <class T>
constexpr bool kHasRegisterWays = latency::kRegisterWays && !std::is_same_v<T, double>;

// In clusters a step takes 1 to 4 us, of the shared way 3 to 5, and more with more rows, of steps
// by themselves 5 at least. So clusters pay where they all run at once, and in two turns where
// there are too many rows for the shared way.
bool clusters_pay(int64_t turns, bool shared_fits) {
  return turns > 0 && turns <= (shared_fits ? 1 : 2);
}

// Where nothing but the plain cell and all rows at every step is asked for.
template <class Layer>
bool is_plain(const Layer& layer) {
  const DeviceSequence& sequence = layer.sequence;
  return layer.variant == kPlainCell && sequence.offsets == nullptr && sequence.reset == nullptr;
}

}  // namespace

template <class T>
LayerWay layer_forward_way(const LayerForward<T>& layer, const Device& device) {
  const bool shared_fits = layer_forward_shared_fits(layer, device);
  if constexpr (kHasRegisterWays<T>) {
    if (is_plain(layer)) {
      if (layer_forward_small_fits(layer, device)) return LayerWay::kSmall;
      if (clusters_pay(layer_forward_cluster_turns(layer, device), shared_fits))
        return LayerWay::kCluster;
    }
  }
  return shared_fits ? LayerWay::kShared : LayerWay::kNone;
}

template <class T>
cudaError_t layer_forward(const LayerForward<T>& layer, const Device& device, LayerWay way,
                          cudaStream_t stream) {
  if constexpr (kHasRegisterWays<T>) {
    if (way == LayerWay::kSmall) return layer_forward_small(layer, device, stream);
    if (way == LayerWay::kCluster) return layer_forward_cluster(layer, device, stream);
  }
  return way == LayerWay::kShared ? layer_forward_shared(layer, device, stream)
                                  : cudaErrorNotSupported;
}

template <class T>
LayerWay layer_backward_way(const LayerBackward<T>& layer, const Device& device) {
  const bool shared_fits = layer_backward_shared_fits(layer, device);
  if constexpr (kHasRegisterWays<T>) {
    if (is_plain(layer)) {
      if (layer_backward_small_fits(layer, device)) return LayerWay::kSmall;
      if (clusters_pay(layer_backward_cluster_turns(layer, device), shared_fits))
        return LayerWay::kCluster;
    }
  }
  return shared_fits ? LayerWay::kShared : LayerWay::kNone;
}

template <class T>
cudaError_t layer_backward(const LayerBackward<T>& layer, const Device& device, LayerWay way,
                           cudaStream_t stream) {
  if constexpr (kHasRegisterWays<T>) {
    if (way == LayerWay::kSmall) return layer_backward_small(layer, device, stream);
    if (way == LayerWay::kCluster) return layer_backward_cluster(layer, device, stream);
  }
  return way == LayerWay::kShared ? layer_backward_shared(layer, device, stream)
                                  : cudaErrorNotSupported;
}

template <class T>
int64_t layer_backward_sums(const LayerBackward<T>& layer, const Device& device, LayerWay way) {
  if constexpr (kHasRegisterWays<T>) {
    if (way == LayerWay::kSmall) return layer_backward_small_blocks(layer, device);
    if (way == LayerWay::kCluster) return layer_backward_clusters(layer, device);
  }
  return 0;
}

#define LSTM_EXT_INSTANTIATE(T)                                                            \
  template LayerWay layer_forward_way<T>(const LayerForward<T>&, const Device&);           \
  template cudaError_t layer_forward<T>(const LayerForward<T>&, const Device&, LayerWay,   \
                                        cudaStream_t);                                     \
  template LayerWay layer_backward_way<T>(const LayerBackward<T>&, const Device&);         \
  template cudaError_t layer_backward<T>(const LayerBackward<T>&, const Device&, LayerWay, \
                                         cudaStream_t);                                    \
  template int64_t layer_backward_sums<T>(const LayerBackward<T>&, const Device&, LayerWay);
LSTM_EXT_INSTANTIATE(float)
LSTM_EXT_INSTANTIATE(double)
LSTM_EXT_INSTANTIATE(__half)
LSTM_EXT_INSTANTIATE(__nv_bfloat16)
#undef LSTM_EXT_INSTANTIATE

}  // namespace lstm_ext::cuda
