// The CUDA kernels of a whole layer that keep w_hh in shared memory, against plain loops in double
// precision: on the CPU as built by tests/test_cuda_emu.py, on a GPU as built by
// tests/gpu/native/build.py. "few" as argument: few cases, for a sanitizer that takes its time.
// Exit status 0 if all agree.
#include "layer_cases.h"

namespace {

using namespace lstm_ext::cuda;
using check::Buffer;
using check::Case;
using check::draw;
using check::sigmoid;
using check::Steps;
using check::tolerance;
using check::Values;

check::Report report;
bool few = false, fewest = false;

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
    check::for_rows(offsets[t + 1] - offsets[t], 4.0 * H * H, [&](int64_t n) {
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
      Values sums(H);
      for (int k = 0; k < 4 * H; ++k)
        for (int u = 0; u < H; ++u) sums[u] += grad[k] * w_hh[size_t(k) * H + u];
      for (int u = 0; u < H; ++u) {
        h[n * H + u] = starts ? 0 : sums[u];
        if (starts) c[n * H + u] = 0;
      }
    });
  }
  out.hx = h;
  out.cx = c;
  return out;
}

// Shared memory for a test: enough for all of w_hh, or the least that will do, so that the units
// are spread over many blocks. The same with the fewest multiprocessors that will do: many rows or
// units a block. kSome: some more memory than that, for products of several row tiles at a time.
enum class Shared { kAll, kLeast, kAllFew, kLeastFew, kSomeFew };

template <class Fits>
Device device_for(Shared shared, bool tf32, const Fits& fits) {
  // The emulator is slow with many blocks, and ThreadSanitizer holds some 30 of 256 threads.
  const int multiprocessors = few || machine::kEmulated ? 28 : machine::multiprocessors();
  Device device = {multiprocessors, machine::shared_per_block(), tf32};
  if (shared != Shared::kAll && shared != Shared::kAllFew) {
    device.shared_per_block = 64;
    while (!fits(device)) device.shared_per_block += 64;
  }
  if (shared == Shared::kAll || shared == Shared::kLeast) return device;
  device.multiprocessors = 1;
  while (!fits(device)) ++device.multiprocessors;
  if (shared == Shared::kSomeFew) device.shared_per_block += 12 * 1024;
  return device;
}

template <class T>
bool forward_fits(const Case& test, const Device& device) {
  LayerForward<T> sizes = {};
  sizes.sequence.N = test.N, sizes.H = test.H;
  return layer_forward_shared_fits(sizes, device);
}

template <class T>
bool backward_fits(const Case& test, const Device& device) {
  LayerBackward<T> sizes = {};
  sizes.sequence.N = test.N, sizes.H = test.H;
  return layer_backward_fits(sizes, device);
}

template <class T>
void check_forward(const Case& test, Shared shared, bool tf32 = false) {
  const Device device =
      device_for(shared, tf32, [&](const Device& device) { return forward_fits<T>(test, device); });
  check::check_forward<T>(report, test, device, LayerWay::kShared);
}

