// The kernels of a CUDA thread, for the host too: the step without any option, with all of them but guidance, with all.
#pragma once
#include "common/device_driver.h"
#include "ddpm_step/ddpm_step.h"

namespace fastgen {

// y = A·x + B·m + S·z: of the row's twelve numbers it keeps three.
template <class R_, class X_, class M_, class Out_> struct DdpmStepPlainDevice {
  using R = R_;
  using X = X_;
  using M = M_;
  using Out = Out_;
  using Noise = Out_;
  using C = DdpmStepColumns;
  static constexpr int kInputs = 2, kAlways = 2, kOutputs = 1, kNoiseInput = 4;
  static constexpr int kNoises = 1 << kNoNoise | 1 << kGivenNoise | 1 << kSeededNoise;
  static constexpr int kTiled = 1 << kSeededNoise;
  DdpmStepArguments a;

  struct Row {
    R y_from_x, y_from_m, sigma;
  };
  static bool serves(const DdpmStepArguments& a) { return a.clip_kind == kNoClip && !a.learned && !a.in[3].data && !a.out[1].data; }
  const FG_HD DdpmStepArguments& arguments() const { return a; }
  FG_HD Row row(int64_t b) const {
    R values[C::kCount];
    table_row(a.rows, b, C::kCount, values);
    return {values[C::kYFromXUnclipped], values[C::kYFromMUnclipped], values[C::kSigma]};
  }
  static FG_HD bool noiseless(const Row& row) { return row.sigma == 0; }
  FG_HD void first_of_sample(int64_t, const Row&) const {}
  template <bool kNoise, int n> FG_HD void apply(const Row& row, const R (&in)[2][n], const R* z, R (&out)[1][n]) const {
    FG_UNROLL
    for (int i = 0; i < n; ++i) {
      out[0][i] = ddpm_mean(row.y_from_x, in[0][i], row.y_from_m, in[1][i]);
      if constexpr (kNoise) out[0][i] = add_noise(out[0][i], row.sigma, z[i]);
    }
  }
};

template <class R_, class X_, class M_, class Out_> struct DdpmStepDevice {
  using R = R_;
  using X = X_;
  using M = M_;
  using Out = Out_;
  using Noise = Out_;
  using C = DdpmStepColumns;
  static constexpr int kInputs = 3, kAlways = 2, kOutputs = 2, kNoiseInput = 4;
  static constexpr int kNoises = 1 << kNoNoise | 1 << kGivenNoise | 1 << kSeededNoise;
  static constexpr int kTiled = 1 << kSeededNoise | 1 << kGivenNoise;
  DdpmStepArguments a;

  struct Row {
    R values[C::kCountWithBound];
    FG_HD R operator()(int column) const { return values[column]; }
  };
  const FG_HD DdpmStepArguments& arguments() const { return a; }
  FG_HD Row row(int64_t b) const {
    Row row;
    ddpm_step_row(a, b, row.values);
    return row;
  }
  static FG_HD bool noiseless(const Row& row) { return row.values[C::kSigma] == 0; }
  FG_HD void first_of_sample(int64_t, const Row&) const {}
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
template <class R_, class X, class M, class Out> struct DdpmStepGuidedDevice : DdpmStepDevice<R_, X, M, Out> {
  using Base = DdpmStepDevice<R_, X, M, Out>;
  using R = R_;
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

// What no fast way serves is left to the last, which serves everything.
template <class Launch> void run_ddpm_step(const DdpmStepArguments& a, Launch launch) {
  if (a.geometry.batch > 0 && DdpmStepPlainDevice<float, Any, Any, Any>::serves(a) &&
      launch_fast_ways<DdpmStepPlainDevice, true>(a, launch))
    return;
  if (a.geometry.batch > 0 && !a.in[3].data && launch_fast_ways<DdpmStepDevice, true>(a, launch)) return;
  run_on_device<DdpmStepGuidedDevice, true>(a, launch);
}

}  // namespace fastgen
