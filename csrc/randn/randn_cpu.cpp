#include "common/cpu_driver.h"  // before the formulas, which find the vector operations by their names
#include "common/isa.h"

#include "randn/randn.h"

namespace fastgen {
namespace {

template <class R> struct Randn {
  static constexpr int kInputs = 0, kOutputs = 1, kColumns = 0;
  static constexpr int kSums = 0;
  const RandnArguments& a;

  void load_row(int64_t, R*) const {}
  bool own_rows() const { return false; }
  static bool noiseless(const R*) { return false; }

  template <bool kNoise, class C> FG_HD void apply(const C&, const Tile<R>& t, int64_t) const {
    FG_UNROLL_4
    for (int64_t i = 0; i < t.n; i += kLanes<R>)
      store(t.out[0] + i, load(t.z + i));
  }
};

}  // namespace

FG_CPU_KERNEL(randn, RandnArguments) { run_elementwise<Randn>(arguments, begin, end); }

FG_CPU_KERNEL(torch_skip, TorchSkipArguments) {
  for (int64_t i = begin; i < end; ++i) {
    const TorchState before = arguments.states[i];
    TorchWords words;
    words.load_state(before);
    words.skip(arguments.words);
    words.store_state(before, arguments.states[i]);
  }
}

}  // namespace fastgen
