// The CUDA kernels of a whole layer that keep w_hh in shared memory, against plain loops in double
// precision: on the CPU as built by tests/test_cuda_emu.py, on a GPU as built by
// tests/gpu/native/build.py. "few" as argument: few cases, for a sanitizer that takes its time.
// Exit status 0 if all agree.
#include "layer_cases.h"

namespace {

using namespace lstm_ext::cuda;
using check::Buffer;
using check::Case;

check::Report report;
bool few = false, fewest = false;

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
  return layer_backward_shared_fits(sizes, device);
}

template <class T>
void check_forward(const Case& test, Shared shared, bool tf32 = false) {
  const Device device =
      device_for(shared, tf32, [&](const Device& device) { return forward_fits<T>(test, device); });
  check::check_forward<T>(report, test, device, LayerWay::kShared);
}

template <class T>
void check_backward(const Case& test, Shared shared, bool tf32 = false) {
  const Device device = device_for(
      shared, tf32, [&](const Device& device) { return backward_fits<T>(test, device); });
  check::check_backward<T>(report, test, device, LayerWay::kShared);
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
  report.that(layer_backward_shared_fits(back, {132, 227 * 1024, false}),
              "backward, 1024 units of half");
  report.that(!layer_backward_shared_fits(back, {60, 227 * 1024, false}),
              "not on 60 multiprocessors");
  back.H = 2048;
  report.that(!layer_backward_shared_fits(back, {132, 227 * 1024, false}), "not 2048");
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
