// Sums over elements on the CPU: of each block of the work, or where each sample is small of each sample. The arguments have
//
//   void* result; double scale     of each sample's sum
//   double* sums                   of each block; null where each sample has its own
#pragma once
#include "cpu_driver.h"
#include "sum_blocks.h"

namespace fastgen {
namespace {

// For a driver's op: its values are added to `sum`, or where that is null each sample's to the result.
template <class R, class Arguments> struct Summed {
  const Arguments& a;
  double* sum = nullptr;

  void add(int, int64_t b, int64_t samples, const R* values, int64_t n) const {
    add_to(sum, a.result, a.scale, b, samples, values, n);
  }

 protected:
  static void add_to(double* sum, void* result, double scale, int64_t b, int64_t samples, const R* values, int64_t n) {
    if (sum) {
      *sum += sum_of(values, n);
      return;
    }
    for (int64_t s = 0, each = n / samples; s < samples; ++s)
      static_cast<R*>(result)[b + s] = static_cast<R>(sum_of(values + s * each, each) * scale);
  }
};

// Blocks begin … end-1: each a part of one sample, or some whole samples where these are small.
template <template <class> class Op, class R, class Arguments> void sum_blocks(const Arguments& a, int64_t begin, int64_t end) {
  const SumBlocks blocks(a);
  Op<R> op(a);
  Driver<R, Op<R>> driver(a, op);
  for (int64_t block = begin; block < end; ++block) {
    if (a.sums) {
      op.sum = a.sums + block;
      *op.sum = 0;
    }
    driver.run(blocks.first(block), blocks.last(block));
  }
}
template <template <class> class Op, class Arguments> void run_sums(const Arguments& a, int64_t begin, int64_t end) {
  a.is_double ? sum_blocks<Op, double>(a, begin, end) : sum_blocks<Op, float>(a, begin, end);
}

}  // namespace
}  // namespace fastgen
