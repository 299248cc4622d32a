#include "common/cuda_driver.cuh"

#include "ddpm_step/ddpm_step.h"

namespace fastgen {
namespace {

template <class R> struct DdpmStep {
  using C = DdpmStepColumns;
  static constexpr int kColumns = C::kCountWithBound;
  DdpmStepArguments a;

  __device__ void load_row(int64_t b, int64_t, R* row) const { ddpm_step_row(a, b, row); }
  static __device__ bool noiseless(const R* row) { return row[C::kS] == 0; }

  __device__ void element(const R* row, const Element<R>& e, R z, bool noise) const {
    switch (a.clip_kind) {
      case kNoClip: return choose_noise<kNoClip>(row, e, z, noise);
      case kClamp: return choose_noise<kClamp>(row, e, z, noise);
      case kThreshold: return choose_noise<kThreshold>(row, e, z, noise);
    }
  }

 private:
  template <ClipKind kClip> __device__ void choose_noise(const R* row, const Element<R>& e, R z, bool noise) const {
    if (!noise) return step<false, kClip, false>(row, e, z);
    if (a.learned) return step<true, kClip, true>(row, e, z);
    step<true, kClip, false>(row, e, z);
  }
  template <bool kNoise, ClipKind kClip, bool kLearned> __device__ void step(const R* row, const Element<R>& e, R z) const {
    R y, x0;
    ddpm_step<kNoise, kClip, kLearned, true>([row](int column) { return row[column]; }, e.in(0), e.in(1), kLearned ? e.in(2) : R(0),
                                             z, y, x0);
    e.out(0, y);
    if (a.out[1].data) e.out(1, x0);
  }
};

}  // namespace

FG_CUDA_KERNEL(ddpm_step, DdpmStepArguments) { return launch_elementwise<DdpmStep, 3>(arguments, stream); }

}  // namespace fastgen
