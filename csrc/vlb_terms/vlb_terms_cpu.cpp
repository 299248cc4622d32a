#include "common/cpu_sums.h"  // before the formulas, which find the vector operations by their names
#include "common/isa.h"

#include "vlb_terms/vlb_terms.h"

namespace fastgen {
namespace {

// Whether a tile has the decoder's terms, which are of some samples only and take many times as long.
template <class R> bool is_decoded(R flag) { return !(flag == 0); }  // NaN is either's
template <class R> bool any_decoded(const SampleRow<R>& row, int64_t, int64_t) {
  return is_decoded(row.get(VlbTermsColumns::kDecoder, 0)[0]);
}
template <class R> bool any_decoded(const ElementRows<R>& row, int64_t first, int64_t n) {
  const R* const flags = row.values[VlbTermsColumns::kDecoder] + first;
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i)
    count += is_decoded(flags[i]);
  return count > 0;
}

// Not inline: in each of the loops it made compiling this file take four times as long.
template <class V> FG_NOINLINE void decode(Decoder decoder, const V& x0, const V& d, const V& log_variance, VlbTerm<V>& term) {
  term = decoded(decoder, x0, d, log_variance);
}

template <class R> struct VlbTermsOp : Summed<R, VlbTermsArguments> {
  using C = VlbTermsColumns;
  static constexpr int kInputs = 4, kColumns = C::kCount;
  using Summed<R, VlbTermsArguments>::a;
  explicit VlbTermsOp(const VlbTermsArguments& arguments) : Summed<R, VlbTermsArguments>{arguments} {}

  void load_row(int64_t b, R* row) const { vlb_terms_row(a, b, row); }
  bool own_rows() const { return a.rows.t || a.weights || (a.gradient && a.each_sample); }
  static bool noiseless(const R* row) { return row[C::kSigma] == 0 && row[C::kTargetFromNoise] == 0; }

  // f(get, apart, term, i) for each vector of the tile, get(column) being its coefficients.
  template <bool kNoise, class Row, class F> FG_HD void each(const Row& row, const Tile<R>& t, int64_t first, const F& f) const {
    if (a.no_term()) {
      for (int64_t i = 0; i < t.n; i += kLanes<R>)
        f([&](int column) FG_INLINE { return row.get(column, first + i); }, Apart<Vec<R>>{}, VlbTerm<Vec<R>>{}, i);
      return;
    }
    if (a.learned) return each_learned<kNoise, true>(row, t, first, f);
    each_learned<kNoise, false>(row, t, first, f);
  }

  // Adds values up to the result, or to the second one, where there is any.
  void add_one_of_two(int k, void* second, int64_t b, int64_t samples, const R* values, int64_t n) const {
    if (k == 0) return this->add_to(this->sum, a.result, a.scale, b, samples, values, n);
    if (second) this->add_to(this->sum ? this->sum + a.blocks : nullptr, second, a.derivative_scale, b, samples, values, n);
  }

  // f(residual, weight, i) for each vector of the tile, with what the hybrid adds to the term.
  template <bool kNoise, class Row, class F>
  FG_HD void each_residual(const Row& row, const Tile<R>& t, int64_t first, const F& f) const {
    using V = Vec<R>;
    for (int64_t i = 0; i < t.n; i += kLanes<R>) {
      const V z = kNoise ? load(t.z + i) : V{};
      const V r = residual<true, kNoise>(load(t.in[1] + i), row.get(C::kTargetFromX0, first + i), load(t.in[0] + i),
                                         row.get(C::kTargetFromNoise, first + i), z);
      f(r, row.get(C::kLossWeight, first + i), i);
    }
  }

 private:
  template <bool kNoise, bool kLearned, class Row, class F>
  FG_HD void each_learned(const Row& row, const Tile<R>& t, int64_t first, const F& f) const {
    if (any_decoded(row, first, t.n)) return loop<kNoise, kLearned, true>(row, t, first, f);
    loop<kNoise, kLearned, false>(row, t, first, f);
  }
  template <bool kNoise, bool kLearned, bool kDecoded, class Row, class F>
  FG_HD void loop(const Row& row, const Tile<R>& t, int64_t first, const F& f) const {
    using V = Vec<R>;
    for (int64_t i = 0; i < t.n; i += kLanes<R>) {
      const auto get = [&](int column) FG_INLINE { return row.get(column, first + i); };
      const V x0 = load(t.in[0] + i), v = kLearned ? load(t.in[2] + i) : V{};
      V x_t = t.in[3] ? load(t.in[3] + i) : q_sample(get(C::kScale), x0);
      if (kNoise) x_t = with_noise(x_t, get(C::kSigma), load(t.z + i));
      const Apart<V> apart = means_apart(a, get, x0, load(t.in[1] + i), x_t);
      VlbTerm<V> term = divergence<kLearned>(get, apart.d, v);
      if (kDecoded) {
        VlbTerm<V> last;
        decode(a.decoder, x0, apart.d, log_variance_of<kLearned>(get, v), last);
        const auto of_divergence = get(C::kDecoder) == splat<V>(0.0);
        auto chosen = [&](V ours, V theirs) { return select(of_divergence, ours, theirs); };
        term = {chosen(term.value, last.value), chosen(term.by_d, last.by_d), chosen(term.by_log_variance, last.by_log_variance)};
      }
      f(get, apart, term, i);
    }
  }
};

// Calls f(kind) with the hybrid's loss as a constant; not where there is none.
template <class F> FG_HD void choose_loss(const VlbTermsArguments& a, const F& f) {
  if (!a.hybrid) return;
  switch (a.loss) {
    case kMse: return f(std::integral_constant<LossKind, kMse>());
    case kL1: return f(std::integral_constant<LossKind, kL1>());
    case kHuber: return f(std::integral_constant<LossKind, kHuber>());
  }
}

template <class R> struct Values : VlbTermsOp<R> {
  static constexpr int kOutputs = 2;  // the term, or the hybrid; the squared error of x̂0
  static constexpr int kSums = 2;
  using VlbTermsOp<R>::VlbTermsOp;

  void add(int k, int64_t b, int64_t samples, const R* values, int64_t n) const {
    this->add_one_of_two(k, this->a.squares, b, samples, values, n);
  }

  template <bool kNoise, class C> FG_HD void apply(const C& row, const Tile<R>& t, int64_t first) const {
    using V = Vec<R>;
    this->template each<kNoise>(row, t, first,
                                [&](const auto&, const Apart<V>& apart, const VlbTerm<V>& term, int64_t i) FG_INLINE {
                                  store(t.out[0] + i, term.value);
                                  if (this->a.squares) store(t.out[1] + i, apart.error * apart.error);
                                });
    const V delta = splat<V>(this->a.delta), factor = splat<V>(this->a.vlb_weight);
    choose_loss(this->a, [&](auto kind) FG_INLINE {
      this->template each_residual<kNoise>(row, t, first, [&](V r, V weight, int64_t i) FG_INLINE {
        store(t.out[0] + i, fma(weight, loss_of<kind.value>(r, delta), factor * load(t.out[0] + i)));
      });
    });
  }
};

template <class R> struct Derivatives : VlbTermsOp<R> {
  static constexpr int kOutputs = 2;
  static constexpr int kSums = 0;
  using VlbTermsOp<R>::VlbTermsOp;

  template <bool kNoise, class C> FG_HD void apply(const C& row, const Tile<R>& t, int64_t first) const {
    using V = Vec<R>;
    const VlbTermsArguments& a = this->a;
    this->template each<kNoise>(row, t, first,
                                [&](const auto& get, const Apart<V>& apart, const VlbTerm<V>& term, int64_t i) FG_INLINE {
                                  V by_m, by_v;
                                  vlb_derivatives(a, get, apart, term, by_m, by_v);
                                  const V upstream = get(VlbTermsColumns::kUpstream);
                                  store(t.out[0] + i, a.hybrid ? by_m : upstream * by_m);
                                  if (t.out[1]) store(t.out[1] + i, upstream * by_v);
                                });
    const V delta = splat<V>(a.delta);
    choose_loss(a, [&](auto kind) FG_INLINE {
      this->template each_residual<kNoise>(row, t, first, [&](V r, V weight, int64_t i) FG_INLINE {
        const V upstream = row.get(VlbTermsColumns::kUpstream, first + i);
        store(t.out[0] + i, upstream * fma(weight, loss_slope<kind.value>(r, delta), load(t.out[0] + i)));
      });
    });
  }
};

// The values, and the derivatives for an upstream gradient of 1: noise and exponentials made once.
template <class R> struct ValuesAndDerivatives : VlbTermsOp<R> {
  static constexpr int kOutputs = 4;  // by m, by v; the term, or the hybrid; its loss by itself
  static constexpr int kSums = 2;
  using VlbTermsOp<R>::VlbTermsOp;

  void add(int k, int64_t b, int64_t samples, const R* values, int64_t n) const {
    this->add_one_of_two(k, this->a.simple, b, samples, values, n);
  }

  template <bool kNoise, class C> FG_HD void apply(const C& row, const Tile<R>& t, int64_t first) const {
    using V = Vec<R>;
    const VlbTermsArguments& a = this->a;
    this->template each<kNoise>(row, t, first,
                                [&](const auto& get, const Apart<V>& apart, const VlbTerm<V>& term, int64_t i) FG_INLINE {
                                  V by_m, by_v;
                                  vlb_derivatives(a, get, apart, term, by_m, by_v);
                                  store(t.out[0] + i, by_m);
                                  if (t.out[1]) store(t.out[1] + i, by_v);
                                  store(t.out[2] + i, term.value);
                                });
    const V delta = splat<V>(a.delta), scale = splat<V>(a.derivative_scale), factor = splat<V>(a.vlb_weight), zero{};
    choose_loss(a, [&](auto kind) FG_INLINE {
      this->template each_residual<kNoise>(row, t, first, [&](V r, V weight, int64_t i) FG_INLINE {
        store(t.out[0] + i, fma(weight * scale, loss_slope<kind.value>(r, delta), load(t.out[0] + i)));
        const V loss = loss_of<kind.value>(r, delta);
        if (a.simple) {
          store(t.out[3] + i, fma(weight, loss, zero));
        } else {
          store(t.out[2] + i, fma(weight, loss, factor * load(t.out[2] + i)));
        }
      });
    });
  }
};

}  // namespace

FG_CPU_KERNEL(vlb_terms, VlbTermsArguments) {
  if (arguments.gradient) {
    run_elementwise<Derivatives>(arguments, begin, end);
  } else if (arguments.ahead) {
    run_sums<ValuesAndDerivatives>(arguments, begin, end);
  } else {
    run_sums<Values>(arguments, begin, end);
  }
}

}  // namespace fastgen
