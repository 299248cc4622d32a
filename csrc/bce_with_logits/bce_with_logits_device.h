// The kernels of a CUDA thread, for the host too: losses or gradients element by element, and the part of a sum that is one
// thread's. Operands are flat: element i of each lies at i, or at 0 where there is a single one.
#pragma once
#include <initializer_list>
#include <type_traits>

#include "bce_with_logits/bce_with_logits.h"
#include "common/device_convert.h"
#include "common/device_sum.h"

namespace fastgen {

// X, Y: Float32 … of input and target. What has one value for each logit besides is of their promoted type.
template <class X_, class Y_> struct BceTypes {
  using R = float;
  using X = X_;
  using Y = Y_;
  using Wide = X_;  // replaced below where the target is the wider one
  static constexpr int n = X::kBytes == 2 || Y::kBytes == 2 ? 8 : 4, kUnroll = n == 8 ? 2 : 4;
  static constexpr Accuracy kAccuracy = kAccuracyFor<Y>;  // X is no wider
  static constexpr bool kWeighted = false;
};
template <class X_> struct BceWideTypes : BceTypes<X_, Float32> {
  using Wide = Float32;
};
// The same where there is a weight, a pos_weight, or a gradient for each logit. Its kernels are separate so that the others need
// not hold those operands, nor ask for each logit which of them there are: a sum of float32 takes 71 registers there, and 102 here.
template <class Types> struct Weighted : Types {
  static constexpr bool kWeighted = true;
};

// Whether a kernel for any dtypes approximates. It does where BceTypes::kAccuracy says so for the same dtypes, half precision to
// half precision or to a sum, so that a value does not depend on the alignment.
FG_HD bool approximate(const BceWithLogitsArguments& a) {
  const DType x = a.input.dtype;
  return half_precision(x) && a.target.dtype == x && (a.reduced || a.out.dtype == x);
}

// A vector of logits and what goes with them.
template <class Types> struct BceVector {
  static constexpr int n = Types::n;
  using Wide = typename Types::Wide;
  Words x[2], y[2], weight[2], pos_weight[2], gradient[2];

  FG_HD void load(const BceWithLogitsArguments& a, int64_t i) {
    load_vector<typename Types::X, n>(flat(a.input), i, x);
    load_vector<typename Types::Y, n>(flat(a.target), i, y);
    if (!Types::kWeighted) return;
    if (full(a.weight)) load_vector<Wide, n>(flat(a.weight), i, weight);
    if (full(a.pos_weight)) load_vector<Wide, n>(flat(a.pos_weight), i, pos_weight);
    if (full(a.gradient)) load_vector<Wide, n>(flat(a.gradient), i, gradient);
  }
  static FG_HD bool full(const BceOperand& o) { return o.data && !o.single; }
};

// The values that are the same for all logits: 1 where there is no such operand. Read once by each thread.
template <class R> struct BceSingles {
  R weight, pos_weight, gradient;

  FG_HD explicit BceSingles(const BceWithLogitsArguments& a)
      : weight(value(a.weight)), pos_weight(value(a.pos_weight)), gradient(value(a.gradient) * static_cast<R>(a.scale)) {}
  static FG_HD R value(const BceOperand& o) { return o.data && o.single ? load_one<R, Any>(flat(o), 0) : R(1); }
};

// The losses of a vector, or their gradients.
template <class Types, bool kBackward>
FG_HD void bce_values(const BceWithLogitsArguments& a, const BceSingles<float>& one, const BceVector<Types>& v, float* values) {
  using Wide = typename Types::Wide;
  constexpr Accuracy kAccuracy = Types::kAccuracy;
  FG_UNROLL
  for (int i = 0; i < Types::n; ++i) {
    const float x = Types::X::get(v.x, i), y = Types::Y::get(v.y, i);
    if constexpr (Types::kWeighted) {
      const float w = v.full(a.weight) ? Wide::get(v.weight, i) : one.weight;
      const float p = v.full(a.pos_weight) ? Wide::get(v.pos_weight, i) : one.pos_weight;
      values[i] = kBackward ? bce_gradient<kAccuracy>(x, y, w, p) : bce_loss<kAccuracy>(x, y, w, p);
      if (kBackward) values[i] *= v.full(a.gradient) ? Wide::get(v.gradient, i) : one.gradient;
    } else {
      values[i] = kBackward ? one.gradient * bce_gradient<kAccuracy>(x, y, One{}, One{}) : bce_loss<kAccuracy>(x, y, One{}, One{});
    }
  }
}

// The same for one logit, of any dtypes.
template <class R, bool kBackward, bool kWeighted, Accuracy kAccuracy>
FG_HD R bce_value(const BceWithLogitsArguments& a, const BceSingles<R>& one, int64_t i) {
  const R x = load_one<R, Any>(flat(a.input), a.input.single ? 0 : i);
  const R y = load_one<R, Any>(flat(a.target), a.target.single ? 0 : i);
  auto read = [i](const BceOperand& o, R single) { return o.data && !o.single ? load_one<R, Any>(flat(o), i) : single; };
  if (kWeighted && (a.weight.data || a.pos_weight.data)) {
    const R w = read(a.weight, one.weight), p = read(a.pos_weight, one.pos_weight);
    return kBackward ? read(a.gradient, one.gradient) * bce_gradient<kAccuracy>(x, y, w, p) : bce_loss<kAccuracy>(x, y, w, p);
  }
  const R gradient = kWeighted && kBackward ? read(a.gradient, one.gradient) : one.gradient;
  return kBackward ? gradient * bce_gradient<kAccuracy>(x, y, One{}, One{}) : bce_loss<kAccuracy>(x, y, One{}, One{});
}
template <class R, bool kBackward> FG_HD R bce_value(const BceWithLogitsArguments& a, const BceSingles<R>& one, int64_t i) {
  return approximate(a) ? bce_value<R, kBackward, true, kApproximate>(a, one, i)
                        : bce_value<R, kBackward, true, kAccurate>(a, one, i);
}
// Losses (kBackward: gradients) to memory, 128 bits at a time.
template <class Types, bool kBackward> struct BceVectors {
  static constexpr int n = Types::n, kUnroll = Types::kUnroll;
  using Out = typename std::conditional<kBackward, typename Types::X, typename Types::Wide>::type;
  BceWithLogitsArguments a;
  VectorPlan plan;
  int64_t left_over;  // logits after the last whole item, each a thread's

  explicit BceVectors(const BceWithLogitsArguments& arguments)
      : a(arguments), plan(a.count / n, 1, kUnroll), left_over(a.count % n + plan.left_over * n) {}
  int64_t blocks() const { return plan.items.blocks(left_over); }

  FG_HD void operator()(int64_t block, int thread) const {
    const int64_t item = block * kThreads + thread;
    const BceSingles<float> one(a);
    if (item >= plan.items.count) {
      const int64_t i = plan.first_left_over() * n + item - plan.items.count;
      if (i < a.count) store_one<float, Out>(a.out, i, bce_value<float, kBackward, Types::kWeighted, Types::kAccuracy>(a, one, i));
      return;
    }
    BceVector<Types> vectors[kUnroll];
    FG_UNROLL
    for (int k = 0; k < kUnroll; ++k)
      if (k < plan.unroll) vectors[k].load(a, plan.vector(item, k) * n);
    FG_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      if (k >= plan.unroll) return;
      float values[n];
      bce_values<Types, kBackward>(a, one, vectors[k], values);
      Words words[2];
      FG_UNROLL
      for (int i = 0; i < n; i += 2)
        Out::put_pair(words, i, values[i], values[i + 1]);
      store_vector<Out, n>(a.out, plan.vector(item, k) * n, words);
    }
  }
};

