#include "common/op.h"
#include "q_sample/q_sample.h"

namespace fastgen {
FG_KERNELS(q_sample, QSampleArguments)
namespace {

void run(const Batch& batch, const Tensor& rows, const OptionalTensor& t, int64_t index, const OptionalTensor& noise,
         const OptionalTensor& seeds, std::optional<int64_t> seed, int64_t offset, const Input& x, const Output& out) {
  QSampleArguments a;
  a.geometry = batch.geometry;
  a.in[0] = batch.operand(x);
  a.is_double = x.dtype == kFloat64;
  const RowsInput rows_input(rows, t, index, QSampleColumns::kCount, batch, arithmetic_of(x.dtype));
  a.rows = rows_input.rows;
  a.noise = noise_of(seeds, seed, offset, false, batch);
  std::optional<Input> given;
  if (noise) {
    given.emplace(batch.input(*noise, "noise"));
    a.in[1] = batch.operand(*given);
    a.noise.kind = kGivenNoise;
  }
  a.out[0] = out.operand;
  flatten(a, false);
  FG_RUN(q_sample, a, batch.like, grain(a.noise));
  out.finish();
}

Tensor q_sample_new(const Tensor& x, const Tensor& rows, const OptionalTensor& t, int64_t index, const OptionalTensor& noise,
                    const OptionalTensor& seeds, std::optional<int64_t> seed, int64_t offset) {
  const Batch batch(x);
  const Input input = batch.first("x");
  const Output out(batch, input.dtype);
  run(batch, rows, t, index, noise, seeds, seed, offset, input, out);
  return out.target;
}

void q_sample_into(const Tensor& x, const Tensor& rows, const OptionalTensor& t, int64_t index, const OptionalTensor& noise,
                   const OptionalTensor& seeds, std::optional<int64_t> seed, int64_t offset, const Tensor& out) {
  const Batch batch(x);
  const Input input = batch.first("x");
  run(batch, rows, t, index, noise, seeds, seed, offset, input, Output(batch, input.dtype, out, {&x, noise ? &*noise : nullptr}));
}

}  // namespace
}  // namespace fastgen

// q_step is the same op under its own name, so that a profile tells them apart.
// The defaults spare the common call the conversion of arguments that it does not use.
#define SCHEMA                                                                                                  \
  "Tensor x, Tensor rows, Tensor? t, SymInt index, Tensor? noise=None, Tensor? seeds=None, SymInt? seed=None, " \
  "SymInt offset=0"
#ifndef FG_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(fastgen, m) {
  m.def("q_sample(" SCHEMA ") -> Tensor");
  m.def("q_step(" SCHEMA ") -> Tensor");
  m.def("q_sample_out(" SCHEMA ", *, Tensor(a!) out) -> ()");
  m.def("q_step_out(" SCHEMA ", *, Tensor(a!) out) -> ()");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fastgen, FG_DEVICE, m) {
  m.impl("q_sample", TORCH_BOX(&fastgen::q_sample_new));
  m.impl("q_step", TORCH_BOX(&fastgen::q_sample_new));
  m.impl("q_sample_out", TORCH_BOX(&fastgen::q_sample_into));
  m.impl("q_step_out", TORCH_BOX(&fastgen::q_sample_into));
}
