// The log-probability of a reverse step. With the mean μ and the deviation σ of ddpm_step, whose rows and options these are, that
// of an element is
//
//   log N(x_{t−1}; μ, σ²) = −½·u² − log σ − ½·log 2π,   u = (x_{t−1} − μ)/σ
//
// μ is not rounded to the dtype of the step. A step that takes no noise has no density: NaN.
//
// And the logarithm of what the step contributes to the weight of a trajectory that q made, the density of the step back over that
// of the step there:
//
//   log p(x_{t−1} | x_t)/q(x_t | x_{t−1}) = ½·(w² − u²) − log(σ/√β),   w = (x_t − √α·x_{t−1})/√β
//
// and at the last step log N(x_T; 0, 1), where the trajectory ends. Host and device.
#pragma once
#include "ddpm_step/ddpm_step.h"

namespace fastgen {

struct StepLogProbColumns : DdpmStepColumns {
  // In the place of columns that are not needed: there is no threshold, and a backward makes no noise. The intercept is
  // log σ where that is not learned.
  enum { kInverseSigma = kInverseBound, kUpstream = kSigma };
};

// Of a trajectory's weight. The table's 1/σ is in the place of σ, its intercept is that of log(σ/√β), and three columns follow: √α,
// 1/√β and whether the step is the last. In the row the bound comes before these.
struct StepLogWeightColumns : DdpmStepColumns {
  enum { kInverseSigma = kSigma, kTableCount = kCount + 3 };
  enum { kForwardScale = kBound + 1, kForwardInverseSigma, kPrior, kRowCount };
};

// The inputs: x, m, v, and the given x_{t−1}; or, of a step that makes it, u and given noise. Then out[0] is x_{t−1}. Backward,
// out[0], out[1] and out[2] are the derivatives by m, v and x.
struct StepLogProbArguments : DdpmStepArguments {
  bool makes_step = false;         // which out[0] alone does not tell: an empty tensor has no address
  bool weighs = false;             // with the table of StepLogWeightColumns
  bool ahead = false;              // on the CPU a forward may make the derivatives by m and v too, for an upstream gradient of 1
  double scale = 1;                // of a sum: forward into the result, backward into every derivative
  void* result = nullptr;          // forward: (B,), of the type of the arithmetic
  double* sums = nullptr;          // on the CPU: of each block; null where each sample is small and has its own
  SumScratch scratch;              // on CUDA
  const void* gradient = nullptr;  // backward: (B,), of the type of the arithmetic
};

template <class R> FG_HD void step_log_prob_row(const StepLogProbArguments& a, int64_t b, R* row) {
  using C = StepLogProbColumns;
  ddpm_step_row(a, b, row);
  const R sigma = row[C::kSigma];
  const bool noisy = sigma >= static_cast<R>(kIsDouble<R> ? 2.2250738585072014e-308 : 1.17549435e-38);  // which NaN is not
  row[C::kInverseSigma] = noisy ? 1 / sigma : static_cast<R>(NAN);
  if (!a.learned) row[C::kIntercept] = log_positive(sigma);
  if (!noisy) row[C::kIntercept] = static_cast<R>(NAN);
  if (a.gradient) row[C::kUpstream] = static_cast<const R*>(a.gradient)[b];
}

template <class R> FG_HD void step_log_weight_row(const StepLogProbArguments& a, int64_t b, R* row) {
  using C = StepLogWeightColumns;
  table_row(a.rows, b, C::kTableCount, row);
  for (int k = C::kPrior; k > C::kBound; --k)
    row[k] = row[k - 1];
  row[C::kBound] = a.clip_kind == kClamp ? static_cast<R>(a.clip) : R(1);
}

// Of an element, or of a vector of them: μ, and whether its derivative goes through x0.
template <class V> struct StepMean {
  V value, reaches;
};
template <bool kClip, class V, class Get> FG_HD StepMean<V> step_mean(const Get& get, V x, V m) {
  using C = StepLogProbColumns;
  V y, x0, unused = splat<V>(0.0);
  ddpm_step<false, kClip ? kClamp : kNoClip, false, kClip>(get, x, m, unused, unused, y, x0);
  if constexpr (kClip) {
    const V found = fma(get(C::kX0FromX), x, get(C::kX0FromM) * m);
    return {y, select(x0 == found, splat<V>(1.0), splat<V>(0.0))};
  } else {
    return {y, splat<V>(1.0)};
  }
}

// The log-probability of d = x_{t−1} − μ, u and 1/σ.
template <class V> struct LogProb {
  V value, u, inverse_sigma;
};
template <bool kLearned, class V, class Get> FG_HD LogProb<V> log_prob(const Get& get, V d, V v) {
  using C = StepLogProbColumns;
  const V log_sigma = kLearned ? fma(get(C::kSlope), v, get(C::kIntercept)) : get(C::kIntercept);
  const V inverse_sigma = kLearned ? exp(-log_sigma) : get(C::kInverseSigma), u = d * inverse_sigma;
  return {-fma(splat<V>(0.5) * u, u, log_sigma + splat<V>(0.91893853320467274178)), u, inverse_sigma};
}

// The derivatives by m, v and x, of an upstream gradient of 1, times `scale`; another multiplies them last, so that it may do so
// later.
template <class V> struct LogProbDerivatives {
  V by_m, by_v, by_x;
};
template <bool kClip, class V, class Get>
FG_HD LogProbDerivatives<V> log_prob_derivatives(const Get& get, const StepMean<V>& mean, const LogProb<V>& of, double scale) {
  using C = StepLogProbColumns;
  const V factor = splat<V>(scale), by_mean = factor * of.u * of.inverse_sigma;
  const V by_v = factor * fma(of.u, of.u, splat<V>(-1.0)) * get(C::kSlope);
  if (!kClip) return {by_mean * get(C::kYFromMUnclipped), by_v, by_mean * get(C::kYFromXUnclipped)};
  const V by_x0 = get(C::kYFromX0) * mean.reaches;
  return {by_mean * fma(by_x0, get(C::kX0FromM), get(C::kYFromM)), by_v, by_mean * fma(by_x0, get(C::kX0FromX), get(C::kYFromX))};
}

// The contribution to the weight. Of fixed variances the logarithm of σ/√β is the table's, made in float64, and most of what the
// two densities have in common is never added.
template <bool kClip, bool kLearned, class V, class Get> FG_HD V step_log_weight(const Get& get, V x_prev, V x, V m, V v) {
  using C = StepLogWeightColumns;
  const V log_ratio = kLearned ? fma(get(C::kSlope), v, get(C::kIntercept)) : get(C::kIntercept);
  const V inverse_sigma = kLearned ? exp(-log_ratio) * get(C::kForwardInverseSigma) : get(C::kInverseSigma);
  const V u = (x_prev - step_mean<kClip>(get, x, m).value) * inverse_sigma;
  const V w = fma(-get(C::kForwardScale), x_prev, x) * get(C::kForwardInverseSigma);
  const V prior = get(C::kPrior) * fma(splat<V>(0.5) * x, x, splat<V>(0.91893853320467274178));
  return fma(splat<V>(0.5) * (w - u), w + u, -(log_ratio + prior));
}

}  // namespace fastgen
