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

// A block goes through three stages, each in the place of the one before: Philox's words (lane l holding the group of
// `lane_of_group`), words and radii, the normals in memory order.
FG_HD void store_words(const Philox4<WordV>& r, float* to) {
  store(to, (FloatV)pack_words(r.r0, r.r2));
  store(to + kNormalsPerBlock / 2, (FloatV)pack_words(r.r1, r.r3));
}
FG_HD void make_radii(float* block) { store(block, radius_of<FloatV>((UInt32V)load(block))); }
FG_HD void make_normals(float* block) {
  FloatV z02, z13, low, high;
  polar<FloatV>(load(block), (UInt32V)load(block + kNormalsPerBlock / 2), z02, z13);
  interleave(z02, z13, low, high);
  store(block, low);
  store(block + kNormalsPerBlock / 2, high);
}
FG_HD void store_words(const Philox4<WordV>& r, double* to) {
  const WordV words[4] = {r.r0, r.r2, r.r1, r.r3};
  for (int k = 0; k < 4; ++k)
    store(to + k * kGroupsPerBlock, (DoubleV)words[k]);
}
FG_HD void make_radii(double* block) {
  for (int k = 0; k < 2; ++k)
    store(block + k * kGroupsPerBlock, radius_of<DoubleV>((WordV)load(block + k * kGroupsPerBlock)));
}
FG_HD void make_normals(double* block) {
  DoubleV z[4];
  for (int k = 0; k < 2; ++k)
    polar<DoubleV>(load(block + k * kGroupsPerBlock), (WordV)load(block + (k + 2) * kGroupsPerBlock), z[2 * k], z[2 * k + 1]);
  for (int g = 0; g < kGroupsPerBlock; ++g)
    for (int k = 0; k < 4; ++k)
      block[4 * g + k] = z[k][lane_of_group(g)];
}

// The words of four blocks, made side by side, instruction by instruction: ten dependent rounds leave the multipliers idle half of
// the time, and the processor's window is too short to find the next block by itself. With two a normal takes 6% longer.
constexpr int kSideBySide = 4;
template <int kBlocks> struct Words {
  WordV of[kBlocks];
};
// One word of the key, for the rounds one after the other: k, k + bump, k + 2·bump …
struct KeySchedule {
  uint64_t words[10];
  FG_HD KeySchedule(uint32_t k, uint32_t bump) {
    for (uint32_t round = 0; round < 10; ++round)
      words[round] = k + round * bump;
    // Makes GCC read the words from here. It would else compute each anew for every turn of the loop, in three instructions.
    asm("" : "+m"(words));
  }
};
struct RoundKey {
  const uint64_t* word;
};
FG_HD RoundKey operator+(RoundKey k, uint32_t) { return {k.word + 1}; }
template <int kBlocks> FG_HD Words<kBlocks> xor3(const Words<kBlocks>& a, const Words<kBlocks>& b, RoundKey k) {
  Words<kBlocks> result;
  for (int i = 0; i < kBlocks; ++i)
    result.of[i] = fastgen::xor3(a.of[i], b.of[i], Lanes<DoubleV>::splat_bits(*k.word));
  return result;
}
// The same where each lane has a key of its own.
template <int kBlocks> FG_HD Words<kBlocks> operator+(Words<kBlocks> k, uint32_t bump) {
  for (WordV& x : k.of)
    x += bump;
  return k;
}
template <int kBlocks> FG_HD Words<kBlocks> xor3(const Words<kBlocks>& a, const Words<kBlocks>& b, const Words<kBlocks>& c) {
  Words<kBlocks> result;
  for (int i = 0; i < kBlocks; ++i)
    result.of[i] = fastgen::xor3(a.of[i], b.of[i], c.of[i]);
  return result;
}
template <int kBlocks> FG_HD void multiply_wide(Words<kBlocks> a, uint32_t b, Words<kBlocks>& high, Words<kBlocks>& low) {
  for (int k = 0; k < kBlocks; ++k)
    fastgen::multiply_wide(a.of[k], b, high.of[k], low.of[k]);
}

// The memory that a tile reads and writes once it has its noise, fetched while the noise is made. Else the two take turns:
// ddpm_step(seed=) at 16 M elements took 0.95 ns per element, and 0.60 with it; q_sample(seed=) 0.81 and 0.50 (AMD EPYC, Zen 4, 2
// threads).
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

template <int kBlocks> FG_HD Words<kBlocks> splat_words(uint64_t word) {
  Words<kBlocks> words;
  for (WordV& x : words.of)
    x = Lanes<DoubleV>::splat_bits(word);
  return words;
}
// The words of kBlocks blocks, one behind the other.
template <int kBlocks, class K, class R> FG_HD void store_blocks(const Words<kBlocks>& groups, const Words<kBlocks>& samples,
                                                                 const Words<kBlocks>& low_offsets,
                                                                 const Words<kBlocks>& high_offsets, K k0, K k1, R* to) {
  const Philox4<Words<kBlocks>> r = philox4x32(groups, samples, low_offsets, high_offsets, k0, k1);
  for (int k = 0; k < kBlocks; ++k)
    store_words({r.r0.of[k], r.r1.of[k], r.r2.of[k], r.r3.of[k]}, to + k * kNormalsPerBlock);
}
// From words to normals. All radii first, then all normals: see `fill_normals`.
template <class R> FG_HD void finish_normals(R* buffer, int64_t n) {
  for (int64_t i = 0; i < n; i += kNormalsPerBlock)
    make_radii(buffer + i);
  for (int64_t i = 0; i < n; i += kNormalsPerBlock)
    make_normals(buffer + i);
}

