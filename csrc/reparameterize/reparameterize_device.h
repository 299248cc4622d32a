// The kernels of a CUDA thread, for the host too: samples, samples with the divergences added up, and derivatives.
#pragma once
#include "common/device_driver.h"
#include "reparameterize/reparameterize.h"

namespace fastgen {

// All tensors are of one type; of several, elements are taken one at a time.
template <class R, class X, class Out> struct ReparameterizeItems : DeviceOp<R, X, X, Out, ReparameterizeArguments> {
  static constexpr int kNoiseInput = 3, kStates = 1 << 0 | 1 << 1 | 1 << 2;
  static constexpr int kNoises = 1 << kGivenNoise | 1 << kSeededNoise, kTiled = 1 << kSeededNoise;
  using Row = ColumnRow<R, GaussianKlColumns::kCount>;

  FG_HD Row row(int64_t b) const {
    Row row;
    gaussian_kl_row(this->a, b, row.values);
    return row;
  }
  static FG_HD bool noiseless(const Row&) { return false; }
};

template <class R, class X, class M, class Out> struct ReparameterizeDevice : ReparameterizeItems<R, X, Out> {
  static constexpr int kInputs = 2, kAlways = 2, kOutputs = 1;
  static constexpr int kUnroll = 2;  // with an exponential for each element, four vectors are code that takes long to compile
  using typename ReparameterizeItems<R, X, Out>::Row;

  template <bool kNoise, int n> FG_HD void apply(const Row&, const R (&in)[2][n], const R* z, R (&out)[1][n]) const {
    FG_UNROLL
    for (int i = 0; i < n; ++i)
      out[0][i] = reparameterize(sigma_of(this->a.bounds, in[0][i]), in[1][i], kNoise ? z[i] : R(0));
  }
};

template <class R, class X, class M, class Out> struct ReparameterizeKlDevice : ReparameterizeItems<R, X, Out> {
  static constexpr int kInputs = 2, kAlways = 2, kOutputs = 2, kUnroll = 1;
  using typename ReparameterizeItems<R, X, Out>::Row;
  using Sink = WritingAdder;

  template <bool kNoise, int n> FG_HD void apply(const Row&, const R (&in)[2][n], const R* z, R (&out)[2][n]) const {
    FG_UNROLL
    for (int i = 0; i < n; ++i) {
      const DeviationRatio<R> sigma = deviation_ratio(half_log_variance(this->a.bounds, in[0][i]));
      out[0][i] = reparameterize(sigma.value, in[1][i], kNoise ? z[i] : R(0));
      out[1][i] = kl_of(sigma, in[1][i]);
    }
  }

  int64_t outputs() const { return this->a.geometry.batch; }
  const SumScratch& scratch() const { return this->a.scratch; }
  FG_HD void finish(int64_t output, double sum) const { static_cast<R*>(this->a.result)[output] = static_cast<R>(sum); }
};

template <class R, class X, class M, class Out> struct ReparameterizeGradientDevice : ReparameterizeItems<R, X, Out> {
  static constexpr int kInputs = 3, kAlways = 1, kOutputs = 2, kUnroll = 1;
  using typename ReparameterizeItems<R, X, Out>::Row;

  // Whether the divergence has a gradient is the same for all threads.
  template <bool kNoise, int n> FG_HD void apply(const Row& row, const R (&in)[3][n], const R* z, R (&out)[2][n]) const {
    const bool of_kl = this->a.in[1].data;
    const R upstream = row(GaussianKlColumns::kUpstream);
    FG_UNROLL
    for (int i = 0; i < n; ++i) {
      const DeviationRatio<R> sigma = deviation_ratio(half_log_variance(this->a.bounds, in[0][i]));
      R by_log_variance = z_by_log_variance(in[2][i], sigma.value, kNoise ? z[i] : R(0));
      if (of_kl) by_log_variance = fma(upstream, kl_by_log_variance(sigma), by_log_variance);
      out[0][i] = where_inside(this->a.bounds, in[0][i], by_log_variance);
      out[1][i] = of_kl ? fma(upstream, in[1][i], in[2][i]) : R(0);
    }
  }
};

// launch(way) for samples alone and derivatives, launch.sum(part) where the divergences are added up.
template <class Launch> struct ReparameterizeSum {
  const Launch& launch;
  template <class Way> void operator()(const Way& way) const { launch.sum(Added<Way>(way)); }
};
template <class Launch> void run_reparameterize(const ReparameterizeArguments& a, const Launch& launch) {
  if (a.backward) return run_on_device<ReparameterizeGradientDevice, false>(a, launch);
  if (!a.result) return run_on_device<ReparameterizeDevice, false>(a, launch);
  run_on_device<ReparameterizeKlDevice, false>(a, ReparameterizeSum<Launch>{launch});
}

}  // namespace fastgen
