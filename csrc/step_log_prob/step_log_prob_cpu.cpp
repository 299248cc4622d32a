#include "common/cpu_sums.h"  // before the formulas, which find the vector operations by their names
#include "common/isa.h"

#include "step_log_prob/step_log_prob.h"

namespace fastgen {
namespace {

template <bool kValue> struct Flag {
  static constexpr bool value = kValue;
};

template <class R> struct StepLogProbOp : Summed<R, StepLogProbArguments> {
  using C = StepLogProbColumns;
  static constexpr int kInputs = 4, kColumns = C::kCountWithBound;
  using Summed<R, StepLogProbArguments>::a;
  explicit StepLogProbOp(const StepLogProbArguments& arguments) : Summed<R, StepLogProbArguments>{arguments} {}

  void load_row(int64_t b, R* row) const { step_log_prob_row(a, b, row); }
  bool own_rows() const { return a.rows.t || a.gradient; }
  static bool noiseless(const R* row) { return row[C::kSigma] == 0; }

  // f(clip, learned), which say by their types what the options are.
  template <class F> FG_HD void choose(const F& f) const {
    if (a.clip_kind == kNoClip) return a.learned ? f(Flag<false>(), Flag<true>()) : f(Flag<false>(), Flag<false>());
    a.learned ? f(Flag<true>(), Flag<true>()) : f(Flag<true>(), Flag<false>());
  }

  // f(get, derivatives, log-probability, i) for each vector of the tile.
  template <class Row, class F> FG_HD void derive(const Row& row, const Tile<R>& t, int64_t first, const F& f) const {
    choose([&](auto clip, auto learned) FG_INLINE {
      for (int64_t i = 0; i < t.n; i += kLanes<R>) {
        const auto get = [&](int column) FG_INLINE { return row.get(column, first + i); };
        const StepMean<Vec<R>> mean = step_mean<clip.value>(get, load(t.in[0] + i), load(t.in[1] + i));
        const Vec<R> d = load(t.in[3] + i) - mean.value;
        const auto of = log_prob<learned.value>(get, d, learned.value ? load(t.in[2] + i) : Vec<R>{});
        f(get, log_prob_derivatives<clip.value>(get, mean, of, a.scale), of.value, i);
      }
    });
  }
};

template <class R> struct Values : StepLogProbOp<R> {
  static constexpr int kOutputs = 1;
  static constexpr int kSums = 1;
  using StepLogProbOp<R>::StepLogProbOp;

  template <bool kNoise, class Row> FG_HD void apply(const Row& row, const Tile<R>& t, int64_t first) const {
    this->choose([&](auto clip, auto learned) FG_INLINE { loop<clip.value, learned.value>(row, t, first); });
  }

 private:
  template <bool kClip, bool kLearned, class Row> FG_HD void loop(const Row& row, const Tile<R>& t, int64_t first) const {
    for (int64_t i = 0; i < t.n; i += kLanes<R>) {
      const auto get = [&](int column) FG_INLINE { return row.get(column, first + i); };
      const Vec<R> mean = step_mean<kClip>(get, load(t.in[0] + i), load(t.in[1] + i)).value;
      store(t.out[0] + i, log_prob<kLearned>(get, load(t.in[3] + i) - mean, kLearned ? load(t.in[2] + i) : Vec<R>{}).value);
    }
  }
};

template <class R> struct Weights : StepLogProbOp<R> {
  static constexpr int kOutputs = 1, kColumns = StepLogWeightColumns::kRowCount;
  static constexpr bool kSums = true;
  using StepLogProbOp<R>::StepLogProbOp;

  void load_row(int64_t b, R* row) const { step_log_weight_row(this->a, b, row); }
  template <bool kNoise, class Row> FG_HD void apply(const Row& row, const Tile<R>& t, int64_t first) const {
    this->choose([&](auto clip, auto learned) FG_INLINE { loop<clip.value, learned.value>(row, t, first); });
  }

 private:
  template <bool kClip, bool kLearned, class Row> FG_HD void loop(const Row& row, const Tile<R>& t, int64_t first) const {
    for (int64_t i = 0; i < t.n; i += kLanes<R>) {
      const auto get = [&](int column) FG_INLINE { return row.get(column, first + i); };
      const Vec<R> x = load(t.in[0] + i), m = load(t.in[1] + i), v = kLearned ? load(t.in[2] + i) : Vec<R>{};
      store(t.out[0] + i, step_log_weight<kClip, kLearned>(get, load(t.in[3] + i), x, m, v));
    }
  }
};

// Makes x_{t−1}, and adds up the log-probabilities of what is stored of it. Second output: μ, then the log-probability.
template <class R> struct Steps : StepLogProbOp<R> {
  static constexpr int kOutputs = 2;
  static constexpr int kSums = 1;
  using StepLogProbOp<R>::StepLogProbOp;
  using StepLogProbOp<R>::a;

  template <bool kNoise, class Row> FG_HD void apply(const Row& row, const Tile<R>& tile, int64_t first) const {
    alignas(64) R m[kTile];
    Tile<R> t = tile;
    if (t.in[3]) {
      const Vec<R> scale = splat<Vec<R>>(a.guidance);
      for (int64_t i = 0; i < t.n; i += kLanes<R>)
        store(m + i, guided(load(t.in[1] + i), load(t.in[3] + i), scale));
      t.in[1] = m;
    }
    this->choose([&](auto clip, auto learned) FG_INLINE {
      steps<kNoise, clip.value, learned.value>(row, t, first);
      as_stored(a.out[0].dtype, t.n, t.out[0]);
      log_probs<learned.value>(row, t, first);
    });
  }

 private:
  template <bool kNoise, bool kClip, bool kLearned, class Row>
  FG_HD void steps(const Row& row, const Tile<R>& t, int64_t first) const {
    constexpr ClipKind kind = kClip ? kClamp : kNoClip;
    for (int64_t i = 0; i < t.n; i += kLanes<R>) {
      const auto get = [&](int column) FG_INLINE { return row.get(column, first + i); };
      const Vec<R> x = load(t.in[0] + i), m = load(t.in[1] + i);
      Vec<R> v{}, z{}, y, mean, x0;
      if (kLearned) v = load(t.in[2] + i);
      if (kNoise) z = load(t.z + i);
      ddpm_step<kNoise, kind, kLearned, false>(get, x, m, v, z, y, x0);
      ddpm_step<false, kind, false, false>(get, x, m, v, z, mean, x0);
      store(t.out[0] + i, y);
      store(t.out[1] + i, mean);
    }
  }
  template <bool kLearned, class Row> FG_HD void log_probs(const Row& row, const Tile<R>& t, int64_t first) const {
    for (int64_t i = 0; i < t.n; i += kLanes<R>) {
      const auto get = [&](int column) FG_INLINE { return row.get(column, first + i); };
      const Vec<R> d = load(t.out[0] + i) - load(t.out[1] + i);
      store(t.out[1] + i, log_prob<kLearned>(get, d, kLearned ? load(t.in[2] + i) : Vec<R>{}).value);
    }
  }
};

template <class R> struct Derivatives : StepLogProbOp<R> {
  static constexpr int kOutputs = 3;
  static constexpr int kSums = 0;
  using StepLogProbOp<R>::StepLogProbOp;

  template <bool kNoise, class Row> FG_HD void apply(const Row& row, const Tile<R>& t, int64_t first) const {
    this->derive(row, t, first, [&](const auto& get, const auto& found, const auto&, int64_t i) FG_INLINE {
      const Vec<R> upstream = get(StepLogProbColumns::kUpstream);
      store(t.out[0] + i, upstream * found.by_m);
      if (t.out[1]) store(t.out[1] + i, upstream * found.by_v);
      if (t.out[2]) store(t.out[2] + i, upstream * found.by_x);
    });
  }
};

// The values, and the derivatives for an upstream gradient of 1: what they are made of is read once.
template <class R> struct ValuesAndDerivatives : StepLogProbOp<R> {
  static constexpr int kOutputs = 3;  // by m, by v; the log-probability
  static constexpr int kSums = 1;
  using StepLogProbOp<R>::StepLogProbOp;

  template <bool kNoise, class Row> FG_HD void apply(const Row& row, const Tile<R>& t, int64_t first) const {
    this->derive(row, t, first, [&](const auto&, const auto& found, const auto& value, int64_t i) FG_INLINE {
      store(t.out[0] + i, found.by_m);
      if (t.out[1]) store(t.out[1] + i, found.by_v);
      store(t.out[2] + i, value);
    });
  }
};

}  // namespace

FG_CPU_KERNEL(step_log_prob, StepLogProbArguments) {
  if (arguments.gradient) return run_elementwise<Derivatives>(arguments, begin, end);
  if (arguments.weighs) return run_sums<Weights>(arguments, begin, end);
  if (arguments.ahead) return run_sums<ValuesAndDerivatives>(arguments, begin, end);
  arguments.makes_step ? run_sums<Steps>(arguments, begin, end) : run_sums<Values>(arguments, begin, end);
}

}  // namespace fastgen
