// Sums on CUDA in one launch with nothing to be zeroed before it, in the same order on every run. An op supplies a Part:
//
//   static constexpr int kValues                                     how many sums are taken side by side
//   SumPlan plan; SumScratch scratch
//   void add(int64_t output, int64_t first, int64_t step, double (&values)[kValues]) const
//                                                                    adds the items first, first + step, … of that output
//   void finish(int64_t output, const double (&sums)[kValues]) const writes the result; called once for each output
#pragma once
#include "elementwise.h"
#include "index.h"

namespace fastgen {

// `chunks` thread blocks for each output; or, where an output has little to add, a warp.
struct SumPlan {
  static constexpr int kWarp = 32;
  int64_t outputs = 1;
  int32_t chunks = 1, threads = kThreads;  // of a chunk

  SumPlan() = default;
  SumPlan(int64_t outputs_, int64_t items_per_output) : outputs(outputs_) {
    if (outputs > 1 && items_per_output <= kWarp * 4) threads = kWarp;
    const int64_t useful = (items_per_output + kThreads - 1) / kThreads, allowed = kMostSums / (outputs > 0 ? outputs : 1);
    const int64_t most = useful < allowed ? useful : allowed;
    if (threads == kThreads && most > 1) chunks = static_cast<int32_t>(most);
  }
  int64_t blocks() const { return threads == kWarp ? (outputs + kThreads / kWarp - 1) / (kThreads / kWarp) : outputs * chunks; }
};

}  // namespace fastgen
