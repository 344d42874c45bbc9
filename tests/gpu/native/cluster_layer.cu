// Kernels of a whole layer for Hopper: are they right, and how long do they take? A line a case.
//
// A: few hidden units, all in one block (small_layer.cuh).
// B: more of them, in a cluster of blocks (cluster_kernel.cuh).
#include <cstdlib>
#include <cstring>
#include <exception>

#include "cluster_kernel.cuh"
#include "layer_cases.h"
#include "small_layer.cuh"

namespace {

using namespace cases;

// Of the machine that this runs on.
Device device_here(bool tf32) {
  return {machine::multiprocessors(), machine::shared_per_block(), tf32};
}

template <class T>
struct Kind {
  const char* name;
  double tolerance;
  bool tf32;
};
const Kind<__half> kHalf = {"half", 2.5e-3, false};
const Kind<__nv_bfloat16> kBfloat16 = {"bfloat16", 2e-2, false};
const Kind<float> kFloat = {"float", 3e-6, false};
const Kind<float> kTf32 = {"tf32", 3e-3, true};

template <class T>
Variant<T> small(const Kind<T>& kind, int rows) {
  const Device device = device_here(kind.tf32);
  return {"A", kind.name, kind.tolerance,
          [=](const LayerForward<T>& layer) { return small_layer_forward(layer, device, rows, nullptr); }};
}

template <class T>
bool check_small(const Kind<T>& kind, bool few, Totals& totals) {
  // rows 0: as the launcher chooses.
  const auto one = [&](int rows, const Shape& shape, const Options& options) {
    const std::string how = rows == 0 ? "rows auto" : "rows " + std::to_string(rows);
    return check(small(kind, rows), how, shape, options, totals);
  };
  Options inference, plain, reverse, shifted;
  inference.train = false;
  plain.biases = false;
  reverse.reverse = true;
  shifted.shift = sizeof(T);
  for (const int rows : {1, 2, 4, 8})
    for (const int H : {33, 40, 64, 100, 128}) {
      if (few && H > 40 && rows != 2) continue;
      if (!one(rows, {5, 17, H}, {})) return false;
      if (!one(rows, {2, 3, H}, inference)) return false;
    }
  for (const int H : {1, 8, 31, 48, 96}) {
    if (!one(0, {3, 3, H}, reverse)) return false;
    if (!one(0, {1, 1, H}, plain)) return false;
  }
  if (!one(0, {2, 3, 64}, shifted) || !one(0, {2, 3, 100}, shifted)) return false;
  if (few) return true;
  return one(0, {50, 16, 128}, {}) && one(0, {100, 256, 64}, {}) && one(0, {35, 20, 33}, {}) &&
         one(0, {3, 1100, 64}, {});
}

#if !defined(LSTM_EXT_CUDA_EMU)
using native::must;

template <class T>
__global__ void fill_kernel(T* numbers, size_t count, float scale) {
  for (size_t k = size_t{blockIdx.x} * blockDim.x + threadIdx.x; k < count;
       k += size_t{gridDim.x} * blockDim.x) {
    unsigned mixed = static_cast<unsigned>(k) * 2654435761u;
    mixed = (mixed ^ mixed >> 15) * 2246822519u;
    numbers[k] = T(scale * (static_cast<float>(mixed >> 8) / 8388608.0f - 1));
  }
}

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

// The median of five times, each of the launches that fit into some milliseconds, 20 at least.
template <class Call>
double microseconds(const Call& call) {
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin), "cudaEventCreate");
  must(cudaEventCreate(&end), "cudaEventCreate");
  for (int k = 0; k < 5; ++k) must(call(), "launch");
  must(cudaDeviceSynchronize(), "kernel");
  float found[5];
  constexpr int kLaunches = 20;
  for (float& one : found) {
    must(cudaEventRecord(begin), "cudaEventRecord");
    for (int k = 0; k < kLaunches; ++k) must(call(), "launch");
    must(cudaEventRecord(end), "cudaEventRecord");
    must(cudaEventSynchronize(end), "kernel");
    must(cudaEventElapsedTime(&one, begin, end), "cudaEventElapsedTime");
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::nth_element(found, found + 2, found + 5);
  return 1000.0 * found[2] / kLaunches;
}

