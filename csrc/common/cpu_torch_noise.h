// torch's own normals, bit for bit: what torch.randn(length, generator=...) gives on the CPU, for 16 contiguous elements or more of
// float32, float16 or bfloat16, and the state in which it leaves the generator.
//
// Sixteen words of mt19937 make sixteen normals, those of words k and k + 8 by one Box–Muller. float32 draws `length` words, and
// where that is no multiple of 16 another 16 for the last 16 elements; the half types draw only the words of whole blocks, and
// round each normal once. The arithmetic is that of ATen's AVX2 kernel (native/cpu/DistributionTemplates.h, avx_mathfun.h, after
// Cephes), fused where the compilers of torch's Linux builds fuse it: one multiplication and addition in place of an fma changes
// one element in a hundred.
#pragma once
#include <stddef.h>

#include "cpu_convert.h"
#include "cpu_noise.h"
#include "real_math.h"

namespace fastgen {
namespace {  // internal linkage: the linker must not swap one instruction set's copy for another's

constexpr int kTorchBlock = 16;

FG_HD UInt32V load_words(const uint32_t* from) { return (UInt32V)load(reinterpret_cast<const float*>(from)); }
FG_HD void store_words(uint32_t* to, UInt32V v) { store(reinterpret_cast<float*>(to), (FloatV)v); }

// The words of mt19937 from a state on.
class TorchWords {
 public:
  void load_state(const TorchState& state) {
    for (int i = 0; i < kTwisted; ++i)
      raw_[i] = static_cast<uint32_t>(state.words[i]);
    end_ = kTwisted;
    next_ = kTwisted - (state.left - 1);
  }
  // The state after the words drawn so far, `before` being that from which they were. torch twists when it needs a word, so the
  // last one drawn is among the state's words.
  void store_state(const TorchState& before, TorchState& state) const {
    state.seed = before.seed;
    state.seeded = before.seeded;
    __builtin_memcpy(&state.pair_y, &before.pair_y, sizeof(TorchState) - offsetof(TorchState, pair_y));
    const int64_t first = next_ > kTwisted ? (next_ - 1) / kTwisted * kTwisted : 0;
    for (int i = 0; i < kTwisted; ++i)
      state.words[i] = raw_[first + i];
    state.next = static_cast<uint64_t>(next_ - first);
    state.left = static_cast<int32_t>(kTwisted + 1 - (next_ - first));
  }
  // The next blocks of words, not tempered yet, at most `most` of them and at least one; how many.
  int64_t blocks(int64_t most, const uint32_t*& words) {
    if (end_ - next_ < kTorchBlock) twist(most * kTorchBlock - (end_ - next_));
    const int64_t count = (end_ - next_) / kTorchBlock < most ? (end_ - next_) / kTorchBlock : most;
    words = raw_ + next_;
    next_ += count * kTorchBlock;
    return count;
  }
  void skip(int64_t words) {
    while (words > end_ - next_) {
      words -= end_ - next_;
      next_ = end_;
      twist(words);
    }
    next_ += words;
  }

 private:
  // How many times 624 words are made at a time, at most. Those before them are moved to the front first.
  static constexpr int kTogether = 4;
  static constexpr int64_t kLag = 397;
  int64_t next_ = 0, end_ = 0;  // raw_[next_ … end_ − 1] are made and not drawn
  alignas(64) uint32_t raw_[kTwisted * (1 + kTogether) + 16];

