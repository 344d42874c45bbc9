// The CUDA kernels of a whole layer that keep w_hh in registers, and which layers take them, as
// check_layer.cpp checks the others.
#include "layer_cases.h"

namespace {

using namespace lstm_ext::cuda;
using check::Case;
using lstm_ext::kPlainCell;

check::Report report;

Device device_of(int multiprocessors, bool tf32) {
  return {multiprocessors, machine::shared_per_block(), tf32, machine::has_clusters()};
}

// rows: of a block, which are as few as give each multiprocessor one.
template <class T>
void check_small(Case test, int rows, bool tf32 = false) {
  const Device device = device_of((test.N + rows - 1) / rows, tf32);
  const std::string more = " small, rows " + std::to_string(rows);
  check::check_forward<T>(report, test, device, LayerWay::kSmall, more);
  check::check_backward<T>(report, test, device, LayerWay::kSmall, more);
}

// all_at_once: on a GPU of that many multiprocessors, else on one that runs a cluster at a time.
template <class T>
void check_cluster(const Case& test, bool all_at_once, bool tf32 = false) {
  if (!machine::has_clusters()) return;
  const Device device = device_of(all_at_once ? 132 : 17, tf32);
  const char* const more = all_at_once ? " clusters" : " clusters in turns";
  check::check_forward<T>(report, test, device, LayerWay::kCluster, more);
  check::check_backward<T>(report, test, device, LayerWay::kCluster, more);
}

// Sizes that are no multiple of anything, one unit, all that a shape takes; fewer rows than a
// block has, and more; one step, an even number and an odd one.
template <class T>
void check_all_small(check::Amount amount) {
  constexpr bool kWide = std::is_same_v<T, float>;
  for (int rows = kWide ? 1 : 2; rows <= (kWide ? 4 : 8); rows *= 2) {
    check_small<T>({3, 2 * rows + 1, 33, false, false, false, true, false}, rows);
    check_small<T>({2, rows, 72, false, true, false, true, true}, rows);
    if (amount == check::Amount::kFewest) continue;
    check_small<T>({4, 3 * rows, 128, false, true, false, true, false}, rows);
    check_small<T>({1, rows, 64, false, false, false, false, false}, rows);
    check_small<T>({5, 2 * rows - 1, 8, false, false, false, true, true}, rows);
    if (amount != check::Amount::kAll) continue;
    for (const int H : {1, 31, 32, 40, 48, 49, 65, 96, 100, 120})
      check_small<T>({3, 2 * rows + 1, H, false, H % 2 == 0, false, H != 40, H == 96}, rows);
  }
}

// Of each shape: few units, and all that it takes; a cluster that is not full, and several.
template <class T>
void check_all_clusters(check::Amount amount, bool tf32 = false) {
  check_cluster<T>({4, 9, 136, false, false, false, true, false}, true, tf32);
  if (amount == check::Amount::kFewest) return;
  check_cluster<T>({1, 3, 256, false, false, false, true, false}, true, tf32);
  check_cluster<T>({3, 8, 250, false, true, false, false, true}, false, tf32);
  check_cluster<T>({3, 3, 264, false, true, false, true, false}, true, tf32);
  check_cluster<T>({3, 10, 264, false, false, false, true, false}, false, tf32);
  if (!tf32) check_cluster<T>({3, 2, 520, false, true, false, true, false}, true, tf32);
  if (amount != check::Amount::kAll) return;
  check_cluster<T>({5, 17, 512, false, false, false, true, true}, true, tf32);
  check_cluster<T>({3, 33, 512, false, true, false, true, false}, false, tf32);
  if (!tf32) check_cluster<T>({3, 9, 768, false, false, false, true, false}, true, tf32);
}

// Sizes of use, where all is as on a GPU: many clusters, many steps.
template <class T>
void check_large(bool tf32 = false) {
  const Device device = device_of(machine::multiprocessors(), tf32);
  const auto one = [&](int L, int N, int H) {
    const Case test = {L, N, H, false, N == 17, false, true, false};
    LayerForward<T> sizes = {};
    sizes.sequence.N = N, sizes.H = H;
    const LayerWay way = layer_forward_way(sizes, device);
    if (way == LayerWay::kSmall || way == LayerWay::kCluster)
      check::check_forward<T>(report, test, device, way, " as it is");
    LayerBackward<T> back = {};
    back.sequence.N = N, back.H = H;
    const LayerWay way_back = layer_backward_way(back, device);
    if (way_back == LayerWay::kSmall || way_back == LayerWay::kCluster)
      check::check_backward<T>(report, test, device, way_back, " as it is");
  };
  for (const int H : {64, 128, 256, 512, 768})
    for (const int N : {1, 17, 56, 120}) one(20, N, H);
  one(100, 256, 64);
  one(60, 140, 256);
  one(60, 64, 512);
}

// Who goes which way on an H100, and on others.
template <class T>
LayerWay way_of(int64_t N, int H, const Device& device, int variant = kPlainCell,
                const DeviceSequence& of = {}) {
  LayerForward<T> sizes = {};
  sizes.sequence = of;
  sizes.sequence.N = N, sizes.H = H, sizes.variant = variant;
  return layer_forward_way(sizes, device);
}

template <class T>
LayerWay way_back_of(int64_t N, int H, const Device& device, int variant = kPlainCell,
                     const DeviceSequence& of = {}) {
  LayerBackward<T> sizes = {};
  sizes.sequence = of;
  sizes.sequence.N = N, sizes.H = H, sizes.variant = variant;
  return layer_backward_way(sizes, device);
}

void check_ways() {
  report.begin("ways");
  const Device h100 = {132, 227 * 1024, false, true}, tf32 = {132, 227 * 1024, true, true};
  const Device a100 = {108, 163 * 1024, false, false}, tiny = {132, 64, false, true};
  constexpr LayerWay kSmall = LayerWay::kSmall, kCluster = LayerWay::kCluster;
  constexpr LayerWay kShared = LayerWay::kShared, kNone = LayerWay::kNone;
  report.that(way_of<float>(1, 1, h100) == kSmall, "one unit");
  report.that(way_of<float>(256, 128, tf32) == kSmall, "float of 128 units");
  report.that(way_of<__half>(4096, 128, h100) == kSmall, "4,096 rows of half");
  report.that(way_of<__half>(4300, 128, h100) != kSmall, "4,300 rows of half");
  report.that(way_of<double>(3, 64, h100) == kShared, "double");
  report.that(way_of<float>(3, 129, h100) == kShared, "float of 129 units");
  report.that(way_of<float>(3, 129, tf32) == kCluster, "TF32 of 129 units");
  report.that(way_of<float>(112, 512, tf32) == kCluster, "TF32, 112 rows of 512");
  report.that(way_of<float>(113, 512, tf32) == kShared, "TF32, 113 rows of 512");
  report.that(way_of<float>(3, 513, tf32) == kShared, "TF32 of 513 units");
  report.that(way_of<__half>(120, 256, h100) == kCluster, "half, 120 rows of 256");
  report.that(way_of<__half>(121, 256, h100) == kShared, "half, 121 rows of 256");
  report.that(way_of<__half>(129, 256, h100) == kCluster, "half, 129 rows in two turns");
  report.that(way_of<__half>(240, 256, h100) == kCluster, "half, 240 rows in two turns");
  report.that(way_of<__half>(241, 256, h100) == kNone, "half, 241 rows of 256");
  report.that(way_of<__half>(120, 512, h100) == kCluster, "half, 120 rows of 512");
  report.that(way_of<__nv_bfloat16>(56, 768, h100) == kCluster, "bfloat16, 56 rows of 768");
  report.that(way_of<__nv_bfloat16>(57, 768, h100) == kShared, "bfloat16, 57 rows of 768");
  report.that(way_of<__half>(16, 776, h100) == kShared, "half of 776 units");
  report.that(way_of<__half>(16, 256, a100) == kShared, "no clusters");
  report.that(way_of<__half>(16, 64, a100) == kSmall, "small without clusters");
  report.that(way_of<float>(1056, 128, h100) == kSmall, "1,056 rows of float");
  report.that(way_of<float>(1057, 128, h100) == kNone, "1,057 rows of float");
  report.that(way_of<float>(500, 128, a100) == kSmall, "float on an A100");
  report.that(way_of<float>(1, 64, tiny) == kNone, "no shared memory to speak of");
  report.that(way_of<__half>(1, 64, tiny) == kNone, "the same in half");
  report.that(way_of<float>(3, 64, h100, kPlainCell + 1) == kShared, "another cell");
  const int64_t offsets[] = {0, 3};
  const bool reset[] = {false, false, false};
  report.that(way_of<float>(3, 64, h100, kPlainCell, {offsets, nullptr, 1, 3, false}) == kShared,
              "packed");
  report.that(way_of<float>(3, 64, h100, kPlainCell, {nullptr, reset, 1, 3, false}) == kShared,
              "with resets");
  report.that(way_back_of<float>(1, 1, h100) == kSmall, "backward, one unit");
  report.that(way_back_of<float>(256, 128, tf32) == kSmall, "backward, float of 128 units");
  report.that(way_back_of<float>(1056, 128, h100) == kSmall, "backward, 1,056 rows of float");
  report.that(way_back_of<float>(1057, 128, h100) != kSmall, "backward, 1,057 rows of float");
  report.that(way_back_of<float>(3, 129, h100) == kShared, "backward, float of 129 units");
  report.that(way_back_of<float>(3, 129, tf32) == kCluster, "backward, TF32 of 129 units");
  report.that(way_back_of<float>(112, 512, tf32) == kCluster, "backward, TF32, 112 rows of 512");
  report.that(way_back_of<float>(113, 512, tf32) == kShared, "backward, TF32, 113 rows of 512");
  report.that(way_back_of<__half>(112, 512, h100) == kCluster, "backward, 112 rows of 512");
  report.that(way_back_of<__half>(113, 512, h100) == kShared, "backward, 113 rows of 512");
  report.that(way_back_of<__half>(120, 256, h100) == kCluster, "backward, 120 rows of 256");
  report.that(way_back_of<__half>(56, 768, h100) == kCluster, "backward, 56 rows of 768");
  report.that(way_back_of<__half>(57, 768, h100) == kShared, "backward, 57 rows of 768");
  report.that(way_back_of<__half>(16, 776, h100) == kShared, "backward, half of 776 units");
  report.that(way_back_of<__half>(16, 256, a100) == kShared, "backward without clusters");
  report.that(way_back_of<double>(3, 64, h100) == kShared, "backward, double");
  report.that(way_back_of<__half>(2112, 128, h100) == kSmall, "backward, 2,112 rows of half");
  report.that(way_back_of<__half>(2113, 128, h100) != kSmall, "backward, 2,113 rows of half");
  report.that(way_back_of<__half>(4224, 64, h100) == kSmall, "backward, 4,224 rows of half");
  report.that(way_back_of<__nv_bfloat16>(16, 64, a100) == kSmall, "backward on an A100");
  report.that(way_back_of<float>(1, 64, tiny) == kNone, "backward, no shared memory to speak of");
  report.that(way_back_of<float>(3, 64, h100, kPlainCell + 1) == kShared, "backward, another cell");
  report.that(
      way_back_of<float>(3, 64, h100, kPlainCell, {offsets, nullptr, 1, 3, false}) == kShared,
      "backward, packed");
  report.that(way_back_of<float>(3, 64, h100, kPlainCell, {nullptr, reset, 1, 3, false}) == kShared,
              "backward, with resets");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run(count, arguments, "The CUDA kernels of a layer with w_hh in registers.", report,
                    [](check::Amount amount) {
                      check_ways();
                      check_all_small<float>(amount);
                      check_all_small<__half>(amount);
                      check_all_clusters<__half>(amount);
                      check_all_clusters<float>(amount, true);
                      if (amount == check::Amount::kAll) {  // as half, but for its rounding
                        check_all_small<__nv_bfloat16>(amount);
                        check_all_clusters<__nv_bfloat16>(amount);
                      }
                      if (machine::kEmulated || amount != check::Amount::kAll) return;
                      check_large<float>();
                      check_large<float>(true);
                      check_large<__half>();
                      check_large<__nv_bfloat16>();
                    });
}
