#include "common/cuda_driver.cuh"

#include "q_posterior/q_posterior.h"

namespace fastgen {
namespace {

template <class R> struct QPosterior {
  using C = QPosteriorColumns;
  static constexpr int kColumns = C::kCount;
  QPosteriorArguments a;

  __device__ void load_row(int64_t b, int64_t group, R* row) const {
    table_row(a.rows, b, kColumns, row);
    if (group > 0) return;
    static_cast<R*>(a.variance)[b] = row[C::kVariance];
    static_cast<R*>(a.log_variance)[b] = row[C::kLogVariance];
  }
  static __device__ bool noiseless(const R*) { return true; }
  __device__ void element(const R* row, const Element<R>& e, R, bool) const {
    e.out(0, q_posterior_mean(row[C::kU], e.in(0), row[C::kV], e.in(1)));
  }
};

}  // namespace

FG_CUDA_KERNEL(q_posterior, QPosteriorArguments) { return launch_elementwise<QPosterior, 2>(arguments, stream); }

}  // namespace fastgen
