// The contract's normals for runs of elements, a vector of element groups at a time.
#pragma once
#include "cpu_vec.h"
#include "elementwise.h"
#include "normal.h"

namespace fastgen {
namespace {  // internal linkage: the linker must not swap one instruction set's copy for another's

constexpr int kGroupsPerBlock = FG_VECTOR_BYTES / 8;   // element groups in one Philox vector
constexpr int kNormalsPerBlock = 4 * kGroupsPerBlock;  // what one call makes

// The lane in which group g of a block travels. In float, words r0 and r2 (then r1 and r3) of a group are packed side by side,
// so Box–Muller gives [z0 z2 | z0 z2 …] and [z1 z3 | …], and one interleave within 128 bits puts lane 2k into the first half of
// the result at place k and lane 2k+1 into the second half: with the groups dealt out like this, memory order costs nothing.
inline constexpr int lane_of_group(int g) {
  constexpr int half = kGroupsPerBlock / 2;
  return g < half ? 2 * g : 2 * (g - half) + 1;
}

// Philox words of a block (lane l holding the group of `lane_of_group`) to its normals in memory order.
FG_HD void store_normals(const Philox4<WordV>& r, float* to) {
  FloatV z02, z13, low, high;
  box_muller<FloatV>(pack_words(r.r0, r.r2), pack_words(r.r1, r.r3), z02, z13);
  interleave(z02, z13, low, high);
  store(to, low);
  store(to + kNormalsPerBlock / 2, high);
}
FG_HD void store_normals(const Philox4<WordV>& r, double* to) {
  DoubleV z[4];
  box_muller<DoubleV>(r.r0, r.r1, z[0], z[1]);
  box_muller<DoubleV>(r.r2, r.r3, z[2], z[3]);
  for (int g = 0; g < kGroupsPerBlock; ++g)
    for (int k = 0; k < 4; ++k)
      to[4 * g + k] = z[k][lane_of_group(g)];
}

// Two blocks, interleaved instruction by instruction: ten dependent rounds leave the multipliers idle half of the time, and the
// processor's window is too short to find the next block by itself.
struct WordPair {
  WordV first, second;
};
FG_HD WordPair operator+(WordPair a, uint32_t b) { return {a.first + b, a.second + b}; }
FG_HD WordPair xor3(WordPair a, WordPair b, WordPair c) {
  return {fastgen::xor3(a.first, b.first, c.first), fastgen::xor3(a.second, b.second, c.second)};
}
FG_HD void multiply_wide(WordPair a, uint32_t b, WordPair& high, WordPair& low) {
  fastgen::multiply_wide(a.first, b, high.first, low.first);
  fastgen::multiply_wide(a.second, b, high.second, low.second);
}

// Memory that is wanted once the noise is there, fetched while it is being made. Without it the two take turns: ddpm_step(seed=) at
// 16 M elements took 0.95 ns per element, and 0.60 with it; q_sample(seed=) 0.81 and 0.50 (AMD EPYC, Zen 4, 2 threads).
struct Ahead {
  const char* from[kMaxInputs + kMaxOutputs];
  int64_t bytes[kMaxInputs + kMaxOutputs];  // of an element
  int count = 0;
  void add(const Operand& x, int64_t offset) {
    if (!x.data) return;
    bytes[count] = size_of(x.dtype);
    from[count] = static_cast<const char*>(x.data) + offset * bytes[count];
    ++count;
  }
  FG_HD void fetch(int64_t element, int64_t elements) const {
    for (int k = 0; k < count; ++k)
      for (int64_t at = 0; at < elements * bytes[k]; at += 64)
        __builtin_prefetch(from[k] + element * bytes[k] + at);
  }
};

// Normals of elements j … j+n-1 of one sample. `buffer` must hold n + 3 + 2·kNormalsPerBlock; returns where element j lies in it.
template <class R> inline R* fill_normals(const Stream& s, int64_t j, int64_t n, R* buffer, const Ahead& ahead = {}) {
  WordV group;
  for (int g = 0; g < kGroupsPerBlock; ++g)
    group[lane_of_group(g)] = static_cast<uint64_t>(j / 4 + g);
  const auto splat = [](uint64_t word) FG_INLINE { return Lanes<DoubleV>::splat_bits(word); };
  const WordV b = splat(static_cast<uint32_t>(s.sample)), o0 = splat(static_cast<uint32_t>(s.offset)),
              o1 = splat(static_cast<uint64_t>(s.offset) >> 32), k0 = splat(static_cast<uint32_t>(s.seed)),
              k1 = splat(static_cast<uint64_t>(s.seed) >> 32);
  const int64_t count = n + (j & 3);
  for (int64_t i = 0; i < count; i += 2 * kNormalsPerBlock) {
    ahead.fetch(i, 2 * kNormalsPerBlock);
    const auto twice = [](WordV word) FG_INLINE { return WordPair{word, word}; };
    const Philox4<WordPair> r =
        philox4x32(WordPair{group, group + kGroupsPerBlock}, twice(b), twice(o0), twice(o1), twice(k0), twice(k1));
    store_normals({r.r0.first, r.r1.first, r.r2.first, r.r3.first}, buffer + i);
    store_normals({r.r0.second, r.r1.second, r.r2.second, r.r3.second}, buffer + i + kNormalsPerBlock);
    group += 2 * kGroupsPerBlock;
  }
  return buffer + (j & 3);
}

// The same for groups that lie apart (small events, short runs of channels): `add` collects them, and each full block is made at
// once and handed out by `place(tag, normals)`, four normals to a group.
template <class R, class Place> struct GroupQueue {
  Place place;
  int used = 0;
  WordV words[6] = {};  // group, sample, offset (2), key (2)
  int64_t tags[kGroupsPerBlock];

  void add(int64_t group, const Stream& s, int64_t tag) {
    const uint64_t values[6] = {static_cast<uint32_t>(group),    static_cast<uint32_t>(s.sample),
                                static_cast<uint32_t>(s.offset), static_cast<uint64_t>(s.offset) >> 32,
                                static_cast<uint32_t>(s.seed),   static_cast<uint64_t>(s.seed) >> 32};
    uint64_t* lanes = reinterpret_cast<uint64_t*>(words);
    for (int i = 0; i < 6; ++i)
      lanes[i * kGroupsPerBlock + lane_of_group(used)] = values[i];
    tags[used] = tag;
    if (++used == kGroupsPerBlock) flush();
  }
  void flush() {
    if (used == 0) return;
    alignas(64) R normals[kNormalsPerBlock];
    store_normals(philox4x32(words[0], words[1], words[2], words[3], words[4], words[5]), normals);
    for (int g = 0; g < used; ++g)
      place(tags[g], normals + 4 * g);
    used = 0;
  }
};

}  // namespace
}  // namespace fastgen
