// The weights of a layer as its forward takes them, packed block by block: for one call, or before
// many (lstm_layer_pack).
#pragma once

#include <cstring>
#include <string>

#include "cpu/tensors.h"

namespace lstm_ext::cpu {

// One of the two matrices, [4H, K].
class PackedGates {
 public:
  PackedGates(Dtype dtype, WeightType type, int64_t K, int64_t H)
      : weights_(weight_kernels(dtype, type)),
        K_(K),
        H_(H),
        blocks_(kernels(dtype).layer.unit_blocks(H)) {}

  int64_t block_bytes() const { return weights_.block_bytes(K_); }
  int64_t bytes() const { return blocks_ * block_bytes(); }
  void lie_at(void* data) { data_ = data; }
  void* at(int64_t block) const { return advance(data_, block * block_bytes()); }
  void pack(const void* w, int64_t first, int64_t last) const { pack(w, first, last, at(first)); }
  void pack(const void* w, int64_t first, int64_t last, void* to) const {
    weights_.pack_gates(w, K_, H_, to, first, last);
  }

 private:
  const WeightKernels& weights_;
  const int64_t K_, H_, blocks_;
  void* data_ = nullptr;
};

// A matrix [depth, columns] as panels of its columns (layer_kernels.h), with blocks for as many
// threads as will share them, if vectors are not too few.
class PackedColumns {
 public:
  PackedColumns(const LayerKernels& kernels, at::ScalarType compute, int64_t depth, int64_t columns,
                int64_t shares = 1)
      : kernels_(kernels),
        panels_{depth, columns, kUnitBlocks},
        block_bytes_(kernels.panel_elements(depth) * static_cast<int64_t>(elementSize(compute))) {
    while (panels_.vectors > 1 && blocks() < shares) panels_.vectors /= 2;
  }

  const ColumnPanels& panels() const { return panels_; }
  int64_t blocks() const {
    return (kernels_.unit_blocks(panels_.columns) + panels_.vectors - 1) / panels_.vectors;
  }
  int64_t bytes() const { return blocks() * block_bytes_; }
  void lie_at(void* data) { data_ = data; }
  void* at(int64_t block) const { return advance(data_, block * block_bytes_); }
  void pack(const void* m, int64_t first, int64_t last) const {
    kernels_.pack_columns(panels_, m, at(first), first, last);
  }
  // Of the transpose, [columns, depth].
  void pack_transposed(const void* m, int64_t first, int64_t last) const {
    kernels_.pack_rows(panels_, m, at(first), first, last);
  }

 private:
  const LayerKernels& kernels_;
  ColumnPanels panels_;
  const int64_t block_bytes_;
  void* data_ = nullptr;
};

// What lstm_layer_pack returns: a header, then the matrices. The header says for which kernels
// they were packed; other kernels would read them wrongly.
struct PackedHeader {
  char instruction_set[16];
  int64_t P;  // 0 without a projection
  int64_t dtype, weights, I, H, bytes;

  PackedHeader(at::ScalarType scalar_type, WeightType type, int64_t input_size, int64_t hidden_size,
               int64_t projected_size, int64_t total)
      : instruction_set(),
        P(projected_size),
        dtype(static_cast<int64_t>(scalar_type)),
        weights(static_cast<int64_t>(type)),
        I(input_size),
        H(hidden_size),
        bytes(total) {
    std::strncpy(instruction_set, active_instruction_set(), sizeof(instruction_set) - 1);
  }
  bool operator==(const PackedHeader& other) const {
    return std::strncmp(instruction_set, other.instruction_set, sizeof(instruction_set)) == 0 &&
           P == other.P && dtype == other.dtype && weights == other.weights && I == other.I &&
           H == other.H && bytes == other.bytes;
  }
};
inline std::string describe(const PackedHeader& header) {
  const size_t length = strnlen(header.instruction_set, sizeof(header.instruction_set));
  return c10::str(static_cast<at::ScalarType>(header.dtype), " ", header.I, " -> ", header.H,
                  header.P > 0 ? c10::str(" -> ", header.P) : "", " and ",
                  std::string(header.instruction_set, length));
}
static_assert(sizeof(PackedHeader) == 64 && std::is_trivially_copyable_v<PackedHeader>);

}  // namespace lstm_ext::cpu
