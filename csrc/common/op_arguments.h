// The arguments of an element-wise op as its kernels take them (elementwise.h): coefficient rows, noise, and how the work is
// shared.
#pragma once
#include <cstring>
#include <memory>

#include "common/op_layout.h"

namespace fastgen {

// Rows of coefficients, one per timestep, and which of them a sample has: a tensor `t` says it, or `index` for all samples.
struct RowsInput {
  std::optional<Tensor> t_copy;
  Rows rows;

  RowsInput(const Tensor& table, const OptionalTensor& t, int64_t index, int64_t columns, const Batch& batch, DType arithmetic)
      : t_copy(t && !t->is_contiguous() ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt) {
    const View view(table);
    check_rows(view, columns, batch.like, arithmetic);
    rows = {view.data, view.sizes[0], columns, nullptr, index};
    if (!t) {
      check_timestep(index, rows.count);
      return;
    }
    const View t_view(t_copy ? *t_copy : *t);
    check_timesteps(t_view, batch.like);
    rows.t = static_cast<const int64_t*>(t_view.data);
    for (int64_t b = 0; kTimestepsAreVisible && b < batch.geometry.batch; ++b)
      check_timestep(rows.t[b], rows.count);
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
    check_seeds(view, batch.like);
    noise.kind = kSeededNoise;
    const int64_t* data = static_cast<const int64_t*>(view.data);
    if (view.numel == 1 && view.on_cpu()) {
      noise.seed = data[0];
    } else {
      noise.seeds = data;
      noise.per_sample = view.numel == batch.geometry.batch;
    }
  } else if (seed) {
    noise.kind = kSeededNoise;
    noise.seed = *seed;
  }
  return noise;
}

// What an op with torch's own noise is told of it: the states of torch's CPU generators, bytes of shape (5056,) for one generator
// or (B, 5056) for one of each sample; the dtype of the noise that torch would have drawn; and whether its arithmetic fuses
// multiplications and additions.
struct TorchDraw {
  const Tensor& states;
  int64_t dtype;
  bool fused;
};

// That noise (cpu_torch_noise.h), set in a kernel's arguments. `finish` puts the states forward to where torch.randn would have
// left the generators.
class TorchNoise {
 public:
  TorchNoise(const TorchDraw& draw, const Batch& batch, DType arithmetic, Noise& noise)
      : states_(draw.states), after_(new TorchState[static_cast<size_t>(states_.count)]) {
    const int64_t event = batch.geometry.event;
    STD_TORCH_CHECK(states_.count == 1 || states_.count == batch.geometry.batch, "states: expected 1 or ", batch.geometry.batch,
                    ", got ", states_.count);
    STD_TORCH_CHECK(arithmetic == kFloat32 && (draw.dtype == kFloat32 || draw.dtype == kFloat16 || draw.dtype == kBFloat16),
                    "noise_dtype: expected float32, float16 or bfloat16, and a result that is computed in float32");
    STD_TORCH_CHECK(!batch.channels_last && (states_.count == 1 ? batch.geometry.batch * event : event) >= 16,
                    "expected contiguous data, of 16 elements or more for each generator");
    noise.kind = kTorchNoise;
    noise.per_sample = states_.count > 1;
    noise.states = states_.data;
    noise.final_states = after_.get();
    noise.dtype = static_cast<DType>(draw.dtype);
    noise.fused = draw.fused;
  }
  // Only now, since each thread of the kernel begins with the states before.
  void finish() const { std::memcpy(states_.data, after_.get(), static_cast<size_t>(states_.count * kTorchStateBytes)); }

  struct States {
    TorchState* data;
    int64_t count;
    explicit States(const Tensor& tensor) {
      const View view(tensor);
      STD_TORCH_CHECK(view.torch_dtype == torch_dtype(kUInt8) && view.on_cpu() && view.contiguous &&
                          (view.dim == 1 || view.dim == 2) && view.sizes[view.dim - 1] == kTorchStateBytes && view.numel > 0,
                      "states: expected contiguous bytes on the CPU, of shape (", kTorchStateBytes, ",) or (B, ", kTorchStateBytes,
                      ")");
      STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(view.data) % alignof(TorchState) == 0, "states: expected aligned memory");
      data = static_cast<TorchState*>(view.data);
      count = view.numel / kTorchStateBytes;
      for (int64_t i = 0; i < count; ++i)
        STD_TORCH_CHECK(data[i].left >= 1 && data[i].left <= kTwisted,
                        "states: expected the state of a generator, got other bytes");
    }
  };

 private:
  States states_;
  std::unique_ptr<TorchState[]> after_;
};

// How many elements are worth a thread of their own: one whose noise is made from a seed costs some ten times another.
constexpr int64_t kUnseededGrain = 32768, kSeededGrain = 4096;
inline int64_t grain(const Noise& noise) {
  return noise.kind == kSeededNoise || noise.kind == kTorchNoise ? kSeededGrain : kUnseededGrain;
}

// Makes the layout of a batch as simple as its kernel may take it. Without a seed no element needs its logical index, so where
// every operand is dense, channels-last is as good as contiguous. Where the samples share one row of coefficients besides, and have
// nothing else of their own either (`per_sample`), the batch is as good as one large sample.
inline void flatten(Elementwise& a, bool per_sample) {
  if (a.noise.kind == kSeededNoise) return;
  for (const Operand& in : a.in)
    if (in.data && in.batch_stride != a.geometry.event) return;
  a.geometry.channels = a.geometry.spatial = 0;
  if (per_sample || a.rows.t || (a.noise.kind == kTorchNoise && a.noise.per_sample)) return;
  a.geometry.event *= a.geometry.batch;
  a.geometry.batch = 1;
}

}  // namespace fastgen
