// Rows of any dtype to and from the type of the arithmetic.
#pragma once
#include "cpu_vec.h"

#include "bytes.h"
#include "elementwise.h"

namespace fastgen {
namespace {  // internal linkage: the linker must not swap one instruction set's copy for another's

inline float bfloat16_to_float(uint16_t h) { return from_bits(static_cast<int32_t>(static_cast<uint32_t>(h) << 16)); }
inline uint16_t float_to_bfloat16(float f) {
  const uint32_t b = static_cast<uint32_t>(bits(f));
  if ((b & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>((b >> 16) | 0x40);  // quiet NaN, sign and payload kept
  return static_cast<uint16_t>((b + 0x7FFF + ((b >> 16) & 1)) >> 16);                 // to nearest, ties to even
}

// _Float16 converts through F16C where the instruction set has it and through libgcc where not; both round to nearest even.
template <class R> FG_HD void read(const Operand& from, int64_t offset, int64_t n, R* to) {
  switch (from.dtype) {
    case kFloat32: {
      const float* p = static_cast<const float*>(from.data) + offset;
      for (int64_t i = 0; i < n; ++i)
        to[i] = static_cast<R>(p[i]);
      break;
    }
    case kFloat64: {
      const double* p = static_cast<const double*>(from.data) + offset;
      for (int64_t i = 0; i < n; ++i)
        to[i] = static_cast<R>(p[i]);
      break;
    }
    case kFloat16: {
      const _Float16* p = static_cast<const _Float16*>(from.data) + offset;
      int64_t i = 0;
#if defined(__AVX512F__)
      if constexpr (sizeof(R) == 4)
        for (; i + 16 <= n; i += 16)
          _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + i))));
#elif defined(__F16C__)
      if constexpr (sizeof(R) == 4)
        for (; i + 8 <= n; i += 8)
          _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i))));
#endif
      for (; i < n; ++i)
        to[i] = static_cast<R>(p[i]);
      break;
    }
    case kBFloat16: {
      const uint16_t* p = static_cast<const uint16_t*>(from.data) + offset;
      for (int64_t i = 0; i < n; ++i)
        to[i] = static_cast<R>(bfloat16_to_float(p[i]));
      break;
    }
    case kUInt8: {
      const uint8_t* p = static_cast<const uint8_t*>(from.data) + offset;
      for (int64_t i = 0; i < n; ++i)
        to[i] = value_of_byte(static_cast<R>(p[i]));
      break;
    }
  }
}

template <class R> FG_HD void write(const R* from, int64_t n, const Operand& to, int64_t offset) {
  switch (to.dtype) {
    case kFloat32: {
      float* p = static_cast<float*>(to.data) + offset;
      for (int64_t i = 0; i < n; ++i)
        p[i] = static_cast<float>(from[i]);
      break;
    }
    case kFloat64: {
      double* p = static_cast<double*>(to.data) + offset;
      for (int64_t i = 0; i < n; ++i)
        p[i] = static_cast<double>(from[i]);
      break;
    }
    case kFloat16: {
      _Float16* p = static_cast<_Float16*>(to.data) + offset;
      int64_t i = 0;
#if defined(__AVX512F__)
      if constexpr (sizeof(R) == 4)
        for (; i + 16 <= n; i += 16)
          _mm256_storeu_si256((__m256i*)(p + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), 0));
#elif defined(__F16C__)
      if constexpr (sizeof(R) == 4)
        for (; i + 8 <= n; i += 8)
          _mm_storeu_si128((__m128i*)(p + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
      for (; i < n; ++i)
        p[i] = static_cast<_Float16>(static_cast<float>(from[i]));
      break;
    }
    case kBFloat16: {
      uint16_t* p = static_cast<uint16_t*>(to.data) + offset;
      for (int64_t i = 0; i < n; ++i)
        p[i] = float_to_bfloat16(static_cast<float>(from[i]));
      break;
    }
    case kUInt8: break;  // no result
  }
}

// Rounds values to what `write` leaves of them, n whole vectors. bfloat16 without its two bytes: to pack them and unpack them again
// took a quarter of the time that a seeded ddpm_step takes.
template <class R> FG_HD void as_stored(DType dtype, int64_t n, R* values) {
  if constexpr (sizeof(R) == 4) {
    if (dtype == kBFloat16) {
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t b = static_cast<uint32_t>(bits(values[i]));
        const float rounded = from_bits(static_cast<int32_t>((b + 0x7FFF + ((b >> 16) & 1)) & 0xFFFF0000));
        values[i] = values[i] == values[i] ? rounded : values[i];
      }
    } else if (dtype == kFloat16) {
      alignas(64) uint16_t stored[64];
      const Operand to = {stored, kFloat16};
      for (int64_t i = 0; i < n; i += 64) {
        const int64_t count = n - i < 64 ? n - i : 64;
        write(values + i, count, to, 0);
        read(to, 0, count, values + i);
      }
    }
  }
}

}  // namespace
}  // namespace fastgen
