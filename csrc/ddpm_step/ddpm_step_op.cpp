#include "ddpm_step/ddpm_step.h"

#include "declared/ddpm_step.h"

namespace fastgen {
FG_KERNELS(ddpm_step, DdpmStepArguments)
namespace {

// x_t, the model's outputs and the dtype of the result.
struct Inputs {
  Batch batch;
  int64_t factor;
  Input x, m;
  std::optional<Input> u;
  DType dtype;
  explicit Inputs(const DdpmStepOperands& o)
      : batch(o.x_t),
        factor(o.learned ? 2 : 1),
        x(batch.first("x_t")),
        m(batch.input(o.model_output, "model_output", factor)),
        dtype(promoted(x.dtype, m.dtype)) {
    if (!o.unconditional) return;
    u.emplace(batch.input(*o.unconditional, "unconditional", factor));
    STD_TORCH_CHECK(u->dtype == m.dtype, "unconditional: expected the dtype of model_output");
  }
};

// draw: of torch's own noise, null where there is none.
void run(const DdpmStepOperands& o, const Inputs& inputs, const Output& out, const Output* x0_out,
         const TorchDraw* draw = nullptr) {
  const Batch& batch = inputs.batch;
  DdpmStepArguments a;
  a.geometry = batch.geometry;
  a.is_double = inputs.dtype == kFloat64;
  const RowsInput rows_input(o.rows, o.t, o.index, DdpmStepColumns::kCount, batch, arithmetic_of(inputs.dtype));
  a.rows = rows_input.rows;
  a.in[0] = batch.operand(inputs.x);
  a.in[1] = batch.operand(inputs.m, inputs.factor);
  a.learned = o.learned;
  if (o.learned) a.in[2] = batch.second_half(a.in[1]);
  if (inputs.u) {
    a.in[3] = batch.operand(*inputs.u, inputs.factor);
    a.guidance = o.guidance;
  }
  a.noise = noise_of(o.seeds, o.seed, o.index, true, batch);
  std::optional<Input> given;
  if (o.noise) {
    given.emplace(batch.input(*o.noise, "noise"));
    a.in[4] = batch.operand(*given);
    a.noise.kind = kGivenNoise;
  }
  std::optional<TorchNoise> torch;
  if (draw) torch.emplace(*draw, batch, arithmetic_of(inputs.dtype), a.noise);
  if (o.threshold) {
    a.threshold = each_sample(*o.threshold, "threshold", batch.like, arithmetic_of(inputs.dtype));
    a.clip_kind = kThreshold;
  } else if (o.clip) {
    a.clip_kind = kClamp;
    a.clip = *o.clip;
  }
  a.out[0] = out.operand;
  if (x0_out) a.out[1] = x0_out->operand;
  flatten(a, a.clip_kind == kThreshold);
  FG_RUN(ddpm_step, a, batch.like, grain(a.noise));
  out.finish();
  if (x0_out) x0_out->finish();
  if (torch) torch->finish();
}

Tensor ddpm_step(const DdpmStepOperands& o) {
  const Inputs inputs(o);
  const Output out(inputs.batch, inputs.dtype);
  run(o, inputs, out, nullptr);
  return out.target;
}

std::tuple<Tensor, Tensor> run_both(const DdpmStepOperands& o, const TorchDraw* draw = nullptr) {
  const Inputs inputs(o);
  const Output out(inputs.batch, inputs.dtype), x0(inputs.batch, inputs.dtype);
  run(o, inputs, out, &x0, draw);
  return {out.target, x0.target};
}

std::tuple<Tensor, Tensor> ddpm_step_x0(const DdpmStepOperands& o) { return run_both(o); }

std::tuple<Tensor, Tensor> ddpm_step_plain(const Tensor& x_t, const Tensor& model_output, const Tensor& rows, int64_t index,
                                           const OptionalTensor& noise, std::optional<int64_t> seed, std::optional<double> clip) {
  const OptionalTensor none;
  return run_both({x_t, model_output, rows, none, index, noise, none, seed, clip, none, false, none, 1.0});
}

void run_to(const DdpmStepOperands& o, const OptionalTensor& x0, const Tensor& out, const TorchDraw* draw = nullptr) {
  const Inputs inputs(o);
  const Output output(inputs.batch, inputs.dtype, out,
                      {&o.x_t, &o.model_output, pointer(o.noise), pointer(o.threshold), pointer(o.unconditional)});
  std::optional<Output> x0_output;
  if (x0) x0_output.emplace(inputs.batch, inputs.dtype, *x0, std::initializer_list<const Tensor*>{&out});
  run(o, inputs, output, x0_output ? &*x0_output : nullptr, draw);
}

void ddpm_step_out(const DdpmStepOperands& o, const OptionalTensor& x0, const Tensor& out) { run_to(o, x0, out); }

#ifndef FG_DEVICE_KERNELS
void ddpm_step_torch(const Tensor& states, int64_t noise_dtype, bool fused, const DdpmStepOperands& o, const OptionalTensor& x0,
                     const Tensor& out) {
  const TorchDraw draw = {states, noise_dtype, fused};
  run_to(o, x0, out, &draw);
}

std::tuple<Tensor, Tensor> ddpm_step_torch_plain(const Tensor& states, int64_t noise_dtype, bool fused, const Tensor& x_t,
                                                 const Tensor& model_output, const Tensor& rows, int64_t index,
                                                 std::optional<double> clip) {
  const OptionalTensor none;
  const TorchDraw draw = {states, noise_dtype, fused};
  return run_both({x_t, model_output, rows, none, index, none, none, std::nullopt, clip, none, false, none, 1.0}, &draw);
}
#endif

}  // namespace
}  // namespace fastgen
