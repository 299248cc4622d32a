// The kernels of a CUDA thread, for the host too: the part of the sums that is one thread's, and gradients.
#pragma once
#include <stdint.h>

#include "common/device_convert.h"
#include "common/device_sum.h"
#include "gan_loss/gan_loss.h"

namespace fastgen {

constexpr int kMostSegments = 32;  // of a launch, whose arguments have at most 4 KB

// The segments of one launch, from segment `first` of the arguments on.
struct GanSegments {
  GanSegment list[kMostSegments];
  int count;

  GanSegments(const GanLossArguments& a, int first) : count(a.count - first < kMostSegments ? a.count - first : kMostSegments) {
    for (int k = 0; k < count; ++k)
      list[k] = a.segments[first + k];
    for (int k = count; k < kMostSegments; ++k)
      list[k].first_block = INT64_MAX;
  }
  int64_t total(int64_t per_item) const {
    int64_t items = 0;
    for (int k = 0; k < count; ++k)
      items += list[k].count / per_item;
    return items;
  }
  // Shares thread blocks out, each to one segment; returns how many.
  int64_t place(int64_t logits_per_block) {
    int64_t blocks = 0;
    for (int k = 0; k < count; ++k) {
      list[k].first_block = blocks;
      blocks += (list[k].count + logits_per_block - 1) / logits_per_block;
    }
    return blocks;
  }
  // The segment of a thread block, by bisection.
  FG_HD const GanSegment& of(int64_t block) const {
    int k = 0;
    FG_UNROLL
    for (int step = kMostSegments / 2; step > 0; step /= 2)
      k += list[k + step].first_block <= block ? step : 0;
    return list[k];
  }
};

// ---- sums ----------------------------------------------------------------------------------------------------------------------

template <bool kMonitors, Accuracy kAccuracy, class R>
FG_HD void add_gan_terms(R x, const GanTarget<R>& target, bool soft, bool real, R (&terms)[kGanTerms]) {
  const GanLogit<R, kAccuracy> logit(x);
  terms[kLossTerm] += gan_loss(logit, target, soft);
  if (!kMonitors) return;
  const R u = real ? x : -x;
  terms[kProbabilityTerm] += gan_probability(logit);
  terms[kRightTerm] += gan_right(u);
  terms[kLogTerm] -= softplus(-u, logit);
}

template <class R> FG_HD void widen_gan_terms(const R (&few)[kGanTerms], double (&sums)[kGanTerms]) {
  FG_UNROLL
  for (int k = 0; k < kGanTerms; ++k)
    sums[k] += static_cast<double>(few[k]);
}

template <bool kMonitors> struct GanSums {
  static constexpr int kValues = kMonitors ? kGanSums : 1;
  GanSegments segments;
  SumScratch scratch;
  SumPlan plan;
  Operand loss, monitored;
  double starts[kValues];
  double* running;
  bool first, last;  // launch of those that add up

  GanSums(const GanLossArguments& a, int segment)
      : segments(a, segment),
        scratch(a.scratch),
        loss(a.loss),
        monitored(a.monitored),
        running(a.running),
        first(segment == 0),
        last(segment + kMostSegments >= a.count) {
    for (int k = 0; k < kValues; ++k)
      starts[k] = a.starts[k];
  }

  static FG_HD void add_segment(const GanSegment& s, const double (&terms)[kGanTerms], double (&values)[kValues]) {
    values[kGanLoss] += s.factor * terms[kLossTerm];
    if constexpr (kMonitors) {
      const double probability = s.mean * terms[kProbabilityTerm];
      values[kRealProbability] += s.real ? probability : 0.0;
      values[kFakeProbability] += s.real ? 0.0 : probability;
      values[kRightShare] += s.right * terms[kRightTerm];
      values[kValue] += s.mean * terms[kLogTerm];
    }
  }
  FG_HD void finish(int64_t, const double (&sums)[kValues]) const {
    FG_UNROLL
    for (int k = 0; k < kValues; ++k) {
      const double sum = (first ? starts[k] : running[k]) + sums[k];
      if (!last) {
        running[k] = sum;
      } else if (k == kGanLoss) {
        store_one<double, Any>(loss, 0, sum);
      } else {
        store_one<double, Any>(monitored, k - 1, sum);
      }
    }
  }
};

// A few terms are added in float32, and those sums in float64.
template <class X, bool kMonitors> struct GanVectorSums : GanSums<kMonitors> {
  using Base = GanSums<kMonitors>;
  using Base::segments;
  static constexpr int n = 16 / X::kBytes, kUnroll = n == 8 ? 2 : 4;

  GanVectorSums(const GanLossArguments& a, int segment) : Base(a, segment) { this->plan = SumPlan(1, segments.total(n * kUnroll)); }
  FG_HD void add(int64_t, int64_t thread, int64_t threads, double (&values)[Base::kValues]) const {
    for (int k = 0; k < segments.count; ++k) {
      const GanSegment& s = segments.list[k];
      const GanTarget<float> target(s);
      double sums[kGanTerms] = {};
      target.soft ? add_vectors<true>(s, target, thread, threads, sums) : add_vectors<false>(s, target, thread, threads, sums);
      const int64_t rest = s.count / n * n + thread;
      if (rest < s.count) {
        float few[kGanTerms] = {};
        add_gan_terms<kMonitors, kAccuracyFor<X>>(X::load(s.logits, rest), target, target.soft, s.real, few);
        widen_gan_terms(few, sums);
      }
      Base::add_segment(s, sums, values);
    }
  }

 private:
  // kSoft says once for the segment whether its target is soft: to ask at each logit would be a tenth of the instructions.
  template <bool kSoft> FG_HD void add_vectors(const GanSegment& s, const GanTarget<float>& target, int64_t thread, int64_t threads,
                                               double (&sums)[kGanTerms]) const {
    const int64_t vectors = s.count / n;
    int64_t first = thread;
    for (; first + (kUnroll - 1) * threads < vectors; first += kUnroll * threads)
      add_few<kSoft, kUnroll>(s, target, first, threads, sums);
    for (; first < vectors; first += threads)
      add_few<kSoft, 1>(s, target, first, threads, sums);
  }
  // kVectors vectors, `step` vectors apart.
  template <bool kSoft, int kVectors> FG_HD void add_few(const GanSegment& s, const GanTarget<float>& target, int64_t first,
                                                         int64_t step, double (&sums)[kGanTerms]) const {
    Words loaded[kVectors];
    FG_UNROLL
    for (int k = 0; k < kVectors; ++k)
      load_vector<X, n>({const_cast<void*>(s.logits), s.dtype}, (first + k * step) * n, loaded + k);
    float few[kGanTerms] = {};
    FG_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      FG_UNROLL
      for (int i = 0; i < n; ++i)
        add_gan_terms<kMonitors, kAccuracyFor<X>>(X::get(loaded + k, i), target, kSoft, s.real, few);
    }
    widen_gan_terms(few, sums);
  }
};

