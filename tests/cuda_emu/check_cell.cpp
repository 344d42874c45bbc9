// The CUDA kernels of the cell, against plain loops in double precision: on the CPU as built by
// tests/test_cuda_emu.py, on a GPU as built by tests/gpu/native/build.py. "few" as argument: few
// shapes, for a sanitizer that takes its time. Exit status 0 if all agree.
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

struct Shape {
  int N, I, H;
};

struct Case {
  Shape shape;
  bool bias, off;  // off: every pointer one number beyond a multiple of 16 bytes
};

struct Cell {
  Values x, h, c, w_ih, w_hh, b_ih, b_hh;
};

template <class T>
Cell draw_cell(const Case& test) {
  const auto [N, I, H] = test.shape;
  std::mt19937 random(N * 1000003 + I * 1009 + H);
  const auto n = [](int a, int b) { return static_cast<size_t>(a) * b; };
  const double scale = 1 / std::sqrt(H + 1.0);
  const size_t bias = test.bias ? 4 * H : 0;
  return {draw<T>(n(N, I), 1, random),         draw<T>(n(N, H), 1, random),
          draw<T>(n(N, H), 1, random),         draw<T>(n(4 * H, I), scale, random),
          draw<T>(n(4 * H, H), scale, random), draw<T>(bias, scale, random),
          draw<T>(bias, scale, random)};
}

// [N, 4H] without biases, from input and h apart.
Values products(const Values& rows, const Values& weights, int N, int K, int H) {
  Values result(static_cast<size_t>(N) * 4 * H);
  for (int n = 0; n < N; ++n)
    for (int m = 0; m < 4 * H; ++m)
      for (int k = 0; k < K; ++k) result[n * 4 * H + m] += rows[n * K + k] * weights[m * K + k];
  return result;
}

struct Outputs {
  Values hy, cy, gates;
};

Outputs forward(const Cell& cell, const Values& of_x, const Values& of_h, const Case& test) {
  const auto [N, I, H] = test.shape;
  Outputs out = {Values(N * H), Values(N * H), Values(N * 4 * H)};
  for (int n = 0; n < N; ++n)
    for (int u = 0; u < H; ++u) {
      double gate[4];
      for (int q = 0; q < 4; ++q) {
        const int at = n * 4 * H + q * H + u;
        gate[q] = of_x[at] + of_h[at];
        if (test.bias) gate[q] += cell.b_ih[q * H + u] + cell.b_hh[q * H + u];
        gate[q] = q == 2 ? std::tanh(gate[q]) : sigmoid(gate[q]);
        out.gates[at] = gate[q];
      }
      const double c = gate[1] * cell.c[n * H + u] + gate[0] * gate[2];
      out.cy[n * H + u] = c;
      out.hy[n * H + u] = gate[3] * std::tanh(c);
    }
  return out;
}

