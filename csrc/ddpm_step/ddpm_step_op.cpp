#include "common/op.h"
#include "ddpm_step/ddpm_step.h"

namespace fastgen {
FG_KERNELS(ddpm_step, DdpmStepArguments)
namespace {

// The arguments that all three ops share, in the schema's order.
#define PARAMETERS                                                                                                       \
  const Tensor &x, const Tensor &model_output, const Tensor &rows, const OptionalTensor &t, int64_t index,               \
      const OptionalTensor &noise, const OptionalTensor &seeds, std::optional<int64_t> seed, std::optional<double> clip, \
      const OptionalTensor &threshold, bool learned, const OptionalTensor &unconditional, double guidance

// x_t, the model's outputs and the dtype of the result.
struct Inputs {
  Batch batch;
  int64_t factor;
  Input x, m;
  std::optional<Input> u;
  DType dtype;
  Inputs(const Tensor& x_t, const Tensor& model_output, bool learned, const OptionalTensor& unconditional)
      : batch(x_t),
        factor(learned ? 2 : 1),
        x(batch.first("x_t")),
        m(batch.input(model_output, "model_output", factor)),
        dtype(promoted(x.dtype, m.dtype)) {
    if (!unconditional) return;
    u.emplace(batch.input(*unconditional, "unconditional", factor));
    STD_TORCH_CHECK(u->dtype == m.dtype, "unconditional: expected the dtype of model_output");
  }
};

void run(const Inputs& inputs, const Tensor& rows, const OptionalTensor& t, int64_t index, const OptionalTensor& noise,
         const OptionalTensor& seeds, std::optional<int64_t> seed, std::optional<double> clip, const OptionalTensor& threshold,
         bool learned, double guidance, const Output& out, const Output* x0_out) {
  const Batch& batch = inputs.batch;
  DdpmStepArguments a;
  a.geometry = batch.geometry;
  a.is_double = inputs.dtype == kFloat64;
  const RowsInput rows_input(rows, t, index, DdpmStepColumns::kCount, batch, arithmetic_of(inputs.dtype));
  a.rows = rows_input.rows;
  a.in[0] = batch.operand(inputs.x);
  a.in[1] = batch.operand(inputs.m, inputs.factor);
  a.learned = learned;
  if (learned) {
    const int64_t mean_channels = batch.channels_last ? a.geometry.channels : a.geometry.event;
    a.in[2] = a.in[1];
    a.in[2].data = static_cast<char*>(a.in[1].data) + mean_channels * size_of(inputs.m.dtype);
  }
  if (inputs.u) {
    a.in[3] = batch.operand(*inputs.u, inputs.factor);
    a.guidance = guidance;
  }
  a.noise = noise_of(seeds, seed, index, true, batch);
  std::optional<Input> given;
  if (noise) {
    given.emplace(batch.input(*noise, "noise"));
    a.in[4] = batch.operand(*given);
    a.noise.kind = kGivenNoise;
  }
  if (threshold) {
    const View view(*threshold);
    STD_TORCH_CHECK(view.dim == 1 && view.sizes[0] == a.geometry.batch && view.contiguous &&
                        view.dtype("threshold") == arithmetic_of(inputs.dtype) && view.same_device(batch.like),
                    "threshold: expected shape (B,) in the dtype of the arithmetic on the data's device");
    a.clip_kind = kThreshold;
    a.threshold = view.data;
  } else if (clip) {
    a.clip_kind = kClamp;
    a.clip = *clip;
  }
  a.out[0] = out.operand;
  if (x0_out) a.out[1] = x0_out->operand;
  flatten(a, a.clip_kind == kThreshold);
  FG_RUN(ddpm_step, a, batch.like, grain(a.noise));
  out.finish();
  if (x0_out) x0_out->finish();
}

#define ARGUMENTS rows, t, index, noise, seeds, seed, clip, threshold, learned, guidance

Tensor ddpm_step_new(PARAMETERS) {
  const Inputs inputs(x, model_output, learned, unconditional);
  const Output out(inputs.batch, inputs.dtype);
  run(inputs, ARGUMENTS, out, nullptr);
  return out.target;
}

std::tuple<Tensor, Tensor> ddpm_step_x0(PARAMETERS) {
  const Inputs inputs(x, model_output, learned, unconditional);
  const Output out(inputs.batch, inputs.dtype), x0(inputs.batch, inputs.dtype);
  run(inputs, ARGUMENTS, out, &x0);
  return {out.target, x0.target};
}

// What a scheduler's step mostly is: of 13 arguments the other six take 0.5 of 4 µs to be left out.
std::tuple<Tensor, Tensor> ddpm_step_plain(const Tensor& x, const Tensor& model_output, const Tensor& rows, int64_t index,
                                           const OptionalTensor& noise, std::optional<int64_t> seed, std::optional<double> clip) {
  return ddpm_step_x0(x, model_output, rows, {}, index, noise, {}, seed, clip, {}, false, {}, 1.0);
}

void ddpm_step_into(PARAMETERS, const OptionalTensor& x0, const Tensor& out) {
  const Inputs inputs(x, model_output, learned, unconditional);
  const Output output(
      inputs.batch, inputs.dtype, out,
      {&x, &model_output, noise ? &*noise : nullptr, threshold ? &*threshold : nullptr, unconditional ? &*unconditional : nullptr});
  std::optional<Output> x0_output;
  if (x0) x0_output.emplace(inputs.batch, inputs.dtype, *x0, std::initializer_list<const Tensor*>{&out});
  run(inputs, ARGUMENTS, output, x0_output ? &*x0_output : nullptr);
}

}  // namespace
}  // namespace fastgen

