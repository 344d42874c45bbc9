// The CUDA kernels of a whole layer on the CPU, against plain loops in double precision. Built by
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

struct Gradients {
  Values gates, hx, cx;
};

// Rounds to T what the kernel rounds from step to step: the gradients of the gates.
template <class T>
Gradients expect_back(const Case& test, const std::vector<int64_t>& offsets,
                      const std::vector<char>& reset, const Values& w_hh, const Values& gates,
                      const Values& c_before, const Values& grad_output, Values h, Values c) {
  const int H = test.H;
  Gradients out = {Values(gates.size()), {}, {}};
  for (int step = test.L - 1; step >= 0; --step) {
    const int t = test.reverse ? test.L - 1 - step : step;
    for (int64_t n = 0; n < offsets[t + 1] - offsets[t]; ++n) {
      const size_t row = offsets[t] + n;
      double* const grad = &out.gates[row * 4 * H];
      for (int u = 0; u < H; ++u) {
        const double* const kept = &gates[row * 4 * H + u];
        const double i = kept[0], f = kept[H], g = kept[2 * H], o = kept[3 * H];
        const double before = c_before[row * H + u], tanh_c = std::tanh(f * before + i * g);
        const double grad_h = h[n * H + u] + grad_output[row * H + u];
        const double grad_c = c[n * H + u] + grad_h * o * (1 - tanh_c * tanh_c);
        const double exact[4] = {grad_c * g * i * (1 - i), grad_c * before * f * (1 - f),
                                 grad_c * i * (1 - g * g), grad_h * tanh_c * o * (1 - o)};
        for (int q = 0; q < 4; ++q) grad[q * H + u] = static_cast<double>(T(exact[q]));
        c[n * H + u] = grad_c * f;
      }
      const bool starts = test.reset && reset[t * test.N + n];
      for (int u = 0; u < H; ++u) {
        double sum = 0;
        for (int k = 0; k < 4 * H; ++k) sum += grad[k] * w_hh[k * H + u];
        h[n * H + u] = starts ? 0 : sum;
        if (starts) c[n * H + u] = 0;
      }
    }
  }
  out.hx = h;
  out.cx = c;
  return out;
}

// Shared memory for a test: enough for all of w_hh, or the least that will do, so that the units
// are spread over many blocks.
enum class Shared { kAll, kLeast };

template <class Fits>
Device device_for(Shared shared, bool tf32, const Fits& fits) {
  Device device = {132, 227 * 1024, tf32};
  if (shared == Shared::kAll) return device;
  device.shared_per_block = 64;
  while (!fits(device)) device.shared_per_block += 64;
  return device;
}

void name_case(const char* type, const Case& test, const Device& device) {
  report.where = std::string(type) + " " + std::to_string(test.L) + "x" + std::to_string(test.N) +
                 "x" + std::to_string(test.H) + (test.packed ? " packed" : "") +
                 (test.reverse ? " reverse" : "") + (test.reset ? " reset" : "") +
                 (test.off ? " off" : "") + (device.tf32 ? " tf32" : "") + " shared " +
                 std::to_string(device.shared_per_block);
}

// Steps of a case, and where they lie.
struct Steps {
  Steps(const Case& test, std::mt19937& random) : reset(static_cast<size_t>(test.L) * test.N) {
    for (int t = 0; t < test.L; ++t) {
      const int rows = test.packed ? std::max(1, test.N - t * test.N / test.L) : test.N;
      offsets.push_back(offsets.back() + rows);
    }
    for (char& flag : reset) flag = random() % 4 == 0;
    flags = std::unique_ptr<bool[]>(new bool[reset.size()]);
    for (size_t k = 0; k < reset.size(); ++k) flags[k] = reset[k] != 0;
    sequence = {test.packed ? offsets.data() : nullptr, test.reset ? flags.get() : nullptr, test.L,
                test.N, test.reverse};
  }

  std::vector<int64_t> offsets = {0};
  std::vector<char> reset;
  std::unique_ptr<bool[]> flags;
  Sequence sequence;
};

// Errors of one step go into the next, but fade.
template <class T>
double tolerance(const Device& device) {
  return device.tf32 ? 1e-2 : (sizeof(T) >= 4 ? 256 : 4) * check::spacing<T>();
}

