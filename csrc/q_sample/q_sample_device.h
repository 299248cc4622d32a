// The kernel of a CUDA thread, for the host too.
#pragma once
#include "common/device_driver.h"
#include "q_sample/q_sample.h"

namespace fastgen {

template <class R, class X, class M, class Out> struct QSampleDevice : DeviceOp<R, X, M, Out, QSampleArguments> {
  using DeviceOp<R, X, M, Out, QSampleArguments>::a;
  using C = QSampleColumns;
  static constexpr int kInputs = 1, kAlways = 1, kOutputs = 1, kNoiseInput = 1;
  static constexpr int kTiled = 1 << kSeededNoise, kBytesWith = 1 << kGivenNoise | 1 << kSeededNoise;
  using Row = ColumnRow<R, C::kCount>;

  FG_HD Row row(int64_t b) const {
    Row row;
    table_row(a.rows, b, C::kCount, row.values);
    return row;
  }
  static FG_HD bool noiseless(const Row& row) { return row(C::kSigma) == 0; }
  template <bool kNoise, int n> FG_HD void apply(const Row& row, const R (&in)[1][n], const R* z, R (&out)[1][n]) const {
    FG_UNROLL
    for (int i = 0; i < n; ++i) {
      out[0][i] = q_sample(row(C::kScale), in[0][i]);
      if constexpr (kNoise) out[0][i] = add_noise(out[0][i], row(C::kSigma), z[i]);
    }
  }
};

}  // namespace fastgen
