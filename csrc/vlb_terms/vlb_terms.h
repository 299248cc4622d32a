// The terms of the variational bound. With x̂0 = clip(P·x_t + Q·m) the means of q(x_{t−1} | x_t, x0) and of the model's step are
// D = U·(x0 − x̂0) apart, since both have the same share of x_t; and the term of an element is
//
//   t ≥ 1   ½·(r − 1 + e^{−r} + D²/σ²),  r = log σ² − log β̃          the divergence of two Gaussians
//   t = 0   −log of what N(x0 − D, σ²) gives the bin of x0, or −log of its density at x0; U is 1 there
//
// x_t is given, or √ᾱ·x0 + √(1−ᾱ)·ε. The hybrid loss adds to it, times a weight, the loss that diffusion_loss.h has. Host and
// device.
#pragma once
#include "common/elementwise.h"
#include "common/log_bin.h"
#include "diffusion_loss/diffusion_loss.h"
#include "q_sample/q_sample.h"

namespace fastgen {

struct VlbTermsColumns {
  enum {
    kScale,
    kSigma,
    kX0FromX,
    kX0FromM,
    kMeanFromX0,
    kLogPosteriorVariance,
    kSlope,
    kIntercept,
    kConstant,
    kPrecision,  // of a fixed variance 1/σ², of a learned one 1/β̃
    kDecoder,
    kTargetFromX0,  // these three of the hybrid loss
    kTargetFromNoise,
    kLossWeight,
    kCount
  };
  enum { kUpstream = kConstant };  // of a backward, which does not need that column
};

// Of the term at t = 0. The last two are those of guided-diffusion and of denoising-diffusion-pytorch.
enum Decoder : int32_t { kDiscretized, kGaussian, kClampedAt12, kClampedAt15 };

// The inputs: x0, m, v, x_t; given noise comes after them.
struct VlbTermsArguments : Elementwise {
  bool learned = false, has_clip = false;
  Decoder decoder = kDiscretized;
  double clip = 0;
  bool hybrid = false;  // loss, delta and weights are those of diffusion_loss, which is added to vlb_weight times the term
  LossKind loss = kMse;
  double delta = 1, vlb_weight = 1;
  const void* weights = nullptr;  // (B,), of the type of the arithmetic; null: 1
  double scale = 1;               // of a sum, into the result
  double derivative_scale = 1;    // the same into its derivatives
  bool each_sample = false;       // forward: (B,) sums, or one
  void* result = nullptr;         // of the type of the arithmetic
  double* sums = nullptr;         // on the CPU: of each block; null where each sample is small and has its own
  // On the CPU a forward may make the derivative ahead, into out[0] and out[1], for an upstream gradient of 1, and leave the simple
  // loss by itself; or besides a term the squared error of x̂0. The sums of these lie `blocks` after the term's.
  bool ahead = false;
  void* simple = nullptr;
  void* squares = nullptr;
  int64_t blocks = 0;
  SumScratch scratch;              // on CUDA
  const void* gradient = nullptr;  // backward: (B,) or one number; out[0] is the derivative by m, out[1] by v
  bool detach_mean = false;        // of the term

  FG_HD bool no_term() const { return hybrid && vlb_weight == 0; }
};

template <class R> FG_HD void vlb_terms_row(const VlbTermsArguments& a, int64_t b, R* row) {
  using C = VlbTermsColumns;
  table_row(a.rows, b, C::kCount, row);
  if (a.weights) row[C::kLossWeight] *= static_cast<const R*>(a.weights)[b];
  if (!a.gradient) return;
  row[C::kUpstream] = static_cast<const R*>(a.gradient)[a.each_sample ? b : 0];
  row[C::kLossWeight] *= static_cast<R>(a.derivative_scale);
}

// Of an element, or of a vector of them: D, whether its derivative reaches m, and x0 − x̂0.
template <class V> struct Apart {
  V d, reaches, error;
};
template <class V, class Get> FG_HD Apart<V> means_apart(const VlbTermsArguments& a, const Get& get, V x0, V m, V x_t) {
  using C = VlbTermsColumns;
  const V zero = splat<V>(0.0), one = splat<V>(1.0), found = fma(get(C::kX0FromX), x_t, get(C::kX0FromM) * m);
  if (!a.has_clip) return {get(C::kMeanFromX0) * (x0 - found), one, x0 - found};
  const V clip = splat<V>(a.clip);
  const V clamped = select(found < -clip, -clip, select(found > clip, clip, found));
  return {get(C::kMeanFromX0) * (x0 - clamped), select(clamped == found, one, zero), x0 - clamped};
}

// The term, and its derivatives by D and by log σ².
template <class V> struct VlbTerm {
  V value, by_d, by_log_variance;
};
template <bool kLearned, class V, class Get> FG_HD V log_variance_of(const Get& get, V v) {
  using C = VlbTermsColumns;
  return kLearned ? fma(get(C::kSlope), v, get(C::kIntercept)) : get(C::kIntercept);
}
template <bool kLearned, class V, class Get> FG_HD VlbTerm<V> divergence(const Get& get, V d, V v) {
  using C = VlbTermsColumns;
  const V half = splat<V>(0.5), zero = splat<V>(0.0);
  if (!kLearned) return {fma(half * get(C::kPrecision) * d, d, get(C::kConstant)), get(C::kPrecision) * d, zero};
  const ExpAndExcess<V> e = exp_and_excess(get(C::kLogPosteriorVariance) - log_variance_of<kLearned>(get, v));
  const V precision = e.exp * get(C::kPrecision), square = d * d * precision;
  return {half * (e.excess + square), precision * d, half * (splat<V>(1.0) - e.exp - square)};
}
template <class V> FG_HD VlbTerm<V> decoded(Decoder decoder, V x0, V d, V log_variance) {
  const V half = splat<V>(0.5);
  if (decoder == kGaussian) {
    const V precision = exp(-log_variance), square = d * d * precision;
    return {half * (splat<V>(1.83787706640934548356) + log_variance + square), precision * d, half * (splat<V>(1.0) - square)};
  }
  const V inverse_sigma = exp(-half * log_variance);
  const LogBin<V> bin = decoder == kDiscretized
                            ? log_bin(x0, d, inverse_sigma)
                            : approximate_log_bin(x0, d, inverse_sigma, decoder == kClampedAt12 ? 1e-12 : 1e-15);
  return {bin.value, bin.by_c, half * bin.by_log_sigma};
}

// The derivatives by m and v for an upstream gradient of 1; another multiplies them last, so that it may do so later.
template <class V, class Get> FG_HD void vlb_derivatives(const VlbTermsArguments& a, const Get& get, const Apart<V>& apart,
                                                         const VlbTerm<V>& term, V& by_m, V& by_v) {
  using C = VlbTermsColumns;
  const V scale = splat<V>(a.derivative_scale) * splat<V>(a.vlb_weight);
  by_m = a.detach_mean ? splat<V>(0.0) : -(scale * term.by_d * get(C::kMeanFromX0) * get(C::kX0FromM)) * apart.reaches;
  by_v = scale * term.by_log_variance * get(C::kSlope);
}

}  // namespace fastgen
