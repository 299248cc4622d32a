#include "common/cuda_driver.cuh"

#include "bce_with_logits/bce_with_logits.h"

namespace fastgen {
namespace {

template <class R> __device__ __forceinline__ R value(const BceOperand& o, int64_t i) {
  return o.data ? read<R>(o.dtype, o.data, o.single ? 0 : i) : R(1);
}
template <class R> __device__ __forceinline__ R loss(const BceWithLogitsArguments& a, int64_t i) {
  return bce_loss(value<R>(a.input, i), value<R>(a.target, i), value<R>(a.weight, i), value<R>(a.pos_weight, i));
}

// The losses, or on the way back their gradients.
template <class R> __global__ void __launch_bounds__(kThreads) elements_kernel(BceWithLogitsArguments a) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < a.count; i += step) {
    if (a.backward) {
      const R slope = bce_gradient(value<R>(a.input, i), value<R>(a.target, i), value<R>(a.weight, i), value<R>(a.pos_weight, i));
      write<R>(a.out.dtype, a.out.data, i, value<R>(a.gradient, i) * static_cast<R>(a.scale) * slope);
    } else {
      write<R>(a.out.dtype, a.out.data, i, loss<R>(a, i));
    }
  }
}

// The sum over a thread block, the same order on every run; valid in thread 0.
__device__ double block_sum(double sum) {
  __shared__ double partial[kThreads];
  partial[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  return partial[0];
}

// One thread block for each kBceBlock logits …
template <class R> __global__ void __launch_bounds__(kThreads) sums_kernel(BceWithLogitsArguments a) {
  const int64_t begin = blockIdx.x * kBceBlock, end = begin + kBceBlock < a.count ? begin + kBceBlock : a.count;
  double sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads)
    sum += static_cast<double>(loss<R>(a, i));
  sum = block_sum(sum);
  if (threadIdx.x == 0) a.sums[blockIdx.x] = sum;
}

// … and one for their sums.
__global__ void __launch_bounds__(kThreads) total_kernel(BceWithLogitsArguments a, int64_t blocks) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads)
    sum += a.sums[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) write<double>(a.out.dtype, a.out.data, 0, a.reduction == kMean ? sum / static_cast<double>(a.count) : sum);
}

template <class R> void launch(const BceWithLogitsArguments& a, cudaStream_t stream) {
  const int64_t blocks = (a.count + kBceBlock - 1) / kBceBlock;
  if (!a.reduced) {
    const int64_t grid = (a.count + kThreads - 1) / kThreads;
    if (grid > 0) elements_kernel<R><<<static_cast<unsigned>(grid < 0x7FFFFFFF ? grid : 0x7FFFFFFF), kThreads, 0, stream>>>(a);
    return;
  }
  if (blocks > 0) sums_kernel<R><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a);
  total_kernel<<<1, kThreads, 0, stream>>>(a, blocks);
}

}  // namespace

FG_CUDA_KERNEL(bce_with_logits, BceWithLogitsArguments) {
  const auto s = static_cast<cudaStream_t>(stream);
  arguments.is_double ? launch<double>(arguments, s) : launch<float>(arguments, s);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace fastgen
