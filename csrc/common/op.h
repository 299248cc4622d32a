// The torch side that all ops share: layouts, allocation, filling the plain-C arguments, running on the tensor's device. The op
// files are compiled twice: into the CPU library, and with FG_CUDA into the CUDA one, where the same op launches CUDA kernels.
// Everything here goes through LibTorch's stable ABI.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sys/mman.h>

#include <atomic>
#include <initializer_list>
#include <optional>
#include <random>
#include <vector>

#include "common/elementwise.h"
#include "common/index.h"
#include "common/isa.h"

#ifdef FG_CUDA
#include <cuda_runtime_api.h>
#define FG_DEVICE CUDA
#else
#define FG_DEVICE CPU
#endif
// FG_DEVICE_ON_HOST: the CPU library of the tests, whose ops run the CUDA kernels' code on the host.
#if defined(FG_CUDA) || defined(FG_DEVICE_ON_HOST)
#define FG_DEVICE_KERNELS
#endif

namespace fastgen {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Null where there is none.
inline const Tensor* pointer(const OptionalTensor& x) { return x ? &*x : nullptr; }

inline DType promoted(DType a, DType b) {
  if (a == b) return a;
  return a == kFloat64 || b == kFloat64 ? kFloat64 : kFloat32;
}
inline DType arithmetic_of(DType dtype) { return dtype == kFloat64 ? kFloat64 : kFloat32; }

inline int32_t torch_dtype(DType dtype) {
  static const int32_t dtypes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_float16(),
                                   aoti_torch_dtype_bfloat16()};
  return dtypes[dtype];
}

// What an op reads of a tensor, read once: every question to a torch::stable::Tensor is a call into libtorch, and on a 16-element
// call some fifty of them took a third of the time.
struct View {
  const int64_t *sizes, *strides;
  int64_t dim, numel = 1;
  int32_t torch_dtype, device_type, device_index = 0;
  void* data;
  bool contiguous = true;

  explicit View(const Tensor& x) {
    const AtenTensorHandle handle = x.get();
    int64_t *size_array, *stride_array;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &size_array));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &stride_array));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &torch_dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
    if (!on_cpu()) TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
    sizes = size_array;
    strides = stride_array;
    for (int64_t d = dim - 1; d >= 0; --d) {
      contiguous = contiguous && (sizes[d] == 1 || strides[d] == numel);
      numel *= sizes[d];
    }
    contiguous = contiguous || numel == 0;
  }

  DType dtype(const char* name) const {
    for (DType d : {kFloat32, kBFloat16, kFloat16, kFloat64})
      if (torch_dtype == fastgen::torch_dtype(d)) return d;
    STD_TORCH_CHECK(false, name, ": expected dtype float16, bfloat16, float32 or float64");
  }
  // How many elements' worth of memory lies between the first element and the end of the last.
  int64_t span() const {
    if (contiguous) return numel;
    int64_t last = 0;
    for (int64_t d = 0; d < dim; ++d)
      last += (sizes[d] - 1) * strides[d];
    return last + 1;
  }
  bool same_sizes(const View& other) const {
    bool same = dim == other.dim;
    for (int64_t d = 0; same && d < dim; ++d)
      same = sizes[d] == other.sizes[d];
    return same;
  }
  bool same_device(const View& other) const { return device_type == other.device_type && device_index == other.device_index; }
  bool on_cpu() const {
    static const int32_t cpu = aoti_torch_device_type_cpu();
    return device_type == cpu;
  }

  // (B, C, *spatial) with the strides of (B, *spatial, C), and not contiguous as well.
  bool channels_last() const {
    if (contiguous || dim < 3) return false;
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
};