  // Makes `words` words or more, if there is room for them. Fewer than 624 must be left.
  void twist(int64_t words) {
    const int64_t last = end_ - kTwisted;
    if (last > 0) __builtin_memmove(raw_, raw_ + last, kTwisted * sizeof(uint32_t));
    next_ -= last;
    const int64_t twists = words > (kTogether - 1) * kTwisted ? kTogether : (words + kTwisted - 1) / kTwisted;
    end_ = kTwisted * (1 + twists);
    // a word depends on one 227 places before it at the nearest: a vector of them is made at a time
    for (int64_t i = 0; i + kTwisted < end_; i += kLanes<float>) {
      const UInt32V upper = load_words(raw_ + i) & 0x80000000u, following = load_words(raw_ + i + 1);
      const UInt32V mixed = (upper | (following & 0x7FFFFFFFu)) >> 1;
      const UInt32V odd = (UInt32V{} - (following & 1u)) & 0x9908B0DFu;
      store_words(raw_ + i + kTwisted, load_words(raw_ + i + kLag) ^ mixed ^ odd);
    }
  }
};

// The masks of the functions below, in memory: GCC would else make each anew at every turn of a loop, in three instructions.
struct TorchMasks {
  UInt32V temper_7, temper_15, mantissa_24, sign_and_mantissa, half;
  TorchMasks() {
    temper_7 = Lanes<FloatV>::splat_bits(0x9D2C5680u);
    temper_15 = Lanes<FloatV>::splat_bits(0xEFC60000u);
    mantissa_24 = Lanes<FloatV>::splat_bits(0xFFFFFFu);
    sign_and_mantissa = Lanes<FloatV>::splat_bits(0x807FFFFFu);
    half = Lanes<FloatV>::splat_bits(0x3F000000u);
    asm("" : "+m"(*this));
  }
};

// Of a word of the recurrence the number within 0 … 1 that it stands for, 24 bits.
FG_HD FloatV torch_uniform(const TorchMasks& masks, UInt32V word) {
  word ^= word >> 11;
  word ^= (word << 7) & masks.temper_7;
  word ^= (word << 15) & masks.temper_15;
  word ^= word >> 18;
  return to_real((Int32V)(word & masks.mantissa_24)) * 0x1p-24f;
}

// √(−2 ln(1 − u)).
FG_HD FloatV torch_radius(const TorchMasks& masks, FloatV u) {
  const FloatV one = splat<FloatV>(1.0);
  FloatV x = one - u;
  FloatV exponent = to_real((Int32V)((UInt32V)x >> 23) - 127) + one;
  x = (FloatV)(((UInt32V)x & masks.sign_and_mantissa) | masks.half);
  const Int32V low = x < splat<FloatV>(0.707106781186547524);
  const FloatV again = select(low, x, FloatV{});
  exponent = exponent - select(low, one, FloatV{});
  x = (x - one) + again;
  FloatV y = polynomial(x, splat<FloatV>(7.0376836292E-2), -1.1514610310E-1, 1.1676998740E-1, -1.2420140846E-1, 1.4249322787E-1,
                        -1.6668057665E-1, 2.0000714765E-1, -2.4999993993E-1, 3.3333331174E-1);
  const FloatV square = x * x;
  y = fma(y * x, square, exponent * splat<FloatV>(-2.12194440e-4));
  y = fma(-square, splat<FloatV>(0.5), y);
  const FloatV log = fma(exponent, splat<FloatV>(0.693359375), x + y);
  return sqrt(splat<FloatV>(-2.0) * log);
}

// radius · (cos 2πu, sin 2πu); the 0 that is added makes a −0 a 0, as torch's scaling by a deviation and a mean does.
FG_HD void torch_polar(FloatV radius, FloatV u, FloatV& cosine, FloatV& sine) {
  FloatV x = splat<FloatV>(6.283185307179586) * u;
  const Int32V octant = (__builtin_convertvector(x * splat<FloatV>(1.27323954473516), Int32V) + 1) & ~1;
  const FloatV octants = to_real(octant);
  x = fma(octants, splat<FloatV>(-0.78515625), x);
  x = fma(octants, splat<FloatV>(-2.4187564849853515625e-4), x);
  x = fma(octants, splat<FloatV>(-3.77489497744594108e-8), x);
  const FloatV square = x * x;
  FloatV c = polynomial(square, splat<FloatV>(2.443315711809948E-5), -1.388731625493765E-3, 4.166664568298827E-2) * square;
  c = fma(c, square, -(square * splat<FloatV>(0.5))) + splat<FloatV>(1.0);
  FloatV s = polynomial(square, splat<FloatV>(-1.9515295891E-4), 8.3321608736E-3, -1.6666654611E-1) * square;
  s = fma(s, x, x);
  const Int32V straight = (octant & 2) == 0;
  const UInt32V sign_of_sine = (UInt32V)(octant & 4) << 29, sign_of_cosine = (UInt32V)(~(octant - 2) & 4) << 29;
  cosine = radius * (FloatV)((UInt32V)select(straight, c, s) ^ sign_of_cosine) + splat<FloatV>(0.0);
  sine = radius * (FloatV)((UInt32V)select(straight, s, c) ^ sign_of_sine) + splat<FloatV>(0.0);
}

// The vectors of words, or of normals, that go through one Box–Muller: of two blocks with 512 bits, of a quarter of one with 128.
struct TorchPairs {
#if defined(__AVX512F__)
  static constexpr int kBlocks = 2, kSteps = 1;
  static FG_HD FloatV half(FloatV a, FloatV b, int which) {
    return which ? (FloatV)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xEE)
                 : (FloatV)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44);
  }
  static FG_HD FloatV get(const float* from, int, int which) { return half(load(from), load(from + kTorchBlock), which); }
  static FG_HD void put(float* to, int, FloatV first, FloatV second) {
    store(to, half(first, second, 0));
    store(to + kTorchBlock, half(first, second, 1));
  }
#else
  static constexpr int kBlocks = 1, kSteps = kTorchBlock / 2 / kLanes<float>;
  static FG_HD FloatV get(const float* from, int step, int which) {
    return load(from + which * kTorchBlock / 2 + step * kLanes<float>);
  }
  static FG_HD void put(float* to, int step, FloatV first, FloatV second) {
    store(to + step * kLanes<float>, first);
    store(to + kTorchBlock / 2 + step * kLanes<float>, second);
  }
#endif
};

