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

  // f(log σ², log σ'², apart, i) for each vector of the tile.
  template <bool kOtherVariance, class F> FG_HD void each(const Tile<R>& t, const F& f) const {
    using V = Vec<R>;
    for (int64_t i = 0; i < t.n; i += kLanes<R>) {
      const V log_variance = load(t.in[0] + i), other_log_variance = kOtherVariance ? load(t.in[2] + i) : V{};
      const V mean = load(t.in[1] + i), other_mean = t.in[3] ? load(t.in[3] + i) : V{};
      f(log_variance, other_log_variance,
        gaussians_apart<kOtherVariance>(a.bounds, log_variance, mean, other_log_variance, other_mean), i);
    }
  }
};

template <class R> struct Values : GaussianKlOp<R> {
  static constexpr int kOutputs = 1;
  static constexpr int kSums = 1;
  using GaussianKlOp<R>::GaussianKlOp;

  template <bool kNoise, class Row> FG_HD void apply(const Row&, const Tile<R>& t, int64_t) const {
    if constexpr (!kNoise) {
      const auto put = [&](const auto&, const auto&, const auto& apart, int64_t i)
                           FG_INLINE { store(t.out[0] + i, kl_of(apart.ratio, apart.w)); };
      t.in[2] ? this->template each<true>(t, put) : this->template each<false>(t, put);
    }
  }
};

template <class R> struct Derivatives : GaussianKlOp<R> {
  static constexpr int kOutputs = 3;
  static constexpr int kSums = 0;
  using GaussianKlOp<R>::GaussianKlOp;

  template <bool kNoise, class Row> FG_HD void apply(const Row& row, const Tile<R>& t, int64_t first) const {
    if constexpr (!kNoise) t.in[2] ? derive<true>(row, t, first) : derive<false>(row, t, first);
  }

 private:
  template <bool kOtherVariance, class Row> FG_HD void derive(const Row& row, const Tile<R>& t, int64_t first) const {
    using V = Vec<R>;
    this->template each<kOtherVariance>(
        t, [&](const V& log_variance, const V& other_log_variance, const GaussiansApart<V>& apart, int64_t i) FG_INLINE {
          const V upstream = row.get(GaussianKlColumns::kUpstream, first + i);
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