#ifndef FG_CUDA
// glibc maps every allocation from 32 MiB on anew, and each 4 KiB page of it faults at its first write. At 64 MiB of output that
// made a seeded q_sample 2.3 ns per element where writing to an existing tensor took 0.77; with 2 MiB pages it is 1.1 (AMD EPYC
// guest, 2 cores). A hint only: without transparent huge pages nothing changes.
constexpr int64_t kMappedAnew = 32 << 20;
inline void ask_for_huge_pages(void* data, int64_t bytes) {
  constexpr int64_t huge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge - 1) / huge * huge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / huge * huge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}
#endif

// A new tensor of `numel` elements without gaps, on the device of `like`.
inline Tensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, [[maybe_unused]] int64_t numel, DType dtype,
                            const View& like) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, torch_dtype(dtype), like.device_type, like.device_index, &handle));
  Tensor tensor(handle);
#ifndef FG_CUDA
  if (numel * size_of(dtype) >= kMappedAnew) ask_for_huge_pages(tensor.mutable_data_ptr(), numel * size_of(dtype));
#endif
  return tensor;
}

// The same, contiguous or channels-last.
inline Tensor empty(const int64_t* sizes, int64_t dim, bool channels_last, DType dtype, const View& like) {
  constexpr int64_t kMaxDim = 64;
  int64_t strides[kMaxDim], step = 1, numel = 1;
  STD_TORCH_CHECK(dim <= kMaxDim, "expected at most 64 dimensions, got ", dim);
  auto place = [&](int64_t d) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
    numel *= sizes[d];
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
  return empty_strided(dim, sizes, strides, numel, dtype, like);
}

// An input in the layout that the op works in: the caller's tensor, or a copy of it that lives as long as this does.
struct Input {
  std::optional<Tensor> copy;
  View view;
  DType dtype;

  Input(const Tensor& x, const View& original, bool channels_last, const char* name) : view(original), dtype(view.dtype(name)) {
    if (channels_last ? view.channels_last() : view.contiguous) return;
    if (channels_last) {
      copy = empty(view.sizes, view.dim, true, dtype, view);
      torch::stable::copy_(*copy, x);
    } else {
      copy = torch::stable::contiguous(x);
    }
    view = View(*copy);
  }
};

// The batch that an op works on: sizes, and the layout of its first input, which the others and the output follow.
struct Batch {
  const Tensor& tensor;
  View like;
  bool channels_last;
  Geometry geometry;

  explicit Batch(const Tensor& x) : tensor(x), like(x), channels_last(like.channels_last()) {
    STD_TORCH_CHECK(like.dim > 0, "expected shape (B, ...), got a tensor without dimensions");
    geometry.batch = like.sizes[0];
    geometry.event = 1;
    for (int64_t d = 1; d < like.dim; ++d)
      geometry.event *= like.sizes[d];
    if (channels_last) {
      geometry.channels = like.sizes[1];
      geometry.spatial = geometry.event / geometry.channels;
    }
  }
  Input first(const char* name) const { return Input(tensor, like, channels_last, name); }
  // A tensor of the first one's shape, or of `channel_factor` times its channels, on its device.
  Input input(const Tensor& x, const char* name, int64_t channel_factor = 1) const {
    const View view(x);
    bool fits = view.dim == like.dim && (channel_factor == 1 || like.dim >= 2);
    for (int64_t d = 0; fits && d < like.dim; ++d)
      fits = view.sizes[d] == like.sizes[d] * (d == 1 ? channel_factor : 1);
    STD_TORCH_CHECK(fits, name, ": expected a shape that fits the first input");
    STD_TORCH_CHECK(view.same_device(like), name, ": expected the device of the first input");
    return Input(x, view, channels_last, name);
  }
  Tensor output(DType dtype) const { return empty(like.sizes, like.dim, channels_last, dtype, like); }

  // How a tensor of this layout is addressed, its channels `channel_factor` times the batch's.
  Operand operand(void* data, DType dtype, int64_t channel_factor = 1) const {
    return {data, dtype, geometry.event * channel_factor, geometry.channels * channel_factor};
  }
  Operand operand(const Input& x, int64_t channel_factor = 1) const { return operand(x.view.data, x.dtype, channel_factor); }
};

