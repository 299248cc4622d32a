// The element types that a device kernel is compiled for, sixteen bytes at a time or one element; `Any` looks at the operand's
// dtype at run time. Under g++ the same names work on the host, for the tests.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "bytes.h"
#include "elementwise.h"
#include "real_math.h"

namespace fastgen {

struct alignas(16) Words {
  uint32_t w[4];
};

#ifndef FG_CHECK_ALIGNED
#define FG_CHECK_ALIGNED(pointer)
#endif
inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
FG_HD Words load_words(const void* from) {
  FG_CHECK_ALIGNED(from);
  return *static_cast<const Words*>(from);
}
FG_HD void store_words(void* to, const Words& words) {
  FG_CHECK_ALIGNED(to);
  *static_cast<Words*>(to) = words;
}

FG_HD float float_of_bits(uint32_t bits) { return from_bits(static_cast<int32_t>(bits)); }

struct Float32 {
  static constexpr DType kDType = kFloat32;
  static constexpr int kBytes = 4;
  static FG_HD float get(const Words* words, int i) { return float_of_bits(words[i / 4].w[i % 4]); }
  static FG_HD void put_pair(Words* words, int i, float a, float b) {
    words[i / 4].w[i % 4] = static_cast<uint32_t>(bits(a));
    words[i / 4].w[i % 4 + 1] = static_cast<uint32_t>(bits(b));
  }
  static FG_HD float load(const void* from, int64_t i) { return static_cast<const float*>(from)[i]; }
  static FG_HD void store(void* to, int64_t i, float value) { static_cast<float*>(to)[i] = value; }
};

struct BFloat16 {
  static constexpr DType kDType = kBFloat16;
  static constexpr int kBytes = 2;
  static FG_HD float get(const Words* words, int i) {
    const uint32_t pair = words[i / 8].w[i / 2 % 4];
    return float_of_bits(i % 2 ? pair & 0xFFFF0000u : pair << 16);
  }
  static FG_HD void put_pair(Words* words, int i, float a, float b) { words[i / 8].w[i / 2 % 4] = pair_of(a, b); }
  static FG_HD float load(const void* from, int64_t i) {
    return float_of_bits(static_cast<uint32_t>(static_cast<const uint16_t*>(from)[i]) << 16);
  }
  static FG_HD void store(void* to, int64_t i, float value) {
    static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(pair_of(value, value));
  }

 private:
  static FG_HD uint32_t pair_of(float a, float b) {
#ifdef __CUDACC__
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    uint32_t words;
    memcpy(&words, &pair, 4);
    return words;
#else
    return rounded(a) | rounded(b) << 16;
#endif
  }
#ifndef __CUDACC__
  static uint32_t rounded(float a) {
    const uint32_t b = static_cast<uint32_t>(bits(a));
    return a != a ? 0x7FFFu : (b + 0x7FFF + (b >> 16 & 1)) >> 16;
  }
#endif
};

struct Float16 {
  static constexpr DType kDType = kFloat16;
  static constexpr int kBytes = 2;
  static FG_HD float get(const Words* words, int i) {
    return value_of(static_cast<uint16_t>(words[i / 8].w[i / 2 % 4] >> i % 2 * 16));
  }
  static FG_HD void put_pair(Words* words, int i, float a, float b) { words[i / 8].w[i / 2 % 4] = pair_of(a, b); }
  static FG_HD float load(const void* from, int64_t i) { return value_of(static_cast<const uint16_t*>(from)[i]); }
  static FG_HD void store(void* to, int64_t i, float value) {
    static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(pair_of(value, value));
  }

 private:
#ifdef __CUDACC__
  using Half = __half;
  static FG_HD float widened(Half a) { return __half2float(a); }
  static FG_HD uint32_t pair_of(float a, float b) {
    const __half2 pair = __floats2half2_rn(a, b);
    uint32_t words;
    memcpy(&words, &pair, 4);
    return words;
  }
#else
  using Half = _Float16;
  static float widened(Half a) { return static_cast<float>(a); }
  static uint32_t pair_of(float a, float b) { return bits_of(static_cast<Half>(a)) | bits_of(static_cast<Half>(b)) << 16; }
  static uint32_t bits_of(Half a) {
    uint16_t b;
    memcpy(&b, &a, 2);
    return b;
  }
#endif
  static FG_HD float value_of(uint16_t b) {
    Half a;
    memcpy(&a, &b, 2);
    return widened(a);
  }
};

// Of data: an input, never a result.
struct UInt8 {
  static constexpr DType kDType = kUInt8;
  static constexpr int kBytes = 1;
  static FG_HD float get(const Words* words, int i) {
    return value_of(static_cast<uint8_t>(words[i / 16].w[i / 4 % 4] >> i % 4 * 8));
  }
  static FG_HD float load(const void* from, int64_t i) { return value_of(static_cast<const uint8_t*>(from)[i]); }

