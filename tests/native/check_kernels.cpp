// The CPU kernels without PyTorch: every table this machine can run, against plain loops in double
// precision, on buffers of exactly the size that the kernels may touch, so that a sanitizer sees
// every stray access. Built by tests/test_native.py. Exit status 0 if all agree.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "vnni_by_hand.h"

namespace {

using lstm_ext::cpu::CellKernels;
using lstm_ext::cpu::Dtype;
using lstm_ext::cpu::ProductKernels;
using Values = std::vector<double>;
using Bytes = std::vector<unsigned char>;

struct Table {
  const char* name;
  const lstm_ext::cpu::Kernels* kernels;
  Dtype dtype;
};

int size_of(Dtype dtype) { return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2; }
Dtype compute_type(Dtype dtype) { return dtype == Dtype::kDouble ? dtype : Dtype::kFloat; }
// The distance of neighbouring numbers about 1.
double spacing(Dtype dtype) {
  const int bits[] = {23, 52, 7, 10};
  return std::ldexp(1.0, -bits[static_cast<int>(dtype)]);
}

void put(Dtype dtype, unsigned char* to, double value) {
  const auto narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  if (dtype == Dtype::kDouble) {
    std::memcpy(to, &value, 8);
  } else if (dtype == Dtype::kFloat) {
    std::memcpy(to, &narrow, 4);
  } else if (dtype == Dtype::kBFloat16) {
    const auto half = static_cast<uint16_t>(bits >> 16);
    std::memcpy(to, &half, 2);
  } else {  // the low bits are dropped, and numbers too small to be normal
    const auto half = static_cast<uint16_t>(std::abs(value) < 0x1p-14
                                                ? 0
                                                : (bits >> 16 & 0x8000) |
                                                      ((bits & 0x7fffffff) - (112u << 23)) >> 13);
    std::memcpy(to, &half, 2);
  }
}
double get(Dtype dtype, const unsigned char* from) {
  if (dtype == Dtype::kDouble) {
    double value;
    std::memcpy(&value, from, 8);
    return value;
  }
  if (dtype == Dtype::kFloat) {
    float value;
    std::memcpy(&value, from, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, from, 2);
  if (dtype == Dtype::kBFloat16) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double magnitude =
      exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return half & 0x8000 ? -magnitude : magnitude;
}

Bytes pack(Dtype dtype, const Values& values) {
  Bytes bytes(values.size() * size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i)
    put(dtype, bytes.data() + i * size_of(dtype), values[i]);
  return bytes;
}
Values unpack(Dtype dtype, const Bytes& bytes) {
  Values values(bytes.size() / size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = get(dtype, bytes.data() + i * size_of(dtype));
  return values;
}

std::mt19937 generator(0);
// Numbers that the dtype holds exactly.
Values random(Dtype dtype, int64_t size) {
  std::uniform_real_distribution<double> uniform(0.1, 1.0);
  Values values(size);
  for (double& value : values) value = generator() % 2 ? uniform(generator) : -uniform(generator);
  return unpack(dtype, pack(dtype, values));
}

int failures = 0, comparisons = 0;

void compare(const Table& table, const char* what, int64_t N, int64_t I, int64_t H, Dtype dtype,
             const Bytes& got, const Values& expected, double scale) {
  const Values values = unpack(dtype, got);
  double worst = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const double error = std::abs(values[i] - expected[i]);
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
  }
  ++comparisons;
  // Rounding of the result, and of what goes into it (bfloat16 gate gradients, say).
  if (worst <= 8 * scale * spacing(table.dtype)) return;
  ++failures;
  std::printf("%-11s dtype %d %s at N %ld I %ld H %ld: error %g\n", table.name,
              static_cast<int>(table.dtype), what, static_cast<long>(N), static_cast<long>(I),
              static_cast<long>(H), worst);
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// a [rows, depth] * b [depth, columns], or with a transposed.
Values multiply(const Values& a, bool transposed, const Values& b, int64_t rows, int64_t depth,
                int64_t columns) {
  std::vector<long double> c(rows * columns);  // long sums, of which double would lose a little
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < columns; ++j)
        c[r * columns + j] += a[transposed ? k * rows + r : r * depth + k] * b[k * columns + j];
  return Values(c.begin(), c.end());
}

// Rows two by two, as pairs of k.
Bytes row_pairs(Dtype dtype, const Values& m, int64_t rows, int64_t columns) {
  const int64_t pairs = (rows + 1) / 2;
  Values values(2 * pairs * columns);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; ++j)
      values[(r / 2 * columns + j) * 2 + r % 2] = m[r * columns + j];
  return pack(dtype, values);
}
Bytes padded_rows(Dtype dtype, const Values& m, int64_t rows, int64_t columns) {
  const int64_t width = (columns + 1) / 2 * 2;
  Values values(rows * width);
  for (int64_t r = 0; r < rows; ++r)
    std::copy_n(m.data() + r * columns, columns, values.data() + r * width);
  return pack(dtype, values);
}

constexpr lstm_ext::cpu::CellKind kPlain = {0, nullptr};  // torch's cell

void check_product(const Table& table, const Values& grad_gates, bool transposed, int64_t N,
                   int64_t H, const Values& b, int64_t columns) {
  const ProductKernels& kernels = table.kernels->product;
  const Dtype dtype = table.dtype, compute = compute_type(dtype);
  const int64_t rows = transposed ? 4 * H : N, depth = transposed ? N : 4 * H;
  const bool pairs = kernels.pair_rows && kernels.packs(rows, depth);
  const Bytes a = !pairs       ? pack(compute, grad_gates)
                  : transposed ? row_pairs(dtype, grad_gates, N, 4 * H)
                               : padded_rows(dtype, grad_gates, N, 4 * H);
  const Values before = random(dtype, rows * columns);
  Values expected = multiply(grad_gates, transposed, b, rows, depth, columns);
  for (size_t i = 0; i < expected.size(); ++i) expected[i] += before[i];
  Bytes c = pack(dtype, before);
  // Where it may, b comes in two pieces, the cut anywhere.
  const bool pieces = !kernels.pair_rows && kernels.packs(rows, depth) && columns % 2;
  const int64_t head = pieces ? depth / 3 : depth;
  const Bytes b_bytes = pack(dtype, Values(b.begin(), b.begin() + head * columns)),
              tail = pack(dtype, Values(b.begin() + head * columns, b.end()));
  const int64_t parts = kernels.parts(rows, depth, columns);
  Bytes terms(parts > 1 ? parts * rows * columns * size_of(compute) : 0);
  const lstm_ext::cpu::ProductArgs args = {rows,
                                           columns,
                                           depth,
                                           a.data(),
                                           transposed ? 1
                                           : pairs    ? 2 * H
                                                      : 4 * H,
                                           transposed ? 4 * H : 1,
                                           b_bytes.data(),
                                           parts > 1 ? terms.data() : c.data(),
                                           true,
                                           N % 3 + 1,
                                           tail.empty() ? nullptr : tail.data(),
                                           head};
  const int64_t tasks = kernels.tasks(args);
  kernels.run(args, tasks / 2, tasks);
  kernels.run(args, 0, tasks / 2);
  if (parts > 1) kernels.add_up(terms.data(), parts, rows * columns, c.data(), true);
  compare(table, transposed ? "weight gradient" : "state gradient", N, columns, H, dtype, c,
          expected, std::sqrt(static_cast<double>(depth)) + 4);
}

// The layer's kernels for one step: the same numbers as the cell's, from packed weights.
struct Step {
  int64_t N, I, H;
  const Bytes &x_factors, &h_factors, &c, &w_ih, &w_hh, &b_ih, &b_hh;
  const Values &hy, &cy, &gates;  // expected
};
void check_step(const Table& table, const Step& step, double terms) {
  const auto& layer = table.kernels->layer;
  const Dtype dtype = table.dtype, compute = compute_type(dtype);
  const auto& [N, I, H, x_factors, h_factors, c, w_ih, w_hh, b_ih, b_hh, hy, cy, gates] = step;
  const int64_t blocks = layer.unit_blocks(H);
  const bool pairs = table.kernels->product.pair_rows != nullptr;
  const auto& weights = layer.weights[static_cast<int>(lstm_ext::cpu::WeightType::kWhole)];
  Bytes packed_ih(blocks * weights.block_bytes(I)), packed_hh(blocks * weights.block_bytes(H));
  weights.pack_gates(w_ih.data(), I, H, packed_ih.data(), 0, blocks);
  weights.pack_gates(w_hh.data(), H, H, packed_hh.data(), 0, blocks);
  Bytes sums(N * layer.sums_per_row(H) * size_of(compute));
  const lstm_ext::cpu::GateSums chunk = {sums.data(), N};
  weights.gate_product({N, H, H, h_factors.data(), packed_hh.data(), chunk, 0, false}, 0, blocks);
  weights.gate_product({N, I, H, x_factors.data(), packed_ih.data(), chunk, 0, true}, 0, blocks);
  Bytes c_state = c, c_before(c.size()), output(c.size()), gates_bytes(4 * c.size());
  Bytes h_state(h_factors.size());
  // The last row starts again at the next step: h from given numbers, c from zero.
  const auto reset = std::make_unique<bool[]>(N);
  reset[N - 1] = true;
  const Values start = random(dtype, N * H);
  const Bytes reset_h = pack(dtype, start);
  Bytes cells(c.size());
  lstm_ext::cpu::StepArgs args = {};
  args.rows = N;
  args.H = H;
  args.sums = chunk;
  args.b_ih = b_ih.data();
  args.b_hh = b_hh.data();
  args.cell = kPlain;
  args.c = c_state.data();
  args.h_factors = h_state.data();
  args.output = output.data();
  args.gates = gates_bytes.data();
  args.c_before = c_before.data();
  args.cells = cells.data();
  args.reset_next = reset.get();
  args.reset_h = reset_h.data();
  layer.step(args, 0, blocks);
  Values c_next = cy, h_next = hy;
  std::fill_n(c_next.end() - H, H, 0.0);
  std::copy(start.end() - H, start.end(), h_next.end() - H);
  compare(table, "step: h", N, I, H, dtype, output, hy, terms);
  compare(table, "step: c", N, I, H, dtype, c_state, c_next, terms);
  compare(table, "step: c of every step", N, I, H, dtype, cells, cy, terms);
  compare(table, "step: gates", N, I, H, dtype, gates_bytes, gates, terms);
  compare(table, "step: c before", N, I, H, dtype, c_before, unpack(dtype, c), 0);
  const Dtype state = pairs ? dtype : compute;
  compare(table, "step: h for the next", N, I, H, state, h_state,
          pairs && H % 2 ? unpack(dtype, padded_rows(dtype, h_next, N, H)) : h_next, terms);
}

// Rows as their scale times integers, as csrc/cpu/integer_weights.h says, in its own precision.
Values rounded_rows(const Values& m, int64_t columns, int64_t levels) {
  Values rounded(m.size());
  for (size_t row = 0; row < m.size(); row += columns) {
    float most = 0;
    for (int64_t k = 0; k < columns; ++k)
      most = std::max(most, static_cast<float>(std::abs(m[row + k])));
    const float scale = most / static_cast<float>(levels);
    const float inverse = static_cast<float>(levels) / most;
    for (int64_t k = 0; k < columns; ++k)
      rounded[row + k] =
          most > 0 ? double{scale} * std::nearbyint(static_cast<float>(m[row + k]) * inverse) : 0;
  }
  return rounded;
}

// Products of weights that are stored in another type than their activations.
void check_weights(const Table& of_layer, const char* name,
                   const lstm_ext::cpu::WeightKernels& weights, lstm_ext::cpu::WeightType type,
                   int64_t N, int64_t K, int64_t H) {
  using lstm_ext::cpu::WeightType;
  const auto& layer = of_layer.kernels->layer;
  const int64_t blocks = layer.unit_blocks(H), stride = layer.sums_per_row(H) / blocks;
  const int64_t width = stride / 4, rows_of_sums = N + 2;  // those around stay as they are
  const bool dense = 2 * H <= width;
  // The same numbers for every table. (How they become bfloat16 is checked elsewhere.)
  generator.seed(static_cast<unsigned>(N + K + H));
  Values x = random(Dtype::kFloat, N * K);
  Values w = random(type == WeightType::kBFloat16 ? Dtype::kBFloat16 : Dtype::kFloat, 4 * H * K);
  // A row of zeros, one with an outlier; a column of one value, and one of zeros.
  std::fill_n(x.begin(), K, 0.0);
  if (K > 0) x[(N - 1) * K] = 1000;
  std::fill_n(w.begin(), K, 0.25);
  std::fill_n(w.end() - K, K, 0.0);
  const Bytes x_bytes = pack(Dtype::kFloat, x), w_bytes = pack(Dtype::kFloat, w);
  Bytes packed(blocks * weights.block_bytes(K));
  weights.pack_gates(w_bytes.data(), K, H, packed.data() + blocks / 2 * weights.block_bytes(K),
                     blocks / 2, blocks);
  weights.pack_gates(w_bytes.data(), K, H, packed.data(), 0, blocks / 2);
  const int64_t levels =
      type == WeightType::kInt8
          ? 127
          : std::min<int64_t>(32767, INT32_MAX / (127 * std::max<int64_t>(K, 1)));
  if (type != WeightType::kBFloat16) x = rounded_rows(x, K, levels), w = rounded_rows(w, K, 127);
  Bytes rows(weights.make_rows ? N * weights.row_bytes(K) : 0);
  if (weights.make_rows) weights.make_rows(x_bytes.data(), N, K, rows.data());
  Bytes sums(rows_of_sums * layer.sums_per_row(H) * sizeof(float));
  const void* a = weights.make_rows ? static_cast<const void*>(rows.data()) : x_bytes.data();
  const auto multiply_blocks = [&](int64_t first, int64_t last, bool accumulate) {
    weights.gate_product({N,
                          K,
                          H,
                          a,
                          packed.data() + first * weights.block_bytes(K),
                          {sums.data(), rows_of_sums},
                          1,
                          accumulate},
                         first, last);
  };
  multiply_blocks(0, blocks / 2, false);
  multiply_blocks(blocks / 2, blocks, false);
  multiply_blocks(0, blocks, true);
  Values expected;
  Bytes got;
  for (int64_t n = -1; n <= N; ++n)
    for (int64_t gate = 0; gate < 4; ++gate)
      for (int64_t unit = 0; unit < H; ++unit) {
        double sum = 0;
        for (int64_t k = 0; n >= 0 && n < N && k < K; ++k)
          sum += 2 * x[n * K + k] * w[(gate * H + unit) * K + k];
        const int64_t block = dense ? 0 : unit / width;
        const int64_t column = dense ? gate * H + unit : gate * width + unit % width;
        const unsigned char* at =
            sums.data() + ((block * rows_of_sums + n + 1) * stride + column) * sizeof(float);
        // As a share of the row's greatest sum: an outlier is a thousand times the others.
        const double size = n == N - 1 ? 1000 : 1;
        float value;
        std::memcpy(&value, at, sizeof(value));
        value = static_cast<float>(value / size);
        got.insert(got.end(), reinterpret_cast<unsigned char*>(&value),
                   reinterpret_cast<unsigned char*>(&value) + sizeof(value));
        expected.push_back(sum / size);
      }
  compare({name, of_layer.kernels, Dtype::kFloat},
          type == WeightType::kBFloat16 ? "weights in bfloat16"
          : type == WeightType::kInt8   ? "weights in 8 bits"
                                        : "weights in 8 bits, rows in 16",
          N, K, H, Dtype::kFloat, got, expected, std::sqrt(static_cast<double>(K)) + 4);
  if (type == WeightType::kBFloat16) return;
  // Integers: the same bits on every instruction set.
  static std::map<std::tuple<WeightType, int64_t, int64_t, int64_t>, Bytes> first;
  const auto [found, is_first] = first.emplace(std::tuple(type, N, K, H), got);
  ++comparisons;
  if (found->second == got) return;
  ++failures;
  std::printf("%s: other bits than the first at N %ld I %ld H %ld\n", name, static_cast<long>(N),
              static_cast<long>(K), static_cast<long>(H));
}

int64_t blocks_of(const lstm_ext::cpu::LayerKernels& layer,
                  const lstm_ext::cpu::ColumnPanels& panels) {
  return (layer.unit_blocks(panels.columns) + panels.vectors - 1) / panels.vectors;
}

// h = r W_hr^T, which the last row forgets before the next step, and the gradients of both, of
// panels that whole blocks share, and of such as are cut for more threads. P: as I.
void check_projection(const Table& table, int64_t N, int64_t P, int64_t H) {
  if (P == 0) return;
  const auto& layer = table.kernels->layer;
  const Dtype dtype = table.dtype, compute = compute_type(dtype);
  const bool pairs = table.kernels->product.pair_rows != nullptr;
  const Dtype state = pairs ? dtype : compute;
  const Values r = random(dtype, N * H), w_hr = random(dtype, P * H);
  Values transposed(H * P);
  for (int64_t p = 0; p < P; ++p)
    for (int64_t j = 0; j < H; ++j) transposed[j * P + p] = w_hr[p * H + j];
  const Values h = multiply(r, false, transposed, N, H, P);
  const Bytes weights = pack(dtype, w_hr);
  const Bytes r_factors = pairs ? padded_rows(dtype, r, N, H) : pack(compute, r);
  const auto reset = std::make_unique<bool[]>(N);
  reset[N - 1] = true;
  const double terms = std::sqrt(static_cast<double>(H)) + 4;
  for (const int64_t vectors : {4, 2, 1}) {
    const lstm_ext::cpu::ColumnPanels panels = {H, P, vectors};
    const int64_t blocks = blocks_of(layer, panels);
    Bytes packed(blocks * layer.panel_elements(H) * size_of(compute));
    layer.pack_rows(panels, weights.data(), packed.data(), 0, blocks);
    Bytes sums(N * P * size_of(compute)), output(N * P * size_of(dtype));
    Bytes h_state(N * (pairs ? (P + 1) / 2 * 2 : P) * size_of(state));
    const int64_t first = blocks / 2, block_bytes = layer.panel_elements(H) * size_of(compute);
    for (const auto& [from, to] : {std::pair(first, blocks), std::pair(int64_t{0}, first)})
      if (from < to)
        layer.project({N, panels, r_factors.data(), packed.data() + from * block_bytes, sums.data(),
                       output.data(), h_state.data(), reset.get()},
                      from, to);
    Values h_next = h;
    std::fill_n(h_next.end() - P, P, 0.0);
    compare(table, "projection", N, P, H, dtype, output, h, terms);
    compare(table, "projection for the next", N, P, H, state, h_state,
            pairs && P % 2 ? unpack(dtype, padded_rows(dtype, h_next, N, P)) : h_next, terms);
  }
  const Values grad_output = random(dtype, N * P), after = random(dtype, N * P);
  Values sum = grad_output;
  for (size_t k = 0; k < sum.size(); ++k) sum[k] += after[k];
  const Bytes grad_bytes = pack(dtype, grad_output), after_bytes = pack(compute, after);
  Bytes grad_h(N * P * size_of(compute)), factors(N * ((P + 1) / 2 * 2) * size_of(dtype));
  const int64_t vectors = layer.unit_blocks(P);
  layer.output_gradient({N, P, grad_bytes.data(), after_bytes.data(), grad_h.data(),
                         pairs ? factors.data() : nullptr},
                        0, vectors);
  compare(table, "projection: h gradient", N, P, H, compute, grad_h, sum, 1);
  if (pairs)
    compare(table, "projection: its factors", N, P, H, dtype, factors,
            P % 2 ? unpack(dtype, padded_rows(dtype, sum, N, P)) : sum, 1);
  const lstm_ext::cpu::ColumnPanels panels = {P, H, lstm_ext::cpu::kUnitBlocks};
  const int64_t blocks = blocks_of(layer, panels);
  Bytes packed(blocks * layer.panel_elements(P) * size_of(compute));
  layer.pack_columns(panels, weights.data(), packed.data(), 0, blocks);
  Bytes grad_r(N * H * size_of(compute));
  const Bytes given = pairs ? padded_rows(dtype, after, N, P) : pack(compute, after);
  layer.multiply_columns({N, panels, given.data(), packed.data(), grad_r.data(), H}, 0, blocks);
  compare(table, "projection: r gradient", N, P, H, compute, grad_r,
          multiply(after, false, w_hr, N, P, H), std::sqrt(static_cast<double>(P)) + 4);
}

// grad_h of the step before: grad_gates W_hh, zero for the last row, which was reset.
void check_state_gradient(const Table& table, int64_t N, int64_t H, const Values& grad_gates,
                          const Values& w_hh) {
  const auto& layer = table.kernels->layer;
  const Dtype dtype = table.dtype, compute = compute_type(dtype);
  const bool pairs = table.kernels->product.pair_rows != nullptr;
  const lstm_ext::cpu::ColumnPanels panels = {4 * H, H, lstm_ext::cpu::kUnitBlocks};
  const int64_t blocks = blocks_of(layer, panels);
  const Bytes weights = pack(dtype, w_hh), factors = pack(pairs ? dtype : compute, grad_gates);
  Bytes packed(blocks * layer.panel_elements(4 * H) * size_of(compute));
  Bytes grad_h(N * H * size_of(compute));
  layer.pack_columns(panels, weights.data(), packed.data(), 0, blocks);
  const auto reset = std::make_unique<bool[]>(N);
  reset[N - 1] = true;
  Bytes grad_reset_h = pack(compute, Values(N * H));
  layer.state_gradient(
      {N, panels, factors.data(), packed.data(), grad_h.data(), reset.get(), grad_reset_h.data()},
      0, blocks);
  Values expected = multiply(grad_gates, false, w_hh, N, 4 * H, H), of_reset(N * H);
  std::copy(expected.end() - H, expected.end(), of_reset.end() - H);
  std::fill_n(expected.end() - H, H, 0.0);
  compare(table, "step: gradient of h to reset to", N, 0, H, compute, grad_reset_h, of_reset,
          std::sqrt(static_cast<double>(4 * H)) + 4);
  compare(table, "step: h gradient", N, 0, H, compute, grad_h, expected,
          std::sqrt(static_cast<double>(4 * H)) + 4);
}

void check(const Table& table, int64_t N, int64_t I, int64_t H) {
  const CellKernels& kernels = table.kernels->cell;
  const ProductKernels& products = table.kernels->product;
  const Dtype dtype = table.dtype, compute = compute_type(dtype);
  const Values x = random(dtype, N * I), h = random(dtype, N * H), c = random(dtype, N * H);
  const Values w_ih = random(dtype, 4 * H * I), w_hh = random(dtype, 4 * H * H);
  const Values b_ih = random(dtype, 4 * H), b_hh = random(dtype, 4 * H);
  Values hy(N * H), cy(N * H), gates(N * 4 * H);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t j = 0; j < H; ++j) {
      double a[4];
      for (int64_t gate = 0; gate < 4; ++gate) {
        const int64_t row = gate * H + j;
        a[gate] = b_ih[row] + b_hh[row];
        for (int64_t k = 0; k < I; ++k) a[gate] += x[n * I + k] * w_ih[row * I + k];
        for (int64_t k = 0; k < H; ++k) a[gate] += h[n * H + k] * w_hh[row * H + k];
        a[gate] = gate == 2 ? std::tanh(a[gate]) : sigmoid(a[gate]);
        gates[n * 4 * H + row] = a[gate];
      }
      cy[n * H + j] = a[1] * c[n * H + j] + a[0] * a[2];
      hy[n * H + j] = a[3] * std::tanh(cy[n * H + j]);
    }

