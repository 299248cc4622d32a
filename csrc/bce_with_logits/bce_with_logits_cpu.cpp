#include "common/cpu_convert.h"  // before the formulas, which find the vector operations by their names
#include "common/isa.h"

#include "bce_with_logits/bce_with_logits.h"

namespace fastgen {
namespace {

constexpr int64_t kTile = 1024;

template <class R> struct BceWithLogits {
  const BceWithLogitsArguments& a;
  enum { kInput, kTarget, kWeight, kPosWeight, kGradient, kOperands };
  alignas(64) R buffers[kOperands][kTile];
  alignas(64) R losses[kTile];

  explicit BceWithLogits(const BceWithLogitsArguments& arguments) : a(arguments) {
    const BceOperand* operands[] = {&a.input, &a.target, &a.weight, &a.pos_weight, &a.gradient};
    for (int k = 0; k < kOperands; ++k) {
      const BceOperand& o = *operands[k];
      R value = 1;
      if (o.data && o.single) read(Operand{const_cast<void*>(o.data), o.dtype, 0, 0}, 0, 1, &value);
      if (!o.data || o.single)
        for (R& element : buffers[k])
          element = value;
    }
  }

  void run(int64_t first_block, int64_t last_block) {
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t end = (block + 1) * kBceBlock < a.count ? (block + 1) * kBceBlock : a.count;
      double sum = 0;
      for (int64_t i = block * kBceBlock; i < end; i += kTile)
        sum += tile(i, end - i < kTile ? end - i : kTile);
      if (a.reduced) a.sums[block] = sum;
    }
  }

 private:
  // The sum of the tile's losses where they are reduced, else 0.
  double tile(int64_t first, int64_t n) {
    const R* in[kOperands] = {gathered(a.input, kInput, first, n), gathered(a.target, kTarget, first, n),
                              gathered(a.weight, kWeight, first, n), gathered(a.pos_weight, kPosWeight, first, n),
                              gathered(a.gradient, kGradient, first, n)};
    const bool direct = a.out.data && a.out.dtype == kNative;
    R* const out = direct ? static_cast<R*>(a.out.data) + first : losses;
    constexpr int64_t lanes = kLanes<R>;
    const int64_t whole = n / lanes * lanes;
    double sum = a.backward ? backward(in, out, whole) : forward(in, out, whole);
    if (const int64_t rest = n - whole) {
      R padded[kOperands][lanes] = {}, last[lanes];
      const R* part[kOperands];
      for (int k = 0; k < kOperands; ++k) {
        for (int64_t i = 0; i < rest; ++i)
          padded[k][i] = in[k][whole + i];
        part[k] = padded[k];
      }
      // weight is padded with 0, hence what lies beyond the end adds nothing
      sum += a.backward ? backward(part, last, lanes) : forward(part, last, lanes);
      if (!a.reduced)
        for (int64_t i = 0; i < rest; ++i)
          out[whole + i] = last[i];
    }
    if (a.out.data && !direct) write(out, n, a.out, first);
    return sum;
  }

  // n is whole vectors.
  FG_HD double forward(const R* const* in, R* out, int64_t n) const {
    Twice<Vec<R>> sum{};
    for_vectors(n, [&](auto load_at, int64_t i) FG_INLINE {
      const auto loss =
          bce_loss(load_at(in[kInput] + i), load_at(in[kTarget] + i), load_at(in[kWeight] + i), load_at(in[kPosWeight] + i));
      if (a.reduced) {
        add(sum, loss);
      } else {
        store(out + i, loss);
      }
    });
    if (!a.reduced) return 0;
    // at most 64 terms a lane between roundings to float32, the rest in float64
    double total = 0;
    for (int k = 0; k < kLanes<R>; ++k)
      total += static_cast<double>(sum.first[k]) + static_cast<double>(sum.second[k]);
    return total;
  }
  FG_HD double backward(const R* const* in, R* out, int64_t n) const {
    for_vectors(n, [&](auto load_at, int64_t i) FG_INLINE {
      auto gradient = load_at(in[kGradient] + i);
      const auto slope =
          bce_gradient(load_at(in[kInput] + i), load_at(in[kTarget] + i), load_at(in[kWeight] + i), load_at(in[kPosWeight] + i));
      store(out + i, gradient * splat<decltype(gradient)>(a.scale) * slope);
    });
    return 0;
  }

  // body(load, i) for two vectors at a time, and for one where one is left.
  template <class Body> static FG_HD void for_vectors(int64_t n, Body body) {
    constexpr int64_t lanes = kLanes<R>;
    int64_t i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes)
      body([](const R* from) FG_INLINE { return load_twice(from); }, i);
    if (i < n) body([](const R* from) FG_INLINE { return load(from); }, i);
  }
  static FG_HD void add(Twice<Vec<R>>& sum, const Twice<Vec<R>>& term) { sum = sum + term; }
  static FG_HD void add(Twice<Vec<R>>& sum, Vec<R> term) { sum.first += term; }

  static constexpr DType kNative = sizeof(R) == 4 ? kFloat32 : kFloat64;

  const R* gathered(const BceOperand& o, int k, int64_t first, int64_t n) {
    if (!o.data || o.single) return buffers[k];
    if (o.dtype == kNative) return static_cast<const R*>(o.data) + first;
    read(Operand{const_cast<void*>(o.data), o.dtype, 0, 0}, first, n, buffers[k]);
    return buffers[k];
  }
};

}  // namespace

FG_CPU_KERNEL(bce_with_logits, BceWithLogitsArguments) {
  if (arguments.is_double) {
    BceWithLogits<double>(arguments).run(begin, end);
  } else {
    BceWithLogits<float>(arguments).run(begin, end);
  }
}

}  // namespace fastgen
