#include "common/cuda_launch.cuh"

#include "bce_with_logits/bce_with_logits_device.h"

namespace fastgen {
namespace {

#ifdef __CUDACC__
// The sum over a thread block, in the same order on every run; valid in thread 0.
__device__ double block_sum(double sum) {
  __shared__ double warps[kThreads / 32];
  for (int distance = 16; distance > 0; distance /= 2)
    sum += __shfl_down_sync(0xFFFFFFFF, sum, distance);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kThreads / 32; ++w)
      sum += warps[w];
  __syncthreads();
  return sum;
}

__device__ __forceinline__ void store_flag(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}
__device__ __forceinline__ uint64_t load_flag(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

// One launch with nothing to be zeroed before it: a thread block leaves its sum and the launch's own number beside it, and the last
// block adds the sums once it has seen all numbers. Then it takes the numbers away, for a replay of the same launch in a graph.
// The others need no block that comes after them, so all of them end while the last one waits.
template <class Part> __global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ Part part) {
  const BceWithLogitsArguments& a = part.a;
  double sum = block_sum(part(blockIdx.x, threadIdx.x));
  if (gridDim.x > 1) {
    const unsigned last = gridDim.x - 1;
    if (blockIdx.x < last) {
      if (threadIdx.x == 0) {
        a.sums[blockIdx.x] = sum;
        store_flag(a.flags + blockIdx.x, a.launch_number);
      }
      return;
    }
    double others = threadIdx.x == 0 ? sum : 0.0;
    for (unsigned block = threadIdx.x; block < last; block += kThreads) {
      while (load_flag(a.flags + block) != a.launch_number) {
      }
      others += a.sums[block];
      a.flags[block] = 0;
    }
    sum = block_sum(others);
  }
  if (threadIdx.x == 0) store_one<double, Any>(a.out, 0, a.reduction == kMean ? sum / static_cast<double>(a.count) : sum);
}

struct BceLaunch : Launch {
  using Launch::Launch;
  template <class Part> void sum(const Part& part) const {
    sum_kernel<<<static_cast<unsigned>(part.sums), kThreads, 0, stream>>>(part);
  }
};
#else
struct BceLaunch : Launch {
  using Launch::Launch;
  template <class Part> void sum(const Part& part) const {
    Known<Part>::mark();
    double sum = 0;
    for (int64_t block = 0; block < part.sums; ++block)
      for (int thread = 0; thread < kThreads; ++thread)
        sum += part(block, thread);
    store_one<double, Any>(part.a.out, 0, part.a.reduction == kMean ? sum / static_cast<double>(part.a.count) : sum);
  }
};
#endif

}  // namespace
}  // namespace fastgen

FG_CUDA_KERNEL(bce_with_logits, BceWithLogitsArguments) {
  fastgen::run_bce_with_logits(arguments, fastgen::BceLaunch(stream));
  return fastgen::last_error();
}
