#include "common/op.h"

#include "randn/randn.h"

namespace fastgen {
FG_KERNELS(randn, RandnArguments)
namespace {

void randn(const Tensor& out, const OptionalTensor& seeds, std::optional<int64_t> seed, int64_t offset) {
  const Batch batch(out);
  RandnArguments a;
  a.geometry = batch.geometry;
  const DType dtype = batch.like.dtype("out");
  a.is_double = dtype == kFloat64;
  a.noise = noise_of(seeds, seed, offset, false, batch);
  STD_TORCH_CHECK(a.noise.kind == kSeededNoise, "seed: expected one, got none");
  const Output output(batch, dtype, out, {});
  a.out[0] = output.operand;
  FG_RUN(randn, a, batch.like, kSeededGrain);
  output.finish();
}

}  // namespace
}  // namespace fastgen

#ifndef FG_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(fastgen, m) { m.def("randn(Tensor(a!) out, Tensor? seeds, SymInt? seed, SymInt offset) -> ()"); }
#endif
STABLE_TORCH_LIBRARY_IMPL(fastgen, FG_DEVICE, m) { m.impl("randn", TORCH_BOX(&fastgen::randn)); }