template <class R, bool kBackward> struct BceElements {
  BceWithLogitsArguments a;
  ItemPlan plan;

  explicit BceElements(const BceWithLogitsArguments& arguments) : a(arguments), plan(a.count, 1) {}
  int64_t blocks() const { return plan.blocks(); }
  FG_HD void operator()(int64_t block, int thread) const {
    const int64_t i = block * kThreads + thread;
    if (i < plan.count) store_one<R, Any>(a.out, i, bce_value<R, kBackward>(a, BceSingles<R>(a), i));
  }
};

template <class Part> FG_HD void finish_bce(const Part& part, double sum) {
  const BceWithLogitsArguments& a = part.a;
  store_one<double, Any>(a.out, 0, a.reduction == kMean ? sum / static_cast<double>(a.count) : sum);
}

// A thread's part of the sum: a few losses are added in float32, and those sums in float64.
template <class Types> struct BceVectorSum {
  static constexpr int kValues = 1, n = Types::n, kUnroll = Types::kUnroll;
  BceWithLogitsArguments a;
  SumScratch scratch;
  int64_t vectors;
  SumPlan plan;

  explicit BceVectorSum(const BceWithLogitsArguments& arguments)
      : a(arguments), scratch(a.scratch), vectors(a.count / n), plan(1, vectors / kUnroll) {}
  FG_HD void add(int64_t, int64_t thread, int64_t threads, double (&sum)[1]) const {
    const BceSingles<float> one(a);
    int64_t first = thread;
    for (; first + (kUnroll - 1) * threads < vectors; first += kUnroll * threads)
      sum[0] += static_cast<double>(few<kUnroll>(one, first, threads));
    for (; first < vectors; first += threads)
      sum[0] += static_cast<double>(few<1>(one, first, threads));
    const int64_t rest = vectors * n + thread;
    if (rest < a.count) sum[0] += static_cast<double>(bce_value<float, false, Types::kWeighted, Types::kAccuracy>(a, one, rest));
  }
  FG_HD void finish(int64_t, const double (&sum)[1]) const { finish_bce(*this, sum[0]); }

 private:
  // The losses of kVectors vectors, `step` vectors apart.
  template <int kVectors> FG_HD float few(const BceSingles<float>& one, int64_t first, int64_t step) const {
    BceVector<Types> loaded[kVectors];
    FG_UNROLL
    for (int k = 0; k < kVectors; ++k)
      loaded[k].load(a, (first + k * step) * n);
    float total = 0;
    FG_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      float values[n];
      bce_values<Types, false>(a, one, loaded[k], values);
      FG_UNROLL
      for (int i = 0; i < n; ++i)
        total += values[i];
    }
    return total;
  }
};

