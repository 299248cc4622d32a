#include <atomic>
#include <random>
#include <vector>

#include "common/op.h"

#include "bce_with_logits/bce_with_logits.h"
#ifdef FG_DEVICE_KERNELS
#include "bce_with_logits/bce_with_logits_device.h"
#endif

namespace fastgen {
FG_KERNELS(bce_with_logits, BceWithLogitsArguments)
namespace {

// Tensors of one shape, read in the memory order of the first: contiguous, or channels-last where that is.
struct Operands {
  View like;
  bool channels_last;
  std::optional<Input> inputs[5];
  int used = 0;

  explicit Operands(const Tensor& x) : like(x), channels_last(like.channels_last()) {}

  // One element for all logits, also where it was expanded to their shape, as autograd does with the gradient of a sum.
  static bool repeats_one(const View& x) {
    bool repeats = x.numel > 1;
    for (int64_t d = 0; d < x.dim; ++d)
      repeats = repeats && (x.sizes[d] == 1 || x.strides[d] == 0);
    return repeats;
  }
  BceOperand read(const Tensor& x, const char* name, bool may_repeat = false) {
    const View view(x);
    const bool scalar = view.dim == 0, single = scalar || (may_repeat && repeats_one(view));
    bool fits = scalar || view.dim == like.dim;
    for (int64_t d = 0; fits && d < view.dim; ++d)
      fits = view.sizes[d] == like.sizes[d];
    STD_TORCH_CHECK(fits, name, ": expected one element or the shape of input");
    STD_TORCH_CHECK(view.same_device(like), name, ": expected the device of input");
    if (single) return {view.data, view.dtype(name), true};
    const Input& input = inputs[used++].emplace(x, view, channels_last, name);
    return {input.view.data, input.dtype, false};
  }
  BceOperand read(const OptionalTensor& x, const char* name) { return x ? read(*x, name, true) : BceOperand{}; }
  Tensor output(DType dtype) const { return empty(like.sizes, like.dim, channels_last, dtype, like); }
};

BceWithLogitsArguments arguments_of(Operands& operands, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                    const OptionalTensor& pos_weight, int64_t reduction) {
  BceWithLogitsArguments a;
  a.count = operands.like.numel;
  a.input = operands.read(input, "input");
  a.target = operands.read(target, "target");
  STD_TORCH_CHECK(a.target.single == a.input.single, "target: expected the shape of input");
  a.weight = operands.read(weight, "weight");
  a.pos_weight = operands.read(pos_weight, "pos_weight");
  STD_TORCH_CHECK(reduction >= kNone && reduction <= kSum, "reduction: expected 0 (none), 1 (mean) or 2 (sum), got ", reduction);
  a.reduction = static_cast<BceReduction>(reduction);
  a.is_double = promoted(a.input.dtype, a.target.dtype) == kFloat64;  // a weight of float64 is rounded to float32 first
  return a;
}

#ifndef FG_DEVICE_KERNELS
int64_t blocks_of(int64_t count) { return (count + kBceBlock - 1) / kBceBlock; }

void run(const BceWithLogitsArguments& a) {
  const CpuKernel<BceWithLogitsArguments> kernel = bce_with_logits_cpu(isa());
  const int64_t blocks = blocks_of(a.count);
  if (blocks <= 1) return kernel(a, 0, blocks);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

void store_scalar(const Tensor& to, DType dtype, double value) {
  void* data = to.mutable_data_ptr();
  switch (dtype) {
    case kFloat32: *static_cast<float*>(data) = static_cast<float>(value); break;
    case kFloat64: *static_cast<double*>(data) = value; break;
    case kFloat16: *static_cast<torch::headeronly::Half*>(data) = static_cast<float>(value); break;
    case kBFloat16: *static_cast<torch::headeronly::BFloat16*>(data) = static_cast<float>(value); break;
  }
}
#endif

// The result has the target's dtype, as torch's has; kWide: float32 in place of half precision, for autocast.
template <bool kWide> Tensor forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                     const OptionalTensor& pos_weight, int64_t reduction) {
  Operands operands(input);
  BceWithLogitsArguments a = arguments_of(operands, input, target, weight, pos_weight, reduction);
  const DType dtype = kWide ? arithmetic_of(a.target.dtype) : a.target.dtype;
  const Tensor out = reduction == kNone ? operands.output(dtype) : empty(nullptr, 0, false, dtype, operands.like);
#ifdef FG_DEVICE_KERNELS
  a.out = {out.mutable_data_ptr(), dtype, 0, 0};
  OptionalTensor sums;
  a.reduced = reduction != kNone;
  if (a.reduced && a.count > kThreads) {  // else one thread block does it alone
    static std::atomic<uint64_t> launches{std::random_device()() * 0x9E3779B97F4A7C15u};
    const int64_t numbers = 2 * kMostSums;
    sums = empty(&numbers, 1, false, kFloat64, operands.like);
    a.sums = static_cast<double*>(sums->mutable_data_ptr());
    a.flags = reinterpret_cast<uint64_t*>(a.sums + kMostSums);
    a.launch_number = ++launches | 1ull << 63;  // not 0
  }
  run_cuda(fastgen_bce_with_logits_cuda, a, operands.like);
#else
  if (reduction == kNone) {
    a.out = {out.mutable_data_ptr(), dtype, 0, 0};
    run(a);
    return out;
  }
  // few enough blocks for the stack up to 4 M logits
  constexpr int64_t on_stack = 256;
  double few[on_stack];
  std::vector<double> many;
  const int64_t blocks = blocks_of(a.count);
  if (blocks > on_stack) many.resize(blocks);
  a.sums = blocks > on_stack ? many.data() : few;
  a.reduced = true;
  run(a);
  double total = 0;
  for (int64_t block = 0; block < blocks; ++block)
    total += a.sums[block];
  store_scalar(out, dtype, reduction == kMean ? total / static_cast<double>(a.count) : total);
#endif
  return out;
}

Tensor backward(const Tensor& gradient, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                const OptionalTensor& pos_weight, int64_t reduction) {
  Operands operands(input);
  BceWithLogitsArguments a = arguments_of(operands, input, target, weight, pos_weight, reduction);
  a.gradient = operands.read(gradient, "gradient", true);
  STD_TORCH_CHECK(reduction == kNone || a.gradient.single, "gradient: expected one element for a mean or a sum");
  a.backward = true;
  a.scale = reduction == kMean ? 1.0 / static_cast<double>(a.count) : 1.0;
  const Tensor out = operands.output(a.input.dtype);
  a.out = {out.mutable_data_ptr(), a.input.dtype, 0, 0};
#ifdef FG_DEVICE_KERNELS
  run_cuda(fastgen_bce_with_logits_cuda, a, operands.like);
#else
  run(a);
#endif
  return out;
}

}  // namespace
}  // namespace fastgen

#define ARGUMENTS "Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, int reduction"
#ifndef FG_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(fastgen, m) {
  m.def("bce_with_logits(" ARGUMENTS ") -> Tensor");
  m.def("bce_with_logits_wide(" ARGUMENTS ") -> Tensor");
  m.def("bce_with_logits_backward(Tensor gradient, " ARGUMENTS ") -> Tensor");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fastgen, FG_DEVICE, m) {
  m.impl("bce_with_logits", TORCH_BOX(&fastgen::forward<false>));
  m.impl("bce_with_logits_wide", TORCH_BOX(&fastgen::forward<true>));
  m.impl("bce_with_logits_backward", TORCH_BOX(&fastgen::backward));
}
