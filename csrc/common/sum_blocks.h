// How the CPU cuts a sum over elements.
#pragma once
#include "elementwise.h"

namespace fastgen {

// The CPU's blocks of a sum over elements, of all samples or of each, the same whatever the threads: parts of one sample, or some
// whole samples where these are small. Units (see `elements_per_unit`) first(i) … last(i) − 1 are block i.
struct SumBlocks {
  static constexpr int64_t kElements = 16384;
  int64_t count = 0, per_sample = 0, sample_units = 0, units = 0;

  FG_HD explicit SumBlocks(const Elementwise& a) {
    const Geometry& g = a.geometry;
    if (g.batch == 0 || g.event == 0) return;
    const int64_t samples = a.small_events() ? 1 : g.batch;
    sample_units = a.small_events() ? g.batch : g.event / a.elements_per_unit();
    units = kElements / a.elements_per_unit() / 4 * 4;  // whole Philox calls
    if (units < 4) units = 4;
    per_sample = (sample_units + units - 1) / units;
    count = samples * per_sample;
  }
  FG_HD int64_t first(int64_t block) const {
    const int64_t sample = block / per_sample;
    return sample * sample_units + (block - sample * per_sample) * units;
  }
  FG_HD int64_t last(int64_t block) const {
    const int64_t end = (block / per_sample + 1) * sample_units, next = first(block) + units;
    return next < end ? next : end;
  }
};

}  // namespace fastgen
