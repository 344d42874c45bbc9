// A layer's numbers on the host: inputs as the number type rounds them, results in float64, and
// how far a kernel's are from them.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cuda/kernels.h"
#if defined(LSTM_EXT_CUDA_EMU)
#include "emulated.h"
#else
#include "on_gpu.h"
#endif

namespace cases {

using namespace lstm_ext::cuda;
using Values = std::vector<double>;

struct Shape {
  int L, N, H;
};

template <class T>
double to_double(T x) {
  return static_cast<double>(static_cast<float>(x));
}

// Memory of the kernels, with guards around it on a GPU.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count, size_t shift = 0) : count_(count), memory_(count * sizeof(T), shift) {}
  Buffer(const Values& values, size_t shift) : Buffer(values.size(), shift) {
    std::vector<T> numbers(count_);
    for (size_t k = 0; k < count_; ++k) numbers[k] = T(static_cast<float>(values[k]));
    memory_.write(numbers.data());
  }
  T* at() { return static_cast<T*>(memory_.at()); }
  Values values() {
    std::vector<T> numbers(count_);
    memory_.read(numbers.data());
    Values result(count_);
    for (size_t k = 0; k < count_; ++k) result[k] = to_double(numbers[k]);
    return result;
  }

 private:
  size_t count_;
  machine::Memory memory_;
};

// Numbers that T holds exactly.
template <class T>
Values draw(size_t count, double scale, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(static_cast<float>(-scale),
                                                static_cast<float>(scale));
  Values values(count);
  for (double& value : values) value = to_double(T(uniform(random)));
  return values;
}

