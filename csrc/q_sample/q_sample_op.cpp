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

// draw: of torch's own noise, null where there is none.
void run(const QSampleOperands& o, const Batch& batch, const Input& x, const Output& out, const TorchDraw* draw = nullptr) {
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
  std::optional<TorchNoise> torch;
  if (draw) torch.emplace(*draw, batch, arithmetic, a.noise);
  a.out[0] = out.operand;
  flatten(a, false);
  FG_RUN(q_sample, a, batch.like, grain(a.noise));
  out.finish();
  if (torch) torch->finish();
}

Tensor q_sample(const QSampleOperands& o) {
  const Batch batch(o.x);
  const Input x = batch.first("x", true);
  const Output out(batch, result_dtype(o, x));
  run(o, batch, x, out);
  return out.target;
}

void run_to(const QSampleOperands& o, const Tensor& out, const TorchDraw* draw = nullptr) {
  const Batch batch(o.x);
  const Input x = batch.first("x", true);
  const DType dtype = x.dtype == kUInt8 ? View(out).dtype("out") : x.dtype;
  run(o, batch, x, Output(batch, dtype, out, {&o.x, pointer(o.noise)}), draw);
}

void q_sample_out(const QSampleOperands& o, const Tensor& out) { run_to(o, out); }

#ifndef FG_DEVICE_KERNELS
void q_sample_torch(const Tensor& states, int64_t noise_dtype, bool fused, const QSampleOperands& o, const Tensor& out) {
  const TorchDraw draw = {states, noise_dtype, fused};
  run_to(o, out, &draw);
}
#endif

}  // namespace
}  // namespace fastgen