int refused = 0;  // benchmarks

// cudnn, ours_now: microseconds of the whole layer on an H200, the input's product too; 0: unknown.
template <class T>
bool bench(const Variant<T>& variant, const std::string& how, const Shape& shape, bool train,
           double cudnn, double ours_now) {
  const auto [L, N, H] = shape;
  const size_t states = size_t(N) * H, all = states * L;
  const float scale = 1 / std::sqrt(static_cast<float>(H));
  char where[200];
  std::snprintf(where, sizeof(where), "bench %-3s %-8s %s L %d N %d H %d %s", variant.family,
                variant.dtype, how.c_str(), L, N, H, train ? "train" : "inference");
  if (!begin_case(where)) return false;
  try {
    Array<T> products(4 * all), output(all), hx(states), cx(states), hy(states), cy(states);
    Array<T> w_hh(size_t(4) * H * H, scale), b_ih(size_t(4) * H, scale), b_hh(size_t(4) * H, scale);
    Array<T> gates(train ? 4 * all : 1), c_before(train ? all : 1);
    LayerForward<T> layer = {};
    layer.sequence = {nullptr, nullptr, L, N, false};
    layer.products = products.at(), layer.hx = hx.at(), layer.cx = cx.at(), layer.w_hh = w_hh.at();
    layer.b_ih = b_ih.at(), layer.b_hh = b_hh.at();
    layer.output = output.at(), layer.hy = hy.at(), layer.cy = cy.at();
    if (train) layer.gates = gates.at(), layer.c_before = c_before.at();
    layer.H = H;
    const double us = microseconds([&] { return variant.run(layer); });
    std::printf("%s: %.1f us, %.3f us a step", where, us, us / L);
    if (cudnn > 0) std::printf("; with input product, H200: cuDNN %.0f, ours now %.0f", cudnn, ours_now);
    std::printf("\n");
  } catch (const std::exception& error) {
    std::printf("%s: error: %s\n", where, error.what());
    std::fflush(stdout);
    ++refused;
    return still_works();
  }
  std::fflush(stdout);
  return true;
}

template <class T>
bool bench_small(const Kind<T>& kind, const Shape& shape, std::initializer_list<int> rows,
                 double cudnn, double ours_now, double cudnn_train = 0, double ours_train = 0) {
  for (const int each : rows) {
    const std::string how = each == 0 ? "rows auto" : "rows " + std::to_string(each);
    if (!bench(small(kind, each), how, shape, false, cudnn, ours_now)) return false;
  }
  return bench(small(kind, 0), "rows auto", shape, true, cudnn_train, ours_train);
}

bool bench_all_small() {
  return bench_small(kHalf, {50, 16, 128}, {0, 4, 8}, 97, 159) &&
         bench_small(kFloat, {50, 16, 128}, {0, 2, 4}, 143, 207) &&
         bench_small(kTf32, {50, 16, 128}, {0, 4, 8}, 0, 0) &&
         bench_small(kHalf, {100, 256, 64}, {0, 4, 8}, 125, 309) &&
         bench_small(kFloat, {100, 256, 64}, {0, 4}, 112, 674) &&
         bench_small(kTf32, {100, 256, 64}, {0, 4, 8}, 0, 0) &&
         bench_small(kFloat, {35, 20, 33}, {0, 2}, 23, 111) &&
         bench_small(kTf32, {35, 20, 33}, {0}, 0, 0) &&
         bench_small(kBfloat16, {50, 16, 128}, {0}, 0, 0) &&
         bench_small(kHalf, {50, 256, 128}, {0, 4, 8}, 0, 0) &&
         bench_small(kFloat, {50, 256, 128}, {0, 4}, 0, 0) &&
         bench_small(kTf32, {50, 256, 128}, {0, 8}, 0, 0) &&
         bench_small(kHalf, {50, 2048, 128}, {0}, 0, 0);
}
#endif

