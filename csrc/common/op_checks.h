// What a tensor must be before a kernel may have its address, and the words of the refusal. These are the checks that memory safety
// needs; Python has made the friendlier ones before it calls an op.
#pragma once
#include <initializer_list>

#include "common/op_tensor.h"

namespace fastgen {

// `x` has the shape of the first input, `like`, or `channel_factor` times its channels, and is on its device.
inline void check_fits(const View& x, const char* name, const View& like, int64_t channel_factor) {
  bool fits = x.dim == like.dim && (channel_factor == 1 || like.dim >= 2);
  for (int64_t d = 0; fits && d < like.dim; ++d)
    fits = x.sizes[d] == like.sizes[d] * (d == 1 ? channel_factor : 1);
  STD_TORCH_CHECK(fits, name, ": expected a shape that fits the first input");
  STD_TORCH_CHECK(x.same_device(like), name, ": expected the device of the first input");
}

// Where (B,) numbers of the type of the arithmetic lie.
inline const void* each_sample(const Tensor& tensor, const char* name, const View& like, DType arithmetic) {
  const View x(tensor);
  STD_TORCH_CHECK(x.dim == 1 && x.sizes[0] == like.sizes[0] && x.contiguous && x.dtype(name) == arithmetic && x.same_device(like),
                  name, ": expected a contiguous tensor of shape (B,) in the dtype of the arithmetic on the data's device");
  return x.data;
}

inline void check_rows(const View& table, int64_t columns, const View& like, DType arithmetic) {
  STD_TORCH_CHECK(table.dim == 2 && table.sizes[1] == columns && table.contiguous && table.dtype("rows") == arithmetic &&
                      table.same_device(like),
                  "rows: expected a contiguous (T, ", columns, ") table in the dtype of the arithmetic on the data's device");
}

inline void check_timesteps(const View& t, const View& like) {
  STD_TORCH_CHECK(t.torch_dtype == aoti_torch_dtype_int64() && t.dim == 1 && t.sizes[0] == like.sizes[0] && t.same_device(like),
                  "t: expected an int64 tensor of shape (B,) on the data's device");
}

inline void check_timestep(int64_t t, int64_t count) {
  STD_TORCH_CHECK(t >= 0 && t < count, "t: expected timesteps within 0 … ", count - 1, ", got ", t);
}

inline void check_seeds(const View& seeds, const View& like) {
  STD_TORCH_CHECK(seeds.torch_dtype == aoti_torch_dtype_int64() && seeds.dim <= 1 && seeds.contiguous,
                  "seed: expected a contiguous int64 tensor of 1 or B elements");
  STD_TORCH_CHECK(seeds.numel == 1 || seeds.numel == like.sizes[0], "seed: expected 1 or ", like.sizes[0], " elements, got ",
                  seeds.numel);
  STD_TORCH_CHECK((seeds.numel == 1 && seeds.on_cpu()) || seeds.same_device(like),
                  "seed: expected the data's device, or one element on the CPU");
}

// Whether no byte of `a` is one of `b`, or both are the same elements in the same order.
inline bool apart_or_same(const View& a, const View& b) {
  const char *a_data = static_cast<const char*>(a.data), *b_data = static_cast<const char*>(b.data);
  const int64_t a_size = size_of(a.dtype("out", true)), b_size = size_of(b.dtype("input", true));
  if (b_data + b.span() * b_size <= a_data || a_data + a.span() * a_size <= b_data) return true;
  bool same = a_data == b_data && a.torch_dtype == b.torch_dtype && a.dim == b.dim;
  for (int64_t d = 0; same && d < a.dim; ++d)
    same = a.sizes[d] == b.sizes[d] && a.strides[d] == b.strides[d];
  return same;
}

// `out` takes the result of an op that reads `inputs`, null where there is none: it may be one of them, and overlaps none
// otherwise.
inline void check_out(const View& out, DType dtype, const View& like, std::initializer_list<const Tensor*> inputs) {
  const bool fits = out.dtype("out", true) == dtype && out.same_sizes(like) && out.same_device(like);
  STD_TORCH_CHECK(fits, "out: expected the result's dtype, shape and device");
  bool own_memory = out.span() >= out.numel;
  for (int64_t d = 0; d < out.dim; ++d)
    own_memory = own_memory && (out.sizes[d] <= 1 || out.strides[d] != 0 || out.numel == 0);
  STD_TORCH_CHECK(own_memory, "out: expected every element to have its own memory");
  for (const Tensor* x : inputs)
    STD_TORCH_CHECK(!x || apart_or_same(out, View(*x)), "out: expected memory apart from the inputs, or one of them");
}

}  // namespace fastgen
