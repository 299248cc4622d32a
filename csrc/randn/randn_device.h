// The kernel of a CUDA thread, for the host too.
#pragma once
#include "common/device_driver.h"
#include "randn/randn.h"

namespace fastgen {

template <class R_, class X_, class M_, class Out_> struct RandnDevice {
  using R = R_;
  using X = X_;
  using M = M_;
  using Out = Out_;
  using Noise = Out_;
  static constexpr int kInputs = 0, kAlways = 0, kOutputs = 1, kNoiseInput = 0, kNoises = 1 << kSeededNoise, kTiled = 0;
  RandnArguments a;

  struct Row {};
  const FG_HD RandnArguments& arguments() const { return a; }
  FG_HD Row row(int64_t) const { return {}; }
  static FG_HD bool noiseless(const Row&) { return false; }
  FG_HD void first_of_sample(int64_t, const Row&) const {}
  template <bool, int n> FG_HD void apply(const Row&, const R (&)[1][n], const R* z, R (&out)[1][n]) const {
    FG_UNROLL
    for (int i = 0; i < n; ++i)
      out[0][i] = z[i];
  }
};

}  // namespace fastgen