// `blocks` blocks of normals. With 512 bits `to` must have room for one more, which is written too where their number is odd. All
// in one loop, other than in `fill_normals`: a normal takes 3.2 ns, and with a loop for the radii before it 4.0. It took 3.6 with
// u2 made after the radius, as the two chains of steps do not overlap then, and 3.7 without `TorchMasks` besides (AMD EPYC, Zen 1,
// whose 256 bits are two halves; torch.randn takes 7.2).
FG_HD void torch_normals(const uint32_t* words, int64_t blocks, float* to, const Ahead& ahead, int64_t first) {
  using Pairs = TorchPairs;
  const float* const raw = reinterpret_cast<const float*>(words);
  const TorchMasks masks;
  constexpr int64_t turn = Pairs::kBlocks * kTorchBlock;
  for (int64_t i = 0; i < blocks * kTorchBlock; i += turn) {
    if (i % 64 == 0) ahead.fetch(first + i, 64);
    for (int step = 0; step < Pairs::kSteps; ++step) {
      const FloatV u1 = torch_uniform(masks, (UInt32V)Pairs::get(raw + i, step, 0));
      const FloatV u2 = torch_uniform(masks, (UInt32V)Pairs::get(raw + i, step, 1));
      FloatV cosine, sine;
      torch_polar(torch_radius(masks, u1), u2, cosine, sine);
      Pairs::put(to + i, step, cosine, sine);
    }
  }
}

