// The losses of a GAN: sums of softplus(∓x) over the logits of real and of generated samples. Host and device.
//
// −log D(x) is softplus(−logit) and −log(1 − D(x)) is softplus(logit), with softplus(u) = max(u, 0) + log1p(e^−|u|). All logits of
// a tensor have one target, so none is stored; where that is 1 or 0, nothing is multiplied by a zero that an infinite logit would
// make a NaN of.
#pragma once
#include "bce_with_logits/bce_with_logits.h"

namespace fastgen {

enum GanLossKind : int32_t { kDiscriminatorLoss, kNonSaturatingLoss, kMinimaxLoss };

// What is added up: the loss, and beside it what the monitors are.
enum GanSum : int32_t { kGanLoss, kRealProbability, kFakeProbability, kRightShare, kValue, kGanSums };
// The same over the logits of one tensor.
enum GanTerm : int32_t { kLossTerm, kProbabilityTerm, kRightTerm, kLogTerm, kGanTerms };

// The logits of one tensor: the loss gets factor · Σ bce(x, target).
struct GanSegment {
  const void* logits;
  void* gradient;  // backward: gets upstream · factor · d bce / d x
  int64_t count;   // > 0
  double target, factor;
  double mean, right;   // the weight of a logit in its side's means, and in the accuracy
  int64_t first_block;  // of the work that is its own
  DType dtype;
  bool real;
};

// A segment's numbers in the type of the arithmetic.
template <class V> struct GanTarget {
  V positive, negative, flip;
  bool soft;  // not 0 or 1

  FG_HD explicit GanTarget(const GanSegment& s)
      : positive(splat<V>(s.target)),
        negative(splat<V>(1.0 - s.target)),
        flip(splat<V>(s.target > 0.0 ? -1.0 : 1.0)),
        soft(s.target > 0.0 && s.target < 1.0) {}
};

// What all of the values below share.
template <class V, Accuracy kAccuracy = kAccurate> struct GanLogit {
  V x, e;  // e^−|x|
  FG_HD explicit GanLogit(V logit) : x(logit), e(exp_negative<kAccuracy>(-abs(logit))) {}
};

// softplus(u) for u = ±x
template <class V, Accuracy kAccuracy> FG_HD V softplus(V u, const GanLogit<V, kAccuracy>& logit) {
  return max(splat<V>(0.0), u) + log1p_unit(logit.e);
}

template <class V, Accuracy kAccuracy>
FG_HD V gan_loss(const GanLogit<V, kAccuracy>& logit, const GanTarget<V>& target, bool soft) {
  const V tail = log1p_unit(logit.e);
  if (soft) return fma(abs(logit.x), select(logit.x < splat<V>(0.0), target.positive, target.negative), tail);
  return max(splat<V>(0.0), target.flip * logit.x) + tail;
}

// scale · (negative·σ(x) − positive·σ(−x)), the two being multiplied by scale already
template <class V, Accuracy kAccuracy> FG_HD V gan_gradient(const GanLogit<V, kAccuracy>& logit, V positive, V negative) {
  const auto right = logit.x >= splat<V>(0.0);
  const V dividend = fma(select(right, -positive, negative), logit.e, select(right, negative, -positive));
  return quotient<kAccuracy>(dividend, splat<V>(1.0) + logit.e);
}

// σ(x)
template <class V, Accuracy kAccuracy> FG_HD V gan_probability(const GanLogit<V, kAccuracy>& logit) {
  const V one = splat<V>(1.0);
  return quotient<kAccuracy>(select(logit.x >= splat<V>(0.0), one, logit.e), one + logit.e);
}

// Whether the discriminator is right, u being x for a real sample and −x for a generated one: 1, 0, or a half where it is
// undecided. NaN stays NaN.
template <class V> FG_HD V gan_right(V u) {
  const V zero = splat<V>(0.0);
  return select(u > zero, splat<V>(1.0), select(u < zero, zero, u + splat<V>(0.5)));
}

constexpr int64_t kGanBlock = 16384;

struct GanLossArguments {
  const GanSegment* segments = nullptr;  // none is empty
  int count = 0;
  double starts[kGanSums] = {};  // what the sums begin with: NaN for the mean of nothing
  bool monitors = false;
  bool gradients = false;          // the CPU makes them beside the loss
  bool backward = false;           // nothing but gradients
  const void* upstream = nullptr;  // one number, that the gradients are multiplied by; null: 1
  DType upstream_dtype = kFloat32;
  // On the CPU: the terms of each block, sums[term · blocks + block].
  int64_t blocks = 0;
  double* sums = nullptr;
  // On CUDA: where the loss goes and the four monitors, which have one dtype.
  Operand loss, monitored;
  SumScratch scratch;
  double* running = nullptr;  // the sums from launch to launch, where the segments take several
};

}  // namespace fastgen
