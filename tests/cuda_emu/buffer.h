// Memory as a test wants it: exactly as much as a kernel may touch, so that a sanitizer sees every
// stray access, filled with chosen numbers, and if asked off the 16 bytes that vectors need.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda_emu.h"

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
  explicit Buffer(size_t count, bool off = false) : count_(count), off_(off ? 1 : 0) {
    const size_t bytes = (count + off_) * sizeof(T);
    memory_.reset(static_cast<T*>(std::malloc(bytes == 0 ? 1 : bytes)));
    std::memset(static_cast<void*>(memory_.get()), 0xff, bytes);  // NaN
  }
  Buffer(const Values& values, bool off = false) : Buffer(values.size(), off) {
    for (size_t k = 0; k < values.size(); ++k) at()[k] = T(values[k]);
  }
  T* at() { return memory_.get() + off_; }
  Values values() {
    Values result(count_);
    for (size_t k = 0; k < count_; ++k) result[k] = static_cast<double>(at()[k]);
    return result;
  }
  bool same_bits(Buffer& other) { return std::memcmp(at(), other.at(), count_ * sizeof(T)) == 0; }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  size_t count_, off_;
  std::unique_ptr<T, Free> memory_;
};

// Numbers that T holds exactly.
template <class T>
Values draw(size_t count, double scale, std::mt19937& random) {
  std::uniform_real_distribution<double> uniform(-scale, scale);
  Values values(count);
  for (double& value : values) value = static_cast<double>(T(uniform(random)));
  return values;
}

class Report {
 public:
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
    ++failures_;
    std::printf("%s: %s off by %g (allowed %g)\n", where.c_str(), what, worst, tolerance);
  }
  void that(bool true_, const char* what) {
    ++comparisons_;
    if (true_) return;
    ++failures_;
    std::printf("%s: not so: %s\n", where.c_str(), what);
  }
  int finish() const {
    std::printf("%d comparisons, %d failures\n", comparisons_, failures_);
    return failures_ == 0 && comparisons_ > 0 ? 0 : 1;
  }
  std::string where;

 private:
  int comparisons_ = 0, failures_ = 0;
};

}  // namespace check