// Where an op writes: the caller's tensor if its layout serves, else a tensor of our own that `finish` copies from.
struct Output {
  Tensor target;
  std::optional<Tensor> own;
  Operand operand;

  Output(const Batch& batch, DType dtype) : target(batch.output(dtype)), operand(batch.operand(target.mutable_data_ptr(), dtype)) {}
  // `inputs`: the tensors that the op reads, null where there is none. `out` may be one of them, and overlap none otherwise.
  Output(const Batch& batch, DType dtype, const Tensor& out, std::initializer_list<const Tensor*> inputs) : target(out) {
    const View view(out);
    const bool fits = view.dtype("out") == dtype && view.same_sizes(batch.like) && view.same_device(batch.like);
    STD_TORCH_CHECK(fits, "out: expected the result's dtype, shape and device");
    bool own_memory = view.span() >= view.numel;
    for (int64_t d = 0; d < view.dim; ++d)
      own_memory = own_memory && (view.sizes[d] <= 1 || view.strides[d] != 0 || view.numel == 0);
    STD_TORCH_CHECK(own_memory, "out: expected every element to have its own memory");
    for (const Tensor* x : inputs)
      STD_TORCH_CHECK(!x || apart_or_same(view, View(*x)), "out: expected memory apart from the inputs, or one of them");
    if (!(batch.channels_last ? view.channels_last() : view.contiguous)) own = batch.output(dtype);
    operand = batch.operand(own ? own->mutable_data_ptr() : view.data, dtype);
  }
  static bool apart_or_same(const View& a, const View& b) {
    const char *a_data = static_cast<const char*>(a.data), *b_data = static_cast<const char*>(b.data);
    const int64_t a_size = size_of(a.dtype("out")), b_size = size_of(b.dtype("input"));
    if (b_data + b.span() * b_size <= a_data || a_data + a.span() * a_size <= b_data) return true;
    bool same = a_data == b_data && a.torch_dtype == b.torch_dtype && a.dim == b.dim;
    for (int64_t d = 0; same && d < a.dim; ++d)
      same = a.sizes[d] == b.sizes[d] && a.strides[d] == b.strides[d];
    return same;
  }
  void finish() const {
    if (own) torch::stable::copy_(const_cast<Tensor&>(target), *own);
  }
};

// Rows of coefficients, one per timestep, and which of them: by a tensor `t`, or by `index` for all samples.
struct RowsInput {
  std::optional<Tensor> t_copy;
  Rows rows;

  RowsInput(const Tensor& table, const OptionalTensor& t, int64_t index, int64_t columns, const Batch& batch, DType arithmetic) {
    const View view(table);
    STD_TORCH_CHECK(view.dim == 2 && view.sizes[1] == columns && view.contiguous && view.dtype("rows") == arithmetic &&
                        view.same_device(batch.like),
                    "rows: expected a contiguous (T, ", columns, ") table in the dtype of the arithmetic on the data's device");
    rows = {view.data, view.sizes[0], columns, nullptr, index};
    if (!t) {
      STD_TORCH_CHECK(index >= 0 && index < rows.count, "t: expected timesteps within 0 … ", rows.count - 1, ", got ", index);
      return;
    }
    View t_view(*t);
    STD_TORCH_CHECK(t_view.torch_dtype == aoti_torch_dtype_int64() && t_view.dim == 1 && t_view.sizes[0] == batch.geometry.batch &&
                        t_view.same_device(batch.like),
                    "t: expected an int64 tensor of shape (B,) on the data's device");
    if (!t_view.contiguous) {
      t_copy = torch::stable::contiguous(*t);
      t_view = View(*t_copy);
    }
    rows.t = static_cast<const int64_t*>(t_view.data);
#ifndef FG_DEVICE_KERNELS
    for (int64_t b = 0; b < batch.geometry.batch; ++b)
      STD_TORCH_CHECK(rows.t[b] >= 0 && rows.t[b] < rows.count, "t: expected timesteps within 0 … ", rows.count - 1, ", got ",
                      rows.t[b]);
#endif
  }
};

