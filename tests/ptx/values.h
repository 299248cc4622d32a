// Types of values, and how a function of one lane becomes that of an instruction.
#pragma once
#include <cmath>
#include <tuple>
#include <type_traits>
#include <utility>

#include "machine.h"

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using half = _Float16;
struct bf16 {
  u16 bits;
};
using Predicate = u8;  // 0 or 1

template <class To, class From> To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline float widened(half a) { return a; }
inline float widened(bf16 a) { return bits_as<float>(u32(a.bits) << 16); }
template <class T> T narrowed(float a) {
  if (a != a) return bits_as<T>(u16(0x7FFF));
  if constexpr (std::is_same_v<T, half>) {
    return half(a);
  } else {
    const u32 bits = bits_as<u32>(a);
    return {u16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
  }
}

// The one NaN that arithmetic results in.
template <class T> T canonical(T a) { return a; }
inline float canonical(float a) { return a == a ? a : bits_as<float>(0x7FFFFFFFu); }
inline double canonical(double a) { return a == a ? a : bits_as<double>(u64(0x7FFFFFFFFFFFFFFF)); }

// d[lane] = f(lane) for the lanes of the mask. All are worked out: a loop without branches takes vectors.
template <class D, class F> inline void for_lanes(Mask mask, D* d, F f) {
  if (mask == kAll) {
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane)
      d[lane] = f(lane);
    return;
  }
  D made[kLanes];
#pragma GCC ivdep
  for (int lane = 0; lane < kLanes; ++lane)
    made[lane] = f(lane);
  for (int lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1) d[lane] = made[lane];
}

// F()(source …) of each lane.
template <class F, class D, class... S, size_t... k>
void each_lane(Warp& w, const Instruction& i, Mask mask, std::index_sequence<k...>) {
  for_lanes(mask, w.at<D>(i.d[0]),
            [of = std::make_tuple(w.at<const S>(i.s[k])...)](int lane) { return canonical(D(F()(std::get<k>(of)[lane]...))); });
}
template <class D, class... S, class F> Opcode made(F) {
  const Function run = [](Warp& w, const Instruction& i, Mask mask) {
    each_lane<F, D, S...>(w, i, mask, std::index_sequence_for<S...>());
  };
  return {run, sizeof(D), {sizeof(S)...}};
}

// "u32", "s64", "f16": with the letter that the opcode has for it.
template <class T> std::string type_name(char letter) { return letter + std::to_string(8 * sizeof(T)); }
// name.<type> of one, two or three values of one type, for each of the types.
template <int kSources, class... T, class F> void enter_same(Opcodes& opcodes, const std::string& name, char letter, F f) {
  auto of = [&]<class One>(One) {
    if constexpr (kSources == 1)
      return made<One, One>(f);
    else if constexpr (kSources == 2)
      return made<One, One, One>(f);
    else
      return made<One, One, One, One>(f);
  };
  ((opcodes[name + "." + type_name<T>(letter)] = of(T())), ...);
}

// ---- memory --------------------------------------------------------------------------------------------------------------------

// What a lane of a load or a store names, in whatever space.
u64 address_of(const Warp& w, const Instruction& i, int lane);
// Where it is, once the access is found to be right; `data`, where it is known, is what a store will put there.
u8* shared_place(Warp& w, const Instruction& i, int lane, u64 address, u32 bytes, bool writes, const void* data = nullptr);

}  // namespace ptx
