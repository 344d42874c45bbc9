// Microbenchmarks of what a faster design of the layer depends on: a line of JSON each, at once.
//
//   {"name", "value", "unit", "note"}   or   {"name", "error"}
//
// A child process measures. Should an error or a kernel that hangs end it, another goes on with the
// next measurement.
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "micro_cluster.cuh"
#include "micro_exchange.cuh"
#include "micro_latency.cuh"
#include "micro_launch.cuh"

namespace {

struct Part {
  const char* name;
  void (*measure)();
};

const Part kParts[] = {
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
constexpr int kCount = sizeof(kParts) / sizeof(kParts[0]);
constexpr unsigned kPartSeconds = 6, kAllSeconds = 40;

// In the child. An error that stays with the process ends it.
int measure(int first, const char* only, volatile int* current) {
  if (const int status = native::find_gpu(); status != 0) return status;
  for (int part = first; part < kCount; ++part) {
    *current = part;
    if (only != nullptr && std::strcmp(only, kParts[part].name) != 0) continue;
    alarm(kPartSeconds);
    try {
      kParts[part].measure();
      native::must(cudaDeviceSynchronize(), "after it");
    } catch (const std::exception& error) {
      micro::no_result(kParts[part].name, error.what());
      cudaGetLastError();
      if (cudaDeviceSynchronize() != cudaSuccess) return 1;
    }
  }
  *current = kCount;
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string word = count > 1 ? arguments[1] : "";
  bool known = word == "";
  for (const Part& part : kParts) known = known || word == part.name;
  if (!known) {
    std::printf("Microbenchmarks, a line of JSON each.\n\nusage: %s [PART]\nparts:", arguments[0]);
    for (const Part& part : kParts) std::printf(" %s", part.name);
    std::printf("\n");
    return word == "--help" ? 0 : 2;
  }
  const char* const only = word == "" ? nullptr : arguments[1];
  auto* const current = static_cast<volatile int*>(
      mmap(nullptr, sizeof(int), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  if (current == MAP_FAILED) return 1;
  alarm(kAllSeconds);
  for (int first = 0; first < kCount; first = *current + 1) {
    *current = first;
    std::fflush(stdout);
    const pid_t child = fork();
    if (child < 0) return 1;
    if (child == 0) {
      const int status = measure(first, only, current);
      std::fflush(stdout);
      _exit(status);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == native::kNoGpu) return native::kNoGpu;
    if (WIFSIGNALED(status))
      micro::no_result(kParts[*current].name,
                       std::string("ended by ") + strsignal(WTERMSIG(status)));
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) break;
  }
  return 0;
}