template <class Body>
void in_parallel(int count, double work, const Body& body) {
  const int threads =
      work < 1e6 ? 1
                 : std::min<int>(count, std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> workers;
  for (int worker = 1; worker < threads; ++worker)
    workers.emplace_back([&body, worker, threads, count] {
      for (int k = worker; k < count; k += threads) body(k);
    });
  for (int k = 0; k < count; k += threads) body(k);
  for (std::thread& worker : workers) worker.join();
}

struct Inputs {
  Values products, hx, cx, w_hh, b_ih, b_hh;
  bool biases, reverse;
};

struct Results {
  Values output, hy, cy, gates, c_before;
};

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

inline Results reference(const Shape& shape, const Inputs& in) {
  const auto [L, N, H] = shape;
  const size_t states = size_t(N) * H;
  Results out;
  out.output.resize(L * states), out.gates.resize(4 * L * states), out.c_before.resize(L * states);
  out.hy = in.hx, out.cy = in.cx;
  Values before(states);
  for (int step = 0; step < L; ++step) {
    const int time = in.reverse ? L - 1 - step : step;
    before = out.hy;
    in_parallel(H, 8.0 * states * H, [&, H = H, N = N](int unit) {
      for (int row = 0; row < N; ++row) {
        const size_t at = size_t(time) * states + size_t(row) * H + unit;
        double pre[4];
        for (int gate = 0; gate < 4; ++gate) {
          const size_t column = size_t(gate) * H + unit;
          double sum = in.products[(size_t(time) * N + row) * 4 * H + column];
          if (in.biases) sum += in.b_ih[column] + in.b_hh[column];
          const double* const w = &in.w_hh[column * H];
          const double* const h = &before[size_t(row) * H];
          for (int k = 0; k < H; ++k) sum += w[k] * h[k];
          pre[gate] = gate == 2 ? std::tanh(sum) : sigmoid(sum);
          out.gates[(size_t(time) * N + row) * 4 * H + column] = pre[gate];
        }
        double& c = out.cy[size_t(row) * H + unit];
        out.c_before[at] = c;
        c = pre[1] * c + pre[0] * pre[2];
        out.output[at] = out.hy[size_t(row) * H + unit] = pre[3] * std::tanh(c);
      }
    });
  }
  return out;
}

// The largest difference, relative to the largest value; infinite where a number is not one.
inline double error_of(const Values& found, const Values& expected) {
  double largest = 0, most = 0;
  for (size_t k = 0; k < expected.size(); ++k) {
    if (!std::isfinite(found[k])) return std::numeric_limits<double>::infinity();
    largest = std::max(largest, std::abs(expected[k]));
    most = std::max(most, std::abs(found[k] - expected[k]));
  }
  return most / largest;
}

template <class T>
struct Variant {
  const char* family;
  const char* dtype;
  double tolerance;
  // What runs the layer; failures: a counter on the device, or null.
  std::function<cudaError_t(const LayerForward<T>&)> run;
};

struct Totals {
  int cases = 0, failures = 0;
};

// When the whole program has to be done. false: it is now, and nothing else is begun.
inline std::chrono::steady_clock::time_point deadline;
inline bool begin_case(const char* where) {
#if !defined(LSTM_EXT_CUDA_EMU)
  const auto left = std::chrono::duration_cast<std::chrono::seconds>(
      deadline - std::chrono::steady_clock::now());
  if (left.count() < 1) {
    std::printf("%s: not begun, no time left\n", where);
    return false;
  }
  machine::watch_seconds = static_cast<unsigned>(std::min<long long>(left.count(), 8));
#endif
  machine::watch(where);
  return true;
}

// After an error: whether it was of a launch that was refused, and the next one may go well.
inline bool still_works() {
#if defined(LSTM_EXT_CUDA_EMU)
  return false;
#else
  cudaGetLastError();
  return cudaDeviceSynchronize() == cudaSuccess;
#endif
}

struct Options {
  bool train = true, biases = true, reverse = false;
  size_t shift = 0;  // bytes by which matrices lie off their alignment
};

// One line: the largest errors of one case. false: a CUDA error, after which nothing else runs.
template <class T>
bool check(const Variant<T>& variant, const std::string& how, const Shape& shape,
           const Options& options, Totals& totals) {
  const auto [L, N, H] = shape;
  const size_t states = size_t(N) * H, shift = options.shift;
  char where[200];
  std::snprintf(where, sizeof(where), "check %-3s %-8s %s L %d N %d H %d%s%s%s%s", variant.family,
                variant.dtype, how.c_str(), L, N, H, options.train ? " train" : "",
                options.biases ? "" : " no biases", options.reverse ? " reverse" : "",
                shift != 0 ? " shifted" : "");
  if (!begin_case(where)) return false;
  std::mt19937 random(static_cast<unsigned>(L * 7919 + N * 131 + H));
  const double scale = 1 / std::sqrt(static_cast<double>(H));
  Inputs in;
  in.products = draw<T>(4 * L * states, 1.5, random);
  in.hx = draw<T>(states, 1, random), in.cx = draw<T>(states, 1, random);
  in.w_hh = draw<T>(size_t(4) * H * H, 2 * scale, random);
  in.b_ih = draw<T>(size_t(4) * H, scale, random), in.b_hh = draw<T>(size_t(4) * H, scale, random);
  in.biases = options.biases, in.reverse = options.reverse;
  const Results expected = reference(shape, in);

  Buffer<T> products(in.products, shift), hx(in.hx, shift), cx(in.cx, shift), w_hh(in.w_hh, shift);
  Buffer<T> b_ih(in.b_ih, shift), b_hh(in.b_hh, shift);
  Buffer<T> output(L * states, shift), hy(states, shift), cy(states, shift);
  Buffer<T> gates(4 * L * states, shift), c_before(L * states, shift);
  LayerForward<T> layer = {};
  layer.sequence = {nullptr, nullptr, L, N, options.reverse};
  layer.products = products.at(), layer.hx = hx.at(), layer.cx = cx.at(), layer.w_hh = w_hh.at();
  if (options.biases) layer.b_ih = b_ih.at(), layer.b_hh = b_hh.at();
  layer.output = output.at(), layer.hy = hy.at(), layer.cy = cy.at();
  if (options.train) layer.gates = gates.at(), layer.c_before = c_before.at();
  layer.H = H;
  ++totals.cases;
  cudaError_t error = variant.run(layer);
#if !defined(LSTM_EXT_CUDA_EMU)
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
#endif
  if (error != cudaSuccess) {
    ++totals.failures;
    std::printf("%s: CUDA error: %s\n", where, machine::describe(error).c_str());
    std::fflush(stdout);
    return still_works();
  }
  double worst = 0;
  std::string errors;
  const auto compare = [&](const char* what, const Values& found, const Values& wanted) {
    const double off = error_of(found, wanted);
    char text[60];
    std::snprintf(text, sizeof(text), " %s %.2g", what, off);
    errors += text;
    if (!(off <= worst)) worst = off;
  };
  compare("output", output.values(), expected.output);
  compare("h", hy.values(), expected.hy);
  compare("c", cy.values(), expected.cy);
  if (options.train) {
    compare("gates", gates.values(), expected.gates);
    compare("c_before", c_before.values(), expected.c_before);
  }
  const std::vector<std::string> strays = machine::strays();
  const bool right = worst <= variant.tolerance && strays.empty();
  totals.failures += !right;
  std::printf("%s:%s (allowed %.2g) %s\n", where, errors.c_str(), variant.tolerance,
              right ? "ok" : "WRONG");
  for (const std::string& stray : strays) std::printf("%s: %s\n", where, stray.c_str());
  std::fflush(stdout);
  return true;
}

}  // namespace cases
