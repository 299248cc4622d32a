// Box–Muller on the words of Philox: u = (a + ½)·2⁻³², φ = 2π·b·2⁻³², z = √(−2 ln u)·(cos φ, sin φ). Host and device.
#pragma once
#include "philox.h"
#include "real_math.h"

namespace fastgen {

// sin and cos of an angle within ±π/4.
template <class V> FG_HD void sincos_within_eighth(V a, V& sine, V& cosine) {
  const V a2 = a * a;
  if constexpr (kIsDouble<V>) {
    sine = fma(a * a2,
               polynomial(a2, splat<V>(1.0 / 355687428096000.0), -1.0 / 1307674368000.0, 1.0 / 6227020800.0, -1.0 / 39916800,
                          1.0 / 362880, -1.0 / 5040, 1.0 / 120, -1.0 / 6),
               a);
    cosine = polynomial(a2, splat<V>(-1.0 / 6402373705728000.0), 1.0 / 20922789888000.0, -1.0 / 87178291200.0, 1.0 / 479001600,
                        -1.0 / 3628800, 1.0 / 40320, -1.0 / 720, 1.0 / 24, -0.5, 1.0);
  } else {
    sine = fma(a * a2, polynomial(a2, splat<V>(-0.0001951528392964974), 0.00833216030150652, -0.16666655242443085), a);
    cosine = polynomial(a2, splat<V>(2.44331567955669e-05), -0.0013887316454201937, 0.04166664555668831, -0.5, 1.0);
  }
}

// Turns an angle with the sine s and the cosine c by as many quarters as bits 31 and 30 say: odd ones swap the two, the sine is
// negative after 2 and 3, the cosine after 1 and 2.
template <class V> FG_HD void turn_by_quarters(typename Lanes<V>::Bits quarters, V s, V c, V& sine, V& cosine) {
  using L = Lanes<V>;
  using Int = typename L::Int;
  const auto odd = (quarters & L::splat_bits(0x40000000)) != L::splat_bits(0);
  constexpr int to_sign = kIsDouble<V> ? 32 : 0;
  const auto sign = L::splat_bits(0x80000000u);
  sine = from_bits(bits(select(odd, c, s)) ^ (Int)((quarters & sign) << to_sign));
  cosine = from_bits(bits(select(odd, s, c)) ^ (Int)(((quarters + L::splat_bits(0x40000000)) & sign) << to_sign));
}

// sin and cos of 2π·b·2⁻³². The quarter turn nearest to b is taken off in integers, exactly; what is left is within ±π/4.
// `turn` holds b in its low 32 bits.
template <class V> FG_HD void sincos_turn(typename Lanes<V>::Bits turn, V& sine, V& cosine) {
  using L = Lanes<V>;
  using Int = typename L::Int;
  const auto shifted = turn + L::splat_bits(0x20000000);
  const Int rest = (Int)(shifted & L::splat_bits(0x3FFFFFFF)) - L::splat_int(0x20000000);
  V s, c;
  sincos_within_eighth(to_real(rest) * splat<V>(1.4629180792671596e-09), s, c);  // 2π·2⁻³²
  turn_by_quarters(shifted, s, c, sine, cosine);
}

#ifdef __CUDA_ARCH__
// On the special-function units of a GPU, four calls for a pair. Their logarithm is off by up to 2⁻²² near u = 1, which the root
// makes 6e-4 where the radius is near 0, and their sine and cosine by 5e-7. abs: that logarithm may be a hair above 0.
__device__ __forceinline__ void box_muller_fast(uint32_t a, uint32_t b, float& z_cos, float& z_sin) {
  const float u = fma(word_to_real(a), 0x1p-32f, 0x1p-33f), angle = to_real(static_cast<int32_t>(b)) * 1.4629180792671596e-09f;
  float log2_u, radius, sine, cosine;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2_u) : "f"(u));
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(radius) : "f"(abs(log2_u * -1.3862943611198906f)));
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(sine) : "f"(angle));
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(cosine) : "f"(angle));
  z_cos = radius * cosine;
  z_sin = radius * sine;
}
#endif

template <class V> FG_HD V radius_of(typename Lanes<V>::Bits a) {
  const V u = fma(word_to_real(a), splat<V>(0x1p-32), splat<V>(0x1p-33));
  return sqrt(log_positive(u) * splat<V>(-2.0));
}

template <class V> FG_HD void polar(V radius, typename Lanes<V>::Bits b, V& z_cos, V& z_sin) {
  V sine, cosine;
  sincos_turn<V>(b, sine, cosine);
  z_cos = radius * cosine;
  z_sin = radius * sine;
}

// Words in, a pair of normals out.
template <class V> FG_HD void box_muller(typename Lanes<V>::Bits a, typename Lanes<V>::Bits b, V& z_cos, V& z_sin) {
#ifdef __CUDA_ARCH__
  if constexpr (!kIsDouble<V>) return box_muller_fast(a, b, z_cos, z_sin);
#endif
  polar(radius_of<V>(a), b, z_cos, z_sin);
}

// The contract, one thread or host call at a time: the four normals of an element group of a sample.
template <class R> FG_HD void contract_normals(const Stream& stream, int64_t group, R* z) {
  const Philox4<uint32_t> r = contract_words(group, stream.sample, stream.offset, stream.seed);
  box_muller<R>(r.r0, r.r1, z[0], z[1]);
  box_muller<R>(r.r2, r.r3, z[2], z[3]);
}

}  // namespace fastgen