template <class T>
void check_forward(const Case& test, Shared shared, bool tf32 = false) {
  const auto [L, N, H, packed, reverse, with_reset, bias, off] = test;
  const Device device = device_for(shared, tf32, [&, N = N, H = H](const Device& device) {
    LayerForward<T> sizes = {};
    sizes.sequence.N = N, sizes.H = H;
    return layer_forward_fits(sizes, device);
  });
  name_case(check::name<T>(), test, device);
  std::mt19937 random(L * 7 + N * 31 + H);
  const Steps steps(test, random);
  const size_t S = steps.offsets.back(), states = static_cast<size_t>(N) * H;
  const double scale = 1 / std::sqrt(H);
  const Values products = draw<T>(S * 4 * H, 1, random), hx = draw<T>(states, 1, random),
               cx = draw<T>(states, 1, random), w_hh = draw<T>(size_t{4} * H * H, scale, random),
               b_ih = draw<T>(4 * H, scale, random), b_hh = draw<T>(4 * H, scale, random);
  const Outputs expected =
      expect<T>(test, steps.offsets, products, w_hh, b_ih, b_hh, steps.reset, hx, cx);
  const double allowed = tolerance<T>(device);

  Buffer<T> products_(products, off), hx_(hx, off), cx_(cx, off), w_hh_(w_hh, off);
  Buffer<T> b_ih_(b_ih, off), b_hh_(b_hh, off);
  Buffer<T> first(S * H);
  for (unsigned order = 0; order < 2; ++order) {
    cuda_emu::seed = order;
    const bool keeps = order == 0;
    Buffer<T> output(S * H, off), hy(states, off), cy(states, off), gates(4 * S * H, off);
    Buffer<T> c_before(S * H, off), h_buffers(2 * states, off);
    const LayerForward<T> call = {steps.sequence,
                                  products_.at(),
                                  hx_.at(),
                                  cx_.at(),
                                  w_hh_.at(),
                                  bias ? b_ih_.at() : nullptr,
                                  bias ? b_hh_.at() : nullptr,
                                  output.at(),
                                  hy.at(),
                                  cy.at(),
                                  keeps ? gates.at() : nullptr,
                                  keeps ? c_before.at() : nullptr,
                                  h_buffers.at(),
                                  H};
    report.that(layer_forward_fits(call, device), "it fits");
    const unsigned long before = cuda_emu::launches;
    report.that(layer_forward(call, device, nullptr) == cudaSuccess, "it ran");
    report.that(cuda_emu::launches == before + 1, "in one launch");
    report.close(output.values(), expected.output, allowed, "output");
    report.close(hy.values(), expected.hy, allowed, "h_n");
    report.close(cy.values(), expected.cy, allowed, "c_n");
    if (keeps) {
      report.close(gates.values(), expected.gates, allowed, "gates");
      report.close(c_before.values(), expected.c_before, allowed, "c before");
      std::memcpy(first.at(), output.at(), S * H * sizeof(T));
    } else {
      report.that(first.same_bits(output), "the same bits in another order of threads");
    }
  }
}

