// Philox4x32-10, Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11. Host and device, scalar and vector.
#pragma once
#include "host_device.h"

namespace fastgen {

template <class W> struct Philox4 {
  W r0, r1, r2, r3;
};

// W: uint32_t, or a vector of 64-bit lanes each holding one 32-bit word (cpu_vec.h), which turns a round into two wide
// multiplications, two shifts and two three-way xors with no shuffle. K: the same, or what stands for a key word of each round.
template <class W, class K> FG_HD Philox4<W> philox4x32(W c0, W c1, W c2, W c3, K k0, K k1) {
  FG_UNROLL
  for (int round = 0; round < 10; ++round) {
    W high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53u, high0, low0);
    multiply_wide(c2, 0xCD9E8D57u, high1, low1);
    c0 = xor3(high1, c1, k0);
    c1 = low1;
    c2 = xor3(high0, c3, k1);
    c3 = low0;
    k0 = k0 + 0x9E3779B9u;
    k1 = k1 + 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// What a sample's noise is a function of, besides the element. `sample` is the counter's b.
struct Stream {
  int64_t seed, offset, sample;
};

// The contract's counter and key: element group (j div 4), sample, offset and seed to four random words.
FG_HD Philox4<uint32_t> contract_words(int64_t group, int64_t sample, int64_t offset, int64_t seed) {
  const uint64_t o = static_cast<uint64_t>(offset), s = static_cast<uint64_t>(seed);
  return philox4x32<uint32_t, uint32_t>(static_cast<uint32_t>(group), static_cast<uint32_t>(sample), static_cast<uint32_t>(o),
                                        static_cast<uint32_t>(o >> 32), static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32));
}

}  // namespace fastgen
