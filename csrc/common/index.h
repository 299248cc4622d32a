// Which elements a CUDA thread owns. Host and device: the tests run this arithmetic on the host, past 2³² elements too.
#pragma once
#include "host_device.h"

namespace fastgen {

constexpr int kThreads = 128;

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

// One item for each thread, `per_sample` of them for each sample.
struct ItemPlan {
  Divider per_sample;
  int64_t count = 0;

  ItemPlan() = default;
  ItemPlan(int64_t items_per_sample, int64_t samples) : per_sample(items_per_sample), count(items_per_sample * samples) {}
  int64_t blocks(int64_t more_items = 0) const { return (count + more_items + kThreads - 1) / kThreads; }
  FG_HD Place at(int64_t item) const {
    const int64_t sample = per_sample.quotient(item);
    return {sample, item - sample * per_sample.divisor};
  }
};

// An item of up to `most` vectors, which lie an item's count apart in the sample: neighbouring threads have neighbouring vectors,
// and all of a thread's are of one sample. The vectors that do not make a whole item (of a batch that is one sample) are left over.
//
// An item has a thread's set-up, of which each of its u vectors costs 1/u; and a launch is worked off in waves of as many threads
// as the device holds, the last of which takes as long as a full one, the longer the more vectors an item has. The sum of the two
// is least where u² is in proportion to the number of vectors: a thread takes u of them where that leaves u · kManyItems items.
// That number is 2.6 waves of 768 threads (of 80 registers) on each of 132 multiprocessors, so that two vectors are taken from 5
// waves on and four from 10, and a last wave that is nearly empty costs a sixth or an eleventh of the time at most. 10 M elements
// of bfloat16 in 3.1 waves of items of four would wait 23% of the time, by count. It is not the device's own number, so that sums
// have the same bits on all. tests/device_on_host.py, where a thread is a function call, sets another, so that small tensors do.
#ifndef FG_MANY_ITEMS
#define FG_MANY_ITEMS (256 * 1024)
#endif
constexpr int64_t kManyItems = FG_MANY_ITEMS;

struct VectorPlan {
  ItemPlan items;
  int32_t unroll = 1;
  int64_t left_over = 0;  // vectors

  VectorPlan() = default;
  VectorPlan(int64_t vectors_per_sample, int64_t samples, int most) {
    while (2 * unroll <= most && vectors_per_sample * samples / (2 * unroll) >= kManyItems * 2 * unroll &&
           (samples == 1 || vectors_per_sample % (2 * unroll) == 0))
      unroll *= 2;
    items = ItemPlan(vectors_per_sample / unroll, samples);
    left_over = vectors_per_sample % unroll;
  }
  // The item's vector k.
  FG_HD int64_t vector(int64_t index, int k) const { return index + k * items.per_sample.divisor; }
  FG_HD int64_t first_left_over() const { return unroll * items.per_sample.divisor; }
};

}  // namespace fastgen
