// The kernel of a CUDA thread, for the host too.
#pragma once
#include "common/device_driver.h"
#include "q_posterior/q_posterior.h"

namespace fastgen {

template <class R_, class X_, class M_, class Out_> struct QPosteriorDevice {
  using R = R_;
  using X = X_;
  using M = M_;
  using Out = Out_;
  using Noise = Out_;
  using C = QPosteriorColumns;
  static constexpr int kInputs = 2, kAlways = 2, kOutputs = 1, kNoiseInput = 2, kNoises = 1 << kNoNoise, kTiled = 0;
  QPosteriorArguments a;

  struct Row {
    R values[C::kCount];
  };
  const FG_HD QPosteriorArguments& arguments() const { return a; }
  FG_HD Row row(int64_t b) const {
    Row row;
    table_row(a.rows, b, C::kCount, row.values);
    return row;
  }
  static FG_HD bool noiseless(const Row&) { return true; }
  FG_HD void first_of_sample(int64_t b, const Row& row) const {
    static_cast<R*>(a.variance)[b] = row.values[C::kVariance];
    static_cast<R*>(a.log_variance)[b] = row.values[C::kLogVariance];
  }
  template <bool, int n> FG_HD void apply(const Row& row, const R (&in)[2][n], const R*, R (&out)[1][n]) const {
    FG_UNROLL
    for (int i = 0; i < n; ++i)
      out[0][i] = q_posterior_mean(row.values[C::kMeanFromX0], in[0][i], row.values[C::kMeanFromX], in[1][i]);
  }
};

}  // namespace fastgen
