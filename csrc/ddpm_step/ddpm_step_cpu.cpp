#include "common/cpu_driver.h"  // before the formulas, which find the vector operations by their names
#include "common/isa.h"

#include "ddpm_step/ddpm_step.h"

namespace fastgen {
namespace {

template <class R> struct DdpmStep : DdpmStepColumns {
  static constexpr int kInputs = 4, kOutputs = 2, kColumns = kCountWithBound;  // x, m, v, u; y, x0
  static constexpr int kSums = 0;
  const DdpmStepArguments& a;
  explicit DdpmStep(const DdpmStepArguments& arguments) : a(arguments) {}

  void load_row(int64_t b, R* row) const { ddpm_step_row(a, b, row); }
  bool own_rows() const { return a.rows.t || a.clip_kind == kThreshold; }
  static bool noiseless(const R* row) { return row[kSigma] == 0; }

  // With guidance, m is computed in a loop of its own, for as many elements at a time as the first-level cache holds. So the loops
  // below are compiled once, and not a second time with guidance in them.
  template <bool kNoise, class C> FG_HD void apply(const C& row, const Tile<R>& t, int64_t first) const {
    alignas(64) R m[kTile];
    const int64_t most = t.in[3] ? kTile : t.n;
    for (int64_t begin = 0; begin < t.n; begin += most) {
      Tile<R> part = t.part(begin, most);
      if (t.in[3]) {
        const Vec<R> scale = splat<Vec<R>>(a.guidance);
        for (int64_t i = 0; i < part.n; i += kLanes<R>)
          store(m + i, guided(load(part.in[1] + i), load(part.in[3] + i), scale));
        part.in[1] = m;
      }
      choose_clip<kNoise>(row, part, first + begin);
    }
  }

 private:
  template <bool kNoise, class C> FG_HD void choose_clip(const C& row, const Tile<R>& t, int64_t first) const {
    switch (a.clip_kind) {
      case kNoClip: return choose_learned<kNoise, kNoClip>(row, t, first);
      case kClamp: return choose_learned<kNoise, kClamp>(row, t, first);
      case kThreshold: return choose_learned<kNoise, kThreshold>(row, t, first);
    }
  }
  template <bool kNoise, ClipKind kClip, class C> FG_HD void choose_learned(const C& row, const Tile<R>& t, int64_t first) const {
    if (kNoise && a.learned) return choose_x0<kNoise, kClip, true>(row, t, first);
    choose_x0<kNoise, kClip, false>(row, t, first);
  }
  template <bool kNoise, ClipKind kClip, bool kLearned, class C>
  FG_HD void choose_x0(const C& row, const Tile<R>& t, int64_t first) const {
    if (t.out[1]) return loop<kNoise, kClip, kLearned, true>(row, t, first);
    loop<kNoise, kClip, kLearned, false>(row, t, first);
  }

  template <bool kNoise, ClipKind kClip, bool kLearned, bool kX0, class C>
  FG_HD void loop(const C& row, const Tile<R>& t, int64_t first) const {
    FG_UNROLL_4
    for (int64_t i = 0; i < t.n; i += kLanes<R>) {
      const auto get = [&](int column) FG_INLINE { return row.get(column, first + i); };
      Vec<R> v{}, z{}, y, x0{};
      if (kLearned) v = load(t.in[2] + i);
      if (kNoise) z = load(t.z + i);
      ddpm_step<kNoise, kClip, kLearned, kX0>(get, load(t.in[0] + i), load(t.in[1] + i), v, z, y, x0);
      // stored last, since `out` may be x_t itself: by now everything has been read
      store(t.out[0] + i, y);
      if (kX0) store(t.out[1] + i, x0);
    }
  }
};

}  // namespace

FG_CPU_KERNEL(ddpm_step, DdpmStepArguments) { run_elementwise<DdpmStep>(arguments, begin, end); }

}  // namespace fastgen
