#include "vlb_terms/vlb_terms.h"

#include "declared/vlb_terms.h"

namespace fastgen {
FG_KERNELS(vlb_terms, VlbTermsArguments)
namespace {

// The plain arguments, and what they point into. Where x0 are bytes the other two may be them too, as prior_kl gives them.
struct Call {
  Batch batch;
  int64_t factor;
  Input x0, m;
  std::optional<Input> x_t, given;
  DType arithmetic;
  RowsInput rows_input;
  VlbTermsArguments a;

  explicit Call(const VlbTermsOperands& o)
      : batch(o.x0),
        factor(o.learned ? 2 : 1),
        x0(batch.first("x0", true)),
        m(batch.input(o.model_output, "model_output", factor, x0.dtype == kUInt8)),
        arithmetic(arithmetic_of(promoted(m.dtype, x0.dtype))),
        rows_input(o.rows, o.t, o.index, VlbTermsColumns::kCount, batch, arithmetic) {
    a.geometry = batch.geometry;
    a.rows = rows_input.rows;
    a.is_double = arithmetic == kFloat64;
    a.learned = o.learned;
    STD_TORCH_CHECK(o.decoder >= kDiscretized && o.decoder <= kClampedAt15, "decoder: expected 0 … 3, got ", o.decoder);
    STD_TORCH_CHECK(o.loss >= -1 && o.loss <= kHuber, "loss: expected -1 … 2, got ", o.loss);
    a.decoder = static_cast<Decoder>(o.decoder);
    a.hybrid = o.loss >= 0;
    if (a.hybrid) a.loss = static_cast<LossKind>(o.loss);
    a.delta = o.delta;
    if (a.hybrid) a.vlb_weight = o.vlb_weight;
    STD_TORCH_CHECK(!a.hybrid || !o.x_t, "x_t: expected none with a loss, whose target has the noise");
    if (o.weights) a.weights = each_sample(*o.weights, "weights", batch.like, arithmetic);
    a.each_sample = o.each_sample;
    a.has_clip = o.clip.has_value();
    a.clip = o.clip.value_or(0);
    a.scale = a.derivative_scale = o.scale;
    a.in[0] = batch.operand(x0);
    a.in[1] = batch.operand(m, factor);
    if (o.learned) a.in[2] = batch.second_half(a.in[1]);
    if (o.x_t) {
      a.in[3] = batch.operand(x_t.emplace(batch.input(*o.x_t, "x_t", 1, x0.dtype == kUInt8)));
      return;
    }
    STD_TORCH_CHECK(o.noise || o.seeds || o.seed, "x_t, noise, seed: expected one of them");
    a.noise = noise_of(o.seeds, o.seed, o.offset, false, batch);
    if (!o.noise) return;
    a.in[4] = batch.operand(given.emplace(batch.input(*o.noise, "noise")));
    a.noise.kind = kGivenNoise;
  }
};

Tensor vlb_terms(const VlbTermsOperands& o) {
  Call call(o);
  VlbTermsArguments& a = call.a;
  const int64_t batch = a.geometry.batch;
  const Tensor out = empty(&batch, a.each_sample ? 1 : 0, false, call.arithmetic, call.batch.like);
  a.result = out.mutable_data_ptr();
  flatten(a, true);
  FG_RUN_SUMS(vlb_terms, a, call.batch.like, a.each_sample);
  return out;
}

// Memory for the derivatives by both halves of the model's output.
Tensor derivatives(Call& call, bool detach_mean) {
  VlbTermsArguments& a = call.a;
  STD_TORCH_CHECK(call.m.dtype != kUInt8, "model_output: expected no bytes, which have no derivative");
  const Tensor out = call.batch.output(call.m.dtype, call.factor);
  a.out[0] = call.batch.operand(out.mutable_data_ptr(), call.m.dtype, call.factor);
  if (a.learned) a.out[1] = call.batch.second_half(a.out[0]);
  a.detach_mean = detach_mean;
  return out;
}

Tensor vlb_terms_backward(const Tensor& gradient, const VlbTermsOperands& o, bool detach_mean) {
  Call call(o);
  VlbTermsArguments& a = call.a;
  const Upstream upstream(gradient, a.each_sample, call.batch.like, call.arithmetic);
  a.gradient = upstream.data;
  const Tensor out = derivatives(call, detach_mean);
  flatten(a, true);
  FG_RUN(vlb_terms, a, call.batch.like, grain(a.noise));
  return out;
}

#ifndef FG_DEVICE_KERNELS
// Runs a forward that has another sum beside the result's: where it goes, and what it is multiplied by.
void run_two_sums(VlbTermsArguments& a, void* second, double second_scale) {
  a.derivative_scale = second_scale;
  flatten(a, true);
  a.blocks = SumBlocks(a).count;
  run_sample_sums(vlb_terms_cpu(isa_for(a, true)), a, a.each_sample, second, second_scale);
}

// The forward's result for each sample, and from the same pass the mean over the event of the squared error of x̂0.
std::tuple<Tensor, Tensor> vlb_terms_and_error(const VlbTermsOperands& o) {
  Call call(o);
  VlbTermsArguments& a = call.a;
  STD_TORCH_CHECK(a.each_sample && !a.hybrid, "each_sample, loss: expected terms of each sample, and no loss besides");
  const int64_t batch = a.geometry.batch, event = a.geometry.event;
  const Tensor out = empty(&batch, 1, false, call.arithmetic, call.batch.like);
  const Tensor error = empty(&batch, 1, false, call.arithmetic, call.batch.like);
  a.result = out.mutable_data_ptr();
  a.squares = error.mutable_data_ptr();
  run_two_sums(a, a.squares, event ? 1.0 / static_cast<double>(event) : INFINITY);
  return {out, error};
}

// The forward's result, the simple loss where that is to be `apart`, else nothing, and the derivative for an upstream gradient of
// 1, from the same pass.
std::tuple<Tensor, Tensor, Tensor> vlb_terms_and_gradient(const VlbTermsOperands& o, bool detach_mean, bool apart) {
  Call call(o);
  VlbTermsArguments& a = call.a;
  STD_TORCH_CHECK(a.hybrid || !apart, "apart: expected a loss, which there is none of");
  const int64_t batch = a.geometry.batch, none = 0;
  auto result = [&](const int64_t* size, int dim) { return empty(size, dim, false, call.arithmetic, call.batch.like); };
  const Tensor out = result(&batch, a.each_sample), simple = apart ? result(&batch, a.each_sample) : result(&none, 1);
  const Tensor gradient = derivatives(call, detach_mean);
  a.result = out.mutable_data_ptr();
  a.ahead = true;
  if (apart) {
    a.simple = simple.mutable_data_ptr();
    a.scale *= a.vlb_weight;
  }
  run_two_sums(a, a.simple, a.derivative_scale);
  return {out, simple, gradient};
}
#endif

}  // namespace
}  // namespace fastgen
