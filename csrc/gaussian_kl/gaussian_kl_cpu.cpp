#include "common/cpu_sums.h"  // before the formulas, which find the vector operations by their names
#include "common/isa.h"

#include "gaussian_kl/gaussian_kl.h"

namespace fastgen {
namespace {

template <class R> struct GaussianKlOp : Summed<R, GaussianKlArguments> {
  static constexpr int kInputs = 4, kColumns = GaussianKlColumns::kCount;
  using Summed<R, GaussianKlArguments>::a;
  explicit GaussianKlOp(const GaussianKlArguments& arguments) : Summed<R, GaussianKlArguments>{arguments} {}

  void load_row(int64_t b, R* row) const { gaussian_kl_row(a, b, row); }
  bool own_rows() const { return a.gradient != nullptr; }
  static bool noiseless(const R*) { return true; }

  // f(log σ², log σ'², apart, i) for the vectors of the tile, two at a time.
  template <bool kOtherVariance, class F> FG_HD void each(const Tile<R>& t, const F& f) const {
    by_twos<R>(t.n, [&](const auto& v, int64_t i) FG_INLINE {
      using V = std::decay_t<decltype(v)>;
      const V zero = splat<V>(0.0), log_variance = load_as<V>(t.in[0] + i), mean = load_as<V>(t.in[1] + i);
      const V other_log_variance = kOtherVariance ? load_as<V>(t.in[2] + i) : zero;
      const V other_mean = t.in[3] ? load_as<V>(t.in[3] + i) : zero;
      f(log_variance, other_log_variance,
        gaussians_apart<kOtherVariance>(a.bounds, log_variance, mean, other_log_variance, other_mean), i);
    });
  }
};

template <class R> struct Values : GaussianKlOp<R> {
  static constexpr int kOutputs = 1;
  static constexpr int kSums = 1;
  using GaussianKlOp<R>::GaussianKlOp;

  template <bool kNoise, class Row> FG_HD void apply(const Row&, const Tile<R>& t, int64_t) const {
    if (!kNoise) loops(t);
  }

 private:
  // Not inline: the driver calls it in four places for two kinds of rows.
  FG_NOINLINE void loops(const Tile<R>& t) const {
    const auto put = [&](const auto&, const auto&, const auto& apart, int64_t i)
                         FG_INLINE { store(t.out[0] + i, kl_of(apart.ratio, apart.w)); };
    t.in[2] ? this->template each<true>(t, put) : this->template each<false>(t, put);
  }
};

template <class R> struct Derivatives : GaussianKlOp<R> {
  static constexpr int kOutputs = 3;
  static constexpr int kSums = 0;
  using GaussianKlOp<R>::GaussianKlOp;

  template <bool kNoise, class Row> FG_HD void apply(const Row& row, const Tile<R>& t, int64_t first) const {
    if (kNoise) return;
    t.in[2] ? derive<true>(row, t, first) : derive<false>(row, t, first);
  }

 private:
  template <bool kOtherVariance, class Row> FG_NOINLINE void derive(const Row& row, const Tile<R>& t, int64_t first) const {
    this->template each<kOtherVariance>(
        t, [&](const auto& log_variance, const auto& other_log_variance, const auto& apart, int64_t i) FG_INLINE {
          const auto upstream = column_of(row, GaussianKlColumns::kUpstream, log_variance, first + i);
          const auto found = kl_derivatives<kOtherVariance>(this->a.bounds, log_variance, other_log_variance, apart, upstream);
          store(t.out[0] + i, found.by_log_variance);
          store(t.out[1] + i, found.by_mean);
          if (kOtherVariance) store(t.out[2] + i, found.by_other_log_variance);
        });
  }
};

}  // namespace

FG_CPU_KERNEL(gaussian_kl, GaussianKlArguments) {
  arguments.gradient ? run_elementwise<Derivatives>(arguments, begin, end) : run_sums<Values>(arguments, begin, end);
}

}  // namespace fastgen
