// Torch's tensors as an op sees them: dtypes, and what is read of a tensor. Like everything that the op layer includes, this goes
// through LibTorch's stable ABI.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "common/elementwise.h"

namespace fastgen {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The tensor, or null where there is none.
inline const Tensor* pointer(const OptionalTensor& x) { return x ? &*x : nullptr; }

// Bytes take the type of what they meet.
inline DType promoted(DType a, DType b) {
  if (a == b || b == kUInt8) return a;
  if (a == kUInt8) return b;
  return a == kFloat64 || b == kFloat64 ? kFloat64 : kFloat32;
}
inline DType arithmetic_of(DType dtype) { return dtype == kFloat64 ? kFloat64 : kFloat32; }

inline int32_t torch_dtype(DType dtype) {
  static const int32_t dtypes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_float16(),
                                   aoti_torch_dtype_bfloat16(), aoti_torch_dtype_uint8()};
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

  // `or_bytes`: of data that may be bytes.
  DType dtype(const char* name, bool or_bytes = false) const {
    for (DType d : {kFloat32, kBFloat16, kFloat16, kFloat64})
      if (torch_dtype == fastgen::torch_dtype(d)) return d;
    if (or_bytes && torch_dtype == fastgen::torch_dtype(kUInt8)) return kUInt8;
    STD_TORCH_CHECK(false, name, ": expected dtype float16, bfloat16, float32", or_bytes ? ", float64 or uint8" : " or float64");
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

}  // namespace fastgen