  const Bytes x_bytes = pack(dtype, x), h_bytes = pack(dtype, h), c_bytes = pack(dtype, c);
  const Bytes w_ih_bytes = pack(dtype, w_ih), w_hh_bytes = pack(dtype, w_hh);
  const Bytes b_ih_bytes = pack(dtype, b_ih), b_hh_bytes = pack(dtype, b_hh);
  const bool pairs = products.pair_rows != nullptr;
  const Bytes x_factors = pairs ? padded_rows(dtype, x, N, I) : pack(compute, x);
  const Bytes h_factors = pairs ? padded_rows(dtype, h, N, H) : pack(compute, h);
  Bytes hy_bytes(h_bytes.size()), cy_bytes(h_bytes.size()), gates_bytes(4 * h_bytes.size());
  const lstm_ext::cpu::CellForwardArgs forward = {N,
                                                  I,
                                                  H,
                                                  x_bytes.data(),
                                                  h_bytes.data(),
                                                  x_factors.data(),
                                                  h_factors.data(),
                                                  c_bytes.data(),
                                                  w_ih_bytes.data(),
                                                  w_hh_bytes.data(),
                                                  b_ih_bytes.data(),
                                                  b_hh_bytes.data(),
                                                  kPlain,
                                                  hy_bytes.data(),
                                                  cy_bytes.data(),
                                                  gates_bytes.data()};
  const int64_t tasks = kernels.forward_tasks(N, H);
  kernels.forward(forward, tasks / 2, tasks);
  kernels.forward(forward, 0, tasks / 2);
  // In single precision the rounding of a sum of I + H terms comes on top.
  const double terms = std::sqrt(static_cast<double>(I + H)) + 2;
  compare(table, "h", N, I, H, dtype, hy_bytes, hy, terms);
  compare(table, "c", N, I, H, dtype, cy_bytes, cy, terms);
  compare(table, "gates", N, I, H, dtype, gates_bytes, gates, terms);