template <class T>
void check_forward(const Case& test, bool tf32, int multiprocessors) {
  const auto [N, I, H] = test.shape;
  const Cell cell = draw_cell<T>(test);
  const Values of_x = products(cell.x, cell.w_ih, N, I, H);
  const Values of_h = products(cell.h, cell.w_hh, N, H, H);
  const Outputs expected = forward(cell, of_x, of_h, test);
  // TF32 rounds both factors of a product to 11 bits.
  const double tolerance = (tf32             ? 4e-3
                            : sizeof(T) >= 4 ? 64
                                             : 2) *
                           (tf32 ? 1 : check::spacing<T>());

  Buffer<T> x(cell.x, test.off), h(cell.h, test.off), c(cell.c, test.off);
  Buffer<T> w_ih(cell.w_ih, test.off), w_hh(cell.w_hh, test.off);
  Buffer<T> b_ih(cell.b_ih, test.off), b_hh(cell.b_hh, test.off);
  T *const bias_ih = test.bias ? b_ih.at() : nullptr, *const bias_hh =
                                                          test.bias ? b_hh.at() : nullptr;
  const size_t states = static_cast<size_t>(N) * H;
  Buffer<T> first(states);
  for (unsigned order = 0; order < machine::orders(); ++order) {
    machine::use_order(order);
    const bool keeps = order % 2 == 0;
    Buffer<T> hy(states, test.off), cy(states, test.off), gates(4 * states, test.off);
    const CellForward<T> call = {x.at(),  h.at(),  c.at(),  w_ih.at(), w_hh.at(),
                                 bias_ih, bias_hh, hy.at(), cy.at(),   keeps ? gates.at() : nullptr,
                                 N,       I,       H};
    const machine::Launches launches;
    report.ran(cell_forward(call, {multiprocessors, machine::shared_per_block(), tf32}, nullptr));
    report.launched(launches, states == 0 ? 0 : 1, "in one launch");
    report.close(hy.values(), expected.hy, tolerance, "h'");
    report.close(cy.values(), expected.cy, tolerance, "c'");
    if (keeps) report.close(gates.values(), expected.gates, tolerance, "gates");
    if (order == 0)
      first.take_bits(hy);
    else
      report.that(first.same_bits(hy), machine::kSameBits);
  }

  if (tf32) return;
  // The same from products that were made before, apart from the gates and in their place.
  Values both(of_x), none(of_x.size());
  for (size_t k = 0; k < both.size(); ++k) both[k] += of_h[k];
  Buffer<T> sums(both, test.off);
  const Outputs rounded = forward(cell, sums.values(), none, test);
  for (const bool keeps : {false, true}) {
    Buffer<T> hy(states, test.off), cy(states, test.off);
    const CellForward<T> call = {nullptr, nullptr, c.at(),  nullptr, nullptr,
                                 bias_ih, bias_hh, hy.at(), cy.at(), keeps ? sums.at() : nullptr,
                                 N,       I,       H};
    report.ran(cell_finish<T>(call, sums.at(), nullptr));
    report.close(hy.values(), rounded.hy, tolerance, "finished h'");
    report.close(cy.values(), rounded.cy, tolerance, "finished c'");
    if (keeps) report.close(sums.values(), rounded.gates, tolerance, "gates for products");
  }
}

template <class T>
void check_backward(const Case& test, bool with_h, bool with_c) {
  const auto [N, I, H] = test.shape;
  const size_t states = static_cast<size_t>(N) * H;
  std::mt19937 random(N + 31 * H);
  const Values gate_values = draw<T>(4 * states, 0.9, random),
               c_values = draw<T>(states, 1, random);
  const Values dh = draw<T>(states, 1, random), dc = draw<T>(states, 1, random);
  Values expected(4 * states), expected_c(states), expected_b(4 * H);
  double largest_sum = 0;
  for (int n = 0; n < N; ++n)
    for (int u = 0; u < H; ++u) {
      const double* gate = &gate_values[n * 4 * H + u];
      const double i = gate[0], f = gate[H], g = gate[2 * H], o = gate[3 * H];
      const double c = c_values[n * H + u], tanh_c = std::tanh(f * c + i * g);
      const double grad_h = with_h ? dh[n * H + u] : 0;
      const double state = (with_c ? dc[n * H + u] : 0) + grad_h * o * (1 - tanh_c * tanh_c);
      double* const grad = &expected[n * 4 * H + u];
      grad[0] = state * g * i * (1 - i);
      grad[H] = state * c * f * (1 - f);
      grad[2 * H] = state * i * (1 - g * g);
      grad[3 * H] = grad_h * tanh_c * o * (1 - o);
      expected_c[n * H + u] = state * f;
      for (int q = 0; q < 4; ++q) {
        expected_b[q * H + u] += grad[q * H];
        largest_sum = std::max(largest_sum, std::abs(expected_b[q * H + u]));
      }
    }
  const double tolerance = (sizeof(T) >= 4 ? 64 : 2) * check::spacing<T>();
  Buffer<T> gates(gate_values, test.off), c(c_values, test.off);
  Buffer<T> grad_h(dh, test.off), grad_c(dc, test.off);
  Buffer<T> first(4 * H);
  for (unsigned order = 0; order < machine::orders(); ++order) {
    machine::use_order(order);
    Buffer<T> grads(4 * states, test.off), grad_cx(states, test.off), b_ih(4 * H), b_hh(4 * H);
    CellBackward<T> call = {with_h ? grad_h.at() : nullptr,
                            with_c ? grad_c.at() : nullptr,
                            c.at(),
                            gates.at(),
                            grads.at(),
                            grad_cx.at(),
                            b_ih.at(),
                            b_hh.at(),
                            nullptr,
                            N,
                            H};
    Buffer<char> workspace(cell_backward_workspace(call));
    call.partial_sums = workspace.at();
    report.ran(cell_backward(call, nullptr));
    report.close(grads.values(), expected, tolerance, "gradients of the gates");
    report.close(grad_cx.values(), expected_c, tolerance, "gradient of c");
    report.close(b_ih.values(), expected_b, tolerance * (1 + std::sqrt(N)), "gradient of b_ih");
    report.that(b_ih.same_bits(b_hh), "both biases have one gradient");
    if (order == 0)
      first.take_bits(b_ih);
    else
      report.that(first.same_bits(b_ih), machine::kSameBits);
    call.grad_cx = call.grad_b_ih = call.grad_b_hh = nullptr;
    report.that(cell_backward_workspace(call) == 0, "no biases, no workspace");
    report.ran(cell_backward(call, nullptr), "it ran without the rest");
    report.close(grads.values(), expected, tolerance, "gradients of the gates alone");
  }
}

