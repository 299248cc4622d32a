#include <vector>

#include "common/op.h"

#include "bce_with_logits/bce_with_logits.h"

namespace fastgen {
FG_KERNELS(bce_with_logits, BceWithLogitsArguments)
namespace {

// Tensors of one shape, read in the memory order of the first: contiguous, or channels-last where that is.
struct Operands {
  const Tensor& like;
  bool channels_last;
  std::vector<Tensor> copies;

  explicit Operands(const Tensor& x) : like(x), channels_last(!x.is_contiguous() && is_channels_last(x)) { copies.reserve(5); }

  BceOperand read(const OptionalTensor& x, const char* name) {
    if (!x) return {};
    STD_TORCH_CHECK(x->is_cuda() == like.is_cuda() && x->get_device_index() == like.get_device_index(), name,
                    ": expected the device of input");
    const bool single = x->dim() == 0;
    STD_TORCH_CHECK(single || x->numel() == like.numel(), name, ": expected one element or as many as input");
    copies.push_back(single ? *x : with_layout(*x, channels_last));
    return {copies.back().const_data_ptr(), dtype_of(*x, name), single};
  }
  Tensor output(DType dtype) const { return empty(like.sizes().data(), like.dim(), channels_last, dtype, like); }
};

// As torch promotes: a tensor without dimensions does not.
DType result_dtype(const Tensor& input, const Tensor& target, const OptionalTensor& weight, const OptionalTensor& pos_weight) {
  DType dtype = promoted(dtype_of(input, "input"), dtype_of(target, "target"));
  for (const OptionalTensor* w : {&weight, &pos_weight})
    if (*w && (*w)->dim() > 0) dtype = promoted(dtype, dtype_of(**w, "weight"));
  return dtype;
}

BceWithLogitsArguments arguments_of(Operands& operands, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                    const OptionalTensor& pos_weight, int64_t reduction, DType dtype) {
  BceWithLogitsArguments a;
  a.count = input.numel();
  a.input = operands.read(input, "input");
  a.target = operands.read(target, "target");
  a.weight = operands.read(weight, "weight");
  a.pos_weight = operands.read(pos_weight, "pos_weight");
  STD_TORCH_CHECK(reduction >= kNone && reduction <= kSum, "reduction: expected 0 (none), 1 (mean) or 2 (sum), got ", reduction);
  a.reduction = static_cast<BceReduction>(reduction);
  a.is_double = dtype == kFloat64;
  return a;
}

int64_t blocks_of(int64_t count) { return (count + kBceBlock - 1) / kBceBlock; }

#ifndef FG_CUDA
void run(const BceWithLogitsArguments& a) {
  const CpuKernel<BceWithLogitsArguments> kernel = bce_with_logits_cpu();
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

Tensor forward(Tensor input, Tensor target, OptionalTensor weight, OptionalTensor pos_weight, int64_t reduction) {
  Operands operands(input);
  const DType dtype = result_dtype(input, target, weight, pos_weight);
  BceWithLogitsArguments a = arguments_of(operands, input, target, weight, pos_weight, reduction, dtype);
  const Tensor out = reduction == kNone ? operands.output(dtype) : empty(nullptr, 0, false, dtype, input);
#ifdef FG_CUDA
  a.out = {out.mutable_data_ptr(), dtype, 0, 0};
  OptionalTensor sums;
  if (reduction != kNone) {
    const int64_t blocks = blocks_of(a.count);
    sums = empty(&blocks, 1, false, kFloat64, input);
    a.sums = static_cast<double*>(sums->mutable_data_ptr());
  }
  run_cuda(fastgen_bce_with_logits_cuda, a, input);
#else
  if (reduction == kNone) {
    a.out = {out.mutable_data_ptr(), dtype, 0, 0};
    run(a);
    return out;
  }
  std::vector<double> sums(blocks_of(a.count));
  a.sums = sums.data();
  run(a);
  double total = 0;
  for (double sum : sums)
    total += sum;
  store_scalar(out, dtype, reduction == kMean ? total / static_cast<double>(a.count) : total);
#endif
  return out;
}

Tensor backward(Tensor gradient, Tensor input, Tensor target, OptionalTensor weight, OptionalTensor pos_weight, int64_t reduction) {
  Operands operands(input);
  const DType dtype = result_dtype(input, target, weight, pos_weight);
  BceWithLogitsArguments a = arguments_of(operands, input, target, weight, pos_weight, reduction, dtype);
  a.gradient = operands.read(gradient, "gradient");
  a.backward = true;
  a.scale = reduction == kMean ? 1.0 / static_cast<double>(a.count) : 1.0;
  const DType input_dtype = dtype_of(input, "input");
  const Tensor out = operands.output(input_dtype);
  a.out = {out.mutable_data_ptr(), input_dtype, 0, 0};
#ifdef FG_CUDA
  run_cuda(fastgen_bce_with_logits_cuda, a, input);
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
  m.def("bce_with_logits_backward(Tensor gradient, " ARGUMENTS ") -> Tensor");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fastgen, FG_DEVICE, m) {
  m.impl("bce_with_logits", TORCH_BOX(&fastgen::forward));
  m.impl("bce_with_logits_backward", TORCH_BOX(&fastgen::backward));
}
