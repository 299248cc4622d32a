// The SIMD vectors of one instruction set: GCC vector types, plus the few operations that the language has no operator for.
// The file is compiled once for each instruction set; the vector is as wide as its registers.
#pragma once
#include <immintrin.h>

#include "host_device.h"

namespace fastgen {

#if defined(__AVX512F__)
#define FG_VECTOR_BYTES 64
#define FG_INTRINSIC(name) _mm512_##name
#elif defined(__AVX2__)
#define FG_VECTOR_BYTES 32
#define FG_INTRINSIC(name) _mm256_##name
#else
#define FG_VECTOR_BYTES 16
#define FG_INTRINSIC(name) _mm_##name
#endif
#define FG_UNROLL_4 _Pragma("GCC unroll 4")
#define FG_VECTOR __attribute__((vector_size(FG_VECTOR_BYTES), may_alias))

typedef float FloatV FG_VECTOR;
typedef double DoubleV FG_VECTOR;
typedef int32_t Int32V FG_VECTOR;
typedef uint32_t UInt32V FG_VECTOR;
typedef int64_t Int64V FG_VECTOR;
typedef uint64_t WordV FG_VECTOR;  // one 32-bit word in each 64-bit lane, upper bits unspecified

template <class R> struct VectorOf;
template <> struct VectorOf<float> {
  using Type = FloatV;
};
template <> struct VectorOf<double> {
  using Type = DoubleV;
};
template <class R> using Vec = typename VectorOf<R>::Type;
template <class R> constexpr int kLanes = FG_VECTOR_BYTES / sizeof(R);

template <> struct Lanes<FloatV> {
  using Real = float;
  using Int = Int32V;
  using Bits = UInt32V;
  static FG_HD FloatV splat(float a) { return a - FloatV{}; }  // a − 0 is a, −0 and NaN included
  static FG_HD Int32V splat_int(int32_t a) { return a - Int32V{}; }
  static FG_HD UInt32V splat_bits(uint32_t a) { return a - UInt32V{}; }
};
template <> struct Lanes<DoubleV> {
  using Real = double;
  using Int = Int64V;
  using Bits = WordV;
  static FG_HD DoubleV splat(double a) { return a - DoubleV{}; }
  static FG_HD Int64V splat_int(int64_t a) { return a - Int64V{}; }
  static FG_HD WordV splat_bits(uint64_t a) { return a - WordV{}; }
};

// The baseline has no fused multiply-add; there two roundings take the place of one.
#ifdef __FMA__
FG_HD FloatV fma(FloatV a, FloatV b, FloatV c) { return (FloatV)FG_INTRINSIC(fmadd_ps)(a, b, c); }
FG_HD DoubleV fma(DoubleV a, DoubleV b, DoubleV c) { return (DoubleV)FG_INTRINSIC(fmadd_pd)(a, b, c); }
#else
FG_HD FloatV fma(FloatV a, FloatV b, FloatV c) { return a * b + c; }
FG_HD DoubleV fma(DoubleV a, DoubleV b, DoubleV c) { return a * b + c; }
#endif
FG_HD FloatV max(FloatV a, FloatV b) { return (FloatV)FG_INTRINSIC(max_ps)(a, b); }
FG_HD DoubleV max(DoubleV a, DoubleV b) { return (DoubleV)FG_INTRINSIC(max_pd)(a, b); }
FG_HD FloatV min(FloatV a, FloatV b) { return (FloatV)FG_INTRINSIC(min_ps)(a, b); }
FG_HD DoubleV min(DoubleV a, DoubleV b) { return (DoubleV)FG_INTRINSIC(min_pd)(a, b); }
FG_HD FloatV sqrt(FloatV a) { return (FloatV)FG_INTRINSIC(sqrt_ps)(a); }
FG_HD DoubleV sqrt(DoubleV a) { return (DoubleV)FG_INTRINSIC(sqrt_pd)(a); }

FG_HD Int32V bits(FloatV a) { return (Int32V)a; }
FG_HD Int64V bits(DoubleV a) { return (Int64V)a; }
FG_HD FloatV from_bits(Int32V a) { return (FloatV)a; }
FG_HD DoubleV from_bits(Int64V a) { return (DoubleV)a; }
FG_HD FloatV abs(FloatV a) { return from_bits(bits(a) & 0x7FFFFFFF); }
FG_HD DoubleV abs(DoubleV a) { return from_bits(bits(a) & 0x7FFFFFFFFFFFFFFF); }
FG_HD FloatV to_real(Int32V a) { return __builtin_convertvector(a, FloatV); }
FG_HD DoubleV to_real(Int64V a) {
  // exact for |a| < 2⁵¹; AVX2 and older have no conversion from 64-bit integers
  constexpr double magic = 6755399441055744.0;
  return (DoubleV)(a + (Int64V)(DoubleV{} + magic)) - magic;
}
#ifdef __AVX512F__
// As the template in real_math.h, in one instruction.
FG_HD FloatV scale(FloatV a, FloatV n) { return (FloatV)_mm512_scalef_ps(a, n); }
FG_HD DoubleV scale(DoubleV a, DoubleV n) { return (DoubleV)_mm512_scalef_pd(a, n); }
#endif
FG_HD FloatV word_to_real(UInt32V a) {
#ifdef __AVX512F__
  return (FloatV)_mm512_cvtepu32_ps((__m512i)a);
#else
  // two exact halves, rounded once in the sum: the same value as the AVX-512 conversion
  return to_real((Int32V)(a >> 16)) * 65536.0f + to_real((Int32V)(a & 0xFFFF));
#endif
}
FG_HD DoubleV word_to_real(WordV a) { return to_real((Int64V)(a & 0xFFFFFFFF)); }

FG_HD FloatV select(Int32V mask, FloatV a, FloatV b) { return mask ? a : b; }
FG_HD DoubleV select(Int64V mask, DoubleV a, DoubleV b) { return mask ? a : b; }

FG_HD void multiply_wide(WordV a, uint32_t b, WordV& high, WordV& low) {
#if defined(__AVX512F__)
  low = (WordV)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  low = (WordV)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  low = (WordV)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#endif
  high = low >> 32;
}
FG_HD WordV xor3(WordV a, WordV b, WordV c) {
#ifdef __AVX512F__
  return (WordV)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}
// [a0, b0, a1, b1, …] of 32-bit words.
FG_HD UInt32V pack_words(WordV a, WordV b) {
#ifdef __AVX512F__
  return (UInt32V)_mm512_mask_shuffle_epi32((__m512i)a, 0xAAAA, (__m512i)b, _MM_PERM_CCAA);
#else
  return (UInt32V)((a & 0xFFFFFFFF) | (b << 32));
#endif
}
// Within each 128 bits: [a0, b0, a1, b1] and [a2, b2, a3, b3].
FG_HD void interleave(FloatV a, FloatV b, FloatV& low, FloatV& high) {
  low = (FloatV)FG_INTRINSIC(unpacklo_ps)(a, b);
  high = (FloatV)FG_INTRINSIC(unpackhi_ps)(a, b);
}

template <class R> FG_HD Vec<R> load(const R* from) {
  typedef R Unaligned __attribute__((vector_size(FG_VECTOR_BYTES), may_alias, aligned(sizeof(R))));
  return (Vec<R>)*reinterpret_cast<const Unaligned*>(from);
}
template <class R> FG_HD void store(R* to, Vec<R> v) {
  typedef R Unaligned __attribute__((vector_size(FG_VECTOR_BYTES), may_alias, aligned(sizeof(R))));
  *reinterpret_cast<Unaligned*>(to) = (Unaligned)v;
}

// Two vectors that go through a formula side by side, instruction by instruction. A formula is one chain of dependent steps, and
// the processor's window is too short to overlap it with the next vector's: the loss and its gradient took 1.17 and 0.90 ns per
// element from the cache on one core one vector at a time, and 0.81 and 0.68 two at a time; four at a time spill, and are no
// faster (AMD EPYC, Zen 4).
template <class V> struct Twice {
  V first, second;
};
template <class V> FG_HD Twice<V> twice(V first, V second) { return {first, second}; }
#define FG_OPERATOR(op) \
  template <class V> FG_HD auto operator op(Twice<V> a, Twice<V> b) { return twice(a.first op b.first, a.second op b.second); }
FG_OPERATOR(+)
FG_OPERATOR(-)
FG_OPERATOR(*)
FG_OPERATOR(/)
FG_OPERATOR(<)
FG_OPERATOR(>)
FG_OPERATOR(>=)
FG_OPERATOR(==)
#undef FG_OPERATOR
template <class V> FG_HD Twice<V> operator-(Twice<V> a) { return {-a.first, -a.second}; }
template <class V> FG_HD Twice<V> operator<<(Twice<V> a, int by) { return {a.first << by, a.second << by}; }
template <class V> FG_HD Twice<V> operator>>(Twice<V> a, int by) { return {a.first >> by, a.second >> by}; }
template <class V> FG_HD Twice<V> fma(Twice<V> a, Twice<V> b, Twice<V> c) {
  return {fma(a.first, b.first, c.first), fma(a.second, b.second, c.second)};
}
template <class M, class V> FG_HD Twice<V> select(Twice<M> mask, Twice<V> a, Twice<V> b) {
  return {select(mask.first, a.first, b.first), select(mask.second, a.second, b.second)};
}
template <class V> FG_HD Twice<V> max(Twice<V> a, Twice<V> b) { return {max(a.first, b.first), max(a.second, b.second)}; }
template <class V> FG_HD Twice<V> min(Twice<V> a, Twice<V> b) { return {min(a.first, b.first), min(a.second, b.second)}; }
#ifdef __AVX512F__
template <class V> FG_HD Twice<V> scale(Twice<V> a, Twice<V> n) { return {scale(a.first, n.first), scale(a.second, n.second)}; }
#endif
template <class V> FG_HD Twice<V> abs(Twice<V> a) { return {abs(a.first), abs(a.second)}; }
template <class V> FG_HD auto bits(Twice<V> a) { return twice(bits(a.first), bits(a.second)); }
template <class V> FG_HD auto from_bits(Twice<V> a) { return twice(from_bits(a.first), from_bits(a.second)); }
template <class V> struct Lanes<Twice<V>> {
  using Real = typename Lanes<V>::Real;
  using Int = Twice<typename Lanes<V>::Int>;
  static FG_HD Twice<V> splat(Real a) { return twice(Lanes<V>::splat(a), Lanes<V>::splat(a)); }
  static FG_HD Int splat_int(int64_t a) { return twice(Lanes<V>::splat_int(a), Lanes<V>::splat_int(a)); }
};
template <class V> struct LoadAs {
  static FG_HD V from(const typename Lanes<V>::Real* data) { return load(data); }
};
template <class V> struct LoadAs<Twice<V>> {
  static FG_HD Twice<V> from(const typename Lanes<V>::Real* data) { return {load(data), load(data + sizeof(V) / sizeof(*data))}; }
};
template <class V> FG_HD V load_as(const typename Lanes<V>::Real* from) { return LoadAs<V>::from(from); }
template <class R> FG_HD void store(R* to, Twice<Vec<R>> v) {
  store(to, v.first);
  store(to + kLanes<R>, v.second);
}

// f(v, i) for the elements from i on of two vectors, and of one where one is left: v says which by its type. n is whole vectors.
template <class R, class F> FG_HD void by_twos(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 2 * kLanes<R> <= n; i += 2 * kLanes<R>)
    f(Twice<Vec<R>>{}, i);
  if (i < n) f(Vec<R>{}, i);
}

}  // namespace fastgen
