#include "q_posterior/q_posterior.h"

#include "declared/q_posterior.h"

namespace fastgen {
FG_KERNELS(q_posterior, QPosteriorArguments)
namespace {

#ifndef FG_DEVICE_KERNELS
template <class R> void fill_variances(const QPosteriorArguments& a) {
  for (int64_t b = 0; b < a.geometry.batch; ++b) {
    const R* row = static_cast<const R*>(a.rows.table) + (a.rows.t ? a.rows.t[b] : a.rows.index) * a.rows.columns;
    static_cast<R*>(a.variance)[b] = row[QPosteriorColumns::kVariance];
    static_cast<R*>(a.log_variance)[b] = row[QPosteriorColumns::kLogVariance];
  }
}
#endif

std::tuple<Tensor, Tensor, Tensor> q_posterior(const QPosteriorOperands& o) {
  const Batch batch(o.x0);
  const Input x0 = batch.first("x0"), x_t = batch.input(o.x_t, "x_t");
  const DType dtype = promoted(x0.dtype, x_t.dtype), arithmetic = arithmetic_of(dtype);
  QPosteriorArguments a;
  a.geometry = batch.geometry;
  a.is_double = dtype == kFloat64;
  const RowsInput rows_input(o.rows, o.t, o.index, QPosteriorColumns::kCount, batch, arithmetic);
  a.rows = rows_input.rows;
  a.in[0] = batch.operand(x0);
  a.in[1] = batch.operand(x_t);
  const Output mean(batch, dtype);
  a.out[0] = mean.operand;
  int64_t per_sample[64];
  for (int64_t d = 0; d < batch.like.dim; ++d)
    per_sample[d] = d == 0 ? batch.geometry.batch : 1;
  const Tensor variance = empty(per_sample, batch.like.dim, false, arithmetic, batch.like);
  const Tensor log_variance = empty(per_sample, batch.like.dim, false, arithmetic, batch.like);
  a.variance = variance.mutable_data_ptr();
  a.log_variance = log_variance.mutable_data_ptr();
  flatten(a, true);
#ifndef FG_DEVICE_KERNELS
  a.is_double ? fill_variances<double>(a) : fill_variances<float>(a);
#endif
  FG_RUN(q_posterior, a, batch.like, kUnseededGrain);
  return {mean.target, variance, log_variance};
}

}  // namespace
}  // namespace fastgen