 private:
  static FG_HD float value_of(uint8_t byte) { return value_of_byte(static_cast<float>(byte)); }
};

FG_HD constexpr bool half_precision(DType dtype) { return dtype == kBFloat16 || dtype == kFloat16; }
template <class T> constexpr Accuracy kAccuracyFor = half_precision(T::kDType) ? kApproximate : kAccurate;

// Any of the dtypes, and the only type of float64 arithmetic: one element at a time.
struct Any {};
template <class T> constexpr bool kIsAny = false;
template <> constexpr bool kIsAny<Any> = true;

template <class R, class T> FG_HD R load_one(const Operand& from, int64_t i) {
  if constexpr (!kIsAny<T>) {
    return T::load(from.data, i);
  } else {
    switch (from.dtype) {
      case kFloat32: return static_cast<R>(Float32::load(from.data, i));
      case kFloat64: return static_cast<R>(static_cast<const double*>(from.data)[i]);
      case kFloat16: return static_cast<R>(Float16::load(from.data, i));
      case kUInt8: return value_of_byte(static_cast<R>(static_cast<const uint8_t*>(from.data)[i]));
      default: return static_cast<R>(BFloat16::load(from.data, i));
    }
  }
}
template <class R, class T> FG_HD void store_one(const Operand& to, int64_t i, R value) {
  if constexpr (!kIsAny<T>) {
    T::store(to.data, i, value);
  } else {
    switch (to.dtype) {
      case kFloat32: return Float32::store(to.data, i, static_cast<float>(value));
      case kFloat64: static_cast<double*>(to.data)[i] = static_cast<double>(value); return;
      case kFloat16: return Float16::store(to.data, i, static_cast<float>(value));
      default: return BFloat16::store(to.data, i, static_cast<float>(value));
    }
  }
}

// What store_one leaves of a value.
template <class R, class T> FG_HD R as_stored(const Operand& to, R value) {
  if constexpr (!kIsAny<T>) {
    Words words;
    T::put_pair(&words, 0, value, value);
    return T::get(&words, 0);
  } else {
    switch (to.dtype) {
      case kFloat16: return static_cast<R>(as_stored<float, Float16>(to, static_cast<float>(value)));
      case kBFloat16: return static_cast<R>(as_stored<float, BFloat16>(to, static_cast<float>(value)));
      case kFloat32: return static_cast<R>(static_cast<float>(value));
      default: return value;
    }
  }
}

// A word of four bytes, or of eight.
template <int kBytes> struct alignas(kBytes) PartOfWords {
  uint32_t w[kBytes / 4];
};

// kCount elements from element i on, in whole words, or in the first part of one.
template <class T, int kCount> FG_HD void load_vector(const Operand& from, int64_t i, Words* words) {
  const char* place = static_cast<const char*>(from.data) + i * T::kBytes;
  if constexpr (kCount * T::kBytes < 16) {
    using Part = PartOfWords<kCount * T::kBytes>;
    const Part part = *reinterpret_cast<const Part*>(place);
    FG_UNROLL
    for (int k = 0; k < kCount * T::kBytes / 4; ++k)
      words->w[k] = part.w[k];
  } else {
    FG_UNROLL
    for (int k = 0; k < kCount * T::kBytes / 16; ++k)
      words[k] = load_words(place + 16 * k);
  }
}
template <class T, int kCount> FG_HD void store_vector(const Operand& to, int64_t i, const Words* words) {
  FG_UNROLL
  for (int k = 0; k < kCount * T::kBytes / 16; ++k)
    store_words(static_cast<char*>(to.data) + i * T::kBytes + 16 * k, words[k]);
}

}  // namespace fastgen