template <class T>
void check_backward(const Case& test, Shared shared, bool tf32 = false) {
  const auto [L, N, H, packed, reverse, with_reset, all, off] = test;
  const Device device = device_for(shared, tf32, [&, N = N, H = H](const Device& device) {
    LayerBackward<T> sizes = {};
    sizes.sequence.N = N, sizes.H = H;
    return layer_backward_fits(sizes, device);
  });
  name_case(check::name<T>(), test, device);
  report.where += " backward";
  std::mt19937 random(L * 5 + N * 37 + H);
  const Steps steps(test, random);
  const size_t S = steps.offsets.back(), states = static_cast<size_t>(N) * H;
  Values gates = draw<T>(S * 4 * H, 1, random);
  for (size_t k = 0; k < gates.size(); ++k)
    gates[k] = static_cast<double>(T(k / H % 4 == 2 ? std::tanh(gates[k]) : sigmoid(gates[k])));
  const Values c_before = draw<T>(S * H, 1, random), none(S * H), no_states(states),
               w_hh = draw<T>(size_t{4} * H * H, 1 / std::sqrt(H), random),
               of_output = draw<T>(S * H, 1, random), of_hy = draw<T>(states, 1, random),
               of_cy = draw<T>(states, 1, random);
  const double allowed = tolerance<T>(device);
  Buffer<T> gates_(gates, off), c_before_(c_before, off), w_hh_(w_hh, off);
  Buffer<T> of_output_(of_output, off), of_hy_(of_hy, off), of_cy_(of_cy, off);
  Buffer<T> first(4 * S * H);
  for (unsigned order = 0; order < 2; ++order) {
    cuda_emu::seed = order;
    // The second time, what is not wanted is left out.
    const bool wanted = order == 0;
    Buffer<T> grad_gates(4 * S * H, off), grad_hx(states, off), grad_cx(states, off);
    const LayerBackward<T> call = {steps.sequence,
                                   all ? of_output_.at() : nullptr,
                                   of_hy_.at(),
                                   all ? nullptr : of_cy_.at(),
                                   gates_.at(),
                                   c_before_.at(),
                                   w_hh_.at(),
                                   grad_gates.at(),
                                   wanted ? grad_hx.at() : nullptr,
                                   wanted ? grad_cx.at() : nullptr,
                                   H};
    report.that(layer_backward_fits(call, device), "it fits");
    const unsigned long before = cuda_emu::launches;
    report.that(layer_backward(call, device, nullptr) == cudaSuccess, "it ran");
    report.that(cuda_emu::launches == before + 1, "in one launch");
    if (wanted) {
      const Gradients expected =
          expect_back<T>(test, steps.offsets, steps.reset, w_hh, gates, c_before,
                         all ? of_output : none, of_hy, all ? no_states : of_cy);
      report.close(grad_gates.values(), expected.gates, allowed, "gradient of gates");
      report.close(grad_hx.values(), expected.hx, allowed, "gradient of h");
      report.close(grad_cx.values(), expected.cx, allowed, "gradient of c");
      std::memcpy(first.at(), grad_gates.at(), 4 * S * H * sizeof(T));
    } else {
      report.that(first.same_bits(grad_gates), "the same bits in another order of threads");
    }
  }
}

template <class T>
void check_layer(const Case& test, Shared shared, bool tf32 = false) {
  check_forward<T>(test, shared, tf32);
  check_backward<T>(test, shared, tf32);
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

// What fits, and what does not: too little memory, too few multiprocessors, too many rows.
void check_fits() {
  report.where = "fits";
  LayerForward<float> sizes = {};
  sizes.sequence.N = 2, sizes.H = 64;
  report.that(!layer_forward_fits(sizes, {132, 1024, false}), "not in a KiB");
  sizes.H = 512;
  report.that(layer_forward_fits(sizes, {132, 227 * 1024, false}), "512 units on an H100");
  report.that(!layer_forward_fits(sizes, {8, 227 * 1024, false}), "not on 8 multiprocessors");
  sizes.sequence.N = 1000;
  report.that(!layer_forward_fits(sizes, {132, 227 * 1024, false}), "not with 1000 rows");
  sizes.H = 64;
  report.that(layer_forward_fits(sizes, {132, 227 * 1024, false}), "1000 rows of 64 units");
  // Backward has four times the columns, and tiles that are not full.
  LayerBackward<__half> back = {};
  back.sequence.N = 8, back.H = 1024;
  report.that(layer_backward_fits(back, {132, 227 * 1024, false}), "backward, 1024 units of half");
  report.that(!layer_backward_fits(back, {60, 227 * 1024, false}), "not on 60 multiprocessors");
  back.H = 2048;
  report.that(!layer_backward_fits(back, {132, 227 * 1024, false}), "not 2048");
}

// Numbers to the device in one launch or several.
void check_copy() {
  report.where = "copy_numbers";
  for (const int64_t count : {1, 480, 481, 1000}) {
    std::vector<int64_t> from(count), to(count + 1, -1);
    for (int64_t k = 0; k < count; ++k) from[k] = k * k + 1;
    report.that(copy_numbers(from.data(), count, to.data(), nullptr) == cudaSuccess, "it ran");
    report.that(to.back() == -1, "no more than wanted");
    to.pop_back();
    report.that(from == to, "all of them");
  }
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
  check_copy();
  return report.finish();
}