template <class T>
void check_backward(const Case& test, Shared shared, bool tf32 = false) {
  const auto [L, N, H, packed, reverse, with_reset, all, off] = test;
  const Device device = device_for(
      shared, tf32, [&](const Device& device) { return backward_fits<T>(test, device); });
  check::name_case<T>(report, test, device, " backward");
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
    const machine::Launches launches;
    report.ran(layer_backward(call, device, nullptr));
    report.launched(launches, 1, "in one launch");
    report.that(launches.blocks_together() <= device.multiprocessors, "one block on each");
    if (wanted) {
      const Gradients expected =
          expect_back<T>(test, steps.offsets, steps.reset, w_hh, gates, c_before,
                         all ? of_output : none, of_hy, all ? no_states : of_cy);
      report.close(grad_gates.values(), expected.gates, allowed, "gradient of gates");
      report.close(grad_hx.values(), expected.hx, allowed, "gradient of h");
      report.close(grad_cx.values(), expected.cx, allowed, "gradient of c");
      first.take_bits(grad_gates);
    } else {
      report.that(first.same_bits(grad_gates), machine::kSameBits);
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
      // Most steps of the emulator, and of the types these are the two ways to multiply.
      const bool one_of_two = std::is_same_v<T, float> || std::is_same_v<T, __half>;
      if (fewest && shared == Shared::kLeast && !one_of_two) continue;
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

// Sizes of use: w_hh spread over all the multiprocessors that it needs, blocks that meet at every
// step. Fewer steps where there are many rows: the expected values are made on the CPU.
template <class T>
void check_large(const std::vector<int>& hidden, const std::vector<int>& rows, bool tf32 = false) {
  for (const int H : hidden)
    for (const int N : rows) {
      const int L = N * H > 16 * 1024 ? 6 : 20;
      const bool odd = N == 16;
      const Case test = {L, N, H, odd, odd, H == 512, true, false};
      // Where it does not fit, the layer goes step by step.
      const Device device = {machine::multiprocessors(), machine::shared_per_block(), tf32};
      if (forward_fits<T>(test, device)) check_forward<T>(test, Shared::kAll, tf32);
      if (backward_fits<T>(test, device)) check_backward<T>(test, Shared::kAll, tf32);
    }
}

// Hidden units: more than a chunk of weights has, in 33 blocks, whose threads are more than
// ThreadSanitizer can hold.
#if defined(__SANITIZE_THREAD__)
constexpr int kManyChunks = 240;
#else
constexpr int kManyChunks = 264;
#endif

// How the work is spread, and how much of it a thread has: several elements, several row tiles,
// blocks that have no rows in some steps, one step, weights of one chunk and of many.
template <class T>
void check_spread() {
  check_layer<T>({4, 11, 40, true, true, true, true, false}, Shared::kAllFew);
  check_layer<T>({2, 1, kManyChunks, false, true, false, true, false}, Shared::kAllFew);
  if (fewest) return;
  check_layer<T>({3, 21, 24, true, false, true, true, false}, Shared::kLeastFew);
  check_layer<T>({3, 21, 24, true, true, true, false, false}, Shared::kSomeFew);
  check_layer<T>({6, 18, 8, true, true, true, true, false}, Shared::kLeast);
  if (few) return;
  check_layer<T>({1, 3, 8, false, false, true, true, false}, Shared::kLeast);
  check_layer<T>({6, 18, 16, true, false, false, false, false}, Shared::kLeast);
  check_layer<T>({3, 40, 32, true, true, true, true, false}, Shared::kLeastFew);
  check_layer<T>({3, 40, 32, true, true, true, true, false}, Shared::kSomeFew);
  check_layer<T>({2, 5, 264, false, false, true, true, false}, Shared::kAllFew);
}

// What fits, and what does not: too little memory, too few multiprocessors, too many rows.
void check_fits() {
  report.begin("fits");
  LayerForward<float> sizes = {};
  sizes.sequence.N = 2, sizes.H = 64;
  report.that(!layer_forward_shared_fits(sizes, {132, 1024, false}), "not in a KiB");
  sizes.H = 512;
  report.that(layer_forward_shared_fits(sizes, {132, 227 * 1024, false}), "512 units on an H100");
  report.that(!layer_forward_shared_fits(sizes, {8, 227 * 1024, false}),
              "not on 8 multiprocessors");
  sizes.sequence.N = 1000;
  report.that(!layer_forward_shared_fits(sizes, {132, 227 * 1024, false}), "not with 1000 rows");
  sizes.H = 64;
  report.that(layer_forward_shared_fits(sizes, {132, 227 * 1024, false}), "1000 rows of 64 units");
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
  report.begin("copy_numbers");
  for (const int64_t count : {1, 480, 481, 1000}) {
    std::vector<int64_t> from(count);
    for (int64_t k = 0; k < count; ++k) from[k] = k * k + 1;
    Buffer<int64_t> to(count + 1);  // of -1
    report.ran(copy_numbers(from.data(), count, to.at(), nullptr));
    const auto found = to.numbers();
    report.that(found[count] == -1, "no more than wanted");
    report.that(std::equal(from.begin(), from.end(), found.get()), "all of them");
  }
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(
      count, arguments, "The CUDA kernels of a layer.", report, [](check::Amount amount) {
        few = amount != check::Amount::kAll;
        fewest = amount == check::Amount::kFewest;
        check_all<float>();
        check_all<double>();
        check_all<__half>();
        check_all<__nv_bfloat16>();
        check_spread<float>();
        if (!fewest) check_spread<__half>();
        if (!few) {
          check_spread<double>();
          check_spread<__nv_bfloat16>();
          check_layer<float>({2, 9, 264, false, false, true, true, false}, Shared::kAllFew, true);
        }
        check_layer<float>({3, 5, 24, true, true, true, true, false}, Shared::kAll, true);
        check_layer<float>({3, 17, 16, false, false, true, true, false}, Shared::kLeast, true);
        check_fits();
        check_copy();
        if (machine::kEmulated || few) return;
        check_large<float>({256, 512, 768, 1024}, {1, 16, 64});
        check_large<float>({512, 768}, {16, 64}, true);
        check_large<double>({256, 512}, {16});
        check_large<__half>({256, 512, 768, 1024}, {1, 16, 64});
        check_large<__nv_bfloat16>({512, 768}, {16});
      });
}
