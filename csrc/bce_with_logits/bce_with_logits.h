// Binary cross entropy on logits: w·(p·y·softplus(−x) + (1 − y)·softplus(x)). Host and device.
//
// The two terms are kept apart: written as (1 − y)·x + …, a confident right answer's loss is the difference of two large numbers
// and rounds to 0, and its gradient σ(x) − y likewise.
#pragma once
#include "common/elementwise.h"
#include "common/real_math.h"

namespace fastgen {

// y, p·y and w as they are where there is no weight: p = w = 1.
template <class V> FG_HD V bce_loss(V x, V y, V weight, V pos_weight) {
  const V zero = splat<V>(0.0), tail = log1p_unit(exp(-abs(x)));
  const V positive = select(x < zero, -x, zero) + tail, negative = select(x > zero, x, zero) + tail;
  return weight * fma(pos_weight * y, positive, (splat<V>(1.0) - y) * negative);
}

// d loss / d x = w·((1 − y)·σ(x) − p·y·σ(−x))
template <class V> FG_HD V bce_gradient(V x, V y, V weight, V pos_weight) {
  const V one = splat<V>(1.0), e = exp(-abs(x)), larger = one / (one + e), smaller = e * larger;
  const auto right = x >= splat<V>(0.0);
  const V positive = select(right, smaller, larger), negative = select(right, larger, smaller);
  return weight * fma(one - y, negative, -(pos_weight * y * positive));
}

enum BceReduction : int32_t { kNone, kMean, kSum };

// An operand with one element for each logit, or with a single one for all.
struct BceOperand {
  const void* data = nullptr;  // null: 1 for every logit
  DType dtype = kFloat32;
  bool single = false;
};

struct BceWithLogitsArguments {
  int64_t count = 0;
  BceOperand input, target, weight, pos_weight;
  BceReduction reduction = kMean;
  bool is_double = false;
  bool backward = false;
  // forward: the losses, or one sum for each block of kBceBlock logits, in a fixed order whatever the threads
  Operand out;
  bool reduced = false;
  double* sums = nullptr;
  // backward: `out` gets gradient · scale · d loss / d x
  BceOperand gradient;
  double scale = 1.0;
};

constexpr int64_t kBceBlock = 16384;

}  // namespace fastgen
