// The kernel of a CUDA thread, for the host too.
#pragma once
#include "common/device_driver.h"
#include "randn/randn.h"

namespace fastgen {

template <class R, class X, class M, class Out> struct RandnDevice : DeviceOp<R, X, M, Out, RandnArguments> {
  static constexpr int kInputs = 0, kAlways = 0, kOutputs = 1, kNoiseInput = 0, kNoises = 1 << kSeededNoise, kTiled = 0;

  struct Row {};
  FG_HD Row row(int64_t) const { return {}; }
  static FG_HD bool noiseless(const Row&) { return false; }
  template <bool, int n> FG_HD void apply(const Row&, const R (&)[1][n], const R* z, R (&out)[1][n]) const {
    FG_UNROLL
    for (int i = 0; i < n; ++i)
      out[0][i] = z[i];
  }
};

}  // namespace fastgen
