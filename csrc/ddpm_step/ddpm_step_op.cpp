#include "common/op.h"
#include "ddpm_step/ddpm_step.h"

namespace fastgen {
FG_KERNELS(ddpm_step, DdpmStepArguments)
namespace {

DType result_dtype(const Tensor& x, const Tensor& model_output) {
  return promoted(dtype_of(x, "x_t"), dtype_of(model_output, "model_output"));
}

void run(const Batch& batch, const Tensor& x, const Tensor& model_output, const Tensor& rows, const OptionalTensor& t,
         int64_t index, const OptionalTensor& noise, const OptionalTensor& seeds, std::optional<int64_t> seed,
         std::optional<double> clip, const OptionalTensor& threshold, bool learned, Output& out, Output* x0_out) {
  DdpmStepArguments a;
  a.geometry = batch.geometry;
  a.is_double = result_dtype(x, model_output) == kFloat64;
  a.rows = rows_of(rows, t, index, DdpmStepColumns::kCount, batch, a.is_double);
  const Tensor x_data = batch.input(x, "x_t");
  const int64_t factor = learned ? 2 : 1;
  const Tensor m_data = batch.input(model_output, "model_output", factor);
  a.in[0] = batch.operand(x_data);
  a.in[1] = batch.operand(m_data, factor);
  a.learned = learned;
  if (learned) {
    STD_TORCH_CHECK(x.dim() >= 2 && model_output.size(1) == 2 * x.size(1), "model_output: expected twice the channels of x_t");
    a.in[2] = a.in[1];
    const int64_t skipped = a.geometry.channels_last() ? a.geometry.channels : a.geometry.event;
    a.in[2].data = static_cast<char*>(a.in[1].data) + skipped * size_of(a.in[1].dtype);
  }
  a.noise = noise_of(seeds, seed, index, true, a.geometry);
  OptionalTensor noise_data, threshold_data;
  if (noise) {
    noise_data = batch.input(*noise, "noise");
    a.in[3] = batch.operand(*noise_data);
    a.noise.kind = kGivenNoise;
  }
  if (threshold) {
    STD_TORCH_CHECK(threshold->dim() == 1 && threshold->size(0) == a.geometry.batch && threshold->is_contiguous() &&
                        dtype_of(*threshold, "threshold") == (a.is_double ? kFloat64 : kFloat32) &&
                        threshold->is_cuda() == x.is_cuda(),
                    "threshold: expected shape (B,) in the dtype of the arithmetic on the data's device");
    a.clip_kind = kThreshold;
    a.threshold = threshold->const_data_ptr();
  } else if (clip) {
    a.clip_kind = kClamp;
    a.clip = *clip;
  }
  a.out[0] = batch.operand(out.written, out.written.mutable_data_ptr());
  if (x0_out) a.out[1] = batch.operand(x0_out->written, x0_out->written.mutable_data_ptr());
  flatten(a);
  FG_RUN(ddpm_step, a, x, grain(a.noise));
  out.finish();
  if (x0_out) x0_out->finish();
}

Tensor ddpm_step_new(Tensor x, Tensor model_output, Tensor rows, OptionalTensor t, int64_t index, OptionalTensor noise,
                     OptionalTensor seeds, std::optional<int64_t> seed, std::optional<double> clip, OptionalTensor threshold,
                     bool learned) {
  const Batch batch(x);
  Output out(batch, result_dtype(x, model_output));
  run(batch, x, model_output, rows, t, index, noise, seeds, seed, clip, threshold, learned, out, nullptr);
  return out.target;
}

std::tuple<Tensor, Tensor> ddpm_step_x0(Tensor x, Tensor model_output, Tensor rows, OptionalTensor t, int64_t index,
                                        OptionalTensor noise, OptionalTensor seeds, std::optional<int64_t> seed,
                                        std::optional<double> clip, OptionalTensor threshold, bool learned) {
  const Batch batch(x);
  const DType dtype = result_dtype(x, model_output);
  Output out(batch, dtype), x0(batch, dtype);
  run(batch, x, model_output, rows, t, index, noise, seeds, seed, clip, threshold, learned, out, &x0);
  return {out.target, x0.target};
}

void ddpm_step_into(Tensor x, Tensor model_output, Tensor rows, OptionalTensor t, int64_t index, OptionalTensor noise,
                    OptionalTensor seeds, std::optional<int64_t> seed, std::optional<double> clip, OptionalTensor threshold,
                    bool learned, OptionalTensor x0, Tensor out) {
  const Batch batch(x);
  const DType dtype = result_dtype(x, model_output);
  Output output(batch, dtype, out);
  std::optional<Output> x0_output;
  if (x0) x0_output.emplace(batch, dtype, *x0);
  run(batch, x, model_output, rows, t, index, noise, seeds, seed, clip, threshold, learned, output,
      x0_output ? &*x0_output : nullptr);
}

}  // namespace
}  // namespace fastgen

// ddim_step is the same op under its own name, so that a profile tells them apart.
#define ARGUMENTS                                                                                                              \
  "Tensor x_t, Tensor model_output, Tensor rows, Tensor? t, SymInt index, Tensor? noise, Tensor? seeds, SymInt? seed, float? " \
  "clip, "                                                                                                                     \
  "Tensor? threshold, bool learned"
#ifndef FG_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(fastgen, m) {
  m.def("ddpm_step(" ARGUMENTS ") -> Tensor");
  m.def("ddim_step(" ARGUMENTS ") -> Tensor");
  m.def("ddpm_step_x0(" ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("ddim_step_x0(" ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("ddpm_step_out(" ARGUMENTS ", Tensor(b!)? x0, *, Tensor(a!) out) -> ()");
  m.def("ddim_step_out(" ARGUMENTS ", Tensor(b!)? x0, *, Tensor(a!) out) -> ()");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fastgen, FG_DEVICE, m) {
  m.impl("ddpm_step", TORCH_BOX(&fastgen::ddpm_step_new));
  m.impl("ddim_step", TORCH_BOX(&fastgen::ddpm_step_new));
  m.impl("ddpm_step_x0", TORCH_BOX(&fastgen::ddpm_step_x0));
  m.impl("ddim_step_x0", TORCH_BOX(&fastgen::ddpm_step_x0));
  m.impl("ddpm_step_out", TORCH_BOX(&fastgen::ddpm_step_into));
  m.impl("ddim_step_out", TORCH_BOX(&fastgen::ddpm_step_into));
}