// Any dtypes, unaligned tensors.
template <class R, bool kMonitors> struct GanElementSums : GanSums<kMonitors> {
  using Base = GanSums<kMonitors>;
  using Base::segments;

  GanElementSums(const GanLossArguments& a, int segment) : Base(a, segment) { this->plan = SumPlan(1, segments.total(1)); }
  FG_HD void add(int64_t, int64_t thread, int64_t threads, double (&values)[Base::kValues]) const {
    for (int k = 0; k < segments.count; ++k) {
      const GanSegment& s = segments.list[k];
      const GanTarget<R> target(s);
      double sums[kGanTerms] = {};
      for (int64_t i = thread; i < s.count; i += threads) {
        R one[kGanTerms] = {};
        const R x = load_one<R, Any>({const_cast<void*>(s.logits), s.dtype}, i);
        half_precision(s.dtype) ? add_gan_terms<kMonitors, kApproximate>(x, target, target.soft, s.real, one)
                                : add_gan_terms<kMonitors, kAccurate>(x, target, target.soft, s.real, one);
        widen_gan_terms(one, sums);
      }
      Base::add_segment(s, sums, values);
    }
  }
};

// ---- gradients -----------------------------------------------------------------------------------------------------------------

struct GanGradients {
  GanSegments segments;
  Operand upstream;
  int64_t thread_blocks = 0;

  GanGradients(const GanLossArguments& a, int segment)
      : segments(a, segment), upstream{const_cast<void*>(a.upstream), a.upstream_dtype} {}
  int64_t blocks() const { return thread_blocks; }

  // What a segment's gradients are made of.
  template <class R> struct Scaled {
    R positive, negative;

    FG_HD Scaled(const GanSegment& s, const Operand& upstream) {
      const double scale = s.factor * (upstream.data ? load_one<double, Any>(upstream, 0) : 1.0);
      positive = static_cast<R>(scale * s.target);
      negative = static_cast<R>(scale * (1.0 - s.target));
    }
    template <Accuracy kAccuracy> FG_HD R of(R x) const { return gan_gradient(GanLogit<R, kAccuracy>(x), positive, negative); }
  };
};

