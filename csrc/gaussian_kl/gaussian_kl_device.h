// The kernels of a CUDA thread, for the host too: the divergences, added up, and their derivatives.
#pragma once
#include "common/device_driver.h"
#include "gaussian_kl/gaussian_kl.h"

namespace fastgen {

// All tensors are of one type; of several, elements are taken one at a time. So are those of channels-last halves, which are small
// in every model there is; what is channels-last without gaps goes as if it were contiguous.
template <class R, class X, bool kBackward> struct GaussianKlItems : DeviceOp<R, X, X, X, GaussianKlArguments> {
  using DeviceOp<R, X, X, X, GaussianKlArguments>::a;
  static constexpr int kInputs = 4, kAlways = 2, kOutputs = kBackward ? 3 : 1, kNoiseInput = 4;
  static constexpr int kStates = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3, kUnroll = 1;
  static constexpr int kNoises = 1 << kNoNoise, kTiled = 0;
  using Row = ColumnRow<R, GaussianKlColumns::kCount>;

  FG_HD Row row(int64_t b) const {
    Row row;
    gaussian_kl_row(a, b, row.values);
    return row;
  }
  static FG_HD bool noiseless(const Row&) { return true; }

  // What is absent is so for all threads: a branch for each vector.
  template <bool kNoise, int n> FG_HD void apply(const Row& row, const R (&in)[4][n], const R*, R (&out)[kOutputs][n]) const {
    a.in[2].data ? elements<true>(row, in, out) : elements<false>(row, in, out);
  }

  // Of the sums, one for each sample.
  int64_t outputs() const { return a.geometry.batch; }
  const SumScratch& scratch() const { return a.scratch; }
  FG_HD void finish(int64_t output, double sum) const { static_cast<R*>(a.result)[output] = static_cast<R>(sum); }

 private:
  template <bool kOtherVariance, int n> FG_HD void elements(const Row& row, const R (&in)[4][n], R (&out)[kOutputs][n]) const {
    FG_UNROLL
    for (int i = 0; i < n; ++i) {
      const R other_log_variance = kOtherVariance ? in[2][i] : R(0), other_mean = a.in[3].data ? in[3][i] : R(0);
      const GaussiansApart<R> apart = gaussians_apart<kOtherVariance>(a.bounds, in[0][i], in[1][i], other_log_variance, other_mean);
      if constexpr (kBackward) {
        const R upstream = row(GaussianKlColumns::kUpstream);
        const KlDerivatives<R> found = kl_derivatives<kOtherVariance>(a.bounds, in[0][i], other_log_variance, apart, upstream);
        out[0][i] = found.by_log_variance;
        out[1][i] = found.by_mean;
        out[2][i] = found.by_other_log_variance;
      } else {
        out[0][i] = kl_of(apart.ratio, apart.w);
      }
    }
  }
};

template <class R, class X, class, class> using GaussianKlDevice = GaussianKlItems<R, X, false>;
template <class R, class X, class, class> using GaussianKlGradientDevice = GaussianKlItems<R, X, true>;

// launch(way) for the derivatives, launch.sum(part) for the divergences.
template <class Launch> struct GaussianKlSum {
  const Launch& launch;
  template <class Way> void operator()(const Way& way) const { launch.sum(Added<Way>(way)); }
};
template <class Launch> void run_gaussian_kl(const GaussianKlArguments& a, const Launch& launch) {
  if (a.gradient) return run_on_device<GaussianKlGradientDevice, false>(a, launch);
  run_on_device<GaussianKlDevice, false>(a, GaussianKlSum<Launch>{launch});
}

}  // namespace fastgen
