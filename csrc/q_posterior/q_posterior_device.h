// The kernel of a CUDA thread, for the host too.
#pragma once
#include "common/device_driver.h"
#include "q_posterior/q_posterior.h"

namespace fastgen {

template <class R, class X, class M, class Out> struct QPosteriorDevice : DeviceOp<R, X, M, Out, QPosteriorArguments> {
  using DeviceOp<R, X, M, Out, QPosteriorArguments>::a;
  using C = QPosteriorColumns;
  static constexpr int kInputs = 2, kAlways = 2, kOutputs = 1, kNoiseInput = 2, kNoises = 1 << kNoNoise, kTiled = 0;
  using Row = ColumnRow<R, C::kCount>;

  FG_HD Row row(int64_t b) const {
    Row row;
    table_row(a.rows, b, C::kCount, row.values);
    return row;
  }
  static FG_HD bool noiseless(const Row&) { return true; }
  FG_HD void first_of_sample(int64_t b, const Row& row) const {
    static_cast<R*>(a.variance)[b] = row(C::kVariance);
    static_cast<R*>(a.log_variance)[b] = row(C::kLogVariance);
  }
  template <bool, int n> FG_HD void apply(const Row& row, const R (&in)[2][n], const R*, R (&out)[1][n]) const {
    FG_UNROLL
    for (int i = 0; i < n; ++i)
      out[0][i] = q_posterior_mean(row(C::kMeanFromX0), in[0][i], row(C::kMeanFromX), in[1][i]);
  }
};

}  // namespace fastgen
