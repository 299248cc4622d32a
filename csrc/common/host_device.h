// Scalar primitives that the formula headers are written in, for the host and for CUDA. cpu_vec.h overloads the same names for
// SIMD vectors, so that one formula serves a CUDA thread, a host test and a vector lane. No torch here.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define FG_HD __host__ __device__ __forceinline__
#define FG_UNROLL _Pragma("unroll")
#define FG_INLINE
#else
#define FG_HD inline __attribute__((always_inline))
#define FG_NOINLINE __attribute__((noinline))  // of the CPU's kernels alone
#define FG_UNROLL _Pragma("GCC unroll 16")
#define FG_INLINE __attribute__((always_inline))
#endif

namespace fastgen {

// What goes with a value type V of a formula: Real, its element type; Int and Bits, a signed and an unsigned integer (vector) of
// the same width.
template <class V> struct Lanes;
template <> struct Lanes<float> {
  using Real = float;
  using Int = int32_t;
  using Bits = uint32_t;
  static FG_HD float splat(float a) { return a; }
  static FG_HD int32_t splat_int(int32_t a) { return a; }
  static FG_HD uint32_t splat_bits(uint32_t a) { return a; }
};
template <> struct Lanes<double> {
  using Real = double;
  using Int = int64_t;
  using Bits = uint64_t;
  static FG_HD double splat(double a) { return a; }
  static FG_HD int64_t splat_int(int64_t a) { return a; }
  static FG_HD uint64_t splat_bits(uint64_t a) { return a; }
};
template <class V> FG_HD V splat(double a) { return Lanes<V>::splat(static_cast<typename Lanes<V>::Real>(a)); }
template <class V> constexpr bool kIsDouble = sizeof(typename Lanes<V>::Real) == 8;

// Explicit, because contraction by the compiler is off: every backend then rounds in the same places.
FG_HD float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
FG_HD double fma(double a, double b, double c) { return ::fma(a, b, c); }
FG_HD float sqrt(float a) { return ::sqrtf(a); }
FG_HD double sqrt(double a) { return ::sqrt(a); }
FG_HD float abs(float a) { return ::fabsf(a); }
FG_HD double abs(double a) { return ::fabs(a); }

// The GPU's approximations of 2ᵃ and 1/a: within 2 ulp and 1 ulp of the rounded values (PTX ISA), subnormal results 0, 2⁰ = 1. On
// the host the rounded values, unless a test puts others in their place.
#ifndef FG_EXP2_APPROXIMATION
#define FG_EXP2_APPROXIMATION(a) ::exp2f(a)
#define FG_RECIPROCAL_APPROXIMATION(a) (1.0f / (a))
#endif
FG_HD float exp2_approximation(float a) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
#else
  return FG_EXP2_APPROXIMATION(a);
#endif
}
FG_HD float reciprocal_approximation(float a) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
#else
  return FG_RECIPROCAL_APPROXIMATION(a);
#endif
}

template <class T> FG_HD T select(bool mask, T a, T b) { return mask ? a : b; }
// a is a number, a bound; NaN in b stays, as x86's own instructions have it.
FG_HD float max(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float result;  // one instruction, a comparison and a selection are two
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a > b ? a : b;
#endif
}
FG_HD float min(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a < b ? a : b;
#endif
}
FG_HD double max(double a, double b) { return a > b ? a : b; }
FG_HD double min(double a, double b) { return a < b ? a : b; }

FG_HD int32_t bits(float a) {
  int32_t b;
  memcpy(&b, &a, 4);
  return b;
}
FG_HD int64_t bits(double a) {
  int64_t b;
  memcpy(&b, &a, 8);
  return b;
}
FG_HD float from_bits(int32_t a) {
  float b;
  memcpy(&b, &a, 4);
  return b;
}
FG_HD double from_bits(int64_t a) {
  double b;
  memcpy(&b, &a, 8);
  return b;
}
FG_HD float to_real(int32_t a) { return static_cast<float>(a); }
FG_HD double to_real(int64_t a) { return static_cast<double>(a); }
// The value of the low 32 bits; rounded once for float.
FG_HD float word_to_real(uint32_t a) { return static_cast<float>(a); }
FG_HD double word_to_real(uint64_t a) { return static_cast<double>(a & 0xFFFFFFFF); }

// 32 × 32 → 64 bits. A word's upper bits, where the type has any, are ignored on input and unspecified on output.
FG_HD void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}
FG_HD uint32_t xor3(uint32_t a, uint32_t b, uint32_t c) { return a ^ b ^ c; }

}  // namespace fastgen
