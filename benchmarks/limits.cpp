// What this machine can do at most: fused multiply-adds, and reading memory of several sizes.
// Built for the machine it runs on by limits.py. Arguments: the number of threads. Prints one
// "name value" a line: GFLOP/s of float, then GB/s of buffers of so many KiB a thread.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Floats __attribute__((vector_size(kBytes)));
constexpr int kWidth = kBytes / sizeof(float);

double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// Seconds that all threads need for work(thread) at the same time, the best of five.
template <class Work>
double best_time(int threads, const Work& work) {
  double best = 1e30;
  for (int round = 0; round < 5; ++round) {
    const double start = now();
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) pool.emplace_back([&, t] { work(t); });
    for (auto& thread : pool) thread.join();
    best = std::min(best, now() - start);
  }
  return best;
}

// Twelve chains hide the latency of FMA on every processor of the last ten years.
constexpr int kChains = 12;
constexpr long kSteps = 20'000'000;
volatile float sink;

void multiply_add(int seed) {
  Floats sum[kChains], a = Floats{} + (1.0f + seed * 1e-7f), b = Floats{} + 1e-7f;
  for (int c = 0; c < kChains; ++c) sum[c] = a * static_cast<float>(c);
  for (long i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sum[c] = sum[c] * a + b;
    asm volatile("" : "+x"(a));
  }
  for (int c = 0; c < kChains; ++c) sink = sum[c][0];
}

void read(const std::vector<Floats>& data, long repeats) {
  Floats sum[8] = {};
  for (long r = 0; r < repeats; ++r) {
    for (size_t i = 0; i + 8 <= data.size(); i += 8)
#pragma GCC unroll 8
      for (int c = 0; c < 8; ++c) sum[c] += data[i + c];
    asm volatile("" ::: "memory");
  }
  for (int c = 0; c < 8; ++c) sink = sum[c][0];
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const double seconds = best_time(threads, multiply_add);
  std::printf("gflops %.1f\n", 2.0 * kChains * kWidth * kSteps * threads / seconds / 1e9);
  for (long kib : {16, 64, 256, 512, 1024, 4096, 8192, 16384, 32768, 65536, 262144}) {
    std::vector<std::vector<Floats>> data(threads);
    for (auto& d : data) d.assign(kib * 1024 / kBytes, Floats{} + 1.0f);
    const long repeats = std::max(2L, 512L * 1024 / kib);
    const double time = best_time(threads, [&](int t) { read(data[t], repeats); });
    std::printf("%ld %.1f\n", kib, 1024.0 * kib * repeats * threads / time / 1e9);
  }
}
