#include "common/cpu_driver.h"  // before the formulas, which find the vector operations by their names
#include "common/isa.h"

#include "q_sample/q_sample.h"

namespace fastgen {
namespace {

template <class R> struct QSample {
  static constexpr int kInputs = 1, kOutputs = 1, kColumns = QSampleColumns::kCount;
  static constexpr int kSums = 0;
  const QSampleArguments& a;

  void load_row(int64_t b, R* row) const { table_row(a.rows, b, kColumns, row); }
  bool own_rows() const { return a.rows.t != nullptr; }
  static bool noiseless(const R* row) { return row[QSampleColumns::kSigma] == 0; }

  template <bool kNoise, class C> FG_HD void apply(const C& row, const Tile<R>& t, int64_t first) const {
    FG_UNROLL_4
    for (int64_t i = 0; i < t.n; i += kLanes<R>) {
      auto y = q_sample(row.get(QSampleColumns::kScale, first + i), load(t.in[0] + i));
      if (kNoise) y = with_noise(y, row.get(QSampleColumns::kSigma, first + i), load(t.z + i));
      store(t.out[0] + i, y);
    }
  }
};

}  // namespace

FG_CPU_KERNEL(q_sample, QSampleArguments) { run_elementwise<QSample>(arguments, begin, end); }

}  // namespace fastgen