// ddim_step is the same op under its own name, so that a profile tells them apart.
// The defaults spare the common call the conversion of arguments that it does not use, some 0.05 µs each.
#define SCHEMA                                                                                                              \
  "Tensor x_t, Tensor model_output, Tensor rows, Tensor? t, SymInt index, Tensor? noise=None, Tensor? seeds=None, SymInt? " \
  "seed=None, float? clip=None, Tensor? threshold=None, bool learned=False, Tensor? unconditional=None, float guidance=1.0"
#ifndef FG_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(fastgen, m) {
  m.def("ddpm_step(" SCHEMA ") -> Tensor");
  m.def("ddim_step(" SCHEMA ") -> Tensor");
  m.def("ddpm_step_x0(" SCHEMA ") -> (Tensor, Tensor)");
  m.def("ddim_step_x0(" SCHEMA ") -> (Tensor, Tensor)");
  m.def(
      "ddpm_step_plain(Tensor x_t, Tensor model_output, Tensor rows, int index, Tensor? noise, int? seed, float? clip) -> "
      "(Tensor, Tensor)");
  m.def("ddpm_step_out(" SCHEMA ", Tensor(b!)? x0=None, *, Tensor(a!) out) -> ()");
  m.def("ddim_step_out(" SCHEMA ", Tensor(b!)? x0=None, *, Tensor(a!) out) -> ()");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fastgen, FG_DEVICE, m) {
  m.impl("ddpm_step", TORCH_BOX(&fastgen::ddpm_step_new));
  m.impl("ddim_step", TORCH_BOX(&fastgen::ddpm_step_new));
  m.impl("ddpm_step_x0", TORCH_BOX(&fastgen::ddpm_step_x0));
  m.impl("ddim_step_x0", TORCH_BOX(&fastgen::ddpm_step_x0));
  m.impl("ddpm_step_plain", TORCH_BOX(&fastgen::ddpm_step_plain));
  m.impl("ddpm_step_out", TORCH_BOX(&fastgen::ddpm_step_into));
  m.impl("ddim_step_out", TORCH_BOX(&fastgen::ddpm_step_into));
}
