#include "randn/randn.h"

#include "declared/randn.h"

namespace fastgen {
FG_KERNELS(randn, RandnArguments)
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

}  // namespace
}  // namespace fastgen
