#include "diffusion_loss/diffusion_loss.h"

#include "declared/diffusion_loss.h"

namespace fastgen {
FG_KERNELS(diffusion_loss, DiffusionLossArguments)
namespace {

enum Prediction : int64_t { kEpsilon, kSample, kVPrediction };

// The plain arguments, and what they point into.
struct Call {
  Batch batch;
  Input m;
  std::optional<Input> x0, given;  // x0 only where it is read
  DType x0_dtype, arithmetic;
  RowsInput rows_input;
  DiffusionLossArguments a;

  explicit Call(const DiffusionLossOperands& o)
      : batch(o.model_output),
        m(batch.first("model_output")),
        x0_dtype(checked_dtype(o.x0)),
        arithmetic(arithmetic_of(promoted(m.dtype, x0_dtype))),
        rows_input(o.rows, o.t, o.index, DiffusionLossColumns::kCount, batch, arithmetic) {
    STD_TORCH_CHECK(o.prediction >= kEpsilon && o.prediction <= kVPrediction, "prediction: expected 0 … 2, got ", o.prediction);
    STD_TORCH_CHECK(o.loss >= kMse && o.loss <= kHuber, "loss: expected 0 … 2, got ", o.loss);
    STD_TORCH_CHECK(o.reduction >= kEachSample && o.reduction <= kSumLoss, "reduction: expected 0 … 2, got ", o.reduction);
    a.geometry = batch.geometry;
    a.rows = rows_input.rows;
    a.is_double = arithmetic == kFloat64;
    a.loss = static_cast<LossKind>(o.loss);
    a.delta = o.delta;
    a.in[1] = batch.operand(m);
    a.in[0].dtype = m.dtype;  // where there is none: of the kernels, the one for the types that there are
    if (o.prediction != kEpsilon) a.in[0] = batch.operand(x0.emplace(batch.input(o.x0, "x0", 1, true)));
    if (o.prediction != kSample) {
      STD_TORCH_CHECK(o.noise || o.seeds || o.seed, "noise, seed: expected one of them");
      a.noise = noise_of(o.seeds, o.seed, o.offset, false, batch);
      if (o.noise) {
        given.emplace(batch.input(*o.noise, "noise"));
        a.in[2] = batch.operand(*given);
        a.noise.kind = kGivenNoise;
        if (o.prediction == kEpsilon) a.in[0].dtype = given->dtype;
      }
    }
    if (o.weights) a.weights = each_sample(*o.weights, "weights", batch.like, arithmetic);
    const int64_t elements = batch.like.numel;
    a.scale = o.reduction == kSumLoss ? 1.0 : 1.0 / static_cast<double>(o.reduction == kMeanLoss ? elements : a.geometry.event);
    a.each_sample = o.reduction == kEachSample;
  }

 private:
  // x0 has to fit, and takes part in the type promotion, also where it is not read.
  DType checked_dtype(const Tensor& x) const {
    const View view(x);
    STD_TORCH_CHECK(view.same_sizes(batch.like) && view.same_device(batch.like),
                    "x0: expected the shape and the device of model_output");
    return view.dtype("x0", true);
  }
};

Tensor run_forward(Call& call) {
  DiffusionLossArguments& a = call.a;
  const int64_t batch = a.geometry.batch;
  const Tensor out = empty(&batch, a.each_sample ? 1 : 0, false, call.arithmetic, call.batch.like);
  a.result = out.mutable_data_ptr();
  flatten(a, a.weights || a.each_sample);
  FG_RUN_SUMS(diffusion_loss, a, call.batch.like, a.each_sample);
  return out;
}

Tensor diffusion_loss(const DiffusionLossOperands& o) {
  Call call(o);
  return run_forward(call);
}

#ifndef FG_DEVICE_KERNELS
// A mean or a sum, and its derivative by the model's output from the same pass.
std::tuple<Tensor, Tensor> diffusion_loss_and_gradient(const DiffusionLossOperands& o) {
  Call call(o);
  const Output gradient(call.batch, call.m.dtype);
  call.a.out[0] = gradient.operand;
  STD_TORCH_CHECK(!call.a.each_sample, "reduction: expected mean or sum");
  const Tensor value = run_forward(call);
  return {value, gradient.target};
}
#endif

// The derivative by the model's output, and that by x0 into `to_x0` where it is wanted.
Tensor derivatives(const Tensor& gradient, const DiffusionLossOperands& o, Tensor* to_x0) {
  Call call(o);
  DiffusionLossArguments& a = call.a;
  const Upstream upstream(gradient, a.each_sample, call.batch.like, call.arithmetic);
  a.gradient = upstream.data;
  a.gradient_each = a.each_sample;
  const Output out(call.batch, call.m.dtype);
  a.out[0] = out.operand;
  if (to_x0) {
    STD_TORCH_CHECK(o.prediction != kEpsilon, "x0: the loss does not depend on it");
    STD_TORCH_CHECK(call.x0_dtype != kUInt8, "x0: expected no bytes, which have no derivative");
    const Output x0_out(call.batch, call.x0_dtype);
    a.out[1] = x0_out.operand;
    *to_x0 = x0_out.target;
  }
  flatten(a, a.weights || a.gradient_each);
  FG_RUN(diffusion_loss, a, call.batch.like, grain(a.noise));
  return out.target;
}

Tensor diffusion_loss_backward(const Tensor& gradient, const DiffusionLossOperands& o) { return derivatives(gradient, o, nullptr); }

std::tuple<Tensor, Tensor> diffusion_loss_backward_x0(const Tensor& gradient, const DiffusionLossOperands& o) {
  Tensor to_x0;
  Tensor to_model_output = derivatives(gradient, o, &to_x0);
  return {to_model_output, to_x0};
}

}  // namespace
}  // namespace fastgen