// kBlocks blocks of words of one sample, from the groups `group` on, which then names the next.
template <int kBlocks, class R>
FG_HD void fill_words(const Stream& s, const KeySchedule& k0, const KeySchedule& k1, WordV& group, R* to) {
  Words<kBlocks> groups;
  for (int k = 0; k < kBlocks; ++k)
    groups.of[k] = group + k * kGroupsPerBlock;
  const uint64_t offset = static_cast<uint64_t>(s.offset);
  store_blocks(groups, splat_words<kBlocks>(static_cast<uint32_t>(s.sample)), splat_words<kBlocks>(static_cast<uint32_t>(offset)),
               splat_words<kBlocks>(offset >> 32), RoundKey{k0.words}, RoundKey{k1.words}, to);
  group += kBlocks * kGroupsPerBlock;
}

// Normals of elements j … j+n-1 of one sample. `buffer` must hold n + 3 + kNormalsPerBlock; returns where element j lies in it.
// First all words, then all radii, then all normals: loops so short that the processor overlaps their turns. In one loop, two
// blocks a turn, a normal took 0.70 ns on one core with AVX-512 and 1.08 with AVX2, so 0.61 and 0.87; four fifths of the former are
// what the arithmetic takes at two instructions a cycle (AMD EPYC, Zen 4).
template <class R> inline R* fill_normals(const Stream& s, int64_t j, int64_t n, R* buffer, const Ahead& ahead = {}) {
  WordV group;
  for (int g = 0; g < kGroupsPerBlock; ++g)
    group[lane_of_group(g)] = static_cast<uint64_t>(j / 4 + g);
  const int64_t end = n + (j & 3);
  const KeySchedule k0(static_cast<uint32_t>(s.seed), 0x9E3779B9u), k1(static_cast<uint64_t>(s.seed) >> 32, 0xBB67AE85u);
  constexpr int64_t turn = kSideBySide * kNormalsPerBlock;
  int64_t i = 0;
  for (; i + turn <= end; i += turn) {
    ahead.fetch(i, turn);
    fill_words<kSideBySide>(s, k0, k1, group, buffer + i);
  }
  ahead.fetch(i, end - i);
  for (; i < end; i += kNormalsPerBlock)
    fill_words<1>(s, k0, k1, group, buffer + i);
  finish_normals(buffer, end);
  return buffer + (j & 3);
}

// The same for groups that lie apart (small events, short runs of channels): `add` collects them, and many at a time are made and
// handed out by `place(tag, normals)`, four normals to a group. A block at a time, loaded as soon as its words had been stored, a
// group took 16 ns on one core, so 7 (AMD EPYC, Zen 4).
template <class R, class Place> struct GroupQueue {
  static constexpr int kMost = 16 * kGroupsPerBlock;
  Place place;
  int used = 0;
  alignas(64) uint64_t groups[kMost], samples[kMost], offsets[kMost], seeds[kMost];
  int64_t tags[kMost];
  alignas(64) R normals[4 * kMost];

  void add(int64_t group, const Stream& s, int64_t tag) {
    put(used, group, s);
    tags[used] = tag;
    if (++used == kMost) flush();
  }
  void flush() {
    for (int g = used; g % kGroupsPerBlock; ++g)
      put(g, 0, {});
    int i = 0;
    for (; i + kTogether * kGroupsPerBlock <= used; i += kTogether * kGroupsPerBlock)
      fill_words<kTogether>(i);
    for (; i < used; i += kGroupsPerBlock)
      fill_words<1>(i);
    finish_normals(normals, 4 * i);
    for (int g = 0; g < used; ++g)
      place(tags[g], normals + 4 * g);
    used = 0;
  }

 private:
  static constexpr int kTogether = 2;

  FG_HD void put(int g, int64_t group, const Stream& s) {
    const int lane = g / kGroupsPerBlock * kGroupsPerBlock + lane_of_group(g % kGroupsPerBlock);
    groups[lane] = static_cast<uint64_t>(group);
    samples[lane] = static_cast<uint64_t>(s.sample);
    offsets[lane] = static_cast<uint64_t>(s.offset);
    seeds[lane] = static_cast<uint64_t>(s.seed);
  }
  template <int kBlocks> FG_HD void fill_words(int first) {
    Words<kBlocks> group, sample, low, high, k0, k1;
    for (int k = 0; k < kBlocks; ++k) {
      const int i = first + k * kGroupsPerBlock;
      group.of[k] = load_word(groups + i), sample.of[k] = load_word(samples + i);
      low.of[k] = load_word(offsets + i), high.of[k] = low.of[k] >> 32;
      k0.of[k] = load_word(seeds + i), k1.of[k] = k0.of[k] >> 32;
    }
    store_blocks(group, sample, low, high, k0, k1, normals + 4 * first);
  }
  static FG_HD WordV load_word(const uint64_t* from) { return *reinterpret_cast<const WordV*>(from); }
};

}  // namespace
}  // namespace fastgen
