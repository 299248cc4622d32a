// The kernel of a CUDA thread, for the host too.
#pragma once
#include "common/device_driver.h"
#include "q_sample/q_sample.h"

namespace fastgen {

template <class R_, class X_, class M_, class Out_> struct QSampleDevice {
  using R = R_;
  using X = X_;
  using M = M_;
  using Out = Out_;
  using Noise = Out_;
  using C = QSampleColumns;
  static constexpr int kInputs = 1, kAlways = 1, kOutputs = 1, kNoiseInput = 1;
  static constexpr int kNoises = 1 << kNoNoise | 1 << kGivenNoise | 1 << kSeededNoise;
  static constexpr int kTiled = 1 << kSeededNoise;
  QSampleArguments a;

  struct Row {
    R values[C::kCount];
  };
  const FG_HD QSampleArguments& arguments() const { return a; }
  FG_HD Row row(int64_t b) const {
    Row row;
    table_row(a.rows, b, C::kCount, row.values);
    return row;
  }
  static FG_HD bool noiseless(const Row& row) { return row.values[C::kSigma] == 0; }
  FG_HD void first_of_sample(int64_t, const Row&) const {}
  template <bool kNoise, int n> FG_HD void apply(const Row& row, const R (&in)[1][n], const R* z, R (&out)[1][n]) const {
    FG_UNROLL
    for (int i = 0; i < n; ++i) {
      out[0][i] = q_sample(row.values[C::kScale], in[0][i]);
      if constexpr (kNoise) out[0][i] = add_noise(out[0][i], row.values[C::kSigma], z[i]);
    }
  }
};

}  // namespace fastgen
