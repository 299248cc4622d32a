// The training loss of a diffusion model, w·ℓ(r) of the residual r = m − (a·x0 + b·ε), and its derivatives. The target a·x0 + b·ε
// is ε, x0 or v = √ᾱ·ε − √(1−ᾱ)·x0. Host and device.
#pragma once
#include "common/elementwise.h"

namespace fastgen {

struct DiffusionLossColumns {
  enum { kX0, kNoise, kWeight, kCount };
};

enum LossKind : int32_t { kMse, kL1, kHuber };
enum LossReduction : int32_t { kEachSample, kMeanLoss, kSumLoss };

// in[0] is x0, absent where the target is ε; in[1] is the model's output; then comes given noise.
struct DiffusionLossArguments : Elementwise {
  LossKind loss = kMse;
  double delta = 1.0;             // of the Huber loss
  const void* weights = nullptr;  // (B,), of the type of the arithmetic; null: 1
  double scale = 1.0;             // of a sum: forward into the result, backward into every derivative
  // forward: (B,) sums, or one
  bool each_sample = false;
  void* result = nullptr;  // of the type of the arithmetic
  double* sums = nullptr;  // on the CPU: of each block; null where each sample is small and has its own
  SumScratch scratch;      // on CUDA
  // backward: out[0] is the derivative by the model's output, out[1] that by x0 where it is wanted
  const void* gradient = nullptr;  // of the type of the arithmetic: one number, or one for each sample
  bool gradient_each = false;
};

// The table's row, and in its last column all that the loss of sample b (or its derivative) is multiplied by.
template <class R> FG_HD void diffusion_loss_row(const DiffusionLossArguments& a, int64_t b, R* row) {
  table_row(a.rows, b, DiffusionLossColumns::kCount, row);
  R& weight = row[DiffusionLossColumns::kWeight];
  if (a.weights) weight *= static_cast<const R*>(a.weights)[b];
  if (a.gradient) weight *= static_cast<const R*>(a.gradient)[a.gradient_each ? b : 0] * static_cast<R>(a.scale);
}

// m less those parts of the target a·x0 + b·ε that the kernel has: the first where kX0, the second where kNoise.
template <bool kX0, bool kNoise, class V> FG_HD V residual(V m, V x0_factor, V x0, V noise_factor, V z) {
  if (kX0) m = fma(-x0_factor, x0, m);
  if (kNoise) m = fma(-noise_factor, z, m);
  return m;
}

template <LossKind kLoss, class V> FG_HD V loss_of(V r, V delta) {
  if (kLoss == kMse) return r * r;
  const V size = abs(r);
  if (kLoss == kL1) return size;
  const V half = splat<V>(0.5);
  return select(size <= delta, half * r * r, delta * (size - half * delta));
}

// dℓ/dr. NaN stays NaN; the slope of |r| at 0 is 0, as torch's.
template <LossKind kLoss, class V> FG_HD V loss_slope(V r, V delta) {
  if (kLoss == kMse) return r + r;
  if (kLoss == kHuber) return max(-delta, min(delta, r));
  const V zero = splat<V>(0.0), one = splat<V>(1.0);
  return select(r > zero, one, select(r < zero, -one, r));
}

}  // namespace fastgen
