// The torch side that all ops share: layouts, allocation, filling the plain-C arguments, running on the tensor's device. The op
// files are compiled twice: into the CPU library, and with FG_CUDA into the CUDA one, where the same op launches CUDA kernels.
// Everything here goes through LibTorch's stable ABI.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sys/mman.h>

#include <optional>

#include "common/elementwise.h"
#include "common/isa.h"

#ifdef FG_CUDA
#define FG_DEVICE CUDA
#else
#define FG_DEVICE CPU
#endif

namespace fastgen {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Double: return kFloat64;
    case ScalarType::Half: return kFloat16;
    case ScalarType::BFloat16: return kBFloat16;
    default: STD_TORCH_CHECK(false, name, ": expected dtype float16, bfloat16, float32 or float64");
  }
}
inline int32_t torch_dtype(DType dtype) {
  static const int32_t dtypes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_float16(),
                                   aoti_torch_dtype_bfloat16()};
  return dtypes[dtype];
}
inline DType promoted(DType a, DType b) {
  if (a == b) return a;
  return a == kFloat64 || b == kFloat64 ? kFloat64 : kFloat32;
}

// (B, C, *spatial) with strides of (B, *spatial, C).
inline bool is_channels_last(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t dim = sizes.size();
  if (dim < 3) return false;
  int64_t expected = 1;
  auto matches = [&](int64_t d) {
    const bool ok = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return ok;
  };
  if (!matches(1)) return false;
  for (int64_t d = dim - 1; d >= 2; --d)
    if (!matches(d)) return false;
  return matches(0);
}

#ifndef FG_CUDA
// glibc maps every allocation from 32 MiB on anew, and each 4 KiB page of it faults at its first write. At 64 MiB of output that
// made a seeded q_sample 2.3 ns per element where writing to an existing tensor took 0.77; with 2 MiB pages it is 1.1 (AMD EPYC
// guest, 2 cores). A hint only: without transparent huge pages nothing changes.
inline void ask_for_huge_pages(void* data, int64_t bytes) {
  constexpr int64_t mapped_anew = 32 << 20, huge = 2 << 20;
  if (bytes < mapped_anew) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge - 1) / huge * huge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / huge * huge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}
#endif

// Strides of (B, C, *spatial): contiguous, or channels-last.
inline Tensor empty(const int64_t* sizes, int64_t dim, bool channels_last, DType dtype, const Tensor& device_like) {
  int64_t strides[64], step = 1;
  STD_TORCH_CHECK(dim <= 64, "expected at most 64 dimensions");
  auto place = [&](int64_t d) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  };
  if (channels_last) {
    place(1);
    for (int64_t d = dim - 1; d >= 2; --d)
      place(d);
    place(0);
  } else {
    for (int64_t d = dim - 1; d >= 0; --d)
      place(d);
  }
  int32_t type, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(device_like.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(device_like.get(), &index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, torch_dtype(dtype), type, index, &handle));
  Tensor tensor(handle);
#ifndef FG_CUDA
  ask_for_huge_pages(tensor.mutable_data_ptr(), step * size_of(dtype));
#endif
  return tensor;
}

inline bool same_layout(const Tensor& x, bool channels_last) { return channels_last ? is_channels_last(x) : x.is_contiguous(); }

// `x` itself where it has the layout, else a copy that has.
inline Tensor with_layout(const Tensor& x, bool channels_last) {
  if (same_layout(x, channels_last)) return x;
  if (!channels_last) return torch::stable::contiguous(x);
  Tensor copy = empty(x.sizes().data(), x.dim(), true, dtype_of(x, "input"), x);
  torch::stable::copy_(copy, x);
  return copy;
}

// The batch that an op works on: sizes, and the layout of its first input, which the others and the output follow.
struct Batch {
  const Tensor& like;
  bool channels_last;
  Geometry geometry;

  explicit Batch(const Tensor& x) : like(x), channels_last(!x.is_contiguous() && is_channels_last(x)) {
    STD_TORCH_CHECK(x.dim() > 0, "expected shape (B, ...), got a tensor without dimensions");
    geometry.batch = x.size(0);
    geometry.event = 1;
    for (int64_t d = 1; d < x.dim(); ++d)
      geometry.event *= x.size(d);
    if (channels_last) {
      geometry.channels = x.size(1);
      geometry.spatial = geometry.channels ? geometry.event / geometry.channels : 0;
    }
  }
  Tensor input(const Tensor& x, const char* name, int64_t channel_factor = 1) const {
    STD_TORCH_CHECK(x.numel() == like.numel() * channel_factor && x.dim() == like.dim() && x.size(0) == like.size(0), name,
                    ": expected a shape that fits the first input");
    STD_TORCH_CHECK(x.get_device_index() == like.get_device_index() && x.is_cuda() == like.is_cuda(), name,
                    ": expected the device of the first input");
    return with_layout(x, channels_last);
  }
  Tensor output(DType dtype) const { return empty(like.sizes().data(), like.dim(), channels_last, dtype, like); }
  // How a tensor of this layout is addressed, its channels `channel_factor` times the batch's.
  Operand operand(const Tensor& x, void* data, int64_t channel_factor = 1) const {
    return {data, dtype_of(x, "input"), geometry.event * channel_factor, geometry.channels * channel_factor};
  }
  Operand operand(const Tensor& x, int64_t channel_factor = 1) const {
    return operand(x, const_cast<void*>(x.const_data_ptr()), channel_factor);
  }
};

