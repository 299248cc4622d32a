// Launches the ways of device_driver.h as CUDA kernels. Compiled by g++ with FG_DEVICE_ON_HOST, runs the same ways on the host,
// thread after thread: for the tests.
#pragma once
#ifdef __CUDACC__
#include <cuda_runtime.h>
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
// Which ways were run, of all that are compiled, by their types' names; written to the file $FASTGEN_WAYS at the end.
struct Ways {
  std::map<std::string, bool> run;
  ~Ways() {
    const char* path = getenv("FASTGEN_WAYS");
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
template <class Way> struct Known {
  static inline const bool known = (ways().run[typeid(Way).name()], true);
  static void mark() { ways().run[typeid(Way).name()] = known; }
};
#endif

namespace {

#ifdef __CUDACC__
// The 1 only keeps ptxas from spilling a few bytes for one more block on a multiprocessor, as it does with kThreads alone.
template <class Way> __global__ void __launch_bounds__(kThreads, 1) device_kernel(const __grid_constant__ Way way) {
  way(blockIdx.x, threadIdx.x);
}

struct Launch {
  cudaStream_t stream;
  explicit Launch(void* s) : stream(static_cast<cudaStream_t>(s)) {}
  template <class Way> void operator()(const Way& way) const {
    // 2³¹ − 1 blocks of 256 threads of 4 elements and more are beyond any memory
    if (const int64_t blocks = way.blocks()) device_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(way);
  }
};
inline int last_error() { return static_cast<int>(cudaGetLastError()); }
#else
struct Launch {
  explicit Launch(void*) {}
  template <class Way> void operator()(const Way& way) const {
    Known<Way>::mark();
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
