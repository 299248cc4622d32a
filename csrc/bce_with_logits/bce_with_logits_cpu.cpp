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
      if (o.data && !o.single) continue;
      R value = 1;
      if (o.data) read(flat(o), 0, 1, &value);
      if (k == kGradient) value *= static_cast<R>(a.scale);
      for (R& element : buffers[k])
        element = value;
    }
  }

  void run(int64_t first_block, int64_t last_block) {
    const bool weighted = a.weight.data || a.pos_weight.data;
    weighted ? blocks<true>(first_block, last_block) : blocks<false>(first_block, last_block);
  }

 private:
  template <bool kWeighted> void blocks(int64_t first_block, int64_t last_block) {
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t end = (block + 1) * kBceBlock < a.count ? (block + 1) * kBceBlock : a.count;
      double sum = 0;
      for (int64_t i = block * kBceBlock; i < end; i += kTile)
        sum += tile<kWeighted>(i, end - i < kTile ? end - i : kTile);
      if (a.reduced) a.sums[block] = sum;
    }
  }

  // The sum of the tile's losses where they are reduced, else 0.
  template <bool kWeighted> double tile(int64_t first, int64_t n) {
    const R* in[kOperands] = {gathered(a.input, kInput, first, n), gathered(a.target, kTarget, first, n),
                              gathered(a.weight, kWeight, first, n), gathered(a.pos_weight, kPosWeight, first, n),
                              gathered(a.gradient, kGradient, first, n)};
    const bool direct = a.out.data && a.out.dtype == kNative;
    R* const out = direct ? static_cast<R*>(a.out.data) + first : losses;
    constexpr int64_t lanes = kLanes<R>;
    const int64_t whole = n / lanes * lanes;
    double sum = 0;
    if (a.backward) {
      backward<kWeighted>(in, out, whole);
    } else if (a.reduced) {
      sum = forward_sum<kWeighted>(in, whole);
    } else {
      forward<kWeighted>(in, out, whole);
    }
    if (const int64_t rest = n - whole) {
      R padded[kOperands][lanes] = {}, last[lanes];
      const R* part[kOperands];
      for (int k = 0; k < kOperands; ++k) {
        for (int64_t i = 0; i < rest; ++i)
          padded[k][i] = in[k][whole + i];
        part[k] = padded[k];
      }
      a.backward ? backward<kWeighted>(part, last, lanes) : forward<kWeighted>(part, last, lanes);
      for (int64_t i = 0; i < rest; ++i) {
        if (a.reduced) sum += static_cast<double>(last[i]);
        if (!a.reduced) out[whole + i] = last[i];
      }
    }
    if (a.out.data && !direct) write(out, n, a.out, first);
    return sum;
  }

  // n is whole vectors.
  template <bool kWeighted> static FG_HD void forward(const R* const* in, R* out, int64_t n) {
    for_vectors<kWeighted>(in, n, [&](auto x, auto y, auto weight, auto pos_weight, int64_t i) FG_INLINE {
      store(out + i, bce_loss(x, y, weight, pos_weight));
    });
  }
  template <bool kWeighted> static FG_HD double forward_sum(const R* const* in, int64_t n) {
    Twice<Vec<R>> sum{};
    for_vectors<kWeighted>(in, n, [&](auto x, auto y, auto weight, auto pos_weight, int64_t) FG_INLINE {
      add(sum, bce_loss(x, y, weight, pos_weight));
    });
    // at most 64 terms a lane between roundings to float32, the rest in float64
    double total = 0;
    for (int k = 0; k < kLanes<R>; ++k)
      total += static_cast<double>(sum.first[k]) + static_cast<double>(sum.second[k]);
    return total;
  }
  template <bool kWeighted> static FG_HD void backward(const R* const* in, R* out, int64_t n) {
    for_vectors<kWeighted>(in, n, [&](auto x, auto y, auto weight, auto pos_weight, int64_t i) FG_INLINE {
      store(out + i, load_like(x, in[kGradient] + i) * bce_gradient(x, y, weight, pos_weight));
    });
  }

  // body(input, target, weight, pos_weight, i) for two vectors at a time, and for one where one is left.
  template <bool kWeighted, class Body> static FG_HD void for_vectors(const R* const* in, int64_t n, Body body) {
    by_twos<R>(n, [&](auto v, int64_t i) FG_INLINE { apply<kWeighted, decltype(v)>(in, i, body); });
  }
  template <bool kWeighted, class V, class Body> static FG_HD void apply(const R* const* in, int64_t i, Body body) {
    const V x = load_as<V>(in[kInput] + i), y = load_as<V>(in[kTarget] + i);
    if constexpr (kWeighted) {
      body(x, y, load_as<V>(in[kWeight] + i), load_as<V>(in[kPosWeight] + i), i);
    } else {
      body(x, y, One{}, One{}, i);
    }
  }
  template <class V> static FG_HD V load_like(V, const R* from) { return load_as<V>(from); }
  static FG_HD void add(Twice<Vec<R>>& sum, const Twice<Vec<R>>& term) { sum = sum + term; }
  static FG_HD void add(Twice<Vec<R>>& sum, Vec<R> term) { sum.first += term; }

  static constexpr DType kNative = sizeof(R) == 4 ? kFloat32 : kFloat64;

  const R* gathered(const BceOperand& o, int k, int64_t first, int64_t n) {
    if (!o.data || o.single) return buffers[k];
    if (o.dtype == kNative) return static_cast<const R*>(o.data) + first;
    read(flat(o), first, n, buffers[k]);
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