  check_step(table,
             {N, I, H, x_factors, h_factors, c_bytes, w_ih_bytes, w_hh_bytes, b_ih_bytes,
              b_hh_bytes, hy, cy, gates},
             terms);

  const Values grad_hy = random(dtype, N * H), grad_cy = random(dtype, N * H);
  const Values kept = unpack(dtype, pack(dtype, gates));  // as the kernel will see them
  Values grad_gates(N * 4 * H), grad_cx(N * H), grad_bias(4 * H);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t j = 0; j < H; ++j) {
      const double* gate = &kept[n * 4 * H + j];
      const double i = gate[0], f = gate[H], g = gate[2 * H], o = gate[3 * H];
      const double c_0 = c[n * H + j], tanh_c = std::tanh(f * c_0 + i * g);
      const double d_h = grad_hy[n * H + j];
      const double d_c = grad_cy[n * H + j] + d_h * o * (1 - tanh_c * tanh_c);
      double* d = &grad_gates[n * 4 * H + j];
      d[0] = d_c * g * i * (1 - i);
      d[H] = d_c * c_0 * f * (1 - f);
      d[2 * H] = d_c * i * (1 - g * g);
      d[3 * H] = d_h * tanh_c * o * (1 - o);
      grad_cx[n * H + j] = d_c * f;
      for (int gate_index = 0; gate_index < 4; ++gate_index)
        grad_bias[gate_index * H + j] += d[gate_index * H];
    }
  const Bytes kept_bytes = pack(dtype, gates), grad_hy_bytes = pack(dtype, grad_hy),
              grad_cy_bytes = pack(dtype, grad_cy);
  const int64_t bias_blocks = lstm_ext::cpu::bias_blocks(N);
  Bytes grad_gates_bytes(N * 4 * H * size_of(compute)), grad_cx_bytes(c_bytes.size()),
      sums(bias_blocks * 4 * H * size_of(compute)), grad_bias_bytes(b_ih_bytes.size());
  const lstm_ext::cpu::GateGradientArgs gradients = {N,
                                                     H,
                                                     grad_hy_bytes.data(),
                                                     grad_cy_bytes.data(),
                                                     c_bytes.data(),
                                                     kept_bytes.data(),
                                                     kPlain,
                                                     grad_gates_bytes.data(),
                                                     grad_cx_bytes.data(),
                                                     sums.data()};
  kernels.gate_gradients(gradients, 0, kernels.gate_gradient_tasks(N, H));
  products.add_up(sums.data(), bias_blocks, 4 * H, grad_bias_bytes.data(), false);
  compare(table, "gate gradients", N, I, H, compute, grad_gates_bytes, grad_gates, 1);
  compare(table, "c gradient", N, I, H, dtype, grad_cx_bytes, grad_cx, 1);
  compare(table, "bias gradient", N, I, H, dtype, grad_bias_bytes, grad_bias,
          std::sqrt(static_cast<double>(N)) + 1);

  // The same by the layer's kernel, whose gradients of the states are in the compute type.
  const auto reset = std::make_unique<bool[]>(N);
  reset[N - 1] = true;
  // All of the gradient of c' comes through that of the c of every step.
  const Bytes from_after = pack(compute, Values(N * H)), grad_cells = pack(dtype, grad_cy);
  Bytes step_grad_c = from_after, step_gates(N * 4 * H * size_of(compute));
  Bytes step_factors(pairs ? N * 4 * H * size_of(dtype) : 0), grad_reset_c = from_after;
  lstm_ext::cpu::StepGradientArgs step = {};
  step.rows = N;
  step.H = H;
  step.grad_output = grad_hy_bytes.data();
  step.grad_cells = grad_cells.data();
  step.grad_h = from_after.data();
  step.grad_c = step_grad_c.data();
  step.gates = kept_bytes.data();
  step.c_before = c_bytes.data();
  step.cell = kPlain;
  step.grad_gates = step_gates.data();
  if (pairs) step.grad_gates_factors = step_factors.data();
  step.reset = reset.get();
  step.grad_reset_c = grad_reset_c.data();
  table.kernels->layer.step_gradient(step, 0, table.kernels->layer.unit_blocks(H));
  compare(table, "step: gate gradients", N, I, H, compute, step_gates, grad_gates, 1);
  if (pairs) compare(table, "step: their factors", N, I, H, dtype, step_factors, grad_gates, 1);
  Values grad_c = grad_cx;
  std::fill_n(grad_c.end() - H, H, 0.0);
  compare(table, "step: c gradient", N, I, H, compute, step_grad_c, grad_c, 1);
  Values of_reset(N * H);
  std::copy(grad_cx.end() - H, grad_cx.end(), of_reset.end() - H);
  compare(table, "step: gradient of c to reset to", N, I, H, compute, grad_reset_c, of_reset, 1);

  // Gate gradients that every dtype holds exactly, so that only the products are measured.
  const Values factors = random(Dtype::kBFloat16, N * 4 * H);
  if (products.pair_rows) {
    Bytes made((N + 1) / 2 * 4 * H * 4);
    const Bytes single = pack(compute, factors);
    products.pair_rows(single.data(), N, 4 * H, made.data(), 0, (N + 1) / 2);
    ++comparisons;
    if (made != row_pairs(dtype, factors, N, 4 * H)) {
      ++failures;
      std::printf("%s pair_rows at N %ld H %ld\n", table.name, static_cast<long>(N),
                  static_cast<long>(H));
    }
  }
  check_state_gradient(table, N, H, factors, w_hh);
  check_projection(table, N, I, H);
  check_product(table, factors, false, N, H, w_ih, I);
  check_product(table, factors, false, N, H, w_hh, H);
  check_product(table, factors, true, N, H, x, I);
  check_product(table, factors, true, N, H, h, H);
}

}  // namespace

