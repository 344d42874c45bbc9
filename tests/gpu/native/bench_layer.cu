// Times of the layer's kernels, whole sequences at a time: a line of JSON a case, at once.
//
//   {"variant", "kind", "dtype", "L", "N", "H", "us_per_step", "us"}   or   {..., "error"}
//
// Linked once a variant of the kernels (variant.cpp has its name): run_variants.py compares them.
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/kernels.h"
#include "no_gpu.h"

extern const char* const kVariant;

namespace {

using namespace lstm_ext::cuda;
using native::must;

constexpr int kWarmUps = 3, kRepeats = 10;
constexpr unsigned kCaseSeconds = 10;

// What a case that hangs is called.
char running[160] = "before the first case";

void end_hung_program(int /*signal*/) {
  constexpr char kWhat[] = ", \"error\": \"hangs, cut off\"}\n";
  (void)!write(STDOUT_FILENO, running, std::strlen(running));
  (void)!write(STDOUT_FILENO, kWhat, sizeof(kWhat) - 1);
  _exit(124);
}

template <class T>
__global__ void fill_kernel(T* numbers, size_t count, float scale) {
  for (size_t k = size_t{blockIdx.x} * blockDim.x + threadIdx.x; k < count;
       k += size_t{gridDim.x} * blockDim.x) {
    unsigned mixed = static_cast<unsigned>(k) * 2654435761u;
    mixed = (mixed ^ mixed >> 15) * 2246822519u;
    numbers[k] = T(scale * (static_cast<float>(mixed >> 8) / 8388608.0f - 1));
  }
}

// Numbers between -scale and scale.
template <class T>
class Array {
 public:
  explicit Array(size_t count, float scale = 1) {
    must(cudaMalloc(&at_, count * sizeof(T)), "cudaMalloc");
    fill_kernel<<<264, 256>>>(at_, count, scale);
    must(cudaGetLastError(), "fill");
  }
  ~Array() { cudaFree(at_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* at() { return at_; }

 private:
  T* at_ = nullptr;
};

// The median of the microseconds that the device takes for a call.
template <class Call>
double microseconds(const Call& call) {
  cudaEvent_t events[kRepeats + 1];
  for (cudaEvent_t& event : events) must(cudaEventCreate(&event), "cudaEventCreate");
  for (int k = 0; k < kWarmUps; ++k) must(call(), "launch");
  must(cudaEventRecord(events[0]), "cudaEventRecord");
  for (int k = 0; k < kRepeats; ++k) {
    must(call(), "launch");
    must(cudaEventRecord(events[k + 1]), "cudaEventRecord");
  }
  must(cudaDeviceSynchronize(), "kernel");
  std::vector<float> found(kRepeats);
  for (int k = 0; k < kRepeats; ++k)
    must(cudaEventElapsedTime(&found[k], events[k], events[k + 1]), "cudaEventElapsedTime");
  for (const cudaEvent_t event : events) cudaEventDestroy(event);
  std::nth_element(found.begin(), found.begin() + kRepeats / 2, found.end());
  return 1000.0 * found[kRepeats / 2];
}

struct Shape {
  int L, N, H;
};

// One line: what the body measures, or its error.
template <class Body>
void print_case(const char* kind, const char* dtype, const Shape& shape, const Body& body) {
  const auto [L, N, H] = shape;
  std::snprintf(running, sizeof(running),
                "{\"variant\": \"%s\", \"kind\": \"%s\", \"dtype\": \"%s\", \"L\": %d, \"N\": %d, "
                "\"H\": %d",
                kVariant, kind, dtype, L, N, H);
  alarm(kCaseSeconds);
  try {
    const double us = body();
    std::printf("%s, \"us_per_step\": %.4f, \"us\": %.2f}\n", running, us / L, us);
  } catch (const std::exception& error) {
    std::printf("%s, \"error\": \"%s\"}\n", running, error.what());
    cudaGetLastError();
  }
  alarm(0);
  std::fflush(stdout);
}

template <class T>
void bench(const char* dtype, const Shape& shape, const Device& device) {
  const auto [L, N, H] = shape;
  const size_t states = static_cast<size_t>(N) * H, all = states * L;
  const float scale = 1 / std::sqrt(static_cast<float>(H));
  const DeviceSequence sequence = {nullptr, nullptr, L, N, false};
  Array<T> gates(4 * all), c_before(all), output(all), w_hh(size_t{4} * H * H, scale);
  Array<T> hx(states), cx(states), hy(states), cy(states);
  const auto forward = [&, H = H](LayerWay way) {
    Array<T> products(4 * all), b_ih(size_t{4} * H, scale), b_hh(size_t{4} * H, scale);
    Array<T> h_buffers(2 * states);
    LayerForward<T> call = {};
    call.sequence = sequence;
    call.products = products.at(), call.hx = hx.at(), call.cx = cx.at(), call.w_hh = w_hh.at();
    call.b_ih = b_ih.at(), call.b_hh = b_hh.at();
    call.output = output.at(), call.hy = hy.at(), call.cy = cy.at();
    call.gates = gates.at(), call.c_before = c_before.at(), call.h_buffers = h_buffers.at();
    call.H = H;
    if (way == LayerWay::kNone) way = layer_forward_way(call, device);
    if (way == LayerWay::kNone) throw std::runtime_error("does not fit");
    return microseconds([&] { return layer_forward(call, device, way, nullptr); });
  };
  // By the way that such a layer takes, and by the one that the switches of latency.cuh change.
  print_case("forward", dtype, shape, [&] { return forward(LayerWay::kNone); });
  print_case("shared", dtype, shape, [&] { return forward(LayerWay::kShared); });
  const auto backward = [&, H = H](LayerWay way) {
    Array<T> grad_gates(4 * all), grad_hx(states), grad_cx(states);
    LayerBackward<T> call = {};
    call.sequence = sequence;
    call.grad_output = output.at(), call.grad_hy = hy.at(), call.grad_cy = cy.at();
    call.gates = gates.at(), call.c_before = c_before.at(), call.w_hh = w_hh.at();
    call.grad_gates = grad_gates.at(), call.grad_hx = grad_hx.at(), call.grad_cx = grad_cx.at();
    call.H = H;
    if (way == LayerWay::kNone) way = layer_backward_way(call, device);
    if (way == LayerWay::kNone) throw std::runtime_error("does not fit");
    Array<float> bias_sums(static_cast<size_t>(layer_backward_sums(call, device, way)) * 4 * H + 1);
    call.bias_sums = bias_sums.at();
    return microseconds([&] { return layer_backward(call, device, way, nullptr); });
  };
  print_case("backward", dtype, shape, [&] { return backward(LayerWay::kNone); });
  print_case("shared backward", dtype, shape, [&] { return backward(LayerWay::kShared); });
}

void bench_all() {
  Device device = {native::attribute(cudaDevAttrMultiProcessorCount),
                   native::attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), false,
                   native::attribute(cudaDevAttrComputeCapabilityMajor) == 9};
  Device tf32 = device;
  tf32.tf32 = true;
  bench<__half>("half", {1024, 16, 768}, device);
  bench<__half>("half", {50, 64, 512}, device);
  bench<__nv_bfloat16>("bfloat16", {50, 64, 512}, device);
  bench<float>("float", {50, 64, 512}, device);
  bench<float>("tf32", {50, 64, 512}, tf32);
  bench<float>("float", {100, 1, 256}, device);
  bench<float>("float", {100, 256, 64}, device);
  bench<__half>("half", {100, 256, 64}, device);
  bench<__half>("half", {50, 16, 128}, device);
  bench<float>("float", {50, 16, 128}, device);
  bench<__nv_bfloat16>("bfloat16", {50, 32, 256}, device);
  bench<float>("float", {35, 20, 33}, device);
  bench<__half>("half", {100, 1, 1024}, device);
  bench<__half>("half", {20, 128, 1024}, device);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) {
    std::printf("Times of the layer's kernels (variant %s), a line of JSON a case.\n\nusage: %s\n",
                kVariant, arguments[0]);
    return std::string(arguments[1]) == "--help" ? 0 : 2;
  }
  signal(SIGALRM, end_hung_program);
  try {
    if (const int status = native::find_gpu(); status != 0) return status;
    bench_all();
  } catch (const std::exception& error) {
    std::printf("{\"variant\": \"%s\", \"error\": \"%s\"}\n", kVariant, error.what());
    return 1;
  }
  return 0;
}
