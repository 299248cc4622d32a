#include "common/op.h"
#include "q_sample/q_sample.h"

namespace fastgen {
FG_KERNELS(q_sample, QSampleArguments)
namespace {

void run(const Batch& batch, const Tensor& x, const Tensor& rows, const OptionalTensor& t, int64_t index,
         const OptionalTensor& noise, const OptionalTensor& seeds, std::optional<int64_t> seed, int64_t offset, Output& out) {
  QSampleArguments a;
  a.geometry = batch.geometry;
  const Tensor x_data = batch.input(x, "x");
  a.in[0] = batch.operand(x_data);
  a.is_double = a.in[0].dtype == kFloat64;
  a.rows = rows_of(rows, t, index, QSampleColumns::kCount, batch, a.is_double);
  a.noise = noise_of(seeds, seed, offset, false, a.geometry);
  OptionalTensor noise_data;
  if (noise) {
    noise_data = batch.input(*noise, "noise");
    a.in[1] = batch.operand(*noise_data);
    a.noise.kind = kGivenNoise;
  }
  a.out[0] = batch.operand(out.written, out.written.mutable_data_ptr());
  flatten(a);
  FG_RUN(q_sample, a, x, grain(a.noise));
  out.finish();
}

Tensor q_sample_new(Tensor x, Tensor rows, OptionalTensor t, int64_t index, OptionalTensor noise, OptionalTensor seeds,
                    std::optional<int64_t> seed, int64_t offset) {
  const Batch batch(x);
  Output out(batch, dtype_of(x, "x"));
  run(batch, x, rows, t, index, noise, seeds, seed, offset, out);
  return out.target;
}

void q_sample_into(Tensor x, Tensor rows, OptionalTensor t, int64_t index, OptionalTensor noise, OptionalTensor seeds,
                   std::optional<int64_t> seed, int64_t offset, Tensor out) {
  const Batch batch(x);
  Output output(batch, dtype_of(x, "x"), out);
  run(batch, x, rows, t, index, noise, seeds, seed, offset, output);
}

}  // namespace
}  // namespace fastgen

// q_step is the same op under its own name, so that a profile tells them apart.
#define ARGUMENTS "Tensor x, Tensor rows, Tensor? t, SymInt index, Tensor? noise, Tensor? seeds, SymInt? seed, SymInt offset"
#ifndef FG_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(fastgen, m) {
  m.def("q_sample(" ARGUMENTS ") -> Tensor");
  m.def("q_step(" ARGUMENTS ") -> Tensor");
  m.def("q_sample_out(" ARGUMENTS ", *, Tensor(a!) out) -> ()");
  m.def("q_step_out(" ARGUMENTS ", *, Tensor(a!) out) -> ()");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fastgen, FG_DEVICE, m) {
  m.impl("q_sample", TORCH_BOX(&fastgen::q_sample_new));
  m.impl("q_step", TORCH_BOX(&fastgen::q_sample_new));
  m.impl("q_sample_out", TORCH_BOX(&fastgen::q_sample_into));
  m.impl("q_step_out", TORCH_BOX(&fastgen::q_sample_into));
}