int main() {
  using namespace lstm_ext::cpu;
  std::vector<Table> tables;
  const auto add = [&](const char* name, const lstm_ext::cpu::Kernels* kernels) {
    for (int dtype = 0; dtype < kDtypes; ++dtype)
      tables.push_back({name, &kernels[dtype], static_cast<Dtype>(dtype)});
  };
  add("DEFAULT", kKernelsDefault);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) add("AVX2", kKernelsAVX2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    add("AVX512", kKernelsAVX512);
    if (__builtin_cpu_supports("avx512bf16"))
      tables.push_back({"AVX512_BF16", &kKernelsAVX512BF16, Dtype::kBFloat16});
  }
#endif
  const int64_t shapes[][3] = {{1, 3, 2},     {1, 1, 1},     {2, 5, 7},    {3, 17, 16},
                               {5, 33, 9},    {8, 16, 32},   {9, 20, 5},   {13, 66, 31},
                               {25, 7, 3},    {40, 129, 17}, {193, 10, 8}, {600, 6, 20},
                               {1100, 18, 5}, {2, 0, 4},     {1, 300, 270}};
  struct OfWeights {
    const char* name;
    const Table* layer;
    const WeightKernels* kernels;
    WeightType type;
  };
  std::vector<OfWeights> of_weights;
  for (const Table& table : tables)
    for (const WeightType type : {WeightType::kBFloat16, WeightType::kInt8, WeightType::kInt8Int16})
      if (table.dtype == Dtype::kFloat)
        of_weights.push_back(
            {table.name, &table, &table.kernels->layer.weights[static_cast<int>(type)], type});
