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
  for (int i = 0; i < kValues; ++i)
    for (int distance = 16; distance > 0; distance /= 2)
      values[i] += __shfl_down_sync(0xFFFFFFFF, values[i], distance);
}

// The sums over a thread block of what the first threads of its warps have, valid in thread 0.
template <int kValues> __device__ void sum_of_warps(double (&values)[kValues]) {
  __shared__ double warps[kThreads / 32][kValues];
  FG_UNROLL
  for (int i = 0; i < kValues; ++i) {
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][i] = values[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    FG_UNROLL
    for (int i = 0; i < kValues; ++i)
      for (int w = 1; w < kThreads / 32; ++w)
        values[i] += warps[w][i];
  }
  __syncthreads();
}

__device__ __forceinline__ void store_flag(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}
// This load orders nothing, so that a thread has many of them on the way at a time: of two loads that acquire, the second waits for
// the first.
__device__ __forceinline__ uint64_t load_flag(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(flag));
  return value;
}
// a ≠ b, or `others` is not 0. A plain comparison would undo what load_flag is for: ptxas compares each flag before it asks for the
// next. This one cannot be worked out before `others` is there.
__device__ __forceinline__ uint32_t differs_or(uint64_t a, uint64_t b, uint32_t others) {
  asm("{ .reg .b32 a0, a1, b0, b1; mov.b64 {a0, a1}, %1; mov.b64 {b0, b1}, %2;\n"
      "lop3.b32 %0, a0, b0, %0, 0xBE; lop3.b32 %0, a1, b1, %0, 0xBE; }"  // (a ^ b) | c
      : "+r"(others)
      : "l"(a), "l"(b));
  return others;
}
// A fence after the last of these loads makes all of them acquire: where a flag was stored with release and read before the fence,
// the loads after the fence see what was stored before that flag.
__device__ __forceinline__ void acquire_flags() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// A thread block leaves its sums and the launch's own number beside them, and the last block of an output adds them once it has
// seen all its numbers. Then it takes the numbers away, for a replay of the same launch in a graph. The others need no block that
// comes after them, so all of them end while the last one waits; that a GPU starts the blocks of a launch in their order, or at
// least not a full load of last ones before any other, is undocumented, and what CUB's scans rely on too.
template <class Part> __global__ void __launch_bounds__(kThreads, kBlocks<Part>) sum_kernel(const __grid_constant__ Part part) {
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
        for (int i = 0; i < n; ++i)
          sums[blockIdx.x * n + i] = values[i];
        store_flag(flags + blockIdx.x, part.scratch.launch_number);
      }
      return;
    }
    if (threadIdx.x != 0) {
      FG_UNROLL
      for (int i = 0; i < n; ++i)
        values[i] = 0;
    }
    // A thread's blocks lie kThreads apart. It reads all their flags until all are there, then their sums: a wait for memory or
    // two each, where one block after the other made two for each block. Past its last block it reads the output's last but one,
    // which has to be there.
    static_assert(kMostSums % kThreads == 0);
    constexpr int most = kMostSums / kThreads;
    const unsigned first = output * chunks + threadIdx.x, end = blockIdx.x;
    auto block = [=](int k) { return first + k * kThreads < end ? first + k * kThreads : end - 1; };
    uint32_t missing;
    do {
      uint64_t numbers[most];
      FG_UNROLL
      for (int k = 0; k < most; ++k)
        numbers[k] = load_flag(flags + block(k));
      missing = 0;
      FG_UNROLL
      for (int k = most - 1; k >= 0; --k)  // from the one that is asked for last
        missing = differs_or(numbers[k], part.scratch.launch_number, missing);
    } while (missing);
    acquire_flags();
    FG_UNROLL
    for (int i = 0; i < n; ++i) {
      double theirs[most];
      FG_UNROLL
      for (int k = 0; k < most; ++k)
        theirs[k] = sums[block(k) * n + i];
      FG_UNROLL
      for (int k = 0; k < most; ++k)
        values[i] += first + k * kThreads < end ? theirs[k] : 0.0;
    }
    warp_sum(values);
    sum_of_warps(values);
    for (unsigned k = first; k < end; k += kThreads)  // after the barrier: before it another thread may look for the number
      flags[k] = 0;
  }
  if (threadIdx.x == 0) part.finish(output, values);
}

template <class Part> void launch_sum(const Part& part, const Launch& launch) {
  if (const int64_t blocks = part.plan.blocks()) sum_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, launch.stream>>>(part);
}
#else
template <class Part> void launch_sum(const Part& part, const Launch&) {
  WayEntry<Part>::mark_run();
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
