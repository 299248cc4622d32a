#include "common/cuda_driver.cuh"

#include "q_sample/q_sample.h"

namespace fastgen {
namespace {

template <class R> struct QSample {
  using C = QSampleColumns;
  static constexpr int kColumns = C::kCount;
  QSampleArguments a;

  __device__ void load_row(int64_t b, int64_t, R* row) const { table_row(a.rows, b, kColumns, row); }
  static __device__ bool noiseless(const R* row) { return row[C::kSigma] == 0; }
  __device__ void element(const R* row, const Element<R>& e, R z, bool noise) const {
    R y = q_sample(row[C::kScale], e.in(0));
    if (noise) y = with_noise(y, row[C::kSigma], z);
    e.out(0, y);
  }
};

}  // namespace

FG_CUDA_KERNEL(q_sample, QSampleArguments) { return launch_elementwise<QSample, 1>(arguments, stream); }

}  // namespace fastgen
