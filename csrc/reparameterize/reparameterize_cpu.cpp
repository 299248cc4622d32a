#include "common/cpu_sums.h"  // before the formulas, which find the vector operations by their names
#include "common/isa.h"

#include "reparameterize/reparameterize.h"

namespace fastgen {
namespace {

template <class R> struct ReparameterizeOp : Summed<R, ReparameterizeArguments> {
  static constexpr int kInputs = 3, kColumns = ReparameterizeColumns::kCount;
  using Summed<R, ReparameterizeArguments>::a;
  explicit ReparameterizeOp(const ReparameterizeArguments& arguments) : Summed<R, ReparameterizeArguments>{arguments} {}

  void load_row(int64_t b, R* row) const { reparameterize_row(a, b, row); }
  bool own_rows() const { return a.gradient != nullptr; }
  static bool noiseless(const R*) { return false; }
};

template <class R> struct Samples : ReparameterizeOp<R> {
  static constexpr int kOutputs = 1;
  static constexpr int kSums = 0;
  using ReparameterizeOp<R>::ReparameterizeOp;

  template <bool kNoise, class Row> FG_HD void apply(const Row&, const Tile<R>& t, int64_t) const {
    if constexpr (kNoise) {
      for (int64_t i = 0; i < t.n; i += kLanes<R>) {
        const Vec<R> sigma = sigma_of(this->a.bounds, load(t.in[0] + i));
        store(t.out[0] + i, reparameterize(sigma, load(t.in[1] + i), load(t.z + i)));
      }
    }
  }
};

// Samples, and the divergence added up.
template <class R> struct SamplesAndKl : ReparameterizeOp<R> {
  static constexpr int kOutputs = 2;
  static constexpr int kSums = 1;
  using ReparameterizeOp<R>::ReparameterizeOp;

  template <bool kNoise, class Row> FG_HD void apply(const Row&, const Tile<R>& t, int64_t) const {
    if constexpr (kNoise) {
      for (int64_t i = 0; i < t.n; i += kLanes<R>) {
        const auto sigma = deviation_ratio(half_log_variance(this->a.bounds, load(t.in[0] + i)));
        const Vec<R> mean = load(t.in[1] + i);
        store(t.out[0] + i, reparameterize(sigma.value, mean, load(t.z + i)));
        store(t.out[1] + i, kl_of(sigma, mean));
      }
    }
  }
};

template <class R> struct Derivatives : ReparameterizeOp<R> {
  static constexpr int kOutputs = 2;  // by log σ², by μ
  static constexpr int kSums = 0;
  using ReparameterizeOp<R>::ReparameterizeOp;

  template <bool kNoise, class Row> FG_HD void apply(const Row& row, const Tile<R>& t, int64_t first) const {
    if constexpr (kNoise) {
      const auto& bounds = this->a.bounds;
      if (!t.in[1]) {
        for (int64_t i = 0; i < t.n; i += kLanes<R>) {
          const Vec<R> log_variance = load(t.in[0] + i), sigma = sigma_of(bounds, log_variance);
          const Vec<R> of_z = z_by_log_variance(load(t.in[2] + i), sigma, load(t.z + i));
          store(t.out[0] + i, where_inside(bounds, log_variance, of_z));
        }
        return;
      }
      for (int64_t i = 0; i < t.n; i += kLanes<R>) {
        const Vec<R> log_variance = load(t.in[0] + i), gradient = load(t.in[2] + i);
        const Vec<R> upstream = row.get(ReparameterizeColumns::kUpstream, first + i);
        const auto sigma = deviation_ratio(half_log_variance(bounds, log_variance));
        const Vec<R> of_z = z_by_log_variance(gradient, sigma.value, load(t.z + i));
        store(t.out[0] + i, where_inside(bounds, log_variance, fma(upstream, kl_by_log_variance(sigma), of_z)));
        store(t.out[1] + i, fma(upstream, load(t.in[1] + i), gradient));
      }
    }
  }
};

}  // namespace

FG_CPU_KERNEL(reparameterize, ReparameterizeArguments) {
  if (arguments.backward) return run_elementwise<Derivatives>(arguments, begin, end);
  arguments.result ? run_sums<SamplesAndKl>(arguments, begin, end) : run_elementwise<Samples>(arguments, begin, end);
}

}  // namespace fastgen