// A seed tensor of 1 or B elements, or the int, or neither. One element on the CPU is read here, wherever the data is.
inline Noise noise_of(const OptionalTensor& seeds, const std::optional<int64_t>& seed, int64_t offset, bool offset_is_t,
                      const Batch& batch) {
  Noise noise;
  noise.offset = offset;
  noise.offset_is_t = offset_is_t;
  if (seeds) {
    const View view(*seeds);
    STD_TORCH_CHECK(view.torch_dtype == aoti_torch_dtype_int64() && view.dim <= 1 && view.contiguous,
                    "seed: expected a contiguous int64 tensor of 1 or B elements");
    STD_TORCH_CHECK(view.numel == 1 || view.numel == batch.geometry.batch, "seed: expected 1 or ", batch.geometry.batch,
                    " elements, got ", view.numel);
    noise.kind = kSeededNoise;
    const int64_t* data = static_cast<const int64_t*>(view.data);
    if (view.numel == 1 && view.on_cpu()) {
      noise.seed = data[0];
    } else {
      STD_TORCH_CHECK(view.same_device(batch.like), "seed: expected the data's device, or one element on the CPU");
      noise.seeds = data;
      noise.per_sample = view.numel == batch.geometry.batch;
    }
  } else if (seed) {
    noise.kind = kSeededNoise;
    noise.seed = *seed;
  }
  return noise;
}

