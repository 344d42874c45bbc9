// Memory as a test wants it: exactly as much as a kernel may touch, so that every stray access is
// seen, filled with chosen numbers, and if asked off the 16 bytes that vectors need. On the
// emulator or on a GPU: what differs between them is in namespace machine.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(LSTM_EXT_CUDA_EMU)
#include "emulated.h"
#else
#include "on_gpu.h"
#endif

namespace check {

using Values = std::vector<double>;

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

template <class T>
const char* name() {
  if (std::is_same_v<T, float>) return "float";
  if (std::is_same_v<T, double>) return "double";
  return std::is_same_v<T, __half> ? "half" : "bfloat16";
}

// The distance of neighbouring numbers about 1.
template <class T>
double spacing() {
  const int bits = std::is_same_v<T, float>    ? 23
                   : std::is_same_v<T, double> ? 52
                   : std::is_same_v<T, __half> ? 10
                                               : 7;
  return std::ldexp(1.0, -bits);
}

template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count, bool off = false)
      : count_(count), memory_(count * sizeof(T), off ? sizeof(T) : 0) {}
  Buffer(const Values& values, bool off = false) : Buffer(values.size(), off) {
    const auto numbers = std::make_unique<T[]>(count_);
    for (size_t k = 0; k < count_; ++k) numbers[k] = T(values[k]);
    memory_.write(numbers.get());
  }
  T* at() { return static_cast<T*>(memory_.at()); }
  std::unique_ptr<T[]> numbers() {
    auto numbers = std::make_unique<T[]>(count_);
    memory_.read(numbers.get());
    return numbers;
  }
  Values values() {
    const auto from = numbers();
    Values result(count_);
    for (size_t k = 0; k < count_; ++k) result[k] = static_cast<double>(from[k]);
    return result;
  }
  void take_bits(Buffer& other) { memory_.write(other.numbers().get()); }
  bool same_bits(Buffer& other) {
    return std::memcmp(numbers().get(), other.numbers().get(), count_ * sizeof(T)) == 0;
  }

 private:
  size_t count_;
  machine::Memory memory_;
};

// Numbers that T holds exactly.
template <class T>
Values draw(size_t count, double scale, std::mt19937& random) {
  std::uniform_real_distribution<double> uniform(-scale, scale);
  Values values(count);
  for (double& value : values) value = static_cast<double>(T(uniform(random)));
  return values;
}

// body(row) for all rows, on many cores where a row is much work (count of multiplications).
template <class Body>
void for_rows(int64_t rows, double work, const Body& body) {
  const int64_t most = std::max(1u, std::thread::hardware_concurrency());
  const int64_t threads = work < 1e5 ? 1 : std::min(rows, most);
  const auto some = [&](int64_t first) {
    for (int64_t row = first; row < rows; row += threads) body(row);
  };
  std::vector<std::thread> others;
  for (int64_t first = 1; first < threads; ++first) others.emplace_back(some, first);
  some(0);
  for (std::thread& thread : others) thread.join();
}

// The first failure of a program that was to stop there.
struct Stopped : std::exception {
  const char* what() const noexcept override { return "stopped at the first failure"; }
};

class Report {
 public:
  void stop_at_first() { stops_ = true; }
  // The case that what follows belongs to.
  void begin(const std::string& where) {
    where_ = where;
    machine::watch(where);
  }
  // found within tolerance of expected, everywhere; NaN is not.
  void close(const Values& found, const Values& expected, double tolerance, const char* what) {
    ++comparisons_;
    double worst = 0;
    for (size_t k = 0; k < expected.size(); ++k) {
      const double error = std::abs(found[k] - expected[k]) / (1 + std::abs(expected[k]));
      if (!(error <= worst)) worst = error;
      if (std::isnan(error)) break;
    }
    if (worst <= tolerance) return;
    std::printf("%s: %s off by %g (allowed %g)\n", where_.c_str(), what, worst, tolerance);
    failed();
  }
  void that(bool true_, const char* what) {
    ++comparisons_;
    if (true_) return;
    std::printf("%s: not so: %s\n", where_.c_str(), what);
    failed();
  }
  // A call was made without an error, and wrote nothing around its buffers.
  void ran(cudaError_t error, const char* what = "it ran") {
    ++comparisons_;
    if (error != cudaSuccess) {
      std::printf("%s: not so: %s: %s\n", where_.c_str(), what, machine::describe(error).c_str());
      failed();
    }
    for (const std::string& stray : machine::strays()) {
      std::printf("%s: %s\n", where_.c_str(), stray.c_str());
      failed();
    }
  }
  void launched(const machine::Launches& since, unsigned long count, const char* what) {
    if (machine::kEmulated) that(since.count() == count, what);
  }
  // An error that nothing can follow.
  void stopped(const char* what) {
    ++failures_;
    std::printf("%s: %s; stopped here\n", where_.c_str(), what);
  }
  int finish() const {
    std::printf("%d comparisons, %d failures\n", comparisons_, failures_);
    return failures_ == 0 && comparisons_ > 0 ? 0 : 1;
  }

 private:
  void failed() {
    ++failures_;
    if (stops_) throw Stopped();
  }

  std::string where_ = "at the start";
  int comparisons_ = 0, failures_ = 0;
  bool stops_ = false;
};

// How many cases a program checks: few for a sanitizer, fewest where seconds count.
enum class Amount { kAll, kFew, kFewest };

// A program of checks: its arguments, and its exit status. body(amount).
template <class Body>
int run(int count, char** arguments, const char* about, Report& report, const Body& body) {
  const std::string word = count > 1 ? arguments[1] : "";
  if (word != "" && word != "few" && word != "fewest" && word != "broken") {
    std::printf(
        "%s\n\nusage: %s [few | fewest | broken]\n"
        "  few: few cases, for a sanitizer that takes its time; fewest: fewer yet\n"
        "  broken: few, until the first failure\n",
        about, arguments[0]);
    return word == "--help" ? 0 : 2;
  }
  const Amount amount = word.empty()       ? Amount::kAll
                        : word == "fewest" ? Amount::kFewest
                                           : Amount::kFew;
  if (word == "broken") report.stop_at_first();
  try {
    if (const int status = machine::start(amount != Amount::kAll); status != 0) return status;
    body(amount);
  } catch (const std::exception& error) {
    report.stopped(error.what());
  }
  return report.finish();
}

}  // namespace check
