// The kernels of a CUDA thread, for the host too: the step without any option, with all options but guidance, and with all of them.
#pragma once
#include "common/device_driver.h"
#include "ddpm_step/ddpm_step.h"

namespace fastgen {

// y = A·x + B·m + S·z. Of the row's twelve numbers a thread keeps three.
template <class R, class X, class M, class Out> struct DdpmStepPlainDevice : DeviceOp<R, X, M, Out, DdpmStepArguments> {
  using DeviceOp<R, X, M, Out, DdpmStepArguments>::a;
  using C = DdpmStepColumns;
  static constexpr int kInputs = 2, kAlways = 2, kOutputs = 1, kNoiseInput = 4;
  static constexpr int kTiled = 1 << kSeededNoise;

  struct Row {
    R y_from_x, y_from_m, sigma;
  };
  static bool serves(const DdpmStepArguments& a) { return a.clip_kind == kNoClip && !a.learned && !a.in[3].data && !a.out[1].data; }
  FG_HD Row row(int64_t b) const {
    R values[C::kCount];
    table_row(a.rows, b, C::kCount, values);
    return {values[C::kYFromXUnclipped], values[C::kYFromMUnclipped], values[C::kSigma]};
  }
  static FG_HD bool noiseless(const Row& row) { return row.sigma == 0; }
  template <bool kNoise, int n> FG_HD void apply(const Row& row, const R (&in)[2][n], const R* z, R (&out)[1][n]) const {
    FG_UNROLL
    for (int i = 0; i < n; ++i) {
      out[0][i] = ddpm_mean(row.y_from_x, in[0][i], row.y_from_m, in[1][i]);
      if constexpr (kNoise) out[0][i] = add_noise(out[0][i], row.sigma, z[i]);
    }
  }
};

template <class R, class X, class M, class Out> struct DdpmStepDevice : DeviceOp<R, X, M, Out, DdpmStepArguments> {
  using DeviceOp<R, X, M, Out, DdpmStepArguments>::a;
  using C = DdpmStepColumns;
  static constexpr int kInputs = 3, kAlways = 2, kOutputs = 2, kNoiseInput = 4;
  static constexpr int kTiled = 1 << kSeededNoise | 1 << kGivenNoise;
  using Row = ColumnRow<R, C::kCountWithBound>;

  FG_HD Row row(int64_t b) const {
    Row row;
    ddpm_step_row(a, b, row.values);
    return row;
  }
  static FG_HD bool noiseless(const Row& row) { return row(C::kSigma) == 0; }
  // The options are the same for all threads: one branch for each vector.
  template <bool kNoise, int n> FG_HD void apply(const Row& row, const R (&in)[3][n], const R* z, R (&out)[2][n]) const {
    switch (a.clip_kind) {
      case kNoClip: return choose<kNoise, kNoClip>(row, in, z, out);
      case kClamp: return choose<kNoise, kClamp>(row, in, z, out);
      case kThreshold: return choose<kNoise, kThreshold>(row, in, z, out);
    }
  }

 private:
  template <bool kNoise, ClipKind kClip, int n>
  FG_HD void choose(const Row& row, const R (&in)[3][n], const R* z, R (&out)[2][n]) const {
    if (kNoise && a.learned) return steps<kNoise, kClip, true>(row, in, z, out);
    steps<kNoise, kClip, false>(row, in, z, out);
  }
  template <bool kNoise, ClipKind kClip, bool kLearned, int n>
  FG_HD void steps(const Row& row, const R (&in)[3][n], const R* z, R (&out)[2][n]) const {
    FG_UNROLL
    for (int i = 0; i < n; ++i)
      ddpm_step<kNoise, kClip, kLearned, true>(row, in[0][i], in[1][i], kLearned ? in[2][i] : R(0), kNoise ? z[i] : R(0), out[0][i],
                                               out[1][i]);
  }
};

// A kernel of its own: room for u would cost the one above 12 to 28 registers on sm_90 (Vectors), and bfloat16 with noise, at 140
// instead of 127, one of four blocks on a multiprocessor.
template <class R, class X, class M, class Out> struct DdpmStepGuidedDevice : DdpmStepDevice<R, X, M, Out> {
  using Base = DdpmStepDevice<R, X, M, Out>;
  static constexpr int kInputs = 4;
  static constexpr int kTiled = 1 << kSeededNoise;

  template <bool kNoise, int n>
  FG_HD void apply(const typename Base::Row& row, const R (&in)[4][n], const R* z, R (&out)[2][n]) const {
    R of[3][n];
    FG_UNROLL
    for (int i = 0; i < n; ++i) {
      of[0][i] = in[0][i];
      of[1][i] = Base::a.in[3].data ? guided(in[1][i], in[3][i], static_cast<R>(Base::a.guidance)) : in[1][i];
      of[2][i] = in[2][i];
    }
    Base::template apply<kNoise>(row, of, z, out);
  }
};

// The first kernel that has a fast way for the arguments is launched. The last one serves all arguments, where need be without one.
template <class Launch> void run_ddpm_step(const DdpmStepArguments& a, Launch launch) {
  if (a.geometry.batch > 0 && DdpmStepPlainDevice<float, Any, Any, Any>::serves(a) &&
      launch_fast_ways<DdpmStepPlainDevice, true>(a, launch))
    return;
  if (a.geometry.batch > 0 && !a.in[3].data && launch_fast_ways<DdpmStepDevice, true>(a, launch)) return;
  run_on_device<DdpmStepGuidedDevice, true>(a, launch);
}

}  // namespace fastgen
