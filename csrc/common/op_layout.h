// The layout that an op works in, contiguous or channels-last: its first input has it, the others are copied where theirs is
// another, and the results are allocated in it.
#pragma once
#include <vector>

#include "common/op_checks.h"
#include "common/op_device.h"

namespace fastgen {

// A new tensor of `numel` elements without gaps, on the device of `like`.
inline Tensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t numel, DType dtype,
                            const View& like) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, torch_dtype(dtype), like.device_type, like.device_index, &handle));
  Tensor tensor(handle);
  prepare_memory(tensor, numel * size_of(dtype));
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

  Input(const Tensor& x, const View& original, bool channels_last, const char* name, bool or_bytes = false)
      : view(original), dtype(view.dtype(name, or_bytes)) {
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

  explicit Batch(const Tensor& x) : Batch(x, View(x)) {}
  Batch(const Tensor& x, const View& view, bool channels_last_) : tensor(x), like(view), channels_last(channels_last_) {
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
  Input first(const char* name, bool or_bytes = false) const { return Input(tensor, like, channels_last, name, or_bytes); }
  // A tensor of the first one's shape, or of `channel_factor` times its channels, on its device.
  Input input(const Tensor& x, const char* name, int64_t channel_factor = 1, bool or_bytes = false) const {
    const View view(x);
    check_fits(view, name, like, channel_factor);
    return Input(x, view, channels_last, name, or_bytes);
  }
  // A tensor of this shape, or of `channel_factor` times the channels.
  Tensor output(DType dtype, int64_t channel_factor = 1) const {
    if (channel_factor == 1) return empty(like.sizes, like.dim, channels_last, dtype, like);
    std::vector<int64_t> sizes(like.sizes, like.sizes + like.dim);
    sizes[1] *= channel_factor;
    return empty(sizes.data(), like.dim, channels_last, dtype, like);
  }

  // How a tensor of this layout is addressed, its channels `channel_factor` times the batch's.
  Operand operand(void* data, DType dtype, int64_t channel_factor = 1) const {
    return {data, dtype, geometry.event * channel_factor, geometry.channels * channel_factor};
  }
  Operand operand(const Input& x, int64_t channel_factor = 1) const { return operand(x.view.data, x.dtype, channel_factor); }
  // Of a tensor of twice the channels, where the second half of them begins.
  Operand second_half(Operand x) const {
    x.data = static_cast<char*>(x.data) + (channels_last ? geometry.channels : geometry.event) * size_of(x.dtype);
    return x;
  }

 private:
  Batch(const Tensor& x, const View& view) : Batch(x, view, view.channels_last()) {}
};

// How the samples of a tensor lie in memory: each contiguous or channels-last, with gaps between the samples, and between the
// positions of channels-last ones, perhaps. So do the halves of a tensor of twice the channels.
struct SampleLayout {
  bool contiguous, channels_last = false;
  int64_t batch_stride, position_stride = 0;

  explicit SampleLayout(const View& x) : contiguous(x.contiguous) {
    const bool one_sample = x.sizes[0] == 1;
    int64_t event = 1;
    bool dense = true;
    for (int64_t d = x.dim - 1; d >= 1; --d) {
      dense = dense && (x.sizes[d] == 1 || x.strides[d] == event);
      event *= x.sizes[d];
    }
    contiguous = contiguous || dense;
    batch_stride = x.contiguous || one_sample ? event : x.strides[0];
    if (contiguous || x.dim < 3 || (x.sizes[1] != 1 && x.strides[1] != 1)) return;
    int64_t positions = 1;
    bool even = true;
    for (int64_t d = x.dim - 1; d >= 2; --d) {
      if (x.sizes[d] == 1) continue;
      if (positions == 1) position_stride = x.strides[d];
      even = even && x.strides[d] == position_stride * positions;
      positions *= x.sizes[d];
    }
    const int64_t span = position_stride * positions;
    channels_last = even && position_stride >= x.sizes[1] && (one_sample || x.strides[0] == 0 || x.strides[0] >= span);
    if (one_sample) batch_stride = span;  // not the event: who sees that takes the sample for one without gaps
  }
};

// A batch in the layout of its first input's samples, which may lie apart.
inline Batch apart_batch(const Tensor& x) {
  const View view(x);
  STD_TORCH_CHECK(view.dim > 0, "expected shape (B, ...), got a tensor without dimensions");
  return Batch(x, view, SampleLayout(view).channels_last);
}

// An input whose samples may lie apart: where it is, or a copy in the batch's layout.
struct ApartInput {
  std::optional<Input> copy;
  Operand operand;

  ApartInput(const Tensor& x, const Batch& batch, const char* name) {
    const View view(x);
    check_fits(view, name, batch.like, 1);
    const SampleLayout layout(view);
    if (batch.channels_last ? layout.channels_last : layout.contiguous) {
      operand = {view.data, view.dtype(name), layout.batch_stride, layout.position_stride};
    } else {
      operand = batch.operand(copy.emplace(x, view, batch.channels_last, name));
    }
  }
};

// The upstream gradient of sums, of the type of the arithmetic: (B,) numbers, copied where they are not one behind the other, or
// one.
struct Upstream {
  std::optional<Tensor> copy;
  const void* data;

  Upstream(const Tensor& gradient, bool of_each_sample, const View& like, DType arithmetic)
      : Upstream(gradient, View(gradient), of_each_sample, like, arithmetic) {}

 private:
  Upstream(const Tensor& gradient, const View& view, bool of_each_sample, const View& like, DType arithmetic)
      : copy(of_each_sample && !view.contiguous ? std::optional<Tensor>(torch::stable::contiguous(gradient)) : std::nullopt) {
    if (of_each_sample) {
      data = each_sample(copy ? *copy : gradient, "gradient", like, arithmetic);
      return;
    }
    STD_TORCH_CHECK(view.dim == 0 && view.dtype("gradient") == arithmetic && view.same_device(like),
                    "gradient: expected one number in the dtype of the arithmetic on the data's device");
    data = view.data;
  }
};

// Where an op writes: the caller's tensor if that has the batch's layout, else a tensor of the op's own, which `finish` copies to
// the caller's.
struct Output {
  Tensor target;
  std::optional<Tensor> own;
  Operand operand;

  Output(const Batch& batch, DType dtype) : target(batch.output(dtype)), operand(batch.operand(target.mutable_data_ptr(), dtype)) {}
  // `inputs`: the tensors that the op reads, null where there is none.
  Output(const Batch& batch, DType dtype, const Tensor& out, std::initializer_list<const Tensor*> inputs)
      : Output(batch, dtype, out, View(out), inputs) {}
  void finish() const {
    if (own) torch::stable::copy_(const_cast<Tensor&>(target), *own);
  }

 private:
  Output(const Batch& batch, DType dtype, const Tensor& out, const View& view, std::initializer_list<const Tensor*> inputs)
      : target(out),
        own(own_for(batch, dtype, view, inputs)),
        operand(batch.operand(own ? own->mutable_data_ptr() : view.data, dtype)) {}
  static std::optional<Tensor> own_for(const Batch& batch, DType dtype, const View& out,
                                       std::initializer_list<const Tensor*> inputs) {
    check_out(out, dtype, batch.like, inputs);
    if (batch.channels_last ? out.channels_last() : out.contiguous) return std::nullopt;
    return batch.output(dtype);
  }
};

}  // namespace fastgen
