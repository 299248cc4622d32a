// Which elements a CUDA thread owns. Host and device: the tests run this arithmetic on the host, past 2³² elements too.
#pragma once
#include "host_device.h"

namespace fastgen {

constexpr int kThreads = 256;

// n / divisor for 0 ≤ n < 2⁶³ by a multiplication: a 64-bit division is some hundred instructions on a GPU. With s = ⌈log₂ d⌉ and
// m = ⌊2⁶³⁺ˢ/d⌋ + 1 (below 2⁶⁴, since d > 2ˢ⁻¹), n·m·2⁻⁶³⁻ˢ exceeds n/d by at most n·2⁻⁶³⁻ˢ < 2⁻ˢ ≤ 1/d.
struct Divider {
  int64_t divisor = 1;
  uint64_t magic = 0;  // 0 where the divisor is 1
  int32_t shift = 0;

  Divider() = default;
  explicit Divider(int64_t d) : divisor(d) {
    if (d <= 1) return;
    int s = 0;
    while (s < 62 && (int64_t(1) << s) < d)
      ++s;
    if ((int64_t(1) << s) < d) s = 63;
    magic = static_cast<uint64_t>((static_cast<unsigned __int128>(1) << (63 + s)) / static_cast<uint64_t>(d)) + 1;
    shift = s - 1;
  }
  FG_HD int64_t quotient(int64_t n) const { return magic ? static_cast<int64_t>(multiply_high(n, magic) >> shift) : n; }

 private:
  static FG_HD uint64_t multiply_high(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
    return __umul64hi(a, b);
#else
    return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
#endif
  }
};

// Item `index` of sample `sample`.
struct Place {
  int64_t sample, index;
};

// `count` items in rows of `per_sample` for each sample; a thread block has kThreads·unroll consecutive ones, of which a thread
// has every kThreads-th.
struct ItemPlan {
  Divider per_sample;
  int64_t count = 0;
  int32_t unroll = 1;

  FG_HD int32_t per_block() const { return kThreads * unroll; }
  int64_t blocks(int64_t more_items) const { return (count + more_items + per_block() - 1) / per_block(); }
  FG_HD Place first_of(int64_t block) const {
    const int64_t first = block * per_block(), sample = per_sample.quotient(first);
    return {sample, first - sample * per_sample.divisor};
  }
  // The item `distance` after a block's first. The block seldom spans two samples where samples are long, hence the branch.
  FG_HD Place after(Place first, int64_t distance) const {
    Place place = {first.sample, first.index + distance};
    if (place.index >= per_sample.divisor) {
      const int64_t samples = per_sample.quotient(place.index);
      place = {place.sample + samples, place.index - samples * per_sample.divisor};
    }
    return place;
  }
};

// Enough thread blocks to fill any present GPU several times over; below that many a thread takes one item only, since then the
// time is that of the longest thread.
constexpr int64_t kManyBlocks = 1024;

inline ItemPlan plan_items(int64_t per_sample, int64_t samples, int most_unrolled) {
  ItemPlan plan;
  plan.per_sample = Divider(per_sample);
  plan.count = per_sample * samples;
  plan.unroll = plan.count >= kManyBlocks * kThreads * most_unrolled ? most_unrolled : 1;
  return plan;
}

}  // namespace fastgen
