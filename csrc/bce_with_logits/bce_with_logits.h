// Binary cross entropy on logits: w·(p·y·softplus(−x) + (1 − y)·softplus(x)). Host and device.
//
// With softplus(±x) = max(±x, 0) + tail, tail = log1p(e^−|x|), that is |x|·(y if x < 0, else 1 − y) + tail where w = p = 1.
// Nothing is subtracted from a number of its own size: written as (1 − y)·x + …, a confident right answer's loss is the difference
// of two large numbers and rounds to 0, and its gradient σ(x) − y likewise.
#pragma once
#include "common/elementwise.h"
#include "common/real_math.h"

namespace fastgen {

// Stands for a weight where there is none, and costs no load and no multiplication.
struct One {};
constexpr bool is_one(One) { return true; }
template <class V> constexpr bool is_one(const V&) { return false; }
template <class V> FG_HD V operator*(One, V v) { return v; }

// W and P: V or One. NaN in x reaches the result through e^−|x|. Where its coefficient is 0, |x| counts for nothing: it may be
// infinite, and 0·∞ is 0 here, the limit of 0·|x|. Hence w is multiplied into the coefficients and not into their sum.
template <Accuracy kAccuracy = kAccurate, class V, class W, class P> FG_HD V bce_loss(V x, V y, W weight, P pos_weight) {
  const V zero = splat<V>(0.0), one = splat<V>(1.0), tail = log1p_unit(exp_negative<kAccuracy>(-abs(x)));
  if constexpr (is_one(W{}) && is_one(P{})) {
    // −y or 1 − y, whose product with x is that of |x| and its coefficient: one instruction less than selecting from two
    const V slope = select(x >= zero, one, zero) - y;
    return select(slope == zero, tail, fma(x, slope, tail));
  } else {
    const V positive = weight * (pos_weight * y), negative = weight * (one - y);
    const auto left = x < zero;
    const V size = select(select(left, positive, negative) == zero, zero, abs(x));
    return fma(positive, select(left, size, zero) + tail, negative * (select(left, zero, size) + tail));
  }
}

// d loss / d x = w·((1 − y)·σ(x) − p·y·σ(−x)), the larger σ being 1/(1 + e) and the smaller e/(1 + e) with e = e^−|x|
template <Accuracy kAccuracy = kAccurate, class V, class W, class P> FG_HD V bce_gradient(V x, V y, W weight, P pos_weight) {
  const V one = splat<V>(1.0), e = exp_negative<kAccuracy>(-abs(x)), positive = pos_weight * y, negative = one - y;
  const auto right = x >= splat<V>(0.0);
  const V dividend = fma(select(right, -positive, negative), e, select(right, negative, -positive));
  return weight * quotient<kAccuracy>(dividend, one + e);
}

enum BceReduction : int32_t { kNone, kMean, kSum };

// An operand with one element for each logit, or with a single one for all.
struct BceOperand {
  const void* data = nullptr;  // null: 1 for every logit
  DType dtype = kFloat32;
  bool single = false;
};

// The operand as the drivers address it, with element i at i.
FG_HD Operand flat(const BceOperand& o) { return {const_cast<void*>(o.data), o.dtype, 0, 0}; }

struct BceWithLogitsArguments {
  int64_t count = 0;
  BceOperand input, target, weight, pos_weight;
  BceReduction reduction = kMean;
  bool is_double = false;
  bool backward = false;
  // forward: the losses, or their mean or sum, on the CPU from one sum for each kBceBlock logits
  Operand out;
  bool reduced = false;
  double* sums = nullptr;
  SumScratch scratch;  // on CUDA
  // backward: `out` gets gradient · scale · d loss / d x
  BceOperand gradient;
  double scale = 1.0;
};

constexpr int64_t kBceBlock = 16384;

}  // namespace fastgen