// The normals of a batch, from one generator for all of it, or from one for each sample: those of a range of its elements, asked
// for in increasing order. Whoever asks for the last elements of a generator leaves its state in `final_states`.
class TorchNormals {
 public:
  // Elements j … j+n-1 of sample b, in `buffer`; returns where element j is. From the block on in which element j is, whole blocks
  // are written, and with 512 bits perhaps one more: up to 16 numbers more than n rounded up, or 32.
  FG_NOINLINE const float* fill(const Noise& noise, const Geometry& g, int64_t b, int64_t j, int64_t n, float* buffer,
                                const Ahead& ahead) {
    const int64_t begin = start(noise, g, b, j), end = begin + n, first = begin / kTorchBlock * kTorchBlock;
    const int64_t rounded_up = (end + kTorchBlock - 1) / kTorchBlock * kTorchBlock;
    const int64_t stop = rounded_up < whole_ ? rounded_up : whole_;
    int64_t at = first;
    if (at < drawn_) {  // the block that the last call ended in
      __builtin_memcpy(buffer, last_, sizeof(last_));
      at += kTorchBlock;
    }
    if (at < stop) {
      draw(at, stop, buffer + (at - first), ahead, at - begin);
      __builtin_memcpy(last_, buffer + (stop - first) - kTorchBlock, sizeof(last_));
    }
    if (end > tail()) {
      draw_tail();
      const int64_t from = begin > tail() ? begin : tail();
      __builtin_memcpy(buffer + (from - first), tail_ + (from - tail()), (end - from) * sizeof(float));
    }
    as_stored(noise.dtype, (end - first + kLanes<float> - 1) / kLanes<float> * kLanes<float>, buffer);
    return buffer + (begin - first);
  }
  // The range has ended before element j of sample b.
  FG_NOINLINE void finish(const Noise& noise, const Geometry& g, int64_t b, int64_t j) {
    const int64_t end = start(noise, g, b, j);
    if (end != length_) return;
    draw_tail();
    words_.store_state(noise.states[stream_], noise.final_states[stream_]);
  }

 private:
  int64_t stream_ = -1;             // of which generator
  int64_t length_, whole_, drawn_;  // its elements, those in whole blocks, and those whose words are drawn
  bool half_, tail_is_drawn_;
  float last_[kTorchBlock], tail_[2 * kTorchBlock];
  TorchWords words_;

  // Turns to the generator of sample b; returns which of its elements is element j of the sample.
  int64_t start(const Noise& noise, const Geometry& g, int64_t b, int64_t j) {
    const int64_t stream = noise.per_sample ? b : 0;
    if (stream != stream_) {
      stream_ = stream;
      length_ = noise.per_sample ? g.event : g.batch * g.event;
      whole_ = length_ / kTorchBlock * kTorchBlock;
      drawn_ = 0;
      half_ = noise.dtype != kFloat32;
      tail_is_drawn_ = false;
      words_.load_state(noise.states[stream]);
    }
    return noise.per_sample ? j : b * g.event + j;
  }
  // The element from which on the last block has them, drawn a second time where whole blocks are not enough.
  int64_t tail() const { return length_ == whole_ ? length_ : length_ - kTorchBlock; }
  void skip_to(int64_t element) {
    words_.skip(element - drawn_);
    drawn_ = element;
  }
  void draw(int64_t begin, int64_t end, float* to, const Ahead& ahead, int64_t first) {
    skip_to(begin);
    while (drawn_ < end) {
      const uint32_t* words;
      const int64_t n = kTorchBlock * words_.blocks((end - drawn_) / kTorchBlock, words);
      torch_normals(words, n / kTorchBlock, to + (drawn_ - begin), ahead, first + drawn_ - begin);
      drawn_ += n;
    }
  }
  void draw_tail() {
    skip_to(drawn_ < whole_ ? whole_ : drawn_);
    if (length_ == whole_ || tail_is_drawn_) return;
    if (!half_) words_.skip(length_ - whole_);
    const uint32_t* words;
    words_.blocks(1, words);
    torch_normals(words, 1, tail_, {}, 0);
    tail_is_drawn_ = true;
  }
};

}  // namespace
}  // namespace fastgen
