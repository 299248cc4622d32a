#include "common/op.h"

#include "bce_with_logits/bce_with_logits.h"

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
    STD_TORCH_CHECK(scalar || view.same_sizes(like), name, ": expected one element or the shape of input");
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
void run(const BceWithLogitsArguments& a) { run_blocks(bce_with_logits_cpu(isa()), a, blocks_of(a.count, kBceBlock)); }
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
  std::optional<Scratch> scratch;
  a.reduced = reduction != kNone;
  if (a.reduced && a.count > kThreads) a.scratch = scratch.emplace(1, operands.like).plain;  // else one thread block does it alone
  run_cuda(fastgen_bce_with_logits_cuda, a, operands.like);
#else
  if (reduction == kNone) {
    a.out = {out.mutable_data_ptr(), dtype, 0, 0};
    run(a);
    return out;
  }
  const BlockSums sums(blocks_of(a.count, kBceBlock));
  a.sums = sums.data;
  a.reduced = true;
  run(a);
  const double total = sums.total();
  store_scalar(out.mutable_data_ptr(), dtype, reduction == kMean ? total / static_cast<double>(a.count) : total);
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
