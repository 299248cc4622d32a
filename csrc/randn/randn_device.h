// The kernels of a CUDA thread, for the host too.
#pragma once
#include "common/device_convert.h"
#include "common/device_driver.h"
#include "randn/randn.h"

namespace fastgen {

template <class R, class X, class M, class Out> struct RandnDevice : DeviceOp<R, X, M, Out, RandnArguments> {
  static constexpr int kInputs = 0, kAlways = 0, kOutputs = 1, kNoiseInput = 0, kNoises = 1 << kSeededNoise, kTiled = 0;

  struct Row {};
  FG_HD Row row(int64_t) const { return {}; }
  static FG_HD bool noiseless(const Row&) { return false; }
  template <bool, int n> FG_HD void apply(const Row&, const R (&)[1][n], const R* z, R (&out)[1][n]) const {
    FG_UNROLL
    for (int i = 0; i < n; ++i)
      out[0][i] = z[i];
  }
};

// What one of torch's threads does in one turn; neighbouring threads have neighbouring elements.
template <class R, class Out> struct RandnTorchCudaDevice {
  TorchCudaArguments a;
  ItemPlan plan;  // an item is a thread of a turn
  Divider turns;

  explicit RandnTorchCudaDevice(const TorchCudaArguments& arguments)
      : a(arguments), plan(a.threads, a.samples * a.turns), turns(a.turns) {}
  int64_t blocks() const { return plan.blocks(); }

  FG_HD void operator()(int64_t block, int thread) const {
    const int64_t item = block * kThreads + thread;
    if (item >= plan.count) return;
    const Place place = plan.at(item);  // `sample` counts the turns of all samples
    const int64_t sample = turns.quotient(place.sample), turn = place.sample - sample * turns.divisor;
    constexpr int n = kTorchCudaNormals<R>;
    const int64_t first = turn * n * a.threads + place.index;
    if (first >= a.event) return;
    R z[n];
    curand_normals(torch_words(static_cast<uint64_t>(a.first + turn), place.index, a.seed_of(sample)), z);
    FG_UNROLL
    for (int k = 0; k < n; ++k)
      if (first + k * a.threads < a.event) store_one<R, Out>(a.out, sample * a.event + first + k * a.threads, z[k]);
  }
};

// The one launch: launch(way).
template <class Launch> void run_randn_torch_cuda(const TorchCudaArguments& a, const Launch& launch) {
  switch (a.out.dtype) {
    case kFloat32: return launch(RandnTorchCudaDevice<float, Float32>(a));
    case kBFloat16: return launch(RandnTorchCudaDevice<float, BFloat16>(a));
    case kFloat16: return launch(RandnTorchCudaDevice<float, Float16>(a));
    default: return launch(RandnTorchCudaDevice<double, Any>(a));
  }
}

}  // namespace fastgen
