#include "q_sample/q_sample.h"

#include "declared/q_sample.h"

namespace fastgen {
FG_KERNELS(q_sample, QSampleArguments)
namespace {

void run(const QSampleOperands& o, const Batch& batch, const Input& x, const Output& out) {
  QSampleArguments a;
  a.geometry = batch.geometry;
  a.in[0] = batch.operand(x);
  a.is_double = x.dtype == kFloat64;
  const RowsInput rows_input(o.rows, o.t, o.index, QSampleColumns::kCount, batch, arithmetic_of(x.dtype));
  a.rows = rows_input.rows;
  a.noise = noise_of(o.seeds, o.seed, o.offset, false, batch);
  std::optional<Input> given;
  if (o.noise) {
    given.emplace(batch.input(*o.noise, "noise"));
    a.in[1] = batch.operand(*given);
    a.noise.kind = kGivenNoise;
  }
  a.out[0] = out.operand;
  flatten(a, false);
  FG_RUN(q_sample, a, batch.like, grain(a.noise));
  out.finish();
}

Tensor q_sample(const QSampleOperands& o) {
  const Batch batch(o.x);
  const Input x = batch.first("x");
  const Output out(batch, x.dtype);
  run(o, batch, x, out);
  return out.target;
}

void q_sample_out(const QSampleOperands& o, const Tensor& out) {
  const Batch batch(o.x);
  const Input x = batch.first("x");
  run(o, batch, x, Output(batch, x.dtype, out, {&o.x, pointer(o.noise)}));
}

}  // namespace
}  // namespace fastgen
