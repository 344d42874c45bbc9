// Cases of a whole layer, and its kernels against plain loops in double precision.
#pragma once

#include <string>

#include "buffer.h"
#include "cuda/kernels.h"

namespace check {

using namespace lstm_ext::cuda;

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
    for_rows(offsets[t + 1] - offsets[t], 4.0 * H * H, [&](int64_t n) {
      const size_t row = offsets[t] + n;
      if (test.reset && reset[t * test.N + n])
        for (int u = 0; u < H; ++u) h[n * H + u] = c[n * H + u] = 0;
      Values next(H);
      for (int u = 0; u < H; ++u) {
        double gate[4];
        for (int q = 0; q < 4; ++q) {
          gate[q] = products[row * 4 * H + q * H + u];
          if (test.bias) gate[q] += b_ih[q * H + u] + b_hh[q * H + u];
        }
        for (int k = 0; k < H; ++k)
          for (int q = 0; q < 4; ++q) gate[q] += w_hh[(size_t(q) * H + u) * H + k] * h[n * H + k];
        for (int q = 0; q < 4; ++q) {
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
    });
  }
  out.hy = h;
  out.cy = c;
  return out;
}

template <class T>
void name_case(Report& report, const Case& test, const Device& device, const std::string& more) {
  report.begin(std::string(name<T>()) + " " + std::to_string(test.L) + "x" +
               std::to_string(test.N) + "x" + std::to_string(test.H) +
               (test.packed ? " packed" : "") + (test.reverse ? " reverse" : "") +
               (test.reset ? " reset" : "") + (test.off ? " off" : "") +
               (device.tf32 ? " tf32" : "") + " shared " + std::to_string(device.shared_per_block) +
               " of " + std::to_string(device.multiprocessors) + more);
}

inline std::vector<int64_t> offsets_of(const Case& test) {
  std::vector<int64_t> offsets = {0};
  for (int t = 0; t < test.L; ++t) {
    const int rows = test.packed ? std::max(1, test.N - t * test.N / test.L) : test.N;
    offsets.push_back(offsets.back() + rows);
  }
  return offsets;
}

inline std::vector<char> draw_resets(const Case& test, std::mt19937& random) {
  std::vector<char> reset(static_cast<size_t>(test.L) * test.N);
  for (char& flag : reset) flag = random() % 4 == 0;
  return reset;
}

// Steps of a case, and where they lie: for the host, and for the kernels.
struct Steps {
  Steps(const Case& test, std::mt19937& random)
      : offsets(offsets_of(test)),
        reset(draw_resets(test, random)),
        offsets_there(Values(offsets.begin(), offsets.end())),
        reset_there(Values(reset.begin(), reset.end())),
        sequence{test.packed ? offsets_there.at() : nullptr,
                 test.reset ? reset_there.at() : nullptr, test.L, test.N, test.reverse} {}

  const std::vector<int64_t> offsets;
  const std::vector<char> reset;
  Buffer<int64_t> offsets_there;
  Buffer<bool> reset_there;
  const DeviceSequence sequence;
};

// Errors of one step go into the next, but fade.
template <class T>
double tolerance(const Device& device) {
  return device.tf32 ? 1e-2 : (sizeof(T) >= 4 ? 256 : 4) * spacing<T>();
}

// As the operators call it: gates, where they are kept, come in the place of the products.
template <class T>
void check_forward(Report& report, const Case& test, const Device& device, LayerWay way,
                   const std::string& more = "") {
  const auto [L, N, H, packed, reverse, with_reset, bias, off] = test;
  name_case<T>(report, test, device, more);
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

  Buffer<T> hx_(hx, off), cx_(cx, off), w_hh_(w_hh, off);
  Buffer<T> b_ih_(b_ih, off), b_hh_(b_hh, off);
  Buffer<T> first(S * H);
  for (unsigned order = 0; order < machine::orders(); ++order) {
    machine::use_order(order);
    const bool keeps = order == 0;
    Buffer<T> products_(products, off), output(S * H, off), hy(states, off), cy(states, off);
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
                                  keeps ? products_.at() : nullptr,
                                  keeps ? c_before.at() : nullptr,
                                  h_buffers.at(),
                                  H};
    const machine::Launches launches;
    report.ran(layer_forward(call, device, way, nullptr));
    report.launched(launches, 1, "in one launch");
    report.that(launches.blocks_together() <= device.multiprocessors, "one block on each");
    report.close(output.values(), expected.output, allowed, "output");
    report.close(hy.values(), expected.hy, allowed, "h_n");
    report.close(cy.values(), expected.cy, allowed, "c_n");
    if (keeps) {
      report.close(products_.values(), expected.gates, allowed, "gates");
      report.close(c_before.values(), expected.c_before, allowed, "c before");
      first.take_bits(output);
    } else {
      report.that(first.same_bits(output), machine::kSameBits);
    }
  }
}

