// What the launchers would ask of an H100 at some sizes, without running it: a line a launch.
// Compared by tests/test_cuda_emu.py with tests/cuda_launches.txt.
#include <cstdio>

#include "buffer.h"
#include "cuda/kernels.h"
#include "cuda/recurrence.h"

namespace {

using namespace lstm_ext::cuda;

constexpr Device kH100 = {132, 227 * 1024, false, true};

template <class T>
void say(const char* what, int64_t N, int H, cudaError_t error) {
  const auto& [grid, block, shared, cooperative, cluster] = cuda_emu::asked;
  const unsigned threads = block.x * block.y;
  std::printf("%-14s %-8s N %-5ld H %-5d", what, check::name<T>(), static_cast<long>(N), H);
  if (error != cudaSuccess)
    std::printf(" error %d\n", static_cast<int>(error));
  else
    std::printf(" %4u x %-3u blocks of %4u, %6zu bytes, resident %5u%s%s\n", grid.x, grid.y,
                threads, shared, cuda_emu::resident_blocks(threads, shared),
                cooperative ? ", waiting for each other" : "",
                cluster == 1   ? ""
                : cluster == 8 ? ", in clusters of 8"
                               : ", in clusters of 16");
}

template <class T>
void say_layer(const char* what, int64_t N, int H, bool fits, cudaError_t error) {
  if (fits)
    say<T>(what, N, H, error);
  else
    std::printf("%-14s %-8s N %-5ld H %-5d step by step\n", what, check::name<T>(),
                static_cast<long>(N), H);
}

template <class T>
void say_all() {
  for (const int64_t N : {1, 32, 256})
    for (const int H : {64, 512, 1024}) {
      CellForward<T> cell = {};
      cell.N = N, cell.I = H, cell.H = H;
      if (cell_forward_pays(cell, kH100))
        say<T>("cell_forward", N, H, cell_forward(cell, kH100, nullptr));
      else
        say<T>("cell_finish", N, H, cell_finish<T>(cell, nullptr, nullptr));
      CellBackward<T> backward = {};
      backward.N = N, backward.H = H;
      say<T>("cell_backward", N, H, cell_backward(backward, nullptr));
      RecurrenceForward<T> recurrence = {};
      recurrence.rows = N, recurrence.options.H = recurrence.options.P = H;
      say<T>("recurrence", N, H, recurrence_step(recurrence, nullptr));
      const T norm = {};
      recurrence.options.norm = &norm;
      say<T>(" with a norm", N, H, recurrence_step(recurrence, nullptr));
      LayerForward<T> layer = {};
      layer.sequence.L = 1, layer.sequence.N = N, layer.H = H;
      const LayerWay way = layer_forward_way(layer, kH100);
      const bool fits = way != LayerWay::kNone;
      say_layer<T>("layer_forward", N, H, fits,
                   fits ? layer_forward(layer, kH100, way, nullptr) : cudaSuccess);
      if (fits && way != LayerWay::kShared && layer_forward_shared_fits(layer, kH100))
        say<T>(" the other way", N, H, layer_forward(layer, kH100, LayerWay::kShared, nullptr));
      LayerBackward<T> back = {};
      back.sequence = layer.sequence, back.H = H;
      const LayerWay way_back = layer_backward_way(back, kH100);
      const bool back_fits = way_back != LayerWay::kNone;
      say_layer<T>("layer_backward", N, H, back_fits,
                   back_fits ? layer_backward(back, kH100, way_back, nullptr) : cudaSuccess);
      if (back_fits && way_back != LayerWay::kShared && layer_backward_shared_fits(back, kH100))
        say<T>(" the other way", N, H, layer_backward(back, kH100, LayerWay::kShared, nullptr));
    }
}

}  // namespace

int main() {
  cuda_emu::runs = false;
  say_all<float>();
  say_all<__half>();
}
