// Launches the parts of device_sum.h. Compiled by g++ with FG_DEVICE_ON_HOST, adds them on the host, thread after thread.
#pragma once
#include "common/cuda_launch.cuh"
#include "common/device_sum.h"

namespace fastgen {
namespace {

#ifdef __CUDACC__
// The sums over a warp, valid in its first thread.
template <int kValues> __device__ void warp_sum(double (&values)[kValues]) {
  FG_UNROLL
  for (int v = 0; v < kValues; ++v)
    for (int distance = 16; distance > 0; distance /= 2)
      values[v] += __shfl_down_sync(0xFFFFFFFF, values[v], distance);
}

// The sums over a thread block of what the first threads of its warps have, valid in thread 0.
template <int kValues> __device__ void sum_of_warps(double (&values)[kValues]) {
  __shared__ double warps[kThreads / 32][kValues];
  FG_UNROLL
  for (int v = 0; v < kValues; ++v) {
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][v] = values[v];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    FG_UNROLL
    for (int v = 0; v < kValues; ++v)
      for (int w = 1; w < kThreads / 32; ++w)
        values[v] += warps[w][v];
  }
  __syncthreads();
}

__device__ __forceinline__ void store_flag(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}
__device__ __forceinline__ uint64_t load_flag(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

// A thread block leaves its sums and the launch's own number beside them, and the last block of an output adds them once it has
// seen all its numbers. Then it takes the numbers away, for a replay of the same launch in a graph. The others need no block that
// comes after them, so all of them end while the last one waits; that a GPU starts the blocks of a launch in their order, or at
// least not a full load of last ones before any other, is undocumented, and what CUB's scans rely on too.
template <class Part> __global__ void __launch_bounds__(kThreads, 1) sum_kernel(const __grid_constant__ Part part) {
  constexpr int n = Part::kValues;
  const SumPlan& plan = part.plan;
  const bool warps = plan.threads == SumPlan::kWarp;
  const unsigned chunks = plan.chunks, output = warps ? blockIdx.x * (kThreads / 32) + threadIdx.x / 32 : blockIdx.x / chunks;
  const unsigned chunk = warps ? 0 : blockIdx.x - output * chunks, last = chunks - 1;
  if (output >= plan.outputs) return;  // of a block of warps, whole warps
  double values[n] = {};
  part.add(output, chunk * plan.threads + threadIdx.x % plan.threads, static_cast<int64_t>(chunks) * plan.threads, values);
  warp_sum(values);
  if (warps) {
    if (threadIdx.x % 32 == 0) part.finish(output, values);
    return;
  }
  sum_of_warps(values);
  if (last > 0) {
    double* const sums = part.scratch.sums;
    uint64_t* const flags = part.scratch.flags;
    if (chunk < last) {
      if (threadIdx.x == 0) {
        FG_UNROLL
        for (int v = 0; v < n; ++v)
          sums[blockIdx.x * n + v] = values[v];
        store_flag(flags + blockIdx.x, part.scratch.launch_number);
      }
      return;
    }
    if (threadIdx.x != 0) {
      FG_UNROLL
      for (int v = 0; v < n; ++v)
        values[v] = 0;
    }
    for (unsigned block = output * chunks + threadIdx.x; block < blockIdx.x; block += kThreads) {
      while (load_flag(flags + block) != part.scratch.launch_number) {
      }
      FG_UNROLL
      for (int v = 0; v < n; ++v)
        values[v] += sums[block * n + v];
      flags[block] = 0;
    }
    warp_sum(values);
    sum_of_warps(values);
  }
  if (threadIdx.x == 0) part.finish(output, values);
}

template <class Part> void launch_sum(const Part& part, const Launch& launch) {
  if (const int64_t blocks = part.plan.blocks()) sum_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, launch.stream>>>(part);
}
#else
template <class Part> void launch_sum(const Part& part, const Launch&) {
  Known<Part>::mark();
  if (part.plan.chunks > 1 && !part.scratch.sums) abort();
  const int64_t threads = static_cast<int64_t>(part.plan.chunks) * part.plan.threads;
  for (int64_t output = 0; output < part.plan.outputs; ++output) {
    double values[Part::kValues] = {};
    for (int64_t thread = 0; thread < threads; ++thread)
      part.add(output, thread, threads, values);
    part.finish(output, values);
  }
}
#endif

// For ops that have both: launch(way), launch.sum(part).
struct SumLaunch : Launch {
  using Launch::Launch;
  template <class Part> void sum(const Part& part) const { launch_sum(part, *this); }
};

}  // namespace
}  // namespace fastgen
