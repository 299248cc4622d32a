#include "q_sample/q_sample.h"

#include "declared/q_sample.h"

namespace fastgen {
FG_KERNELS(q_sample, QSampleArguments)
namespace {

// Of floating data theirs; of bytes that of the noise, and where none is given that of the rows.
DType result_dtype(const QSampleOperands& o, const Input& x) {
  if (x.dtype != kUInt8) return x.dtype;
  return o.noise ? View(*o.noise).dtype("noise") : View(o.rows).dtype("rows");
}

// draw(noise, arithmetic) changes where the noise comes from.
template <class Draw> void run(const QSampleOperands& o, const Batch& batch, const Input& x, const Output& out, const Draw& draw) {
  QSampleArguments a;
  a.geometry = batch.geometry;
  a.in[0] = batch.operand(x);
  const DType arithmetic = arithmetic_of(out.operand.dtype);
  a.is_double = arithmetic == kFloat64;
  const RowsInput rows_input(o.rows, o.t, o.index, QSampleColumns::kCount, batch, arithmetic);
  a.rows = rows_input.rows;
  a.noise = noise_of(o.seeds, o.seed, o.offset, false, batch);
  std::optional<Input> given;
  if (o.noise) {
    given.emplace(batch.input(*o.noise, "noise"));
    a.in[1] = batch.operand(*given);
    a.noise.kind = kGivenNoise;
  }
  draw(a.noise, arithmetic);
  a.out[0] = out.operand;
  flatten(a, false);
  FG_RUN(q_sample, a, batch.like, grain(a.noise));
  out.finish();
}

void run(const QSampleOperands& o, const Batch& batch, const Input& x, const Output& out) {
  run(o, batch, x, out, [](Noise&, DType) {});
}

Tensor q_sample(const QSampleOperands& o) {
  const Batch batch(o.x);
  const Input x = batch.first("x", true);
  const Output out(batch, result_dtype(o, x));
  run(o, batch, x, out);
  return out.target;
}

void q_sample_out(const QSampleOperands& o, const Tensor& out) {
  const Batch batch(o.x);
  const Input x = batch.first("x", true);
  const DType dtype = x.dtype == kUInt8 ? View(out).dtype("out") : x.dtype;
  run(o, batch, x, Output(batch, dtype, out, {&o.x, pointer(o.noise)}));
}

#ifndef FG_DEVICE_KERNELS
void q_sample_torch(const Tensor& states, int64_t noise_dtype, bool fused, const QSampleOperands& o, const Tensor& out) {
  const Batch batch(o.x);
  const Input x = batch.first("x", true);
  const DType dtype = x.dtype == kUInt8 ? View(out).dtype("out") : x.dtype;
  std::optional<TorchNoise> torch;
  run(o, batch, x, Output(batch, dtype, out, {&o.x}),
      [&](Noise& noise, DType arithmetic) { torch.emplace(states, noise_dtype, fused, batch, arithmetic, noise); });
  torch->finish();
}
#endif

}  // namespace
}  // namespace fastgen
