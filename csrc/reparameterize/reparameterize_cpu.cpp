#include "common/cpu_sums.h"  // before the formulas, which find the vector operations by their names
#include "common/isa.h"

#include "reparameterize/reparameterize.h"

namespace fastgen {
namespace {

template <class R> struct ReparameterizeOp : Summed<R, ReparameterizeArguments> {
  static constexpr int kInputs = 3, kColumns = GaussianKlColumns::kCount;
  using Summed<R, ReparameterizeArguments>::a;
  explicit ReparameterizeOp(const ReparameterizeArguments& arguments) : Summed<R, ReparameterizeArguments>{arguments} {}

  void load_row(int64_t b, R* row) const { gaussian_kl_row(a, b, row); }
  bool own_rows() const { return a.gradient != nullptr; }
  static bool noiseless(const R*) { return false; }
};

// The loops are not inline: the driver calls each in four places for two kinds of rows, and compiling those took four times as
// long.
template <class R> struct Samples : ReparameterizeOp<R> {
  static constexpr int kOutputs = 1;
  static constexpr int kSums = 0;
  using ReparameterizeOp<R>::ReparameterizeOp;

  template <bool kNoise, class Row> FG_HD void apply(const Row&, const Tile<R>& t, int64_t) const {
    if (kNoise) loop(this->a.bounds, t);
  }

 private:
  static FG_NOINLINE void loop(const LogVarianceBounds& bounds, const Tile<R>& t) {
    by_twos<R>(t.n, [&](const auto& v, int64_t i) FG_INLINE {
      using V = std::decay_t<decltype(v)>;
      const V sigma = sigma_of(bounds, load_as<V>(t.in[0] + i));
      store(t.out[0] + i, reparameterize(sigma, load_as<V>(t.in[1] + i), load_as<V>(t.z + i)));
    });
  }
};

// Samples, and the divergence added up.
template <class R> struct SamplesAndKl : ReparameterizeOp<R> {
  static constexpr int kOutputs = 2;
  static constexpr int kSums = 1;
  using ReparameterizeOp<R>::ReparameterizeOp;

  template <bool kNoise, class Row> FG_HD void apply(const Row&, const Tile<R>& t, int64_t) const {
    if (kNoise) loop(this->a.bounds, t);
  }

 private:
  static FG_NOINLINE void loop(const LogVarianceBounds& bounds, const Tile<R>& t) {
    by_twos<R>(t.n, [&](const auto& v, int64_t i) FG_INLINE {
      using V = std::decay_t<decltype(v)>;
      const auto sigma = deviation_ratio(half_log_variance(bounds, load_as<V>(t.in[0] + i)));
      const V mean = load_as<V>(t.in[1] + i);
      store(t.out[0] + i, reparameterize(sigma.value, mean, load_as<V>(t.z + i)));
      store(t.out[1] + i, kl_of(sigma, mean));
    });
  }
};

template <class R> struct Derivatives : ReparameterizeOp<R> {
  static constexpr int kOutputs = 2;  // by log σ², by μ
  static constexpr int kSums = 0;
  using ReparameterizeOp<R>::ReparameterizeOp;

  template <bool kNoise, class Row> FG_HD void apply(const Row& row, const Tile<R>& t, int64_t first) const {
    if (!kNoise) return;
    t.in[1] ? of_both(this->a.bounds, row, t, first) : of_sample(this->a.bounds, t);
  }

 private:
  static FG_NOINLINE void of_sample(const LogVarianceBounds& bounds, const Tile<R>& t) {
    by_twos<R>(t.n, [&](const auto& v, int64_t i) FG_INLINE {
      using V = std::decay_t<decltype(v)>;
      const V log_variance = load_as<V>(t.in[0] + i), sigma = sigma_of(bounds, log_variance);
      const V of_z = z_by_log_variance(load_as<V>(t.in[2] + i), sigma, load_as<V>(t.z + i));
      store(t.out[0] + i, where_inside(bounds, log_variance, of_z));
    });
  }
  template <class Row>
  static FG_NOINLINE void of_both(const LogVarianceBounds& bounds, const Row& row, const Tile<R>& t, int64_t first) {
    by_twos<R>(t.n, [&](const auto& v, int64_t i) FG_INLINE {
      using V = std::decay_t<decltype(v)>;
      const V log_variance = load_as<V>(t.in[0] + i), gradient = load_as<V>(t.in[2] + i);
      const V upstream = column_of(row, GaussianKlColumns::kUpstream, v, first + i);
      const auto sigma = deviation_ratio(half_log_variance(bounds, log_variance));
      const V of_z = z_by_log_variance(gradient, sigma.value, load_as<V>(t.z + i));
      store(t.out[0] + i, where_inside(bounds, log_variance, fma(upstream, kl_by_log_variance(sigma), of_z)));
      store(t.out[1] + i, fma(upstream, load_as<V>(t.in[1] + i), gradient));
    });
  }
};

}  // namespace

FG_CPU_KERNEL(reparameterize, ReparameterizeArguments) {
  if (arguments.backward) return run_elementwise<Derivatives>(arguments, begin, end);
  arguments.result ? run_sums<SamplesAndKl>(arguments, begin, end) : run_elementwise<Samples>(arguments, begin, end);
}

}  // namespace fastgen
