// What a launch costs: plain and cooperative, one after another and in a graph.
#pragma once

#include <chrono>

#include "micro_common.cuh"

namespace micro {

__global__ void empty_kernel() {}

inline double host_microseconds(int count, const How& how, bool wait) {
  const auto begin = std::chrono::steady_clock::now();
  for (int k = 0; k < count; ++k) {
    launch(how, empty_kernel);
    if (wait) must(cudaDeviceSynchronize(), "kernel");
  }
  must(cudaDeviceSynchronize(), "kernel");
  const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
  return took.count() / count;
}

// Microseconds a launch on the device, of a graph of `count` launches in a chain.
inline double graph_microseconds(int count, const How& how) {
  cudaStream_t stream;
  must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  cudaGraph_t graph;
  cudaGraphExec_t ready;
  must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = how.cooperative ? 1 : 0;
  cudaError_t error = cudaSuccess;
  for (int k = 0; k < count && error == cudaSuccess; ++k)
    error = cudaLaunchKernelEx(&config, empty_kernel);
  const cudaError_t end = cudaStreamEndCapture(stream, &graph);
  must(error, "launch in a capture");
  must(end, "end of a capture");
  must(cudaGraphInstantiate(&ready, graph, 0), "cudaGraphInstantiate");
  const double us = median_microseconds([&] { must(cudaGraphLaunch(ready, 0), "graph"); });
  cudaGraphExecDestroy(ready);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return us / count;
}

inline void measure_launches() {
  for (const bool cooperative : {false, true})
    for (const int blocks : {1, 96}) {
      const How how = {blocks, kThreads, 0, cooperative};
      const std::string suffix = std::string(cooperative ? "_cooperative" : "_plain") + "_blocks_" +
                                 std::to_string(blocks);
      host_microseconds(100, how, false);
      result("launch" + suffix, host_microseconds(1000, how, false), "us", "one after another");
      result("launch_and_wait" + suffix, host_microseconds(200, how, true), "us");
      result("launch_in_graph" + suffix, graph_microseconds(200, how), "us",
             "a node of a chain of 200");
    }
}

}  // namespace micro
