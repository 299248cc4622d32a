#include "common/cpu_convert.h"  // before the formulas, which find the vector operations by their names
#include "common/isa.h"

#include "gan_loss/gan_loss.h"

namespace fastgen {
namespace {

constexpr int64_t kTile = 1024;

// The blocks of one segment. kSums: how many sums are taken: none, the loss, or the monitors' too.
template <class R, bool kSoft, int kSums, bool kGradients> struct GanBlocks {
  static constexpr DType kNative = sizeof(R) == 4 ? kFloat32 : kFloat64;
  static constexpr int64_t kLane = kLanes<R>;
  using V = Vec<R>;

  const GanLossArguments& a;
  const GanSegment& segment;
  R scale;
  alignas(64) R logits[kTile];
  alignas(64) R gradients[kTile];

  GanBlocks(const GanLossArguments& arguments, const GanSegment& s) : a(arguments), segment(s) {
    double upstream = 1;
    if (a.upstream) read(Operand{const_cast<void*>(a.upstream), a.upstream_dtype}, 0, 1, &upstream);
    scale = static_cast<R>(upstream * s.factor);
  }

  void block(int64_t index) {
    const int64_t begin = (index - segment.first_block) * kGanBlock;
    const int64_t end = begin + kGanBlock < segment.count ? begin + kGanBlock : segment.count;
    double sums[kSums + 1] = {};
    for (int64_t i = begin; i < end; i += kTile)
      tile(i, end - i < kTile ? end - i : kTile, sums);
    for (int k = 0; k < kSums; ++k)
      a.sums[k * a.blocks + index] = sums[k];
  }

 private:
  // Sums side by side, in float32 over at most 64 terms of a lane (128 without AVX), in float64 from there on.
  template <class W> struct Sums {
    W values[kSums + 1];
  };

  void tile(int64_t first, int64_t n, double* sums) {
    const bool direct = segment.dtype == kNative;
    const R* in = logits;
    R* out = gradients;
    if (direct) {
      in = static_cast<const R*>(segment.logits) + first;
      if (kGradients) out = static_cast<R*>(segment.gradient) + first;
    } else {
      read(Operand{const_cast<void*>(segment.logits), segment.dtype}, first, n, logits);
    }
    const int64_t whole = n / kLane * kLane;
    Sums<Twice<V>> total{};
    int64_t i = 0;
    for (; i + 2 * kLane <= whole; i += 2 * kLane) {
      const auto terms = vectors(load_as<Twice<V>>(in + i), out + i);
      for (int k = 0; k < kSums; ++k)
        total.values[k] = total.values[k] + terms.values[k];
    }
    if (i < whole) {
      const auto terms = vectors(load(in + i), out + i);
      for (int k = 0; k < kSums; ++k)
        total.values[k].first += terms.values[k];
    }
    for (int k = 0; k < kSums; ++k)
      for (int lane = 0; lane < kLane; ++lane)
        sums[k] += static_cast<double>(total.values[k].first[lane]) + static_cast<double>(total.values[k].second[lane]);
    if (const int64_t rest = n - whole) {
      R padded[kLane] = {}, last[kLane];
      for (int64_t j = 0; j < rest; ++j)
        padded[j] = in[whole + j];
      const auto terms = vectors(load(padded), last);
      for (int64_t j = 0; j < rest; ++j) {
        for (int k = 0; k < kSums; ++k)
          sums[k] += static_cast<double>(terms.values[k][j]);
        if (kGradients) out[whole + j] = last[j];
      }
    }
    if (kGradients && !direct) write(gradients, n, Operand{segment.gradient, segment.dtype}, first);
  }

  // The terms of a vector or two; stores their gradients.
  template <class W> FG_HD Sums<W> vectors(W x, R* out) const {
    const GanLogit<W> logit(x);
    const GanTarget<W> target(segment);
    Sums<W> terms{};
    if constexpr (kSums > 0) terms.values[kLossTerm] = gan_loss(logit, target, kSoft);
    if constexpr (kSums > 1) {
      const W u = segment.real ? x : -x;
      terms.values[kProbabilityTerm] = gan_probability(logit);
      terms.values[kRightTerm] = gan_right(u);
      terms.values[kLogTerm] = -softplus(-u, logit);
    }
    if constexpr (kGradients) {
      const W s = splat<W>(scale);
      store(out, gan_gradient(logit, s * target.positive, s * target.negative));
    }
    return terms;
  }
};

template <class R, bool kSoft, int kSums, bool kGradients>
void run(const GanLossArguments& a, const GanSegment& segment, int64_t begin, int64_t end) {
  GanBlocks<R, kSoft, kSums, kGradients> blocks(a, segment);
  for (int64_t index = begin; index < end; ++index)
    blocks.block(index);
}

template <class R, bool kSoft> void run(const GanLossArguments& a, const GanSegment& segment, int64_t begin, int64_t end) {
  if (a.backward) return run<R, kSoft, 0, true>(a, segment, begin, end);
  if (a.monitors) return (a.gradients ? run<R, kSoft, kGanTerms, true> : run<R, kSoft, kGanTerms, false>)(a, segment, begin, end);
  (a.gradients ? run<R, kSoft, 1, true> : run<R, kSoft, 1, false>)(a, segment, begin, end);
}

template <class R> void run(const GanLossArguments& a, const GanSegment& segment, int64_t begin, int64_t end) {
  const bool soft = segment.target > 0 && segment.target < 1 && !a.backward;  // gradients have one formula
  (soft ? run<R, true> : run<R, false>)(a, segment, begin, end);
}

}  // namespace

FG_CPU_KERNEL(gan_loss, GanLossArguments) {
  const GanLossArguments& a = arguments;
  for (int k = 0; begin < end; ++k) {
    const int64_t next = k + 1 < a.count ? a.segments[k + 1].first_block : a.blocks;
    if (next <= begin) continue;
    const int64_t last = next < end ? next : end;
    const GanSegment& segment = a.segments[k];
    segment.dtype == kFloat64 ? run<double>(a, segment, begin, last) : run<float>(a, segment, begin, last);
    begin = last;
  }
}

}  // namespace fastgen