#ifdef FG_CUDA
// Runs `launch(arguments, stream)`, an extern-C launcher that returns a cudaError_t, on the data's device and current stream.
template <class Arguments> void run_cuda(int (*launch)(const Arguments&, void*), const Arguments& arguments, const View& like) {
  const torch::stable::accelerator::DeviceGuard guard(like.device_index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.device_index, &stream));
  const int error = launch(arguments, stream);
  STD_TORCH_CHECK(error == 0, "CUDA kernel launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}
#elif defined(FG_DEVICE_ON_HOST)
template <class Arguments> void run_cuda(int (*launch)(const Arguments&, void*), const Arguments& arguments, const View&) {
  launch(arguments, nullptr);
}
#endif
#ifdef FG_DEVICE_KERNELS
#define FG_RUN(op, arguments, like, cost) run_cuda(fastgen_##op##_cuda, arguments, like)
#define FG_KERNELS(op, Arguments) extern "C" int fastgen_##op##_cuda(const Arguments&, void* stream);
#else
// Where no noise is made, a step waits for memory, and then 512-bit accesses are the slower ones: given noise, ddpm_step and
// q_sample reach 1.02 … 1.13 and 0.88 … 1.00 of torch.add's bytes per second with 256 bits, 0.83 … 0.96 and 0.74 … 0.89 with 512
// (AMD EPYC, Zen 4; neither stores past the cache nor prefetching by hand changed that). Not so with bfloat16, whose rounding takes
// ten instructions: there 512 bits take 0.8 of the time. The values are the same.
inline Isa isa_for(const Elementwise& a) {
  bool wide = a.noise.kind == kSeededNoise;
  for (const Operand& out : a.out)
    wide = wide || (out.data && out.dtype == kBFloat16);
  return isa() == Isa::kAvx512 && !wide ? Isa::kAvx2 : isa();
}

// Runs the kernel of this processor over torch's threads. `cost`: elements that are worth a thread, fewer where each costs more.
template <class Arguments> void run_cpu(CpuKernel<Arguments> kernel, const Arguments& arguments, const View&, int64_t cost) {
  const int64_t elements = arguments.geometry.batch * arguments.geometry.event;
  if (elements == 0) return;
  const int64_t per_unit = arguments.elements_per_unit(), units = elements / per_unit;
  if (elements <= cost) return kernel(arguments, 0, units);
  torch::stable::parallel_for(0, units, cost / per_unit > 0 ? cost / per_unit : 1,
                              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}
#define FG_RUN(op, arguments, like, cost) run_cpu(op##_cpu(isa_for(arguments)), arguments, like, cost)
#define FG_KERNELS(op, Arguments) FG_CPU_KERNELS(op, Arguments)
#endif

// ---- sums ----------------------------------------------------------------------------------------------------------------------

inline int64_t blocks_of(int64_t count, int64_t block) { return (count + block - 1) / block; }

#ifdef FG_DEVICE_KERNELS
// For `values` sums side by side.
struct Scratch {
  Tensor numbers;
  SumScratch plain;

  Scratch(int values, const View& like) : Scratch(values * kMostSums, kMostSums, like) {}

 private:
  Scratch(int64_t sums, int64_t flags, const View& like) : numbers(doubles(sums + flags, like)) {
    static std::atomic<uint64_t> launches{std::random_device()() * 0x9E3779B97F4A7C15u};
    plain.sums = static_cast<double*>(numbers.mutable_data_ptr());
    plain.flags = reinterpret_cast<uint64_t*>(plain.sums + sums);
    plain.launch_number = ++launches | 1ull << 63;  // not 0
  }
  static Tensor doubles(int64_t count, const View& like) { return empty(&count, 1, false, kFloat64, like); }
};
#else
// The sum of each block of the work, the blocks being the same whatever the threads; few of them on the stack.
struct BlockSums {
  static constexpr int64_t kFew = 256;
  double few[kFew];
  std::vector<double> many;
  int64_t count;
  double* data;

  explicit BlockSums(int64_t blocks) : many(blocks > kFew ? blocks : 0), count(blocks), data(blocks > kFew ? many.data() : few) {}
  BlockSums(const BlockSums&) = delete;
  double total(int64_t begin, int64_t end) const {
    double sum = 0;
    for (int64_t block = begin; block < end; ++block)
      sum += data[block];
    return sum;
  }
  double total() const { return total(0, count); }
};

// `cost`: blocks that are worth a thread.
template <class Arguments>
void run_blocks(CpuKernel<Arguments> kernel, const Arguments& arguments, int64_t blocks, int64_t cost = 1) {
  if (blocks <= cost) return kernel(arguments, 0, blocks);
  torch::stable::parallel_for(0, blocks, cost, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

inline void store_scalar(void* data, DType dtype, double value) {
  switch (dtype) {
    case kFloat32: *static_cast<float*>(data) = static_cast<float>(value); break;
    case kFloat64: *static_cast<double*>(data) = value; break;
    case kFloat16: *static_cast<torch::headeronly::Half*>(data) = static_cast<float>(value); break;
    case kBFloat16: *static_cast<torch::headeronly::BFloat16*>(data) = static_cast<float>(value); break;
  }
}
#endif

// ---- choices -------------------------------------------------------------------------------------------------------------------

// Elements worth a thread of their own: a seeded one costs some ten times a plain one.
constexpr int64_t kPlainGrain = 32768, kSeededGrain = 4096;
inline int64_t grain(const Noise& noise) { return noise.kind == kSeededNoise ? kSeededGrain : kPlainGrain; }

// Without a seed no logical index is needed, and where every operand is dense the layout is of no consequence; where the samples
// share one row of coefficients besides (and nothing else is one for each, `per_sample`), nor are the samples.
inline void flatten(Elementwise& a, bool per_sample) {
  if (a.noise.kind == kSeededNoise) return;
  for (const Operand& in : a.in)
    if (in.data && in.batch_stride != a.geometry.event) return;
  a.geometry.channels = a.geometry.spatial = 0;
  if (per_sample || a.rows.t) return;
  a.geometry.event *= a.geometry.batch;
  a.geometry.batch = 1;
}

}  // namespace fastgen