template <class R> struct BceElementSum {
  static constexpr int kValues = 1;
  BceWithLogitsArguments a;
  SumScratch scratch;
  SumPlan plan;

  explicit BceElementSum(const BceWithLogitsArguments& arguments) : a(arguments), scratch(a.scratch), plan(1, a.count) {}
  FG_HD void add(int64_t, int64_t thread, int64_t threads, double (&sum)[1]) const {
    const BceSingles<R> one(a);
    for (int64_t i = thread; i < a.count; i += threads)
      sum[0] += static_cast<double>(bce_value<R, false>(a, one, i));
  }
  FG_HD void finish(int64_t, const double (&sum)[1]) const { finish_bce(*this, sum[0]); }
};

// ---- which way, on the host ----------------------------------------------------------------------------------------------------

// Calls visit(types) with the BceTypes of these arguments; false where they are not aligned, or of other types.
template <class Visit> bool visit_bce_types(const BceWithLogitsArguments& a, Visit visit) {
  const DType x = a.input.dtype, y = a.target.dtype, wide = x == y ? x : kFloat32;
  if (a.is_double || (x != y && y != kFloat32)) return false;
  if (!aligned(a.input.data) || !aligned(a.target.data) || !aligned(a.out.data) || a.input.single) return false;
  for (const BceOperand& o : {a.weight, a.pos_weight, a.gradient})
    if (o.data && !o.single && (o.dtype != wide || !aligned(o.data))) return false;
  if (a.out.data && !a.reduced && a.out.dtype != (a.backward ? x : wide)) return false;
  const bool weighted = a.weight.data || a.pos_weight.data || (a.gradient.data && !a.gradient.single);
  auto either = [&](auto types) { weighted ? visit(Weighted<decltype(types)>{}) : visit(types); };
  switch (x) {
    case kFloat32: either(BceTypes<Float32, Float32>{}); return true;
    case kBFloat16: x == y ? either(BceTypes<BFloat16, BFloat16>{}) : either(BceWideTypes<BFloat16>{}); return true;
    case kFloat16: x == y ? either(BceTypes<Float16, Float16>{}) : either(BceWideTypes<Float16>{}); return true;
    default: return false;
  }
}

template <class R, class Launch> void launch_bce_elements(const BceWithLogitsArguments& a, const Launch& launch) {
  a.backward ? launch(BceElements<R, true>(a)) : launch(BceElements<R, false>(a));
}

// The one launch: launch(way) for elements, launch.sum(part) for a sum.
template <class Launch> void run_bce_with_logits(const BceWithLogitsArguments& a, const Launch& launch) {
  if (a.reduced) {
    if (visit_bce_types(a, [&](auto types) { launch.sum(BceVectorSum<decltype(types)>(a)); })) return;
    a.is_double ? launch.sum(BceElementSum<double>(a)) : launch.sum(BceElementSum<float>(a));
  } else if (a.count > 0) {
    const bool vectors = visit_bce_types(a, [&](auto types) {
      a.backward ? launch(BceVectors<decltype(types), true>(a)) : launch(BceVectors<decltype(types), false>(a));
    });
    if (!vectors) a.is_double ? launch_bce_elements<double>(a, launch) : launch_bce_elements<float>(a, launch);
  }
}

}  // namespace fastgen
