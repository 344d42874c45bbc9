// The CUDA kernel of a whole layer on the CPU, against plain loops in double precision. Built by
// tests/test_cuda_emu.py. "few" as argument: few cases. Exit status 0 if all agree.
#include <string>

#include "buffer.h"
#include "cuda/kernels.h"

namespace {

using namespace lstm_ext::cuda;
using check::Buffer;
using check::draw;
using check::sigmoid;
using check::Values;

check::Report report;
bool few = false;

struct Case {
  int L, N, H;
  bool packed, reverse, reset, bias, off;
};

struct Outputs {
  Values output, hy, cy, gates, c_before;
};

// Rounds to T what the kernel rounds from step to step.
template <class T>
Outputs expect(const Case& test, const std::vector<int64_t>& offsets, const Values& products,
               const Values& w_hh, const Values& b_ih, const Values& b_hh,
               const std::vector<char>& reset, Values h, Values c) {
  const int H = test.H;
  const size_t S = offsets.back();
  Outputs out = {Values(S * H), {}, {}, Values(S * 4 * H), Values(S * H)};
  for (int step = 0; step < test.L; ++step) {
    const int t = test.reverse ? test.L - 1 - step : step;
    for (int64_t n = 0; n < offsets[t + 1] - offsets[t]; ++n) {
      const size_t row = offsets[t] + n;
      if (test.reset && reset[t * test.N + n])
        for (int u = 0; u < H; ++u) h[n * H + u] = c[n * H + u] = 0;
      Values next(H);
      for (int u = 0; u < H; ++u) {
        double gate[4];
        for (int q = 0; q < 4; ++q) {
          gate[q] = products[row * 4 * H + q * H + u];
          if (test.bias) gate[q] += b_ih[q * H + u] + b_hh[q * H + u];
          for (int k = 0; k < H; ++k) gate[q] += w_hh[(q * H + u) * H + k] * h[n * H + k];
          gate[q] = q == 2 ? std::tanh(gate[q]) : sigmoid(gate[q]);
          out.gates[row * 4 * H + q * H + u] = gate[q];
        }
        double& state = c[n * H + u];
        out.c_before[row * H + u] = state;
        const double exact = gate[1] * state + gate[0] * gate[2];
        state = static_cast<double>(T(exact));
        next[u] = static_cast<double>(T(gate[3] * std::tanh(exact)));
      }
      for (int u = 0; u < H; ++u) h[n * H + u] = out.output[row * H + u] = next[u];
    }
  }
  out.hy = h;
  out.cy = c;
  return out;
}

// Shared memory for a test: enough for all of w_hh, or the least that will do, so that the units
// are spread over many blocks.
enum class Shared { kAll, kLeast };

template <class T>
void check_layer(const Case& test, Shared shared, bool tf32 = false) {
  Device device = {132, 227 * 1024, tf32};
  if (shared == Shared::kLeast) {
    LayerForward<T> sizes = {};
    sizes.L = test.L, sizes.N = test.N, sizes.H = test.H;
    device.shared_per_block = 64;
    while (!layer_forward_fits(sizes, device)) device.shared_per_block += 64;
  }
  const auto [L, N, H, packed, reverse, with_reset, bias, off] = test;
  report.where = std::string(check::name<T>()) + " " + std::to_string(L) + "x" + std::to_string(N) +
                 "x" + std::to_string(H) + (packed ? " packed" : "") + (reverse ? " reverse" : "") +
                 (with_reset ? " reset" : "") + (off ? " off" : "") + (device.tf32 ? " tf32" : "") +
                 " shared " + std::to_string(device.shared_per_block);
  std::mt19937 random(L * 7 + N * 31 + H);
  std::vector<int64_t> offsets = {0};
  for (int t = 0; t < L; ++t) {
    const int rows = packed ? std::max(1, N - t * N / L) : N;
    offsets.push_back(offsets.back() + rows);
  }
  const size_t S = offsets.back(), states = static_cast<size_t>(N) * H;
  std::vector<char> reset(static_cast<size_t>(L) * N);
  for (char& flag : reset) flag = random() % 4 == 0;
  const double scale = 1 / std::sqrt(H);
  const Values products = draw<T>(S * 4 * H, 1, random), hx = draw<T>(states, 1, random),
               cx = draw<T>(states, 1, random), w_hh = draw<T>(size_t{4} * H * H, scale, random),
               b_ih = draw<T>(4 * H, scale, random), b_hh = draw<T>(4 * H, scale, random);
  const Outputs expected = expect<T>(test, offsets, products, w_hh, b_ih, b_hh, reset, hx, cx);
  // Errors of one step go into the next, but fade.
  const double tolerance = device.tf32 ? 1e-2 : (sizeof(T) >= 4 ? 256 : 4) * check::spacing<T>();

  Buffer<T> products_(products, off), hx_(hx, off), cx_(cx, off), w_hh_(w_hh, off);
  Buffer<T> b_ih_(b_ih, off), b_hh_(b_hh, off);
  Buffer<T> first(S * H);
  std::unique_ptr<bool[]> flags(new bool[reset.size()]);
  for (size_t k = 0; k < reset.size(); ++k) flags[k] = reset[k] != 0;
  for (unsigned order = 0; order < 2; ++order) {
    cuda_emu::seed = order;
    const bool keeps = order == 0;
    Buffer<T> output(S * H, off), hy(states, off), cy(states, off), gates(4 * S * H, off);
    Buffer<T> c_before(S * H, off), h_buffers(2 * states, off);
    const LayerForward<T> call = {products_.at(),
                                  hx_.at(),
                                  cx_.at(),
                                  w_hh_.at(),
                                  bias ? b_ih_.at() : nullptr,
                                  bias ? b_hh_.at() : nullptr,
                                  packed ? offsets.data() : nullptr,
                                  with_reset ? flags.get() : nullptr,
                                  output.at(),
                                  hy.at(),
                                  cy.at(),
                                  keeps ? gates.at() : nullptr,
                                  keeps ? c_before.at() : nullptr,
                                  h_buffers.at(),
                                  L,
                                  N,
                                  H,
                                  reverse};
    report.that(layer_forward_fits(call, device), "it fits");
    const unsigned long before = cuda_emu::launches;
    report.that(layer_forward(call, device, nullptr) == cudaSuccess, "it ran");
    report.that(cuda_emu::launches == before + 1, "in one launch");
    report.close(output.values(), expected.output, tolerance, "output");
    report.close(hy.values(), expected.hy, tolerance, "h_n");
    report.close(cy.values(), expected.cy, tolerance, "c_n");
    if (keeps) {
      report.close(gates.values(), expected.gates, tolerance, "gates");
      report.close(c_before.values(), expected.c_before, tolerance, "c before");
      std::memcpy(first.at(), output.at(), S * H * sizeof(T));
    } else {
      report.that(first.same_bits(output), "the same bits in another order of threads");
    }
  }
}

template <class T>
void check_all() {
  for (const Shared shared : {Shared::kAll, Shared::kLeast})
    for (const bool off : {false, true}) {
      if (few && off) continue;
      check_layer<T>({3, 1, 2, false, false, false, true, off}, shared);
      check_layer<T>({4, 3, 8, true, true, true, !off, off}, shared);
      check_layer<T>({4, 5, 24, true, false, true, off, off}, shared);
      if (few || off) continue;
      check_layer<T>({3, 4, 16, false, true, false, true, off}, shared);
      check_layer<T>({2, 11, 40, false, false, true, true, off}, shared);
      check_layer<T>({3, 20, 33, true, true, true, true, off}, shared);
      check_layer<T>({2, 40, 32, true, true, true, true, off}, shared);
    }
}

// What does not fit is said to: too little memory, too few multiprocessors, too many rows.
void check_fits() {
  report.where = "fits";
  LayerForward<float> sizes = {};
  sizes.L = 5, sizes.N = 2, sizes.H = 64;
  report.that(!layer_forward_fits(sizes, {132, 1024, false}), "not in a KiB");
  sizes.H = 512;
  report.that(layer_forward_fits(sizes, {132, 227 * 1024, false}), "512 units on an H100");
  report.that(!layer_forward_fits(sizes, {8, 227 * 1024, false}), "not on 8 multiprocessors");
  sizes.N = 1000;
  report.that(!layer_forward_fits(sizes, {132, 227 * 1024, false}), "not with 1000 rows");
  sizes.H = 64;
  report.that(layer_forward_fits(sizes, {132, 227 * 1024, false}), "1000 rows of 64 units");
}

}  // namespace

int main(int count, char** arguments) {
  few = count > 1 && std::string(arguments[1]) == "few";
  check_all<float>();
  check_all<double>();
  check_all<__half>();
  check_all<__nv_bfloat16>();
  check_layer<float>({3, 5, 24, true, true, true, true, false}, Shared::kAll, true);
  check_layer<float>({3, 17, 16, false, false, true, true, false}, Shared::kLeast, true);
  check_fits();
  return report.finish();
}
