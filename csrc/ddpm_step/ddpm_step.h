// The reverse step of DDPM, and with another table of DDIM:
//
//   x0 = clip(P·x + Q·m),   y = U·x0 + V·x + W·m + S·z;   without clipping y = A·x + B·m + S·z
//
// Where a network was run without its condition too, and said u, m stands for u + g·(m − u): classifier-free guidance.
// With a learned variance the deviation is S·exp(L·v + M), v being the second half of the network's channels and S 0 or 1.
// Host and device.
#pragma once
#include "common/real_math.h"
#include "q_sample/q_sample.h"

namespace fastgen {

struct DdpmStepColumns {
  enum { kP, kQ, kU, kV, kA, kB, kS, kL, kM, kW, kCount };  // the table's
  enum { kBound = kCount, kInverse, kCountWithBound };      // the bound of x0 of each sample and what x0 is scaled by after
};

enum ClipKind : int32_t { kNoClip, kClamp, kThreshold };

// The inputs: x, m, v, u.
struct DdpmStepArguments : Elementwise {
  ClipKind clip_kind = kNoClip;
  bool learned = false;
  double clip = 0;                  // for kClamp
  const void* threshold = nullptr;  // for kThreshold: (B,), of the type of the arithmetic
  double guidance = 1;              // g, where there is a u
};

// What m stands for where there is a u.
template <class V> FG_HD V guided(V m, V u, V g) { return fma(g, m - u, u); }

// NaN passes, as through torch.clamp.
template <class V> FG_HD V clamp(V x, V bound) {
  x = select(x < -bound, -bound, x);
  return select(x > bound, bound, x);
}

// The coefficients of sample b, and the bound of its x0.
template <class R> FG_HD void ddpm_step_row(const DdpmStepArguments& a, int64_t b, R* row) {
  table_row(a.rows, b, DdpmStepColumns::kCount, row);
  R bound = 1;  // no division where nothing is divided: with a row for each of 16 one-element samples it would show
  if (a.clip_kind == kClamp) bound = static_cast<R>(a.clip);
  if (a.clip_kind == kThreshold) bound = static_cast<const R*>(a.threshold)[b];
  row[DdpmStepColumns::kBound] = bound;
  row[DdpmStepColumns::kInverse] = a.clip_kind == kThreshold ? 1 / bound : R(1);
}

// Where x0 is not clipped: A·x + B·m.
template <class V> FG_HD V ddpm_mean(V a, V x, V b, V m) { return fma(a, x, b * m); }

// One element, or a vector of them: y, and x0 where kClip or kX0 need it. get(column) gives the coefficients.
template <bool kNoise, ClipKind kClip, bool kLearned, bool kX0, class V, class Get>
FG_HD void ddpm_step(const Get& get, V x, V m, V v, V z, V& y, V& x0) {
  using C = DdpmStepColumns;
  if (kClip != kNoClip || kX0) x0 = fma(get(C::kP), x, get(C::kQ) * m);
  if (kClip != kNoClip) {
    x0 = clamp(x0, get(C::kBound));
    if (kClip == kThreshold) x0 = x0 * get(C::kInverse);
    // where W is 0 no look at an infinite m; m is selected and not y, for a select of y nvcc makes a branch
    const V weighed = select(get(C::kW) == splat<V>(0.0), splat<V>(0.0), m);
    y = fma(get(C::kW), weighed, fma(get(C::kU), x0, get(C::kV) * x));
  } else {
    y = ddpm_mean(get(C::kA), x, get(C::kB), m);
  }
  if (kNoise) {
    if (kLearned) z = z * exp(fma(get(C::kL), v, get(C::kM)));
    y = with_noise(y, get(C::kS), z);
  }
}

}  // namespace fastgen