bool all_of_small(Totals& totals, bool few) {
  if (!check_small(kHalf, few, totals) || !check_small(kFloat, few, totals) ||
      !check_small(kTf32, few, totals) || !check_small(kBfloat16, few, totals))
    return false;
  std::printf("checks of A: %d, failures: %d\n", totals.cases, totals.failures);
  std::fflush(stdout);
#if !defined(LSTM_EXT_CUDA_EMU)
  return bench_all_small();
#else
  return true;
#endif
}

// What the kernels of B say when they give up waiting.
unsigned* failures_of_waits() {
#if defined(LSTM_EXT_CUDA_EMU)
  static unsigned failures = 0;
  return &failures;
#else
  static unsigned* failures = nullptr;
  if (failures == nullptr) {
    native::must(cudaMalloc(&failures, sizeof(*failures)), "cudaMalloc");
    native::must(cudaMemset(failures, 0, sizeof(*failures)), "cudaMemset");
  }
  return failures;
#endif
}

bool waits_came() {
  unsigned failures = 0;
#if defined(LSTM_EXT_CUDA_EMU)
  failures = *failures_of_waits();
#else
  native::must(cudaMemcpy(&failures, failures_of_waits(), sizeof(failures), cudaMemcpyDefault),
               "cudaMemcpy");
#endif
  if (failures != 0) std::printf("a wait for another block was given up\n");
  return failures == 0;
}

template <class T>
Variant<T> in_clusters(const Kind<T>& kind, int blocks, int rows) {
  unsigned* const failures = failures_of_waits();
  return {"B", kind.name, kind.tolerance, [=](const LayerForward<T>& layer) {
            const auto run = rows == 16 ? cluster_layer_forward<T, 2> : cluster_layer_forward<T, 1>;
            return run(layer, blocks, rows < 8, failures, nullptr, nullptr);
          }};
}

// rows 7: 8, with fewer weights in registers.
std::string cluster_name(int blocks, int rows) {
  if (rows < 8) return "blocks " + std::to_string(blocks) + " rows 8 few kept";
  return "blocks " + std::to_string(blocks) + " rows " + std::to_string(rows);
}

template <class T>
bool check_clusters(const Kind<T>& kind, bool few, Totals& totals) {
  const auto one = [&](int blocks, int rows, const Shape& shape, const Options& options) {
    return check(in_clusters(kind, blocks, rows), cluster_name(blocks, rows), shape, options,
                 totals) &&
           waits_came();
  };
  Options inference, reverse, plain, shifted;
  inference.train = false;
  reverse.reverse = true;
  plain.biases = false;
  shifted.shift = sizeof(T);
  const bool wide = std::is_same_v<T, float>;
  for (const int rows : {8, 16}) {
    if (!wide) {
      if (!one(4, rows, {5, 17, 256}, {}) || !one(4, rows, {1, 1, 40}, plain) ||
          !one(4, rows, {2, 3, 250}, reverse) || !one(4, rows, {6, 8, 136}, inference))
        return false;
    }
    if (few && rows == 16) continue;
    if (!one(8, rows, {5, 3, 256}, {}) || !one(8, rows, {4, 17, 200}, inference)) return false;
    if (few && !std::is_same_v<T, __half> && !wide) continue;
    if (!wide && !one(8, rows, {4, 3, 512}, {})) return false;
    if (!one(16, rows, {4, 3, 512}, {})) return false;
    if (!wide && rows == 8 && (!one(16, 8, {4, 3, 768}, {}) || !one(16, 7, {3, 9, 768}, {})))
      return false;
    if (few) continue;
    if (!wide && !one(8, rows, {3, 16, 384}, shifted)) return false;
    if (!wide && rows == 8 &&
        (!one(16, rows, {3, 17, 768}, inference) || !one(16, rows, {2, 1, 648}, reverse)))
      return false;
    if (!one(16, rows, {3, 17, 500}, inference) || !one(8, rows, {200, 33, 256}, {}) ||
        !one(16, rows, {60, 40, 512}, {}))
      return false;
  }
  return true;
}

#if !defined(LSTM_EXT_CUDA_EMU)
template <class T>
bool bench_clusters(const Kind<T>& kind, int blocks, int rows, const Shape& shape, bool train,
                    double cudnn, double ours_now) {
  return bench(in_clusters(kind, blocks, rows), cluster_name(blocks, rows), shape, train, cudnn,
               ours_now) &&
         waits_came();
}