template <class X> struct GanVectors : GanGradients {
  static constexpr int n = 16 / X::kBytes, kUnroll = n == 8 ? 2 : 4;
  int32_t unroll;

  GanVectors(const GanLossArguments& a, int segment)
      : GanGradients(a, segment), unroll(VectorPlan(segments.total(n), 1, kUnroll).unroll) {
    thread_blocks = segments.place(static_cast<int64_t>(kThreads) * n * unroll);
  }
  FG_HD void operator()(int64_t block, int thread) const {
    const GanSegment& s = segments.of(block);
    const Scaled<float> scaled(s, upstream);
    auto gradient = [&](float x) { return scaled.template of<kAccuracyFor<X>>(x); };
    const Operand from{const_cast<void*>(s.logits), s.dtype}, to{s.gradient, s.dtype};
    const int64_t vectors = s.count / n, first = (block - s.first_block) * kThreads * unroll;
    Words loaded[kUnroll];
    FG_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      const int64_t vector = first + k * kThreads + thread;
      if (k < unroll && vector < vectors) load_vector<X, n>(from, vector * n, loaded + k);
    }
    FG_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      const int64_t vector = first + k * kThreads + thread;
      if (k >= unroll || vector >= vectors) break;
      Words words[1];
      FG_UNROLL
      for (int i = 0; i < n; i += 2)
        X::put_pair(words, i, gradient(X::get(loaded + k, i)), gradient(X::get(loaded + k, i + 1)));
      store_vector<X, n>(to, vector * n, words);
    }
    // the segment's last block also takes the logits that make no whole vector
    const int64_t rest = vectors * n + thread;
    if (rest < s.count && vectors < first + kThreads * unroll) X::store(s.gradient, rest, gradient(X::load(s.logits, rest)));
  }
};

template <class R> struct GanElements : GanGradients {
  GanElements(const GanLossArguments& a, int segment) : GanGradients(a, segment) { thread_blocks = segments.place(kThreads); }
  FG_HD void operator()(int64_t block, int thread) const {
    const GanSegment& s = segments.of(block);
    const int64_t i = (block - s.first_block) * kThreads + thread;
    if (i >= s.count) return;
    const R x = load_one<R, Any>({const_cast<void*>(s.logits), s.dtype}, i);
    const Scaled<R> scaled(s, upstream);
    const R gradient = half_precision(s.dtype) ? scaled.template of<kApproximate>(x) : scaled.template of<kAccurate>(x);
    store_one<R, Any>({s.gradient, s.dtype}, i, gradient);
  }
};

// ---- which way, on the host ----------------------------------------------------------------------------------------------------

// The dtype of all segments where they are of one that is read in vectors, and aligned; else kFloat64.
inline DType gan_vectors(const GanLossArguments& a) {
  const DType dtype = a.count > 0 ? a.segments[0].dtype : kFloat32;
  for (int k = 0; k < a.count; ++k) {
    const GanSegment& s = a.segments[k];
    if (s.dtype != dtype || !aligned(s.logits) || (a.backward && !aligned(s.gradient))) return kFloat64;
  }
  return dtype;
}
inline bool gan_double(const GanLossArguments& a) {
  for (int k = 0; k < a.count; ++k)
    if (a.segments[k].dtype == kFloat64) return true;
  return false;
}

template <bool kMonitors, class Launch> void launch_gan_sums(const GanLossArguments& a, int segment, const Launch& launch) {
  switch (gan_vectors(a)) {
    case kFloat32: return launch.sum(GanVectorSums<Float32, kMonitors>(a, segment));
    case kBFloat16: return launch.sum(GanVectorSums<BFloat16, kMonitors>(a, segment));
    case kFloat16: return launch.sum(GanVectorSums<Float16, kMonitors>(a, segment));
    default:
      gan_double(a) ? launch.sum(GanElementSums<double, kMonitors>(a, segment))
                    : launch.sum(GanElementSums<float, kMonitors>(a, segment));
  }
}

template <class Launch> void launch_gan_gradients(const GanLossArguments& a, int segment, const Launch& launch) {
  switch (gan_vectors(a)) {
    case kFloat32: return launch(GanVectors<Float32>(a, segment));
    case kBFloat16: return launch(GanVectors<BFloat16>(a, segment));
    case kFloat16: return launch(GanVectors<Float16>(a, segment));
    default: gan_double(a) ? launch(GanElements<double>(a, segment)) : launch(GanElements<float>(a, segment));
  }
}

// One launch for every kMostSegments tensors.
template <class Launch> void run_gan_loss(const GanLossArguments& a, const Launch& launch) {
  for (int segment = 0; segment == 0 || segment < a.count; segment += kMostSegments) {
    if (a.backward) {
      launch_gan_gradients(a, segment, launch);
    } else if (a.monitors) {
      launch_gan_sums<true>(a, segment, launch);
    } else {
      launch_gan_sums<false>(a, segment, launch);
    }
  }
}

}  // namespace fastgen
