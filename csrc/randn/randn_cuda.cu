#include "common/cuda_driver.cuh"

#include "randn/randn.h"

namespace fastgen {
namespace {

template <class R> struct Randn {
  static constexpr int kColumns = 0;
  RandnArguments a;

  __device__ void load_row(int64_t, int64_t, R*) const {}
  static __device__ bool noiseless(const R*) { return false; }
  __device__ void element(const R*, const Element<R>& e, R z, bool) const { e.out(0, z); }
};

}  // namespace

FG_CUDA_KERNEL(randn, RandnArguments) { return launch_elementwise<Randn, 0>(arguments, stream); }

}  // namespace fastgen
