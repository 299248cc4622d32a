// The divergence of a diagonal Gaussian N(μ, σ²) from another one, N(μ', σ'²), or from N(0, I). With h = log(σ/σ') and
// w = (μ − μ')/σ' that of an element is
//
//   ½·((σ/σ')² − 1 + w²) − h = x + ½·(u² + w²),   x = e^h − 1 − h,   u = e^h − 1
//
// where no term is negative, so that nothing cancels where the two are nearly the same, and one exponential serves σ too. Host and
// device.
#pragma once
#include "common/elementwise.h"
#include "common/real_math.h"

namespace fastgen {

// Of a backward.
struct GaussianKlColumns {
  enum { kUpstream, kCount };
};

// What log σ² is clamped to; infinite bounds where it is not. Outside of them its derivative is 0.
struct LogVarianceBounds {
  double lowest = -INFINITY, highest = INFINITY;
};
template <class V> FG_HD V clamped(const LogVarianceBounds& bounds, V log_variance) {
  return min(splat<V>(bounds.highest), max(splat<V>(bounds.lowest), log_variance));
}
template <class V> FG_HD V where_inside(const LogVarianceBounds& bounds, V log_variance, V derivative) {
  const V zero = splat<V>(0.0);
  return select(log_variance < splat<V>(bounds.lowest), zero, select(log_variance > splat<V>(bounds.highest), zero, derivative));
}

// e^h, x and u.
template <class V> struct DeviationRatio {
  V value, excess, less_one;
};
template <class V> FG_HD DeviationRatio<V> deviation_ratio(V h) {
  const ExpAndExcess<V> e = exp_and_excess(h);
  // x + h would be ∞ − ∞ where σ is 0
  return {e.exp, e.excess, select(abs(h) < splat<V>(0.25), e.excess + h, e.exp - splat<V>(1.0))};
}
template <class V> FG_HD V kl_of(const DeviationRatio<V>& ratio, V w) {
  return fma(splat<V>(0.5), fma(w, w, ratio.less_one * ratio.less_one), ratio.excess);
}
// The derivative by log σ²: ½·((σ/σ')² − 1).
template <class V> FG_HD V kl_by_log_variance(const DeviationRatio<V>& ratio) {
  return splat<V>(0.5) * ratio.less_one * (ratio.less_one + splat<V>(2.0));
}

// The inputs: log σ², μ, and those of the other one, log σ'² and μ', each 0 where it is absent. Backward, out[0], out[1] and
// out[2] are the derivatives by log σ², μ and log σ'²; that by μ' is minus that by μ.
struct GaussianKlArguments : Elementwise {
  LogVarianceBounds bounds;        // of both
  double scale = 1;                // of a sum, as all that add up have it
  void* result = nullptr;          // forward: (B,), of the type of the arithmetic
  double* sums = nullptr;          // on the CPU: of each block; null where each sample is small and has its own
  SumScratch scratch;              // on CUDA
  const void* gradient = nullptr;  // backward: (B,), of the type of the arithmetic
};

template <class R> FG_HD void gaussian_kl_row(const GaussianKlArguments& a, int64_t b, R* row) {
  row[GaussianKlColumns::kUpstream] = a.gradient ? static_cast<const R*>(a.gradient)[b] : R(0);
}

// Of an element, or of a vector of them: what the two are apart.
template <class V> struct GaussiansApart {
  DeviationRatio<V> ratio;
  V w, inverse_sigma;  // 1/σ'
};
template <bool kOtherVariance, class V> FG_HD GaussiansApart<V> gaussians_apart(const LogVarianceBounds& bounds, V log_variance,
                                                                                V mean, V other_log_variance, V other_mean) {
  const V half = splat<V>(0.5), own = clamped(bounds, log_variance), distance = mean - other_mean;
  if constexpr (kOtherVariance) {
    const V other = clamped(bounds, other_log_variance), inverse_sigma = exp(-half * other);
    return {deviation_ratio(half * (own - other)), distance * inverse_sigma, inverse_sigma};
  } else {
    return {deviation_ratio(half * own), distance, splat<V>(1.0)};
  }
}

template <class V> struct KlDerivatives {
  V by_log_variance, by_mean, by_other_log_variance;
};
template <bool kOtherVariance, class V> FG_HD KlDerivatives<V> kl_derivatives(const LogVarianceBounds& bounds, V log_variance,
                                                                              V other_log_variance, const GaussiansApart<V>& apart,
                                                                              V upstream) {
  const V by_own = kl_by_log_variance(apart.ratio), by_mean = apart.w * apart.inverse_sigma;
  V by_other = splat<V>(0.0);
  if constexpr (kOtherVariance) {
    by_other = -fma(splat<V>(0.5) * apart.w, apart.w, by_own);
    by_other = where_inside(bounds, other_log_variance, upstream * by_other);
  }
  return {where_inside(bounds, log_variance, upstream * by_own), upstream * by_mean, by_other};
}

}  // namespace fastgen
