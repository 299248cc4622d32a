#include "randn/randn.h"

#include "declared/randn.h"

namespace fastgen {
FG_KERNELS(randn, RandnArguments)
#ifndef FG_DEVICE_KERNELS
FG_CPU_KERNELS(torch_skip, TorchSkipArguments)
#endif
FG_KERNELS(randn_torch_cuda, TorchCudaArguments)
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
  const TorchNoise torch({states, dtype, fused}, batch, arithmetic_of(dtype), a.noise);
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

// `threads`: how many the GPU whose numbers these are runs at a time.
void randn_torch_cuda(const Tensor& out, const RandnOperands& o, int64_t threads) {
  const Batch batch(out, View(out), false);  // the numbers follow the logical order
  STD_TORCH_CHECK(threads >= kTorchCudaBlock && threads % kTorchCudaBlock == 0, "threads: expected a multiple of ", kTorchCudaBlock,
                  ", got ", threads);
  STD_TORCH_CHECK(o.offset >= 0 && o.offset % 4 == 0, "offset: expected a multiple of 4, got ", o.offset);
  const Noise noise = noise_of(o.seeds, o.seed, 0, false, batch);
  STD_TORCH_CHECK(noise.kind == kSeededNoise, "seed: expected one, got none");
  TorchCudaArguments a;
  a.seeds = noise.seeds;
  a.per_sample = noise.per_sample;
  a.seed = noise.seed;
  a.first = o.offset / 4;
  a.samples = a.per_sample ? batch.geometry.batch : 1;
  a.event = a.per_sample ? batch.geometry.event : batch.like.numel;
  const DType dtype = batch.like.dtype("out");
  const Output output(batch, dtype, out, {});
  a.out = output.operand;
  a.plan(threads);
  if (batch.like.numel > 0) {
#ifdef FG_DEVICE_KERNELS
    run_cuda(fastgen_randn_torch_cuda_cuda, a, batch.like);
#else
    constexpr int64_t cost = kSeededGrain / (2 * kTorchCudaBlock);  // where n is below T, a piece is a quarter of what it might be
    run_blocks(randn_torch_cuda_cpu(isa()), a, a.samples * a.turns * (a.threads / kTorchCudaBlock), cost);
#endif
  }
  output.finish();
}

}  // namespace
}  // namespace fastgen
