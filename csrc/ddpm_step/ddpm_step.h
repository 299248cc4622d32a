// The reverse step of DDPM, and with another table of DDIM:
//
//   x0 = clip(P·x + Q·m),   y = U·x0 + V·x + W·m + S·z;   without clipping y = A·x + B·m + S·z
//
// Where a network was run without its condition too, and said u, m stands for u + g·(m − u): classifier-free guidance.
// With a learned variance the deviation is S·exp(L·v + M), v being the second half of the network's channels and S 0 or 1.
//
// In the code the coefficients have words. Those of x0 are P = x0_from_x and Q = x0_from_m; those of y U = y_from_x0, V = y_from_x
// and W = y_from_m, and where x0 is not clipped A = y_from_x_unclipped and B = y_from_m_unclipped; those of the noise S = sigma, L
// = slope and M = intercept. Host and device.
#pragma once
#include "common/real_math.h"
#include "q_sample/q_sample.h"

namespace fastgen {

struct DdpmStepColumns {
  // the table's
  enum { kX0FromX, kX0FromM, kYFromX0, kYFromX, kYFromXUnclipped, kYFromMUnclipped, kSigma, kSlope, kIntercept, kYFromM, kCount };
  // the bound of each sample's x0, and what its x0 is multiplied by after it has been clamped
  enum { kBound = kCount, kInverseBound, kCountWithBound };
};

enum ClipKind : int32_t { kNoClip, kClamp, kThreshold };

// The inputs: x, m, v, u.
struct DdpmStepArguments : Elementwise {
  ClipKind clip_kind = kNoClip;
  bool learned = false;
  double clip = 0;                  // for kClamp
  const void* threshold = nullptr;  // for kThreshold: (B,), of the type of the arithmetic
  double guidance = 1;              // g, read only where there is a u
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
  R bound = 1;  // divided by only where there is a threshold: with a row for each of 16 one-element samples the division would show
  if (a.clip_kind == kClamp) bound = static_cast<R>(a.clip);
  if (a.clip_kind == kThreshold) bound = static_cast<const R*>(a.threshold)[b];
  row[DdpmStepColumns::kBound] = bound;
  row[DdpmStepColumns::kInverseBound] = a.clip_kind == kThreshold ? 1 / bound : R(1);
}

// The mean of y where x0 is not clipped: A·x + B·m.
template <class V> FG_HD V ddpm_mean(V y_from_x, V x, V y_from_m, V m) { return fma(y_from_x, x, y_from_m * m); }

// One element, or a vector of them: y, and x0 where kClip or kX0 need it. get(column) gives the coefficients.
template <bool kNoise, ClipKind kClip, bool kLearned, bool kX0, class V, class Get>
FG_HD void ddpm_step(const Get& get, V x, V m, V v, V z, V& y, V& x0) {
  using C = DdpmStepColumns;
  if (kClip != kNoClip || kX0) x0 = fma(get(C::kX0FromX), x, get(C::kX0FromM) * m);
  if (kClip != kNoClip) {
    x0 = clamp(x0, get(C::kBound));
    if (kClip == kThreshold) x0 = x0 * get(C::kInverseBound);
    // Where m has no weight it is not looked at, were it infinite or NaN. The selection is of m and not of y, which nvcc would make
    // a branch of.
    const V weighed = select(get(C::kYFromM) == splat<V>(0.0), splat<V>(0.0), m);
    y = fma(get(C::kYFromM), weighed, fma(get(C::kYFromX0), x0, get(C::kYFromX) * x));
  } else {
    y = ddpm_mean(get(C::kYFromXUnclipped), x, get(C::kYFromMUnclipped), m);
  }
  if (kNoise) {
    if (kLearned) z = z * exp(fma(get(C::kSlope), v, get(C::kIntercept)));
    y = with_noise(y, get(C::kSigma), z);
  }
}

}  // namespace fastgen
