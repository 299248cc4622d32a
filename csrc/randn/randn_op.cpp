#include "randn/randn.h"

#include "declared/randn.h"

namespace fastgen {
FG_KERNELS(randn, RandnArguments)
#ifndef FG_DEVICE_KERNELS
FG_CPU_KERNELS(torch_skip, TorchSkipArguments)
#endif
namespace {

void randn(const Tensor& out, const RandnOperands& o) {
  const Batch batch(out);
  RandnArguments a;
  a.geometry = batch.geometry;
  const DType dtype = batch.like.dtype("out");
  a.is_double = dtype == kFloat64;
  a.noise = noise_of(o.seeds, o.seed, o.offset, false, batch);
  STD_TORCH_CHECK(a.noise.kind == kSeededNoise, "seed: expected one, got none");
  const Output output(batch, dtype, out, {});
  a.out[0] = output.operand;
  FG_RUN(randn, a, batch.like, kSeededGrain);
  output.finish();
}

#ifndef FG_DEVICE_KERNELS
// What torch.randn(out.shape, generator=...) would have been.
void torch_randn(const Tensor& out, const Tensor& states, bool fused) {
  const Batch batch(out);
  RandnArguments a;
  a.geometry = batch.geometry;
  const DType dtype = batch.like.dtype("out");
  const Output output(batch, dtype, out, {});
  a.out[0] = output.operand;
  const TorchNoise torch(states, dtype, fused, batch, arithmetic_of(dtype), a.noise);
  flatten(a, false);
  FG_RUN(randn, a, batch.like, kSeededGrain);
  torch.finish();
}

// Puts the states forward by as many words of 32 bits each.
void torch_skip(const Tensor& states, int64_t words) {
  STD_TORCH_CHECK(words >= 0, "words: expected a number >= 0, got ", words);
  const TorchNoise::States all(states);
  if (words > 0) run_blocks(torch_skip_cpu(isa()), {all.data, words}, all.count);
}
#endif

}  // namespace
}  // namespace fastgen
