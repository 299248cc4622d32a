#include "gaussian_kl/gaussian_kl.h"

#include "declared/gaussian_kl.h"

namespace fastgen {
FG_KERNELS(gaussian_kl, GaussianKlArguments)
namespace {

// The plain arguments, and what they point into.
struct Call {
  Batch batch;
  ApartInput log_variance, mean;
  std::optional<ApartInput> other_log_variance, other_mean;
  DType arithmetic;
  GaussianKlArguments a;

  explicit Call(const GaussianKlOperands& o)
      : batch(apart_batch(o.mean)), log_variance(o.log_variance, batch, "log_variance"), mean(o.mean, batch, "mean") {
    a.geometry = batch.geometry;
    a.bounds = {o.lowest, o.highest};
    a.in[0] = log_variance.operand;
    a.in[1] = mean.operand;
    DType dtype = promoted(mean.operand.dtype, log_variance.operand.dtype);
    if (o.other_log_variance) {
      a.in[2] = other_log_variance.emplace(*o.other_log_variance, batch, "other_log_variance").operand;
      dtype = promoted(dtype, a.in[2].dtype);
    }
    if (o.other_mean) {
      a.in[3] = other_mean.emplace(*o.other_mean, batch, "other_mean").operand;
      dtype = promoted(dtype, a.in[3].dtype);
    }
    arithmetic = arithmetic_of(dtype);
    a.is_double = arithmetic == kFloat64;
  }
  // Memory for a derivative.
  Tensor derivative(int k, const Operand& of) {
    const Tensor out = batch.output(of.dtype);
    a.out[k] = batch.operand(out.mutable_data_ptr(), of.dtype);
    return out;
  }
};

Tensor gaussian_kl(const GaussianKlOperands& o) {
  Call call(o);
  GaussianKlArguments& a = call.a;
  const int64_t batch = a.geometry.batch;
  const Tensor out = empty(&batch, 1, false, call.arithmetic, call.batch.like);
  a.result = out.mutable_data_ptr();
  flatten(a, true);
  FG_RUN_SUMS(gaussian_kl, a, call.batch.like, true);
  return out;
}

// The derivatives by μ, log σ² and log σ'²: of no elements where that is absent.
std::tuple<Tensor, Tensor, Tensor> gaussian_kl_backward(const Tensor& gradient, const GaussianKlOperands& o) {
  Call call(o);
  GaussianKlArguments& a = call.a;
  const int64_t none = 0;
  const Upstream upstream(gradient, true, call.batch.like, call.arithmetic);
  a.gradient = upstream.data;
  const Tensor to_log_variance = call.derivative(0, a.in[0]), to_mean = call.derivative(1, a.in[1]);
  const Tensor to_other_log_variance =
      o.other_log_variance ? call.derivative(2, a.in[2]) : empty(&none, 1, false, call.arithmetic, call.batch.like);
  flatten(a, true);
  FG_RUN(gaussian_kl, a, call.batch.like, grain(a.noise));
  return {to_mean, to_log_variance, to_other_log_variance};
}

}  // namespace
}  // namespace fastgen
