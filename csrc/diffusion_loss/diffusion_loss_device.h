// The kernels of a CUDA thread, for the host too: the loss, added up, and its derivatives.
#pragma once
#include "common/device_driver.h"
#include "diffusion_loss/diffusion_loss.h"

namespace fastgen {

// kBackward: the derivatives instead of the losses. Input 0 is x0, input 1 the model's output, whose type both derivatives have:
// with another type of x0 and its derivative wanted, which is rare, they are made one element at a time.
template <class R, class X, class M, bool kBackward> struct DiffusionLossItems : DeviceOp<R, X, M, M, DiffusionLossArguments> {
  using DeviceOp<R, X, M, M, DiffusionLossArguments>::a;
  using Noise = std::conditional_t<std::is_same_v<X, UInt8>, M, X>;
  using C = DiffusionLossColumns;
  static constexpr int kInputs = 2, kAlways = 0, kOutputs = kBackward ? 2 : 1, kNoiseInput = 2;
  static constexpr int kTiled = 1 << kSeededNoise, kBytesWith = 1 << kNoNoise | 1 << kSeededNoise;
  using Row = ColumnRow<R, C::kCount>;

  FG_HD Row row(int64_t b) const {
    Row row;
    diffusion_loss_row(a, b, row.values);
    return row;
  }
  static FG_HD bool noiseless(const Row& row) { return row(C::kNoise) == 0; }

  // The options are the same for all threads: a branch or two for each vector.
  template <bool kNoise, int n> FG_HD void apply(const Row& row, const R (&in)[2][n], const R* z, R (&out)[kOutputs][n]) const {
    R r[n];
    FG_UNROLL
    for (int i = 0; i < n; ++i)
      r[i] = a.in[0].data ? residual<true, false>(in[1][i], row(C::kX0), in[0][i], R(0), R(0)) : in[1][i];
    if constexpr (kNoise) {
      FG_UNROLL
      for (int i = 0; i < n; ++i)
        r[i] = residual<false, true>(r[i], R(0), R(0), row(C::kNoise), z[i]);
    }
    const R delta = static_cast<R>(a.delta), weight = row(C::kWeight);
    switch (a.loss) {
      case kMse: results<kMse>(r, delta, weight, out[0]); break;
      case kL1: results<kL1>(r, delta, weight, out[0]); break;
      case kHuber: results<kHuber>(r, delta, weight, out[0]); break;
    }
    if constexpr (kBackward) {
      FG_UNROLL
      for (int i = 0; i < n; ++i)
        out[1][i] = -row(C::kX0) * out[0][i];
    }
  }

  // Of the sums: one for each sample, or one.
  int64_t outputs() const { return a.each_sample ? a.geometry.batch : 1; }
  const SumScratch& scratch() const { return a.scratch; }
  FG_HD void finish(int64_t output, double sum) const { static_cast<R*>(a.result)[output] = static_cast<R>(sum * a.scale); }

 private:
  template <LossKind kLoss, int n> FG_HD void results(const R (&r)[n], R delta, R weight, R (&out)[n]) const {
    FG_UNROLL
    for (int i = 0; i < n; ++i)
      out[i] = weight * (kBackward ? loss_slope<kLoss>(r[i], delta) : loss_of<kLoss>(r[i], delta));
  }
};

template <class R, class X, class M, class> using DiffusionLossDevice = DiffusionLossItems<R, X, M, false>;
template <class R, class X, class M, class> using DiffusionLossGradientDevice = DiffusionLossItems<R, X, M, true>;

// launch(way) for the derivatives, launch.sum(part) for the loss.
template <class Launch> struct DiffusionLossSum {
  const Launch& launch;
  template <class Way> void operator()(const Way& way) const { launch.sum(Added<Way>(way)); }
};
template <class Launch> void run_diffusion_loss(const DiffusionLossArguments& a, const Launch& launch) {
  if (a.gradient) return run_on_device<DiffusionLossGradientDevice, true>(a, launch);
  const DiffusionLossSum<Launch> sum{launch};
  if (a.geometry.batch > 0) return run_on_device<DiffusionLossDevice, true>(a, sum);
  a.is_double ? launch_groups(DiffusionLossItems<double, Any, Any, false>{a}, sum)
              : launch_groups(DiffusionLossItems<float, Any, Any, false>{a}, sum);
}

}  // namespace fastgen
