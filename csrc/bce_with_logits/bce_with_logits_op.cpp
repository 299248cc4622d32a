#include "bce_with_logits/bce_with_logits.h"

#include "declared/bce_with_logits.h"

namespace fastgen {
FG_KERNELS(bce_with_logits, BceWithLogitsArguments)
namespace {

// Tensors of one shape, read in the memory order of the first: contiguous, or channels-last where that is.
struct Inputs {
  View like;
  bool channels_last;
  std::optional<Input> inputs[5];
  int used = 0;

  explicit Inputs(const Tensor& x) : like(x), channels_last(like.channels_last()) {}

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

BceWithLogitsArguments arguments_of(Inputs& inputs, const BceWithLogitsOperands& o) {
  BceWithLogitsArguments a;
  a.count = inputs.like.numel;
  a.input = inputs.read(o.input, "input");
  a.target = inputs.read(o.target, "target");
  STD_TORCH_CHECK(a.target.single == a.input.single, "target: expected the shape of input");
  a.weight = inputs.read(o.weight, "weight");
  a.pos_weight = inputs.read(o.pos_weight, "pos_weight");
  STD_TORCH_CHECK(o.reduction >= kNone && o.reduction <= kSum, "reduction: expected 0 (none), 1 (mean) or 2 (sum), got ",
                  o.reduction);
  a.reduction = static_cast<BceReduction>(o.reduction);
  a.is_double = promoted(a.input.dtype, a.target.dtype) == kFloat64;  // a weight of float64 is rounded to float32 first
  return a;
}

#ifndef FG_DEVICE_KERNELS
void run(const BceWithLogitsArguments& a) { run_blocks(bce_with_logits_cpu(isa()), a, blocks_of(a.count, kBceBlock)); }
#endif

// The result has the target's dtype, as torch's has; kWide: float32 in place of half precision, for autocast.
template <bool kWide> Tensor forward(const BceWithLogitsOperands& o) {
  Inputs inputs(o.input);
  BceWithLogitsArguments a = arguments_of(inputs, o);
  const DType dtype = kWide ? arithmetic_of(a.target.dtype) : a.target.dtype;
  const Tensor out = o.reduction == kNone ? inputs.output(dtype) : empty(nullptr, 0, false, dtype, inputs.like);
#ifdef FG_DEVICE_KERNELS
  a.out = {out.mutable_data_ptr(), dtype, 0, 0};
  std::optional<Scratch> scratch;
  a.reduced = o.reduction != kNone;
  if (a.reduced && a.count > kThreads)
    a.scratch = scratch.emplace(1, inputs.like).for_kernel;  // else one thread block does it alone
  run_cuda(fastgen_bce_with_logits_cuda, a, inputs.like);
#else
  if (o.reduction == kNone) {
    a.out = {out.mutable_data_ptr(), dtype, 0, 0};
    run(a);
    return out;
  }
  const BlockSums sums(blocks_of(a.count, kBceBlock));
  a.sums = sums.data;
  a.reduced = true;
  run(a);
  const double total = sums.total();
  store_scalar(out.mutable_data_ptr(), dtype, o.reduction == kMean ? total / static_cast<double>(a.count) : total);
#endif
  return out;
}

Tensor bce_with_logits(const BceWithLogitsOperands& o) { return forward<false>(o); }
Tensor bce_with_logits_wide(const BceWithLogitsOperands& o) { return forward<true>(o); }

Tensor bce_with_logits_backward(const Tensor& gradient, const BceWithLogitsOperands& o) {
  Inputs inputs(o.input);
  BceWithLogitsArguments a = arguments_of(inputs, o);
  a.gradient = inputs.read(gradient, "gradient", true);
  STD_TORCH_CHECK(o.reduction == kNone || a.gradient.single, "gradient: expected one element for a mean or a sum");
  a.backward = true;
  a.scale = o.reduction == kMean ? 1.0 / static_cast<double>(a.count) : 1.0;
  const Tensor out = inputs.output(a.input.dtype);
  a.out = {out.mutable_data_ptr(), a.input.dtype, 0, 0};
#ifdef FG_DEVICE_KERNELS
  run_cuda(fastgen_bce_with_logits_cuda, a, inputs.like);
#else
  run(a);
#endif
  return out;
}

}  // namespace
}  // namespace fastgen
