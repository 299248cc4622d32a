// The kernels of a CUDA thread, for the host too: the log-probabilities, added up for each sample, their derivatives, the step that
// comes with its log-probability, and what steps contribute to the weights of trajectories.
#pragma once
#include "common/device_driver.h"
#include "step_log_prob/step_log_prob.h"

namespace fastgen {

// Inputs 0 and 3 are x and x_{t−1}, of one type, 1 and 2 the halves of the model's output, whose type the derivatives have: with
// another type of x and its derivative wanted, which is rare, they are made one element at a time.
template <class R, class X, class M, bool kBackward> struct StepLogProbItems : DeviceOp<R, X, M, M, StepLogProbArguments> {
  using DeviceOp<R, X, M, M, StepLogProbArguments>::a;
  using C = StepLogProbColumns;
  static constexpr int kInputs = 4, kAlways = 2, kOutputs = kBackward ? 3 : 1, kNoiseInput = 4;
  static constexpr int kStates = 1 << 0 | 1 << 3;
  static constexpr int kNoises = 1 << kNoNoise, kTiled = 1 << kNoNoise;
  using Row = ColumnRow<R, C::kCountWithBound>;

  FG_HD Row row(int64_t b) const {
    Row row;
    step_log_prob_row(a, b, row.values);
    return row;
  }
  static FG_HD bool noiseless(const Row&) { return true; }

  // The options are the same for all threads: a branch or two for each vector.
  template <bool kNoise, int n> FG_HD void apply(const Row& row, const R (&in)[4][n], const R*, R (&out)[kOutputs][n]) const {
    if (a.clip_kind == kNoClip) {
      a.learned ? elements<false, true>(row, in, out) : elements<false, false>(row, in, out);
    } else {
      a.learned ? elements<true, true>(row, in, out) : elements<true, false>(row, in, out);
    }
  }

  // Of the sums, one for each sample.
  int64_t outputs() const { return a.geometry.batch; }
  const SumScratch& scratch() const { return a.scratch; }
  FG_HD void finish(int64_t output, double sum) const { static_cast<R*>(a.result)[output] = static_cast<R>(sum * a.scale); }

 private:
  template <bool kClip, bool kLearned, int n>
  FG_HD void elements(const Row& row, const R (&in)[4][n], R (&out)[kOutputs][n]) const {
    FG_UNROLL
    for (int i = 0; i < n; ++i) {
      const StepMean<R> mean = step_mean<kClip>(row, in[0][i], in[1][i]);
      const LogProb<R> of = log_prob<kLearned>(row, in[3][i] - mean.value, kLearned ? in[2][i] : R(0));
      if constexpr (kBackward) {
        const LogProbDerivatives<R> found = log_prob_derivatives<kClip>(row, mean, of, a.scale);
        const R upstream = row(C::kUpstream);
        out[0][i] = upstream * found.by_m;
        out[1][i] = upstream * found.by_v;
        out[2][i] = upstream * found.by_x;
      } else {
        out[0][i] = of.value;
      }
    }
  }
};

// The contributions to the weights, in the place of the log-probabilities.
template <class R, class X, class M> struct StepLogWeightItems : StepLogProbItems<R, X, M, false> {
  using StepLogProbItems<R, X, M, false>::a;
  using Row = ColumnRow<R, StepLogWeightColumns::kRowCount>;

  FG_HD Row row(int64_t b) const {
    Row row;
    step_log_weight_row(a, b, row.values);
    return row;
  }
  static FG_HD bool noiseless(const Row&) { return true; }

  template <bool kNoise, int n> FG_HD void apply(const Row& row, const R (&in)[4][n], const R*, R (&out)[1][n]) const {
    if (a.clip_kind == kNoClip) {
      a.learned ? elements<false, true>(row, in, out) : elements<false, false>(row, in, out);
    } else {
      a.learned ? elements<true, true>(row, in, out) : elements<true, false>(row, in, out);
    }
  }

 private:
  template <bool kClip, bool kLearned, int n> FG_HD void elements(const Row& row, const R (&in)[4][n], R (&out)[1][n]) const {
    FG_UNROLL
    for (int i = 0; i < n; ++i)
      out[0][i] = step_log_weight<kClip, kLearned>(row, in[3][i], in[0][i], in[1][i], kLearned ? in[2][i] : R(0));
  }
};

// Makes x_{t−1}, and adds up the log-probabilities of what is stored of it.
template <class R, class X, class M, class Out> struct StepsDevice : DeviceOp<R, X, M, Out, StepLogProbArguments> {
  using DeviceOp<R, X, M, Out, StepLogProbArguments>::a;
  using C = StepLogProbColumns;
  using Sink = WritingAdder;
  static constexpr int kInputs = 3, kAlways = 2, kOutputs = 2, kNoiseInput = 4;
  static constexpr int kNoises = 1 << kSeededNoise | 1 << kGivenNoise, kTiled = kNoises;
  using Row = ColumnRow<R, C::kCountWithBound>;

  FG_HD Row row(int64_t b) const {
    Row row;
    step_log_prob_row(a, b, row.values);
    return row;
  }
  static FG_HD bool noiseless(const Row& row) { return row(C::kSigma) == 0; }

  template <bool kNoise, int n> FG_HD void apply(const Row& row, const R (&in)[3][n], const R* z, R (&out)[2][n]) const {
    if (a.clip_kind == kNoClip) {
      a.learned ? steps<kNoise, kNoClip, true>(row, in, z, out) : steps<kNoise, kNoClip, false>(row, in, z, out);
    } else {
      a.learned ? steps<kNoise, kClamp, true>(row, in, z, out) : steps<kNoise, kClamp, false>(row, in, z, out);
    }
  }

  int64_t outputs() const { return a.geometry.batch; }
  const SumScratch& scratch() const { return a.scratch; }
  FG_HD void finish(int64_t output, double sum) const { static_cast<R*>(a.result)[output] = static_cast<R>(sum * a.scale); }

 private:
  template <bool kNoise, ClipKind kClip, bool kLearned, int n>
  FG_HD void steps(const Row& row, const R (&in)[3][n], const R* z, R (&out)[2][n]) const {
    FG_UNROLL
    for (int i = 0; i < n; ++i) {
      const R m = in[1][i], v = kLearned ? in[2][i] : R(0);
      R y, mean, x0;
      ddpm_step<kNoise, kClip, kLearned, false>(row, in[0][i], m, v, kNoise ? z[i] : R(0), y, x0);
      ddpm_step<false, kClip, false, false>(row, in[0][i], m, v, R(0), mean, x0);
      out[0][i] = y;
      out[1][i] = log_prob<kLearned>(row, as_stored<R, Out>(a.out[0], y) - mean, v).value;
    }
  }
};

// With u, one element at a time: room for its vectors made the fast ways above spill on sm_90, at the 168 registers that three
// thread blocks leave a thread.
template <class R, class X, class M, class Out> struct StepsGuidedDevice : StepsDevice<R, X, M, Out> {
  using Base = StepsDevice<R, X, M, Out>;
  static constexpr int kInputs = 4;

  template <bool kNoise, int n>
  FG_HD void apply(const typename Base::Row& row, const R (&in)[4][n], const R* z, R (&out)[2][n]) const {
    R of[3][n];
    FG_UNROLL
    for (int i = 0; i < n; ++i) {
      of[0][i] = in[0][i];
      of[1][i] = guided(in[1][i], in[3][i], static_cast<R>(Base::a.guidance));
      of[2][i] = in[2][i];
    }
    Base::template apply<kNoise>(row, of, z, out);
  }
};

template <class R, class X, class M, class> using StepLogProbDevice = StepLogProbItems<R, X, M, false>;
template <class R, class X, class M, class> using StepLogProbGradientDevice = StepLogProbItems<R, X, M, true>;

// launch(way) for the derivatives, launch.sum(part) for what is added up.
template <class Launch> struct StepLogProbSum {
  const Launch& launch;
  template <class Way> void operator()(const Way& way) const { launch.sum(Added<Way>(way)); }
};
// A trajectory is kept in float32 or float64, so there are no fast ways for one in half precision.
template <class Launch> void run_step_log_weight(const StepLogProbArguments& a, const Launch& launch) {
  if (a.geometry.batch == 0) return;
  if (!a.is_double && a.in[0].dtype == kFloat32) {
    const DType m = a.in[1].dtype;
    if (m == kFloat32 && launch_fast<kNoNoise>(StepLogWeightItems<float, Float32, Float32>{a}, launch)) return;
    if (m == kBFloat16 && launch_fast<kNoNoise>(StepLogWeightItems<float, Float32, BFloat16>{a}, launch)) return;
    if (m == kFloat16 && launch_fast<kNoNoise>(StepLogWeightItems<float, Float32, Float16>{a}, launch)) return;
  }
  a.is_double ? launch_groups(StepLogWeightItems<double, Any, Any>{a}, launch)
              : launch_groups(StepLogWeightItems<float, Any, Any>{a}, launch);
}
template <class Launch> void run_step_log_prob(const StepLogProbArguments& a, const Launch& launch) {
  if (a.gradient) return run_on_device<StepLogProbGradientDevice, true>(a, launch);
  const StepLogProbSum<Launch> sum{launch};
  if (a.weighs) return run_step_log_weight(a, sum);
  if (!a.makes_step) return run_on_device<StepLogProbDevice, true>(a, sum);
  if (!a.in[3].data) return run_on_device<StepsDevice, true>(a, sum);
  a.is_double ? launch_groups(StepsGuidedDevice<double, Any, Any, Any>{a}, sum)
              : launch_groups(StepsGuidedDevice<float, Any, Any, Any>{a}, sum);
}

}  // namespace fastgen
