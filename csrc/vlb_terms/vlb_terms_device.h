// The kernels of a CUDA thread, for the host too: the terms, added up for each sample, and their derivatives.
#pragma once
#include "common/device_driver.h"
#include "vlb_terms/vlb_terms.h"

namespace fastgen {

// Inputs 0 and 3 are x0 and x_t, of one type, 1 and 2 the halves of the model's output, whose type the derivatives have.
template <class R, class X, class M, bool kBackward> struct VlbTermsItems : DeviceOp<R, X, M, M, VlbTermsArguments> {
  using DeviceOp<R, X, M, M, VlbTermsArguments>::a;
  using Noise = X;
  using C = VlbTermsColumns;
  static constexpr int kInputs = 4, kAlways = 2, kOutputs = kBackward ? 2 : 1, kNoiseInput = 4;
  // Of four operands one vector each is 64 bytes on the way, which is enough, and four were as much code again three times: with
  // them the compiler took three times as long, and 14 kernels spilled on sm_90.
  static constexpr int kUnroll = 1;
  static constexpr int kStates = 1 << 0 | 1 << 3;
  static constexpr int kTiled = 1 << kSeededNoise;
  using Row = ColumnRow<R, C::kCount>;

  FG_HD Row row(int64_t b) const {
    Row row;
    vlb_terms_row(a, b, row.values);
    return row;
  }
  static FG_HD bool noiseless(const Row& row) { return row(C::kSigma) == 0 && row(C::kTargetFromNoise) == 0; }

  // The options are the same for all threads, and which term it is for all of a sample's.
  template <bool kNoise, int n> FG_HD void apply(const Row& row, const R (&in)[4][n], const R* z, R (&out)[kOutputs][n]) const {
    R x_t[n];
    FG_UNROLL
    for (int i = 0; i < n; ++i) {
      x_t[i] = a.in[3].data ? in[3][i] : q_sample(row(C::kScale), in[0][i]);
      if constexpr (kNoise) x_t[i] = add_noise(x_t[i], row(C::kSigma), z[i]);
    }
    if (a.no_term()) {
      FG_UNROLL
      for (int i = 0; i < n; ++i)
        put(row, {}, {}, out, i);
    } else if (row(C::kDecoder) != 0) {
      decode(row, in, x_t, out);
    } else {
      a.learned ? diverge<true>(row, in, x_t, out) : diverge<false>(row, in, x_t, out);
    }
    if (!a.hybrid) return;
    R r[n];
    FG_UNROLL
    for (int i = 0; i < n; ++i) {
      r[i] = residual<true, false>(in[1][i], row(C::kTargetFromX0), in[0][i], R(0), R(0));
      if constexpr (kNoise) r[i] = residual<false, true>(r[i], R(0), R(0), row(C::kTargetFromNoise), z[i]);
    }
    switch (a.loss) {
      case kMse: return add_loss<kMse>(row, r, out[0]);
      case kL1: return add_loss<kL1>(row, r, out[0]);
      case kHuber: return add_loss<kHuber>(row, r, out[0]);
    }
  }

  // Of the sums: one for each sample, or one.
  int64_t outputs() const { return a.each_sample ? a.geometry.batch : 1; }
  const SumScratch& scratch() const { return a.scratch; }
  FG_HD void finish(int64_t output, double sum) const { static_cast<R*>(a.result)[output] = static_cast<R>(sum * a.scale); }

 private:
  template <int n>
  FG_HD void put(const Row& row, const Apart<R>& apart, const VlbTerm<R>& term, R (&out)[kOutputs][n], int i) const {
    if constexpr (kBackward) {
      vlb_derivatives(a, row, apart, term, out[0][i], out[1][i]);
      if (!a.hybrid) out[0][i] *= row(C::kUpstream);
      out[1][i] *= row(C::kUpstream);
    } else {
      out[0][i] = term.value;
    }
  }
  template <bool kLearned, int n>
  FG_HD void diverge(const Row& row, const R (&in)[4][n], const R (&x_t)[n], R (&out)[kOutputs][n]) const {
    FG_UNROLL
    for (int i = 0; i < n; ++i) {
      const Apart<R> apart = means_apart(a, row, in[0][i], in[1][i], x_t[i]);
      put(row, apart, divergence<kLearned>(row, apart.d, in[2][i]), out, i);
    }
  }
  // Element after element, since the decoder is large and of few samples: with a copy of it for each the compiler took minutes.
  template <int n> FG_HD void decode(const Row& row, const R (&in)[4][n], const R (&x_t)[n], R (&out)[kOutputs][n]) const {
    FG_UNROLL
    for (int k = 0; k < kOutputs; ++k)
      FG_UNROLL
    for (int i = 0; i < n; ++i)
      out[k][i] = 0;
    FG_NO_UNROLL
    for (int turn = 0; turn < n; ++turn) {
      auto own = [&](const R(&of)[n]) { return picked<n>(turn, [&](int i) { return of[i]; }); };
      const R x0 = own(in[0]), v = own(in[2]);
      const Apart<R> apart = means_apart(a, row, x0, own(in[1]), own(x_t));
      const R log_variance = a.learned ? log_variance_of<true>(row, v) : log_variance_of<false>(row, v);
      R found[kOutputs][1];
      put(row, apart, decoded(a.decoder, x0, apart.d, log_variance), found, 0);
      FG_UNROLL
      for (int k = 0; k < kOutputs; ++k)
        FG_UNROLL
      for (int i = 0; i < n; ++i)
        out[k][i] = i == turn ? found[k][0] : out[k][i];
    }
  }
  template <LossKind kLoss, int n> FG_HD void add_loss(const Row& row, const R (&r)[n], R (&out)[n]) const {
    const R delta = static_cast<R>(a.delta);
    FG_UNROLL
    for (int i = 0; i < n; ++i) {
      if constexpr (kBackward) {
        out[i] = row(C::kUpstream) * fma(row(C::kLossWeight), loss_slope<kLoss>(r[i], delta), out[i]);
      } else {
        out[i] = fma(row(C::kLossWeight), loss_of<kLoss>(r[i], delta), static_cast<R>(a.vlb_weight) * out[i]);
      }
    }
  }
};

template <class R, class X, class M, class> using VlbTermsDevice = VlbTermsItems<R, X, M, false>;
template <class R, class X, class M, class> using VlbTermsGradientDevice = VlbTermsItems<R, X, M, true>;

// launch(way) for the derivatives, launch.sum(part) for the terms.
template <class Launch> struct VlbTermsSum {
  const Launch& launch;
  template <class Way> void operator()(const Way& way) const { launch.sum(Added<Way>(way)); }
};
template <class Launch> void run_vlb_terms(const VlbTermsArguments& a, const Launch& launch) {
  if (a.gradient) return run_on_device<VlbTermsGradientDevice, true>(a, launch);
  const VlbTermsSum<Launch> sum{launch};
  if (a.geometry.batch > 0) return run_on_device<VlbTermsDevice, true>(a, sum);
  a.is_double ? launch_groups(VlbTermsItems<double, Any, Any, false>{a}, sum)
              : launch_groups(VlbTermsItems<float, Any, Any, false>{a}, sum);
}

}  // namespace fastgen
