#include "common/cpu_sums.h"  // before the formulas, which find the vector operations by their names
#include "common/isa.h"

#include "diffusion_loss/diffusion_loss.h"

namespace fastgen {
namespace {

// Calls loop.run<kLoss, kX0>() for the loss that the arguments name.
template <class Op> FG_HD void choose_loss(const DiffusionLossArguments& a, bool x0, const Op& loop) {
  switch (a.loss) {
    case kMse: return x0 ? loop.template run<kMse, true>() : loop.template run<kMse, false>();
    case kL1: return x0 ? loop.template run<kL1, true>() : loop.template run<kL1, false>();
    case kHuber: return x0 ? loop.template run<kHuber, true>() : loop.template run<kHuber, false>();
  }
}

// What both directions read: the residual of the vector at i, and what its loss is multiplied by.
template <class R, bool kNoise, class C> struct Residuals {
  using Columns = DiffusionLossColumns;
  const C& row;
  const Tile<R>& t;
  int64_t first;

  FG_HD Vec<R> get(int column, int64_t i) const { return row.get(column, first + i); }
  template <bool kX0> FG_HD Vec<R> at(int64_t i) const {
    const Vec<R> zero{};
    return residual<kX0, kNoise>(load(t.in[1] + i), kX0 ? get(Columns::kX0, i) : zero, kX0 ? load(t.in[0] + i) : zero,
                                 kNoise ? get(Columns::kNoise, i) : zero, kNoise ? load(t.z + i) : zero);
  }
  FG_HD Vec<R> weight(int64_t i) const { return get(Columns::kWeight, i); }
};

template <class R> struct DiffusionLossOp : Summed<R, DiffusionLossArguments> {
  static constexpr int kInputs = 2, kColumns = DiffusionLossColumns::kCount;
  using Summed<R, DiffusionLossArguments>::a;
  explicit DiffusionLossOp(const DiffusionLossArguments& arguments) : Summed<R, DiffusionLossArguments>{arguments} {}

  void load_row(int64_t b, R* row) const { diffusion_loss_row(a, b, row); }
  bool own_rows() const { return a.rows.t || a.weights || (a.gradient && a.gradient_each); }
  static bool noiseless(const R* row) { return row[DiffusionLossColumns::kNoise] == 0; }
};

// The losses, to be added, and where it is wanted their derivative by the model's output, for a backward that multiplies it by 1.
template <class R> struct Losses : DiffusionLossOp<R> {
  static constexpr int kOutputs = 2;  // the derivative; the losses
  static constexpr int kSums = 1;
  using DiffusionLossOp<R>::DiffusionLossOp;

  template <bool kNoise, class C> struct Loop : Residuals<R, kNoise, C> {
    Vec<R> delta, scale;
    template <LossKind kLoss, bool kX0> FG_HD void run() const {
      this->t.out[0] ? run<kLoss, kX0, true>() : run<kLoss, kX0, false>();
    }
    template <LossKind kLoss, bool kX0, bool kSlope> FG_HD void run() const {
      FG_UNROLL_4
      for (int64_t i = 0; i < this->t.n; i += kLanes<R>) {
        const Vec<R> r = this->template at<kX0>(i), weight = this->weight(i);
        store(this->t.out[1] + i, weight * loss_of<kLoss>(r, delta));
        if (kSlope) store(this->t.out[0] + i, weight * scale * loss_slope<kLoss>(r, delta));
      }
    }
  };
  template <bool kNoise, class C> FG_HD void apply(const C& row, const Tile<R>& t, int64_t first) const {
    const auto& a = this->a;
    choose_loss(a, t.in[0], Loop<kNoise, C>{{row, t, first}, splat<Vec<R>>(a.delta), splat<Vec<R>>(a.scale)});
  }
};

template <class R> struct LossGradients : DiffusionLossOp<R> {
  static constexpr int kOutputs = 2;
  static constexpr int kSums = 0;
  using DiffusionLossOp<R>::DiffusionLossOp;

  template <bool kNoise, class C> struct Loop : Residuals<R, kNoise, C> {
    Vec<R> delta;
    template <LossKind kLoss, bool kX0> FG_HD void run() const {
      FG_UNROLL_4
      for (int64_t i = 0; i < this->t.n; i += kLanes<R>) {
        const Vec<R> gradient = this->weight(i) * loss_slope<kLoss>(this->template at<kX0>(i), delta);
        store(this->t.out[0] + i, gradient);
        if (kX0 && this->t.out[1]) store(this->t.out[1] + i, -this->get(DiffusionLossColumns::kX0, i) * gradient);
      }
    }
  };
  template <bool kNoise, class C> FG_HD void apply(const C& row, const Tile<R>& t, int64_t first) const {
    choose_loss(this->a, t.in[0], Loop<kNoise, C>{{row, t, first}, splat<Vec<R>>(this->a.delta)});
  }
};

}  // namespace

FG_CPU_KERNEL(diffusion_loss, DiffusionLossArguments) {
  if (arguments.gradient) {
    run_elementwise<LossGradients>(arguments, begin, end);
  } else {
    run_sums<Losses>(arguments, begin, end);
  }
}

}  // namespace fastgen