#if defined(__x86_64__)
  const auto add_integers = [&](const char* name, const char* layer, const WeightKernels* kernels) {
    for (const Table& table : tables)
      if (table.dtype == Dtype::kFloat && std::string(table.name) == layer)
        for (int type = 0; type < kIntegerTypes; ++type)
          of_weights.push_back(
              {name, &table, &kernels[type], static_cast<WeightType>(kFirstIntegerType + type)});
  };
  add_integers("VNNI by hand", "AVX2", kIntegersByHand);
  if (__builtin_cpu_supports("avx2") && has_avx_vnni())
    add_integers("AVX2_VNNI", "AVX2", kIntegersAVX2VNNI);
  if (__builtin_cpu_supports("avx512vnni"))
    add_integers("AVX512_VNNI", "AVX512", kIntegersAVX512VNNI);
#endif
  for (const auto& shape : shapes) {
    for (const Table& table : tables) check(table, shape[0], shape[1], shape[2]);
    for (const OfWeights& weights : of_weights)
      check_weights(*weights.layer, weights.name, *weights.kernels, weights.type, shape[0],
                    shape[1], shape[2]);
  }
  std::printf("%zu tables, %zu of weights, %d comparisons, %d failures\n", tables.size(),
              of_weights.size(), comparisons, failures);
  return failures != 0;
}