template <class T>
void name_case(const Shape& shape, const char* more) {
  report.begin(std::string(check::name<T>()) + " " + std::to_string(shape.N) + "x" +
               std::to_string(shape.I) + "x" + std::to_string(shape.H) + more);
}

template <class T>
void check_all() {
  // 250: so many that each of eight warps has a share of the sums.
  const Shape shapes[] = {{1, 3, 2},  {1, 1, 1},    {1, 32, 32},  {2, 5, 7},   {3, 50, 20},
                          {5, 0, 6},  {1, 250, 2},  {7, 100, 33}, {9, 16, 16}, {17, 24, 40},
                          {33, 8, 8}, {40, 40, 72}, {0, 3, 2},    {2, 3, 0}};
  for (const Shape& shape : shapes) {
    if (few && shape.N * shape.I * shape.H > 1100) continue;
    for (const bool off : {false, true}) {
      const Case test = {shape, !off, off};
      name_case<T>(shape, off ? " off" : "");
      // One multiprocessor: many units a block; a hundred: all warps share one tile.
      check_forward<T>(test, false, off ? 1 : 100);
      if (!off) check_forward<T>(test, false, 4);
      if (std::is_same_v<T, float>) check_forward<T>(test, true, off ? 1 : 100);
      check_backward<T>(test, true, !off);
    }
  }
  report.begin(std::string(check::name<T>()) + " backward");
  check_backward<T>({{5, 0, 6}, false, false}, false, true);
  check_backward<T>({{5, 0, 8}, false, false}, true, false);
  // More rows than one block takes: sums of blocks, in a second launch.
  check_backward<T>({{few ? 129 : 700, 0, 8}, false, false}, true, true);
  if (!few) check_backward<T>({{300, 0, 200}, false, false}, true, true);
}

// Sizes of use: many blocks, and all of the multiprocessors.
template <class T>
void check_large() {
  const Shape shapes[] = {{1, 256, 256},  {16, 512, 512},  {64, 512, 512},
                          {64, 768, 768}, {1, 1024, 1024}, {256, 64, 64}};
  for (const Shape& shape : shapes) {
    name_case<T>(shape, "");
    const Case test = {shape, true, false};
    check_forward<T>(test, false, machine::multiprocessors());
    if (std::is_same_v<T, float>) check_forward<T>(test, true, machine::multiprocessors());
    check_backward<T>(test, true, true);
  }
}

void check_limits() {
  report.begin("limits");
  Buffer<float> any(Values(4 * 8 * 8));
  const CellForward<float> call = {any.at(), any.at(), any.at(), any.at(), any.at(),
                                   nullptr,  nullptr,  any.at(), any.at(), nullptr,
                                   1,        8,        8};
  const machine::NarrowLimits narrow(128);
  report.that(cell_forward(call, {4, 227 * 1024, false}, nullptr) == cudaErrorInvalidConfiguration,
              "a launch beyond the limits is an error, and returned");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments, "The CUDA kernels of the cell.", report,
                    [](check::Amount amount) {
                      few = amount != check::Amount::kAll;
                      check_all<float>();
                      check_all<double>();
                      check_all<__half>();
                      check_all<__nv_bfloat16>();
                      if (machine::kEmulated) return check_limits();
                      if (few) return;
                      check_large<float>();
                      check_large<double>();
                      check_large<__half>();
                      check_large<__nv_bfloat16>();
                    });
}
