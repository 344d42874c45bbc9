// Microbenchmarks of what a faster design of the layer depends on: a line of JSON each, at once.
//
//   {"name", "value", "unit", "note"}   or   {"name", "error"}
//
// All of them go through should one crash or hang (parts.h).
#include <string>

#include "micro_cluster.cuh"
#include "micro_exchange.cuh"
#include "micro_latency.cuh"
#include "micro_launch.cuh"
#include "parts.h"

namespace {

const native::Part kParts[] = {
    {"clock", micro::measure_clock},
    {"syncthreads",
     [] {
       micro::result("syncthreads", micro::cycles({1, 256}, micro::syncthreads_kernel, 1000),
                     "cycles", "256 threads");
     }},
    {"memory", micro::measure_memory},
    {"mma_half", [] { micro::measure_mma<__half>("half"); }},
    {"mma_tf32", [] { micro::measure_mma<float>("tf32"); }},
    {"functions", micro::measure_functions},
    {"packets", micro::measure_ping_pong},
    {"exchanges", micro::measure_exchanges},
    {"cluster_2", [] { micro::measure_cluster(2); }},
    {"cluster_4", [] { micro::measure_cluster(4); }},
    {"cluster_8", [] { micro::measure_cluster(8); }},
    {"cluster_16", [] { micro::measure_cluster(16); }},
    {"launches", micro::measure_launches},
};

// Whether the errors of a part end with it.
bool settle() {
  const cudaError_t error = cudaDeviceSynchronize();
  cudaGetLastError();
  return error == cudaSuccess;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string word = count > 1 ? arguments[1] : "";
  bool known = word == "";
  for (const native::Part& part : kParts) known = known || word == part.name;
  if (!known) {
    std::printf("Microbenchmarks, a line of JSON each.\n\nusage: %s [PART]\nparts:", arguments[0]);
    for (const native::Part& part : kParts) std::printf(" %s", part.name);
    std::printf("\n");
    return word == "--help" ? 0 : 2;
  }
  return native::run_parts(kParts, {native::find_gpu, settle, micro::no_result, 6}, word);
}
