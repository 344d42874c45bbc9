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
template <class T>
bool clusters_pay(const LayerForward<T>& layer, const Device& device, bool shared_fits) {
  const int64_t turns = layer_forward_cluster_turns(layer, device);
  return turns > 0 && turns <= (shared_fits ? 1 : 2);
}

}  // namespace

template <class T>
LayerWay layer_forward_way(const LayerForward<T>& layer, const Device& device) {
  const bool shared_fits = layer_forward_shared_fits(layer, device);
  if constexpr (kHasRegisterWays<T>) {
    const DeviceSequence& sequence = layer.sequence;
    if (layer.variant == kPlainCell && sequence.offsets == nullptr && sequence.reset == nullptr) {
      if (layer_forward_small_fits(layer, device)) return LayerWay::kSmall;
      if (clusters_pay(layer, device, shared_fits)) return LayerWay::kCluster;
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

#define LSTM_EXT_INSTANTIATE(T)                                                          \
  template LayerWay layer_forward_way<T>(const LayerForward<T>&, const Device&);         \
  template cudaError_t layer_forward<T>(const LayerForward<T>&, const Device&, LayerWay, \
                                        cudaStream_t);
LSTM_EXT_INSTANTIATE(float)
LSTM_EXT_INSTANTIATE(double)
LSTM_EXT_INSTANTIATE(__half)
LSTM_EXT_INSTANTIATE(__nv_bfloat16)
#undef LSTM_EXT_INSTANTIATE

}  // namespace lstm_ext::cuda
