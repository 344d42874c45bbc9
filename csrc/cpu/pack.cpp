// Weights packed once for many calls: lstm_layer_pack, and the layer over its result.
#include <torch/library.h>

#include <cstring>

#include "cpu/layer.h"
#include "cpu/packed_weights.h"
#include "ops/layer.h"

namespace lstm_ext::cpu {
namespace {

// The matrices as lstm_layer_pack returns them. P: of h where it is projected, else 0, without hr.
struct PackedLayer {
  PackedGates ih, hh;
  PackedColumns hr;
  PackedHeader header;

  PackedLayer(at::ScalarType dtype, WeightType type, int64_t I, int64_t H, int64_t P)
      : ih(kernel_dtype(dtype), type, I, H),
        hh(kernel_dtype(dtype), type, P > 0 ? P : H, H),
        hr(kernels(kernel_dtype(dtype)).layer, compute_type(dtype), H, P),
        header(dtype, type, I, H, P, ih.bytes() + hh.bytes() + hr.bytes()) {}
  // data: behind the header.
  void lie_at(void* data) {
    ih.lie_at(data);
    hh.lie_at(advance(data, ih.bytes()));
    hr.lie_at(advance(data, ih.bytes() + hh.bytes()));
  }
  int64_t bytes() const { return static_cast<int64_t>(sizeof(header)) + header.bytes; }
};

constexpr int64_t kMostTerms = int64_t{1} << 17;

// Whether weights can be stored so for such activations.
bool has_weights(at::ScalarType dtype, int64_t type) {
  return type >= 0 && type < kWeightTypes &&
         weight_kernels(kernel_dtype(dtype), static_cast<WeightType>(type)).pack_gates != nullptr;
}

PackedLayer packed_layer(const Tensor& w_ih, const Tensor& w_hh, int64_t weights,
                         const std::optional<Tensor>& w_hr) {
  const bool projects = defined(w_hr);
  TORCH_CHECK(!projects || (w_hr->dim() == 2 && w_hh.dim() == 2 && w_hr->size(0) > 0 &&
                            w_hh.size(1) == w_hr->size(0)),
              "lstm_layer_pack: w_hh and w_hr must be (4H, P) and (P, H), got ", w_hh.sizes(),
              " and ", projects ? w_hr->sizes() : w_hh.sizes());
  const int64_t P = projects ? w_hr->size(0) : 0;
  const int64_t H = projects ? w_hr->size(1) : w_hh.dim() == 2 ? w_hh.size(1) : 0;
  const auto gates_of = [](const Tensor& w, int64_t H) {
    return w.dim() == 2 && w.size(0) == 4 * H;
  };
  TORCH_CHECK(gates_of(w_hh, H) && gates_of(w_ih, H),
              "lstm_layer_pack: w_ih and w_hh must be (4H, I) and (4H, H), got ", w_ih.sizes(),
              " and ", w_hh.sizes());
  const at::ScalarType dtype = w_ih.scalar_type();
  TORCH_CHECK(w_hh.scalar_type() == dtype && w_ih.layout() == at::kStrided &&
                  w_hh.layout() == at::kStrided && w_hh.device() == w_ih.device() &&
                  fused_dtype(dtype) && (!projects || alike(*w_hr, w_ih)),
              "lstm_layer_pack: the weights must be dense, on one device, and of one dtype out of "
              "float32, float64, bfloat16 and float16");
  TORCH_CHECK(has_weights(dtype, weights), "lstm_layer_pack: there are no weights of type ",
              weights, " for ", dtype);
  TORCH_CHECK(weights < kFirstIntegerType || std::max(w_ih.size(1), w_hh.size(1)) <= kMostTerms,
              "lstm_layer_pack: sums of more than ", kMostTerms,
              " products of 8-bit integers may not fit into 32 bits");
  return {dtype, static_cast<WeightType>(weights), w_ih.size(1), H, P};
}

Tensor lstm_layer_pack(const Tensor& w_ih, const Tensor& w_hh, int64_t weights,
                       const std::optional<Tensor>& w_hr) {
  PackedLayer layer = packed_layer(w_ih, w_hh, weights, w_hr);
  check_all_allocated(w_ih, w_hh, w_hr);
  const Tensor packed = empty({layer.bytes()}, kPackedType);
  std::memcpy(packed.mutable_data_ptr(), &layer.header, sizeof(layer.header));
  layer.lie_at(advance(packed.mutable_data_ptr(), sizeof(layer.header)));
  const Dense dense_ih(w_ih), dense_hh(w_hh), dense_hr(w_hr);
  const int64_t I = w_ih.size(1), H = layer.header.H;
  const int64_t blocks = cpu::kernels(kernel_dtype(w_ih.scalar_type())).layer.unit_blocks(H);
  cpu::run(blocks, 4 * H * (I + H), [&](int64_t first, int64_t last) {
    layer.ih.pack(dense_ih.data(), first, last);
    layer.hh.pack(dense_hh.data(), first, last);
    if (const int64_t panels = layer.hr.blocks(); defined(w_hr))
      layer.hr.pack_transposed(dense_hr.data(), panels * first / blocks, panels * last / blocks);
  });
  return packed;
}

// The result's size alone.
Tensor lstm_layer_pack_meta(const Tensor& w_ih, const Tensor& w_hh, int64_t weights,
                            const std::optional<Tensor>& w_hr) {
  return w_ih.new_empty({packed_layer(w_ih, w_hh, weights, w_hr).bytes()}, at::dtype(kPackedType));
}

// Whether packed weights have a projection among them.
bool is_packed_projection(const Tensor& packed) {
  PackedHeader header(at::kFloat, WeightType::kWhole, 0, 0, 0, 0);
  if (packed.scalar_type() != kPackedType || packed.dim() != 1 || !packed.is_contiguous() ||
      packed.nbytes() < sizeof(header))
    return false;
  check_allocated(packed);
  std::memcpy(static_cast<void*>(&header), packed.const_data_ptr(), sizeof(header));
  return header.P > 0;
}

LayerOutputs lstm_layer_packed(const PackedLayerInputs& from) {
  const Tensor& packed = from.packed;
  const Tensor none;
  const LayerInputs in = {{from.input, from.hx, from.cx, none, none, from.b_ih, from.b_hh,
                           from.unit_weights, from.variant},
                          from.batch_sizes,
                          from.reset,
                          from.reverse};
  const bool projects = in.hx.dim() == 2 && in.cx.dim() == 2 && is_packed_projection(packed);
  check_packed_inputs(in, projects);
  check_all_allocated(from);
  log_cpu_path("lstm_layer_packed", in.input, in.cx);
  const at::ScalarType dtype = in.hx.scalar_type();
  const int64_t I = in.input.size(-1), H = in.cx.size(1), P = projects ? in.hx.size(1) : 0;
  PackedHeader found(dtype, WeightType::kWhole, I, H, P, 0);
  TORCH_CHECK(packed.scalar_type() == kPackedType && packed.dim() == 1 && packed.is_contiguous() &&
                  packed.nbytes() >= sizeof(found),
              "lstm_layer_packed: packed must be the result of lstm_layer_pack");
  std::memcpy(static_cast<void*>(&found), packed.const_data_ptr(), sizeof(found));
  const WeightType type = has_weights(dtype, found.weights) ? static_cast<WeightType>(found.weights)
                                                            : WeightType::kWhole;
  PackedLayer wanted(dtype, type, I, H, P);
  TORCH_CHECK(found == wanted.header && packed.numel() == wanted.bytes(),
              "lstm_layer_packed: the weights were packed for ", describe(found), ", not for ",
              describe(wanted.header), "; pack (freeze) them again");
  wanted.lie_at(const_cast<void*>(advance(packed.const_data_ptr(), sizeof(found))));
  const PackedWeights before = {wanted.ih.at(0), projects ? wanted.hr.at(0) : nullptr, type};
  LayerTensors out = layer_forward(in, false, before);
  return {std::move(out.output), std::move(out.hy), std::move(out.cy)};
}

}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, CPU, m) {
  ops::lstm_layer_pack::implement<lstm_layer_pack>(m);
  ops::lstm_layer_packed::implement<lstm_layer_packed>(m);
}

TORCH_LIBRARY_IMPL(lstm_ext, Meta, m) { ops::lstm_layer_pack::implement<lstm_layer_pack_meta>(m); }

}  // namespace lstm_ext::cpu