// Where an op writes: the caller's tensor if its layout serves, else a tensor of our own that `finish` copies.
struct Output {
  Tensor target, written;
  bool copied = false;
  Output(const Batch& batch, DType dtype) : target(batch.output(dtype)), written(target) {}
  Output(const Batch& batch, DType dtype, const Tensor& out) : target(out), written(out) {
    STD_TORCH_CHECK(dtype_of(out, "out") == dtype && out.numel() == batch.like.numel(),
                    "out: expected the result's dtype and size");
    copied = !same_layout(out, batch.channels_last);
    if (copied) written = batch.output(dtype);
  }
  void finish() {
    if (copied) torch::stable::copy_(target, written);
  }
};

// Rows of coefficients, one per timestep, and which of them: by a tensor `t`, or by `index` for all samples.
inline Rows rows_of(const Tensor& table, const OptionalTensor& t, int64_t index, int64_t columns, const Batch& batch,
                    bool is_double) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == columns && table.is_contiguous(), "rows: expected a contiguous (T, ",
                  columns, ") table");
  STD_TORCH_CHECK(dtype_of(table, "rows") == (is_double ? kFloat64 : kFloat32), "rows: expected the dtype of the arithmetic");
  STD_TORCH_CHECK(table.is_cuda() == batch.like.is_cuda(), "rows: expected the device of the data");
  Rows rows{table.const_data_ptr(), table.size(0), columns, nullptr, index};
  if (!t) {
    STD_TORCH_CHECK(index >= 0 && index < rows.count, "t: expected timesteps within 0 … ", rows.count - 1, ", got ", index);
    return rows;
  }
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long && t->dim() == 1 && t->size(0) == batch.geometry.batch &&
                      t->is_contiguous() && t->is_cuda() == batch.like.is_cuda(),
                  "t: expected a contiguous int64 tensor of shape (B,) on the data's device");
  rows.t = static_cast<const int64_t*>(t->const_data_ptr());
#ifndef FG_CUDA
  for (int64_t b = 0; b < batch.geometry.batch; ++b)
    STD_TORCH_CHECK(rows.t[b] >= 0 && rows.t[b] < rows.count, "t: expected timesteps within 0 … ", rows.count - 1, ", got ",
                    rows.t[b], " at index ", b);
#endif
  return rows;
}

// A seed tensor of 1 or B elements, or the int, or neither. One element on the CPU is read here, wherever the data is.
inline Noise noise_of(const OptionalTensor& seeds, const std::optional<int64_t>& seed, int64_t offset, bool offset_is_t,
                      const Geometry& geometry) {
  Noise noise;
  noise.offset = offset;
  noise.offset_is_t = offset_is_t;
  if (seeds) {
    STD_TORCH_CHECK(seeds->scalar_type() == ScalarType::Long && seeds->is_contiguous(), "seed: expected a contiguous int64 tensor");
    const int64_t count = seeds->numel();
    STD_TORCH_CHECK(count == 1 || count == geometry.batch, "seed: expected 1 or ", geometry.batch, " elements, got ", count);
    noise.kind = kSeededNoise;
    const int64_t* data = static_cast<const int64_t*>(seeds->const_data_ptr());
    if (count == 1 && !seeds->is_cuda()) {
      noise.seed = data[0];
    } else {
      noise.seeds = data;
      noise.per_sample = count == geometry.batch;
    }
  } else if (seed) {
    noise.kind = kSeededNoise;
    noise.seed = *seed;
  }
  return noise;
}

#ifdef FG_CUDA
// Runs `launch(arguments, stream)`, an extern-C launcher that returns a cudaError_t, on the data's device and current stream.
template <class Arguments> void run_cuda(int (*launch)(const Arguments&, void*), const Arguments& arguments, const Tensor& like) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  const int error = launch(arguments, stream);
  STD_TORCH_CHECK(error == 0, "CUDA kernel launch failed with cudaError ", error);
}
#define FG_RUN(op, arguments, like, cost) run_cuda(fastgen_##op##_cuda, arguments, like)
#define FG_KERNELS(op, Arguments) extern "C" int fastgen_##op##_cuda(const Arguments&, void* stream);
#else
// Runs the kernel of this processor over torch's threads. `cost`: elements that are worth a thread, fewer where each costs more.
template <class Arguments> void run_cpu(CpuKernel<Arguments> kernel, const Arguments& arguments, const Tensor&, int64_t cost) {
  const int64_t elements = arguments.geometry.batch * arguments.geometry.event;
  if (elements == 0) return;
  const int64_t per_unit = arguments.elements_per_unit(), units = elements / per_unit;
  if (elements <= cost) return kernel(arguments, 0, units);
  torch::stable::parallel_for(0, units, cost / per_unit > 0 ? cost / per_unit : 1,
                              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}
#define FG_RUN(op, arguments, like, cost) run_cpu(op##_cpu(), arguments, like, cost)
#define FG_KERNELS(op, Arguments) FG_CPU_KERNELS(op, Arguments)
#endif

// Elements worth a thread of their own: a seeded one costs some ten times a plain one.
constexpr int64_t kPlainGrain = 32768, kSeededGrain = 4096;
inline int64_t grain(const Noise& noise) { return noise.kind == kSeededNoise ? kSeededGrain : kPlainGrain; }

// Without a seed no logical index is needed, and where every operand is dense the layout is of no consequence.
inline void flatten(Elementwise& a) {
  if (a.noise.kind != kSeededNoise && a.geometry.channels_last()) {
    for (const Operand& in : a.in)
      if (in.data && in.batch_stride != a.geometry.event) return;
    a.geometry.channels = a.geometry.spatial = 0;
  }
}

}  // namespace fastgen
