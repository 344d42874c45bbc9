// Weights packed once for many calls: lstm_layer_pack, and the layer over its result.
#include <torch/library.h>

#include <cstring>

#include "cpu/layer.h"
#include "cpu/packed_weights.h"
#include "ops/layer.h"

namespace lstm_ext::cpu {
namespace {

// Both matrices as lstm_layer_pack returns them.
struct PackedLayer {
  PackedGates ih, hh;
  PackedHeader header;

  PackedLayer(at::ScalarType dtype, WeightType type, int64_t I, int64_t H)
      : ih(kernel_dtype(dtype), type, I, H),
        hh(kernel_dtype(dtype), type, H, H),
        header(dtype, type, I, H, ih.bytes() + hh.bytes()) {}
  int64_t bytes() const { return static_cast<int64_t>(sizeof(header)) + header.bytes; }
};

constexpr int64_t kMostTerms = int64_t{1} << 17;

// Whether weights can be stored so for such activations.
bool has_weights(at::ScalarType dtype, int64_t type) {
  return type >= 0 && type < kWeightTypes &&
         weight_kernels(kernel_dtype(dtype), static_cast<WeightType>(type)).pack_gates != nullptr;
}

PackedLayer packed_layer(const Tensor& w_ih, const Tensor& w_hh, int64_t weights) {
  const auto gates_of = [](const Tensor& w, int64_t H) {
    return w.dim() == 2 && w.size(0) == 4 * H;
  };
  TORCH_CHECK(w_hh.dim() == 2 && gates_of(w_hh, w_hh.size(1)) && gates_of(w_ih, w_hh.size(1)),
              "lstm_layer_pack: w_ih and w_hh must be (4H, I) and (4H, H), got ", w_ih.sizes(),
              " and ", w_hh.sizes());
  const at::ScalarType dtype = w_ih.scalar_type();
  TORCH_CHECK(
      w_hh.scalar_type() == dtype && w_ih.layout() == at::kStrided &&
          w_hh.layout() == at::kStrided && w_hh.device() == w_ih.device() && fused_dtype(dtype),
      "lstm_layer_pack: w_ih and w_hh must be dense, on one device, and of one dtype out of "
      "float32, float64, bfloat16 and float16");
  TORCH_CHECK(has_weights(dtype, weights), "lstm_layer_pack: there are no weights of type ",
              weights, " for ", dtype);
  TORCH_CHECK(weights < kFirstIntegerType || std::max(w_ih.size(1), w_hh.size(1)) <= kMostTerms,
              "lstm_layer_pack: sums of more than ", kMostTerms,
              " products of 8-bit integers may not fit into 32 bits");
  return {dtype, static_cast<WeightType>(weights), w_ih.size(1), w_hh.size(1)};
}

Tensor lstm_layer_pack(const Tensor& w_ih, const Tensor& w_hh, int64_t weights) {
  PackedLayer layer = packed_layer(w_ih, w_hh, weights);
  check_all_allocated(w_ih, w_hh);
  const Tensor packed = empty({layer.bytes()}, kPackedType);
  std::memcpy(packed.mutable_data_ptr(), &layer.header, sizeof(layer.header));
  layer.ih.lie_at(advance(packed.mutable_data_ptr(), sizeof(layer.header)));
  layer.hh.lie_at(advance(layer.ih.at(0), layer.ih.bytes()));
  const Dense dense_ih(w_ih), dense_hh(w_hh);
  const int64_t I = w_ih.size(1), H = w_hh.size(1);
  const int64_t blocks = cpu::kernels(kernel_dtype(w_ih.scalar_type())).layer.unit_blocks(H);
  cpu::run(blocks, 4 * H * (I + H), [&](int64_t first, int64_t last) {
    layer.ih.pack(dense_ih.data(), first, last);
    layer.hh.pack(dense_hh.data(), first, last);
  });
  return packed;
}

// The result's size alone.
Tensor lstm_layer_pack_meta(const Tensor& w_ih, const Tensor& w_hh, int64_t weights) {
  return w_ih.new_empty({packed_layer(w_ih, w_hh, weights).bytes()}, at::dtype(kPackedType));
}

LayerOutputs lstm_layer_packed(const PackedLayerInputs& from) {
  const Tensor& packed = from.packed;
  const Tensor none;
  const LayerInputs in = {{from.input, from.hx, from.cx, none, none, from.b_ih, from.b_hh,
                           from.unit_weights, from.variant},
                          from.batch_sizes,
                          from.reset,
                          from.reverse};
  check_packed_inputs(in);
  check_all_allocated(from);
  log_cpu_path("lstm_layer_packed", in.input, in.hx);
  const at::ScalarType dtype = in.hx.scalar_type();
  const int64_t I = in.input.size(-1), H = in.hx.size(1);
  PackedHeader found(dtype, WeightType::kWhole, I, H, 0);
  TORCH_CHECK(packed.scalar_type() == kPackedType && packed.dim() == 1 && packed.is_contiguous() &&
                  packed.nbytes() >= sizeof(found),
              "lstm_layer_packed: packed must be the result of lstm_layer_pack");
  std::memcpy(static_cast<void*>(&found), packed.const_data_ptr(), sizeof(found));
  const WeightType type = has_weights(dtype, found.weights) ? static_cast<WeightType>(found.weights)
                                                            : WeightType::kWhole;
  const PackedLayer wanted(dtype, type, I, H);
  TORCH_CHECK(found == wanted.header && packed.numel() == wanted.bytes(),
              "lstm_layer_packed: the weights were packed for ", describe(found), ", not for ",
              describe(wanted.header), "; pack (freeze) them again");
  const PackedWeights before = {advance(packed.const_data_ptr(), sizeof(found)), type};
  LayerTensors out = layer_forward(StatesInputs::plain(in), {}, before);
  return {std::move(out.output), std::move(out.hy), std::move(out.cy)};
}

}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, CPU, m) {
  ops::lstm_layer_pack::implement<lstm_layer_pack>(m);
  ops::lstm_layer_packed::implement<lstm_layer_packed>(m);
}

TORCH_LIBRARY_IMPL(lstm_ext, Meta, m) { ops::lstm_layer_pack::implement<lstm_layer_pack_meta>(m); }

}  // namespace lstm_ext::cpu