bool bench_all_clusters() {
  const Shape long_one = {1024, 16, 768}, wide = {50, 64, 512}, two_ways = {50, 32, 256};
  return bench_clusters(kHalf, 16, 8, long_one, false, 2118, 4299) &&
         bench_clusters(kHalf, 16, 7, long_one, false, 2118, 4299) &&
         bench_clusters(kHalf, 16, 8, long_one, true, 6703 / 3.0, 11260 / 3.0) &&
         bench_clusters(kBfloat16, 4, 8, two_ways, false, 311, 329) &&
         bench_clusters(kBfloat16, 4, 16, two_ways, false, 311, 329) &&
         bench_clusters(kBfloat16, 8, 8, two_ways, false, 311, 329) &&
         bench_clusters(kBfloat16, 8, 16, two_ways, false, 311, 329) &&
         bench_clusters(kBfloat16, 8, 8, two_ways, true, 0, 0) &&
         bench_clusters(kBfloat16, 8, 8, wide, false, 326, 226) &&
         bench_clusters(kBfloat16, 8, 16, wide, false, 326, 226) &&
         bench_clusters(kBfloat16, 16, 8, wide, false, 326, 226) &&
         bench_clusters(kBfloat16, 16, 16, wide, false, 326, 226) &&
         bench_clusters(kTf32, 16, 8, wide, false, 469, 291) &&
         bench_clusters(kTf32, 16, 16, wide, false, 469, 291) &&
         bench_clusters(kTf32, 8, 8, {100, 1, 256}, false, 492, 299) &&
         bench_clusters(kHalf, 4, 8, {100, 1, 256}, false, 0, 0) &&
         bench_clusters(kHalf, 8, 8, {100, 1, 256}, false, 0, 0) &&
         bench_clusters(kHalf, 4, 8, {50, 256, 256}, false, 0, 0) &&
         bench_clusters(kHalf, 4, 16, {50, 256, 256}, false, 0, 0);
}
#endif

bool all_of_clusters(Totals& totals, bool few) {
  const Totals before = totals;
#if !defined(LSTM_EXT_CUDA_EMU)
  if (native::attribute(cudaDevAttrComputeCapabilityMajor) < 9) {
    std::printf("B: no clusters on this GPU\n");
    return true;
  }
#endif
  if (!check_clusters(kHalf, few, totals) || !check_clusters(kTf32, few, totals) ||
      !check_clusters(kBfloat16, few, totals))
    return false;
  std::printf("checks of B: %d, failures: %d\n", totals.cases - before.cases,
              totals.failures - before.failures);
  std::fflush(stdout);
#if !defined(LSTM_EXT_CUDA_EMU)
  return bench_all_clusters();
#else
  return true;
#endif
}

}  // namespace

int main(int count, char** arguments) {
  int seconds = 40;
  bool few = machine::kEmulated;
  std::string family;
  for (int k = 1; k < count; ++k) {
    const std::string word = arguments[k];
    if (word == "--seconds" && k + 1 < count) {
      seconds = std::atoi(arguments[++k]);
    } else if (word == "A" || word == "B") {
      family = word;
    } else if (word == "all") {
      few = false;
    } else {
      std::printf("Checks and times of a layer's kernels for Hopper.\n\nusage: %s [--seconds N] [A | B] [all]\n",
                  arguments[0]);
      return word == "--help" ? 0 : 2;
    }
  }
  if (seconds <= 0) seconds = 40;
  Totals totals;
  bool went_on = true;
  try {
    deadline = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
    if (const int status = machine::start(false); status != 0) return status;
    went_on = (family == "B" || all_of_small(totals, few)) &&
              (family == "A" || all_of_clusters(totals, few));
  } catch (const std::exception& error) {
    std::printf("stopped: %s\n", error.what());
    went_on = false;
  }
#if !defined(LSTM_EXT_CUDA_EMU)
  totals.failures += refused;
#endif
  std::printf("%d checks, %d failures%s\n", totals.cases, totals.failures,
              went_on ? "" : "; stopped before the end");
  return went_on && totals.failures == 0 && totals.cases > 0 ? 0 : 1;
}
