#include "common/cpu_driver.h"  // before the formulas, which find the vector operations by their names
#include "common/isa.h"

#include "q_posterior/q_posterior.h"

namespace fastgen {
namespace {

template <class R> struct QPosterior {
  using Columns = QPosteriorColumns;
  static constexpr int kInputs = 2, kOutputs = 1, kColumns = Columns::kCount;
  static constexpr int kSums = 0;
  const QPosteriorArguments& a;

  void load_row(int64_t b, R* row) const { table_row(a.rows, b, kColumns, row); }
  bool own_rows() const { return a.rows.t != nullptr; }
  static bool noiseless(const R*) { return true; }

  template <bool kNoise, class C> FG_HD void apply(const C& row, const Tile<R>& t, int64_t first) const {
    FG_UNROLL_4
    for (int64_t i = 0; i < t.n; i += kLanes<R>)
      store(t.out[0] + i, q_posterior_mean(row.get(Columns::kMeanFromX0, first + i), load(t.in[0] + i),
                                           row.get(Columns::kMeanFromX, first + i), load(t.in[1] + i)));
  }
};

}  // namespace

FG_CPU_KERNEL(q_posterior, QPosteriorArguments) { run_elementwise<QPosterior>(arguments, begin, end); }

}  // namespace fastgen
