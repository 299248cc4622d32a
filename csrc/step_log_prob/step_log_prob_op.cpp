#include "step_log_prob/step_log_prob.h"

#include "declared/step_log_prob.h"

namespace fastgen {
FG_KERNELS(step_log_prob, StepLogProbArguments)
namespace {

// A step whose deviation is 0 has no density; a GPU, where the timesteps are not looked at, gives NaN.
template <class R> void check_deviations(const Rows& rows, int64_t batch) {
  for (int64_t b = 0; b < (rows.t ? batch : batch > 0); ++b) {
    const int64_t t = rows.t ? rows.t[b] : rows.index;
    STD_TORCH_CHECK(static_cast<const R*>(rows.table)[t * rows.columns + DdpmStepColumns::kSigma] != 0,
                    "t: expected steps that add noise, since others have no density, got ", t);
  }
}

// The plain arguments, and what they point into.
struct Call {
  Batch batch;
  int64_t factor;
  Input x, m;
  DType arithmetic;
  RowsInput rows_input;
  std::optional<Input> x_prev, u, noise;
  StepLogProbArguments a;

  // `given`: x_{t−1}, or null where that is to be made.
  Call(const Tensor* given, const StepLogProbOperands& o, int64_t columns = DdpmStepColumns::kCount)
      : batch(o.x_t),
        factor(o.learned ? 2 : 1),
        x(batch.first("x_t")),
        m(batch.input(o.model_output, "model_output", factor)),
        arithmetic(arithmetic_of(promoted(promoted(x.dtype, m.dtype), given ? View(*given).dtype("x_prev") : x.dtype))),
        rows_input(o.rows, o.t, o.index, columns, batch, arithmetic) {
    a.geometry = batch.geometry;
    a.rows = rows_input.rows;
    a.is_double = arithmetic == kFloat64;
    a.weighs = columns == StepLogWeightColumns::kTableCount;
    if (kTimestepsAreVisible && !a.weighs)
      a.is_double ? check_deviations<double>(a.rows, a.geometry.batch) : check_deviations<float>(a.rows, a.geometry.batch);
    a.learned = o.learned;
    a.scale = o.scale;
    if (o.clip) {
      a.clip_kind = kClamp;
      a.clip = *o.clip;
    }
    a.in[0] = batch.operand(x);
    a.in[1] = batch.operand(m, factor);
    if (o.learned) a.in[2] = batch.second_half(a.in[1]);
    if (given) a.in[3] = batch.operand(x_prev.emplace(batch.input(*given, "x_prev")));
  }
};

// The sums of a call's kernel.
Tensor sums(Call& call) {
  StepLogProbArguments& a = call.a;
  const int64_t batch = a.geometry.batch;
  const Tensor out = empty(&batch, 1, false, call.arithmetic, call.batch.like);
  a.result = out.mutable_data_ptr();
  flatten(a, true);
  FG_RUN_SUMS(step_log_prob, a, call.batch.like, true);
  return out;
}

Tensor step_log_prob(const Tensor& x_prev, const StepLogProbOperands& o) {
  Call call(&x_prev, o);
  return sums(call);
}

Tensor step_log_weight(const Tensor& x_prev, const StepLogProbOperands& o) {
  Call call(&x_prev, o, StepLogWeightColumns::kTableCount);
  return sums(call);
}

// x_{t−1} into `out`, and the log-probabilities of what is stored there.
Tensor make_step(Call& call, const StepLogProbOperands& o, const OptionalTensor& noise, const OptionalTensor& seeds,
                 std::optional<int64_t> seed, const OptionalTensor& unconditional, double guidance, const Output& out) {
  StepLogProbArguments& a = call.a;
  STD_TORCH_CHECK(noise || seeds || seed, "noise, seed: expected one of them");
  a.noise = noise_of(seeds, seed, o.index, true, call.batch);
  if (noise) {
    a.in[4] = call.batch.operand(call.noise.emplace(call.batch.input(*noise, "noise")));
    a.noise.kind = kGivenNoise;
  }
  if (unconditional) {
    call.u.emplace(call.batch.input(*unconditional, "unconditional", call.factor));
    STD_TORCH_CHECK(call.u->dtype == call.m.dtype, "unconditional: expected the dtype of model_output");
    a.in[3] = call.batch.operand(*call.u, call.factor);
    a.guidance = guidance;
  }
  a.makes_step = true;
  a.out[0] = out.operand;
  const Tensor log_prob = sums(call);
  out.finish();
  return log_prob;
}

std::tuple<Tensor, Tensor> ddpm_step_log_prob(const StepLogProbOperands& o, const OptionalTensor& noise,
                                              const OptionalTensor& seeds, std::optional<int64_t> seed,
                                              const OptionalTensor& unconditional, double guidance) {
  Call call(nullptr, o);
  const Output out(call.batch, promoted(call.x.dtype, call.m.dtype));
  const Tensor log_prob = make_step(call, o, noise, seeds, seed, unconditional, guidance, out);
  return {out.target, log_prob};
}

Tensor ddpm_step_log_prob_out(const StepLogProbOperands& o, const OptionalTensor& noise, const OptionalTensor& seeds,
                              std::optional<int64_t> seed, const OptionalTensor& unconditional, double guidance,
                              const Tensor& out) {
  Call call(nullptr, o);
  const Output output(call.batch, promoted(call.x.dtype, call.m.dtype), out,
                      {&o.x_t, &o.model_output, pointer(noise), pointer(unconditional)});
  return make_step(call, o, noise, seeds, seed, unconditional, guidance, output);
}

// Memory for the derivatives by both halves of the model's output.
Tensor derivatives(Call& call) {
  StepLogProbArguments& a = call.a;
  const Tensor out = call.batch.output(call.m.dtype, call.factor);
  a.out[0] = call.batch.operand(out.mutable_data_ptr(), call.m.dtype, call.factor);
  if (a.learned) a.out[1] = call.batch.second_half(a.out[0]);
  return out;
}

#ifndef FG_DEVICE_KERNELS
// The forward's result, and the derivative by m for an upstream gradient of 1 from the same pass.
std::tuple<Tensor, Tensor> step_log_prob_and_gradient(const Tensor& x_prev, const StepLogProbOperands& o) {
  Call call(&x_prev, o);
  const Tensor to_m = derivatives(call);
  call.a.ahead = true;
  return {sums(call), to_m};
}
#endif

// The derivatives by m, and with `x` by x_t.
Tensor backward(const Tensor& gradient, const Tensor& x_prev, const StepLogProbOperands& o, std::optional<Tensor>* to_x) {
  Call call(&x_prev, o);
  StepLogProbArguments& a = call.a;
  const Upstream upstream(gradient, true, call.batch.like, call.arithmetic);
  a.gradient = upstream.data;
  const Tensor out = derivatives(call);
  if (to_x) a.out[2] = call.batch.operand(to_x->emplace(call.batch.output(call.x.dtype)).mutable_data_ptr(), call.x.dtype);
  flatten(a, true);
  FG_RUN(step_log_prob, a, call.batch.like, grain(a.noise));
  return out;
}

Tensor step_log_prob_backward(const Tensor& gradient, const Tensor& x_prev, const StepLogProbOperands& o) {
  return backward(gradient, x_prev, o, nullptr);
}

std::tuple<Tensor, Tensor> step_log_prob_backward_x(const Tensor& gradient, const Tensor& x_prev, const StepLogProbOperands& o) {
  std::optional<Tensor> to_x;
  const Tensor to_m = backward(gradient, x_prev, o, &to_x);
  return {to_m, *to_x};
}

}  // namespace
}  // namespace fastgen
