// The kernels of a CUDA thread, for the host too.
#pragma once
#include "common/device_convert.h"
#include "common/index.h"
#include "to_uint8/to_uint8.h"

namespace fastgen {

// Four bytes as they lie in memory.
template <class R> FG_HD uint32_t four_bytes(R a, R b, R c, R d) {
  auto byte = [](R x) { return static_cast<uint32_t>(byte_of_value(x)) & 0xFF; };
  return byte(a) | byte(b) << 8 | byte(c) << 16 | byte(d) << 24;
}

// A thread has up to four vectors of 128 bits, all of which are loaded before the first is used; their four or eight bytes are one
// store, and those of a warp lie side by side.
template <class X> struct ToUint8Vectors {
  static constexpr int n = 16 / X::kBytes, kUnroll = 4;
  using Part = PartOfWords<n>;
  ToUint8Arguments a;
  VectorPlan plan;
  int64_t left_over;  // elements after the last whole item, each a thread's

  explicit ToUint8Vectors(const ToUint8Arguments& arguments)
      : a(arguments), plan(a.count / n, 1, kUnroll), left_over(a.count % n + plan.left_over * n) {}
  int64_t blocks() const { return plan.items.blocks(left_over); }

  FG_HD void operator()(int64_t block, int thread) const {
    const int64_t item = block * kThreads + thread;
    if (item >= plan.items.count) {
      const int64_t i = plan.first_left_over() * n + item - plan.items.count;
      if (i < a.count) a.out[i] = static_cast<uint8_t>(byte_of_value(X::load(a.data, i)));
      return;
    }
    Words words[kUnroll];
    FG_UNROLL
    for (int k = 0; k < kUnroll; ++k)
      if (k < plan.unroll) load_vector<X, n>(a.operand(), plan.vector(item, k) * n, words + k);
    FG_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      if (k >= plan.unroll) return;
      Part bytes;
      FG_UNROLL
      for (int i = 0; i < n; i += 4)
        bytes.w[i / 4] =
            four_bytes(X::get(words + k, i), X::get(words + k, i + 1), X::get(words + k, i + 2), X::get(words + k, i + 3));
      *reinterpret_cast<Part*>(a.out + plan.vector(item, k) * n) = bytes;
    }
  }
};

// Anything else: four bytes that follow each other in the result, of elements that are read one by one. Where the result is
// transposed, the threads of a warp read from few rows at a time, and neighbours in them.
template <class R> struct ToUint8Quads {
  ToUint8Arguments a;
  Divider samples, rows;  // elements of a sample; where transposed
  bool whole;             // whether four bytes are stored at once

  explicit ToUint8Quads(const ToUint8Arguments& arguments) : a(arguments), whole(reinterpret_cast<uintptr_t>(a.out) % 4 == 0) {
    if (!a.transposes()) return;
    samples = Divider(a.rows * a.columns);
    rows = Divider(a.rows);
  }
  int64_t blocks() const { return ((a.count + 3) / 4 + kThreads - 1) / kThreads; }

  FG_HD void operator()(int64_t block, int thread) const {
    const int64_t first = 4 * (block * kThreads + thread);
    if (first >= a.count) return;
    R x[4] = {};
    FG_UNROLL
    for (int k = 0; k < 4; ++k)
      if (first + k < a.count) x[k] = load_one<R, Any>(a.operand(), place_of(first + k));
    const uint32_t bytes = four_bytes(x[0], x[1], x[2], x[3]);
    if (whole && first + 4 <= a.count) {
      *reinterpret_cast<uint32_t*>(a.out + first) = bytes;
      return;
    }
    FG_UNROLL
    for (int k = 0; k < 4; ++k)
      if (first + k < a.count) a.out[first + k] = static_cast<uint8_t>(bytes >> 8 * k);
  }

 private:
  // Where the element lies whose byte is the result's i-th.
  FG_HD int64_t place_of(int64_t i) const {
    if (!a.transposes()) return i;
    const int64_t sample = samples.quotient(i), within = i - sample * samples.divisor;
    const int64_t column = rows.quotient(within), row = within - column * rows.divisor;
    return sample * samples.divisor + row * a.columns + column;
  }
};

// The one launch: launch(way).
template <class Launch> void run_to_uint8(const ToUint8Arguments& a, const Launch& launch) {
  if (a.count == 0) return;
  if (!a.transposes() && aligned(a.data) && aligned(a.out)) {
    switch (a.dtype) {
      case kFloat32: return launch(ToUint8Vectors<Float32>(a));
      case kBFloat16: return launch(ToUint8Vectors<BFloat16>(a));
      case kFloat16: return launch(ToUint8Vectors<Float16>(a));
      default: break;
    }
  }
  a.dtype == kFloat64 ? launch(ToUint8Quads<double>(a)) : launch(ToUint8Quads<float>(a));
}

}  // namespace fastgen
