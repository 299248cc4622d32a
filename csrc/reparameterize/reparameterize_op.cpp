#include "reparameterize/reparameterize.h"

#include "declared/reparameterize.h"

namespace fastgen {
FG_KERNELS(reparameterize, ReparameterizeArguments)
namespace {

// The plain arguments, and what they point into. The batch has the layout of `like`.
struct Call {
  Batch batch;
  ApartInput log_variance;
  std::optional<ApartInput> mean, gradient;
  std::optional<Input> noise;
  ReparameterizeArguments a;

  Call(const Tensor& like, const ReparameterizeOperands& o, const Tensor* mean_, const Tensor* gradient_)
      : batch(apart_batch(like)), log_variance(o.log_variance, batch, "log_variance") {
    a.geometry = batch.geometry;
    a.bounds = {o.lowest, o.highest};
    a.in[0] = log_variance.operand;
    DType dtype = log_variance.operand.dtype;
    auto take = [&](std::optional<ApartInput>& input, const Tensor* x, const char* name, Operand& operand) {
      if (!x) return;
      operand = input.emplace(*x, batch, name).operand;
      dtype = promoted(dtype, operand.dtype);
    };
    take(mean, mean_, "mean", a.in[1]);
    take(gradient, gradient_, "gradient", a.in[2]);
    a.is_double = arithmetic_of(dtype) == kFloat64;
    STD_TORCH_CHECK(o.noise || o.seeds || o.seed, "noise, seed: expected one of them");
    a.noise = noise_of(o.seeds, o.seed, o.offset, false, batch);
    if (!o.noise) return;
    a.in[3] = batch.operand(noise.emplace(batch.input(*o.noise, "noise")));
    a.noise.kind = kGivenNoise;
  }
  DType arithmetic() const { return a.is_double ? kFloat64 : kFloat32; }
  DType result_dtype() const { return promoted(mean->operand.dtype, log_variance.operand.dtype); }
  Tensor output(int k, DType dtype) {
    const Tensor out = batch.output(dtype);
    a.out[k] = batch.operand(out.mutable_data_ptr(), dtype);
    return out;
  }
};

Tensor reparameterize(const Tensor& mean, const ReparameterizeOperands& o) {
  Call call(mean, o, &mean, nullptr);
  ReparameterizeArguments& a = call.a;
  const Tensor z = call.output(0, call.result_dtype());
  flatten(a, false);
  FG_RUN(reparameterize, a, call.batch.like, grain(a.noise));
  return z;
}

std::tuple<Tensor, Tensor> reparameterize_kl(const Tensor& mean, const ReparameterizeOperands& o) {
  Call call(mean, o, &mean, nullptr);
  ReparameterizeArguments& a = call.a;
  const int64_t batch = a.geometry.batch;
  const Tensor z = call.output(0, call.result_dtype()), kl = empty(&batch, 1, false, call.arithmetic(), call.batch.like);
  a.result = kl.mutable_data_ptr();
  flatten(a, true);
  FG_RUN_SUMS(reparameterize, a, call.batch.like, true);
  return {z, kl};
}

// The derivative by log σ², of z alone.
Tensor reparameterize_backward(const Tensor& gradient, const ReparameterizeOperands& o) {
  Call call(o.log_variance, o, nullptr, &gradient);
  ReparameterizeArguments& a = call.a;
  a.backward = true;
  const Tensor to_log_variance = call.output(0, call.log_variance.operand.dtype);
  flatten(a, false);
  FG_RUN(reparameterize, a, call.batch.like, grain(a.noise));
  return to_log_variance;
}

// Those by μ and log σ², of z and the divergence.
std::tuple<Tensor, Tensor> reparameterize_kl_backward(const Tensor& gradient, const Tensor& kl_gradient, const Tensor& mean,
                                                      const ReparameterizeOperands& o) {
  Call call(o.log_variance, o, &mean, &gradient);
  ReparameterizeArguments& a = call.a;
  a.backward = true;
  const Upstream upstream(kl_gradient, true, call.batch.like, call.arithmetic());
  a.gradient = upstream.data;
  const Tensor to_log_variance = call.output(0, call.log_variance.operand.dtype);
  const Tensor to_mean = call.output(1, call.mean->operand.dtype);
  flatten(a, true);
  FG_RUN(reparameterize, a, call.batch.like, grain(a.noise));
  return {to_mean, to_log_variance};
}

}  // namespace
}  // namespace fastgen
