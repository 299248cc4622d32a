// Launches the ways of device_driver.h as CUDA kernels. Compiled by g++ with FG_DEVICE_ON_HOST, runs the same ways on the host,
// thread after thread: for the tests.
#pragma once
#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <type_traits>
#else
#include <stdio.h>
#include <stdlib.h>

#include <map>
#include <string>
#include <typeinfo>
#endif

#include "common/device_driver.h"

namespace fastgen {

#ifndef __CUDACC__
// Which ways were run, of all that are compiled, by their types' names; written to the file $FASTGEN_LAUNCHED at the end.
struct Ways {
  std::map<std::string, bool> run;
  ~Ways() {
    const char* path = getenv("FASTGEN_LAUNCHED");
    FILE* file = path ? fopen(path, "w") : nullptr;
    for (const auto& [name, was_run] : run)
      if (file) fprintf(file, "%s %d\n", name.c_str(), was_run);
    if (file) fclose(file);
  }
};
inline Ways& ways() {
  static Ways all;
  return all;
}
// Enters a compiled way when the library is loaded: the initializer of `compiled` does, which exists because `mark_run` reads it.
template <class Way> struct WayEntry {
  static inline const bool compiled = (ways().run[typeid(Way).name()], true);
  static void mark_run() { ways().run[typeid(Way).name()] = compiled; }
};
#endif

namespace {

#ifdef __CUDACC__
// How many thread blocks a multiprocessor must have room for, which leaves a thread 168 registers, or 128 for four blocks. In
// blocks of 256 threads, every kernel above 128 registers had one: 8 warps that wait for memory together and leave it alone
// together. Three smaller ones take turns, and as each thread asks for 48 bytes and more at a time they have 18 KB on the way;
// at 3.0 TB/s and an assumed 600 ns to an answer, each of an H100's 132 multiprocessors needs 13.6. Four blocks of all kernels
// would spill in 13 of them on sm_90, up to 444 bytes a thread: only of those whose loaded vectors, noise made ahead and numbers of
// one vector are few (kHeld).
template <class Way, class = void> constexpr int kBlocks = 3;
template <class Way> constexpr int kBlocks<Way, std::void_t<decltype(Way::kHeld)>> = Way::kHeld < 80 ? 4 : 3;

template <class Way> __global__ void __launch_bounds__(kThreads, kBlocks<Way>) device_kernel(const __grid_constant__ Way way) {
  way(blockIdx.x, threadIdx.x);
}

struct Launch {
  cudaStream_t stream;
  explicit Launch(void* s) : stream(static_cast<cudaStream_t>(s)) {}
  template <class Way> void operator()(const Way& way) const {
    // 2³¹ − 1 blocks of 128 threads of one element and more are beyond any memory
    if (const int64_t blocks = way.blocks()) device_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(way);
  }
};
inline int last_error() { return static_cast<int>(cudaGetLastError()); }
#else
struct Launch {
  explicit Launch(void*) {}
  template <class Way> void operator()(const Way& way) const {
    WayEntry<Way>::mark_run();
    for (int64_t block = 0; block < way.blocks(); ++block)
      for (int thread = 0; thread < kThreads; ++thread)
        way(block, thread);
  }
};
inline int last_error() { return 0; }
#endif

}  // namespace
}  // namespace fastgen

// FG_CUDA_KERNEL(op, Arguments) { … } defines the op's launcher, of (arguments, stream), which returns a cudaError_t.
#define FG_CUDA_KERNEL(op, Arguments) \
  extern "C" __attribute__((visibility("hidden"))) int fastgen_##op##_cuda(const fastgen::Arguments& arguments, void* stream)
