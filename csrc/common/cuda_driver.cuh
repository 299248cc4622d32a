// The element-wise driver of CUDA: a thread makes the four logical elements that share a Philox call. Simple and right; a faster
// one (128-bit accesses, several loads in flight) can replace it without touching an op. An op supplies
//
//   static constexpr int kColumns;
//   __device__ void load_row(int64_t b, R* row) const;
//   __device__ void element(const R* row, const Element<R>& e, R z, bool noise) const;
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/elementwise.h"
#include "common/normal.h"

namespace fastgen {

template <class R> __device__ __forceinline__ R read(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case kFloat32: return static_cast<R>(static_cast<const float*>(data)[i]);
    case kFloat64: return static_cast<R>(static_cast<const double*>(data)[i]);
    case kFloat16: return static_cast<R>(__half2float(static_cast<const __half*>(data)[i]));
    default: return static_cast<R>(__bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]));
  }
}
template <class R> __device__ __forceinline__ void write(DType dtype, void* data, int64_t i, R value) {
  switch (dtype) {
    case kFloat32: static_cast<float*>(data)[i] = static_cast<float>(value); break;
    case kFloat64: static_cast<double*>(data)[i] = static_cast<double>(value); break;
    case kFloat16: static_cast<__half*>(data)[i] = __float2half_rn(static_cast<float>(value)); break;
    default: static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(static_cast<float>(value));
  }
}

// Element j of sample b in every operand.
template <class R> struct Element {
  const Elementwise& a;
  int64_t b, channel, position;  // position is j itself where contiguous

  __device__ Element(const Elementwise& arguments, int64_t sample, int64_t j) : a(arguments), b(sample) {
    const int64_t spatial = a.geometry.channels_last() ? a.geometry.spatial : 1;
    channel = a.geometry.channels_last() ? j / spatial : j;
    position = a.geometry.channels_last() ? j % spatial : 0;
  }
  __device__ int64_t offset(const Operand& x) const { return b * x.batch_stride + position * x.position_stride + channel; }
  __device__ R in(int k) const { return read<R>(a.in[k].dtype, a.in[k].data, offset(a.in[k])); }
  __device__ void out(int k, R value) const { write<R>(a.out[k].dtype, a.out[k].data, offset(a.out[k]), value); }
};

constexpr int kThreads = 256;

// kNoiseInput: which of the inputs is the noise where it is given.
template <class R, class Op, int kNoiseInput> __global__ void __launch_bounds__(kThreads) elementwise_kernel(Op op) {
  const Elementwise& a = op.a;
  const int64_t event = a.geometry.event, groups = event > 0 ? (event + 3) / 4 : 1, total = a.geometry.batch * groups;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < total; i += step) {
    const int64_t b = i / groups, group = i % groups;
    R row[Op::kColumns > 0 ? Op::kColumns : 1];
    op.load_row(b, group, row);
    const bool noise = a.noise.kind != kNoNoise && !Op::noiseless(row);
    R z[4] = {};
    if (noise && a.noise.kind == kSeededNoise) contract_normals(stream_of(a, b), group, z);
    for (int k = 0; k < 4 && 4 * group + k < event; ++k) {
      const Element<R> element(a, b, 4 * group + k);
      if (noise && a.noise.kind == kGivenNoise) z[k] = element.in(kNoiseInput);
      op.element(row, element, z[k], noise);
    }
  }
}

template <template <class> class Op, int kNoiseInput, class Arguments>
int launch_elementwise(const Arguments& arguments, void* stream) {
  const int64_t event = arguments.geometry.event, groups = event > 0 ? (event + 3) / 4 : 1;
  const int64_t blocks = (arguments.geometry.batch * groups + kThreads - 1) / kThreads;
  if (blocks == 0) return 0;
  const unsigned grid = static_cast<unsigned>(blocks < 0x7FFFFFFF ? blocks : 0x7FFFFFFF);
  const auto s = static_cast<cudaStream_t>(stream);
  if (arguments.is_double) {
    elementwise_kernel<double, Op<double>, kNoiseInput><<<grid, kThreads, 0, s>>>(Op<double>{arguments});
  } else {
    elementwise_kernel<float, Op<float>, kNoiseInput><<<grid, kThreads, 0, s>>>(Op<float>{arguments});
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace fastgen

#define FG_CUDA_KERNEL(op, Arguments) \
  extern "C" __attribute__((visibility("hidden"))) int fastgen_##op##_cuda(const Arguments& arguments, void* stream)