struct Gradients {
  Values gates, hx, cx;
  Values bias;  // of gates that are not rounded
};

// Rounds to T what the kernel rounds from step to step: the gradients of the gates.
template <class T>
Gradients expect_back(const Case& test, const std::vector<int64_t>& offsets,
                      const std::vector<char>& reset, const Values& w_hh, const Values& gates,
                      const Values& c_before, const Values& grad_output, Values h, Values c) {
  const int H = test.H;
  Gradients out = {Values(gates.size()), {}, {}, Values(4 * H)};
  Values exact_gates(gates.size());
  for (int step = test.L - 1; step >= 0; --step) {
    const int t = test.reverse ? test.L - 1 - step : step;
    for_rows(offsets[t + 1] - offsets[t], 4.0 * H * H, [&](int64_t n) {
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
        for (int q = 0; q < 4; ++q) {
          exact_gates[row * 4 * H + q * H + u] = exact[q];
          grad[q * H + u] = static_cast<double>(T(exact[q]));
        }
        c[n * H + u] = grad_c * f;
      }
      const bool starts = test.reset && reset[t * test.N + n];
      Values sums(H);
      for (int k = 0; k < 4 * H; ++k)
        for (int u = 0; u < H; ++u) sums[u] += grad[k] * w_hh[size_t(k) * H + u];
      for (int u = 0; u < H; ++u) {
        h[n * H + u] = starts ? 0 : sums[u];
        if (starts) c[n * H + u] = 0;
      }
    });
  }
  for (size_t k = 0; k < gates.size(); ++k) out.bias[k % (size_t{4} * H)] += exact_gates[k];
  out.hx = h;
  out.cx = c;
  return out;
}

template <class T>
void check_backward(Report& report, const Case& test, const Device& device, LayerWay way,
                    const std::string& more = "") {
  const auto [L, N, H, packed, reverse, with_reset, all, off] = test;
  name_case<T>(report, test, device, more + " backward");
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
  for (unsigned order = 0; order < machine::orders(); ++order) {
    machine::use_order(order);
    // The second time, what is not wanted is left out.
    const bool wanted = order == 0;
    Buffer<T> grad_gates(4 * S * H, off), grad_hx(states, off), grad_cx(states, off);
    LayerBackward<T> call = {steps.sequence,
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
    const int64_t sums = layer_backward_sums(call, device, way);
    Buffer<float> bias_sums(sums * 4 * H);
    if (wanted && sums > 0) call.bias_sums = bias_sums.at();
    const machine::Launches launches;
    report.ran(layer_backward(call, device, way, nullptr));
    report.launched(launches, 1, "in one launch");
    report.that(launches.blocks_together() <= device.multiprocessors, "one block on each");
    if (wanted) {
      const Gradients expected =
          expect_back<T>(test, steps.offsets, steps.reset, w_hh, gates, c_before,
                         all ? of_output : none, of_hy, all ? no_states : of_cy);
      report.close(grad_gates.values(), expected.gates, allowed, "gradient of gates");
      report.close(grad_hx.values(), expected.hx, allowed, "gradient of h");
      report.close(grad_cx.values(), expected.cx, allowed, "gradient of c");
      if (sums > 0) {
        const Values of_blocks = bias_sums.values();
        Values bias(4 * H);
        for (size_t k = 0; k < of_blocks.size(); ++k) bias[k % bias.size()] += of_blocks[k];
        report.close(bias, expected.bias, allowed, "gradient of a bias");
      }
      first.take_bits(grad_gates);
    } else {
      report.that(first.same_bits(grad_gates), machine::kSameBits);
    }
  }
}

}  // namespace check
