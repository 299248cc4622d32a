// z itself: the contract's normals with nothing done to them, whose generator is csrc/common/philox.h and normal.h; or torch's own
// on a CUDA GPU, below.
#pragma once
#include "common/elementwise.h"
#include "common/normal.h"

namespace fastgen {

using RandnArguments = Elementwise;

// States of torch's generator that go on by `words` words.
struct TorchSkipArguments {
  TorchState* states;
  int64_t words;
};

// ---- torch's numbers on a CUDA GPU ---------------------------------------------------------------------------------------------

// torch fills a tensor of n elements by a launch of T threads, 256 to a block, no more of them than the GPU runs at a time. A
// thread makes kTorchCudaNormals<R> numbers by a call of Philox, for elements that lie T apart, and so on in turns. Element i has
//
//     thread = i mod T, turn = i div (kTorchCudaNormals·T), number = i div T mod kTorchCudaNormals
//     counter = (offset div 4 + turn, thread), each of 64 bits, key = seed
//
// (ATen/native/cuda/DistributionTemplates.h: calc_execution_policy, distribution_elementwise_grid_stride_kernel; curand_init of
// cuRAND).
constexpr int64_t kTorchCudaBlock = 256;
template <class R> constexpr int kTorchCudaNormals = sizeof(R) == 8 ? 2 : 4;

struct TorchCudaArguments {
  Operand out;
  int64_t samples = 1, event = 0;  // each sample is filled by a launch of its own, from a seed of its own
  int64_t threads = 0, turns = 0;  // of a launch
  const int64_t* seeds = nullptr;  // null: `seed`
  bool per_sample = false;
  int64_t seed = 0, first = 0;  // the counter of the first turn

  // `most`: threads that the GPU runs at a time.
  void plan(int64_t most) {
    const int64_t wanted = (event + kTorchCudaBlock - 1) / kTorchCudaBlock * kTorchCudaBlock;
    threads = wanted < most ? wanted : most;
    const int64_t of_turn = threads * (out.dtype == kFloat64 ? kTorchCudaNormals<double> : kTorchCudaNormals<float>);
    turns = threads ? (event + of_turn - 1) / of_turn : 0;
  }
  FG_HD int64_t seed_of(int64_t sample) const { return seeds ? seeds[per_sample ? sample : 0] : seed; }
};

// sin and cos of an angle within 0 … 2π. The nearest quarter turn is taken off in three parts, of which the products with the first
// two are exact, with or without fused multiply-adds.
template <class V> FG_HD void sincos_radians(V angle, V& sine, V& cosine) {
  const V rounder = splat<V>(kRounder<V>);
  const V shifted = fma(angle, splat<V>(0.63661977236758134308), rounder), quarters = shifted - rounder;  // 2/π
  V rest = fma(quarters, splat<V>(-1.5703125), angle);
  rest = fma(quarters, splat<V>(-4.837512969970703125e-4), rest);
  rest = fma(quarters, splat<V>(-7.54978995489188216e-8), rest);
  V s, c;
  sincos_within_eighth(rest, s, c);
  turn_by_quarters<V>((typename Lanes<V>::Bits)bits(shifted) << 30, s, c, sine, cosine);
}
// sin and cos of π·angle for an angle within 0 … 2; for doubles alone.
template <class V> FG_HD void sincos_half_turns(V angle, V& sine, V& cosine) {
  const V rounder = splat<V>(kRounder<V>);
  const V shifted = fma(angle, splat<V>(2.0), rounder), quarters = shifted - rounder;
  V s, c;
  sincos_within_eighth(fma(quarters, splat<V>(-0.5), angle) * splat<V>(3.14159265358979323846), s, c);
  turn_by_quarters<V>((typename Lanes<V>::Bits)bits(shifted) << 30, s, c, sine, cosine);
}

// Box–Muller as cuRAND has it: u = a·2⁻³² + 2⁻³³, v = 2π·b·2⁻³² + π·2⁻³², of floats and rounded to them, √(−2 ln u)·(sin v, cos v).
template <class V> FG_HD V curand_angle(typename Lanes<V>::Bits b) {
  constexpr double two_pi = 6.283185482025146484375;  // the float
  return fma(word_to_real(b), splat<V>(two_pi * 0x1p-32), splat<V>(two_pi * 0x1p-33));
}
template <class V> FG_HD void curand_polar(V radius, V angle, V& z_sin, V& z_cos) {
  V sine, cosine;
  sincos_radians(angle, sine, cosine);
  z_sin = sine * radius;
  z_cos = cosine * radius;
}

// The same of doubles: u = a·2⁻⁵³ + 2⁻⁵⁴, v = b·2⁻⁵² + 2⁻⁵³, √(−2 ln u)·(sin πv, cos πv), where a and b have 53 bits.
template <class W> FG_HD W curand_bits(W low, W high) { return (low & 0xFFFFFFFF) ^ ((high & 0xFFFFFFFF) << 21); }
template <class V> FG_HD V curand_real(typename Lanes<V>::Bits a) {  // exact
  return fma(word_to_real(a >> 32), splat<V>(0x1p32), word_to_real(a));
}
template <class V> FG_HD V curand_radius_double(typename Lanes<V>::Bits a) {
  return sqrt(log_positive(fma(curand_real<V>(a), splat<V>(0x1p-53), splat<V>(0x1p-54))) * splat<V>(-2.0));
}
template <class V> FG_HD void curand_polar_double(V radius, typename Lanes<V>::Bits b, V& z_sin, V& z_cos) {
  V sine, cosine;
  sincos_half_turns(fma(curand_real<V>(b), splat<V>(0x1p-52), splat<V>(0x1p-53)), sine, cosine);
  z_sin = sine * radius;
  z_cos = cosine * radius;
}

// One thread at a time: the words of its turn, and its numbers.
FG_HD Philox4<uint32_t> torch_words(uint64_t counter, int64_t thread, int64_t seed) {
  const uint64_t s = static_cast<uint64_t>(seed);
  return philox4x32<uint32_t, uint32_t>(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32),
                                        static_cast<uint32_t>(thread), 0u, static_cast<uint32_t>(s),
                                        static_cast<uint32_t>(s >> 32));
}
FG_HD void curand_box_muller(uint32_t a, uint32_t b, float& z_sin, float& z_cos) {
#ifdef __CUDA_ARCH__
  // the very functions that cuRAND calls
  const float radius = ::sqrtf(-2.0f * ::logf(fma(word_to_real(a), 0x1p-32f, 0x1p-33f))), angle = curand_angle<float>(b);
  z_sin = __sinf(angle) * radius;
  z_cos = __cosf(angle) * radius;
#else
  curand_polar(radius_of<float>(a), curand_angle<float>(b), z_sin, z_cos);
#endif
}
FG_HD void curand_normals(const Philox4<uint32_t>& r, float (&z)[4]) {
  curand_box_muller(r.r0, r.r1, z[0], z[1]);
  curand_box_muller(r.r2, r.r3, z[2], z[3]);
}
FG_HD void curand_normals(const Philox4<uint32_t>& r, double (&z)[2]) {
  const double radius = curand_radius_double<double>(curand_bits<uint64_t>(r.r0, r.r1));
  curand_polar_double(radius, curand_bits<uint64_t>(r.r2, r.r3), z[0], z[1]);
}

}  // namespace fastgen
