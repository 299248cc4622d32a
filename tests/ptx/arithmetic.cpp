// The functions of values, by name: as the PTX ISA 9.0 defines them. An opcode that is not here is refused when a kernel is parsed.
#include <limits>
#include <tuple>

#include "values.h"

namespace ptx {
namespace {

// ---- integers and reals --------------------------------------------------------------------------------------------------------

struct Multiply {
  template <class T> T operator()(T a, T b) const {
    if constexpr (sizeof(T) == 2 && std::is_integral_v<T>) return T(u32(a) * u32(b));  // not of ints, which may overflow
    return T(a * b);
  }
};
struct MultiplyHigh {
  template <class T> T operator()(T a, T b) const {
    using Twice = std::conditional_t<std::is_signed_v<T>, std::conditional_t<sizeof(T) == 8, __int128, s64>,
                                     std::conditional_t<sizeof(T) == 8, unsigned __int128, u64>>;
    return T(Twice(a) * Twice(b) >> 8 * sizeof(T));
  }
};
struct MultiplyAdd {  // mad.lo, and mad.wide, whose c and d are of twice the width
  template <class T, class D> D operator()(T a, T b, D c) const { return D(a) * D(b) + c; }
};
struct Divide {
  template <class T> T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) {
      if (b == 0) return T(-1);
      if (std::is_signed_v<T> && b == T(-1)) return T(0) - a;
    }
    return a / b;
  }
};
struct Remainder {
  template <class T> T operator()(T a, T b) const {
    if (b == 0) return a;
    return std::is_signed_v<T> && b == T(-1) ? 0 : a % b;
  }
};
template <bool kLeast> struct Extremum {
  template <class T> T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>) {
      if (a != a) return b;
      if (b != b) return a;
      if (a == b) return std::signbit(a) == kLeast ? a : b;  // −0 < +0
    }
    return (a < b) == kLeast ? a : b;
  }
};
template <bool kLeast> struct ExtremumOrNan {
  template <class T> T operator()(T a, T b) const { return a != a ? a : b != b ? b : Extremum<kLeast>()(a, b); }
};

// ---- bits ----------------------------------------------------------------------------------------------------------------------

struct ShiftLeft {
  template <class T> T operator()(T a, u32 n) const { return n >= 8 * sizeof(T) ? T(0) : T(a << n); }
};
struct ShiftRight {
  template <class T> T operator()(T a, u32 n) const {
    constexpr u32 most = 8 * sizeof(T) - 1;
    return n <= most ? T(a >> n) : std::is_signed_v<T> ? T(a >> most) : T(0);
  }
};
struct ExtractBits {
  template <class T> T operator()(T a, u32 position, u32 length) const {
    constexpr u32 bits = 8 * sizeof(T);
    const u32 from = position & 255, count = length & 255;
    if (count == 0) return 0;
    const T sign = std::is_signed_v<T> ? a >> (bits - 1) : 0;  // in the place of bits beyond the highest
    const T shifted = from >= bits ? sign : a >> from;
    if (count >= bits) return shifted;
    const T low = T(shifted & T((T(1) << count) - 1));
    return std::is_signed_v<T> && (shifted >> (count - 1) & 1) ? T(low | T(~u64(0) << count)) : low;
  }
};
struct PermuteBytes {
  u32 operator()(u32 a, u32 b, u32 selector) const {
    const u64 both = a | u64(b) << 32;
    u32 made = 0;
    for (int k = 0; k < 4; ++k) {
      const u32 which = selector >> 4 * k & 15;
      const u8 byte = u8(both >> 8 * (which & 7));
      made |= u32(which & 8 ? (byte & 0x80 ? 0xFF : 0) : byte) << 8 * k;
    }
    return made;
  }
};
struct LookUp3 {  // lop3: bit k of the table is the result where the bits of a, b, c are those of k
  u32 operator()(u32 a, u32 b, u32 c, u32 table) const {
    u32 made = 0;
    for (int k = 0; k < 8; ++k)
      if (table >> k & 1) made |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    return made;
  }
};

// ---- approximate functions -----------------------------------------------------------------------------------------------------

// −1 … 1, by the operand; where `perturbed`, half of the operands have one of the ends.
double deviation(float a) {
  if (!settings.perturbed) return 0;
  u32 hash = (bits_as<u32>(a) + u32(settings.seed)) * 0x9E3779B1u;
  hash ^= hash >> 15;
  hash *= 0x85EBCA77u;
  hash ^= hash >> 13;
  return (hash & 1 ? 1.0 : -1.0) * (hash & 2 ? 1.0 : (hash >> 8) / double(1 << 24));
}
float off_by_share(double y, float a, double bound) { return float(y * (1 + bound * deviation(a))); }
float off_by(double y, float a, double bound) { return float(y + bound * deviation(a)); }

struct Logarithm2 {
  float operator()(float a) const {
    const double y = std::log2(double(a));
    if (!std::isfinite(y) || y == 0) return float(y);
    return a > 0.5f && a < 2 ? off_by(y, a, 0x1p-22) : off_by_share(y, a, 0x1p-22);
  }
};
float flushed(float a) { return std::fabs(a) < std::numeric_limits<float>::min() ? std::copysign(0.f, a) : a; }

// ---- comparisons ---------------------------------------------------------------------------------------------------------------

// The ordered ones are false of a NaN, the unordered ones, with a "u" behind their names, true.
enum Relation { kEqual, kNotEqual, kLess, kLessOrEqual, kGreater, kGreaterOrEqual, kNumbers };
template <Relation kRelation, bool kUnordered = false> struct Compare {
  template <class T> Predicate operator()(T a, T b) const {
    if (kRelation == kNumbers) return (a == a && b == b) != kUnordered;  // num and nan
    if (a != a || b != b) return kUnordered;
    switch (kRelation) {
      case kEqual: return a == b;
      case kNotEqual: return a != b;
      case kLess: return a < b;
      case kLessOrEqual: return a <= b;
      case kGreater: return a > b;
      default: return a >= b;
    }
  }
};
template <class F, class Stored> struct OfStored {
  Predicate operator()(u16 a, u16 b) const { return F()(widened(bits_as<Stored>(a)), widened(bits_as<Stored>(b))); }
};
// setp: d[0] and, if it is there, d[1], its negation.
template <class F, class T> void compare(Warp& w, const Instruction& i, Mask mask) {
  const T *a = w.at<T>(i.s[0]), *b = w.at<T>(i.s[1]);
  Predicate found[kLanes];  // the result may be where it was
#pragma GCC ivdep
  for (int lane = 0; lane < kLanes; ++lane)
    found[lane] = F()(a[lane], b[lane]);
  for_lanes(mask, w.at<Predicate>(i.d[0]), [&](int lane) { return found[lane]; });
  if (i.d[1] != kNone) for_lanes(mask, w.at<Predicate>(i.d[1]), [&](int lane) { return found[lane] ^ 1; });
}
template <class F, class Stored> void compare_pair(Warp& w, const Instruction& i, Mask mask) {  // d[0] of the lower halves, d[1]
  const u32 *a = w.at<u32>(i.s[0]), *b = w.at<u32>(i.s[1]);
  for (int k = 0; k < 2; ++k)
    for_lanes(mask, w.at<Predicate>(i.d[k]), [&](int lane) { return OfStored<F, Stored>()(a[lane] >> 16 * k, b[lane] >> 16 * k); });
}
template <class F, class... T> void enter_comparison(Opcodes& opcodes, const std::string& relation, char letter) {
  ((opcodes["setp." + relation + "." + type_name<T>(letter)] = {compare<F, T>, 1, {sizeof(T), sizeof(T)}}), ...);
}
template <Relation kRelation>
void enter_comparisons(Opcodes& opcodes, const std::string& signed_name, const std::string& unsigned_name) {
  using F = Compare<kRelation>;
  enter_comparison<F, s16, s32, s64>(opcodes, signed_name, 's');
  enter_comparison<F, u16, u32, u64>(opcodes, unsigned_name, 'u');
  enter_comparison<F, u16, u32, u64>(opcodes, signed_name, 'u');
  enter_comparison<F, u16, u32, u64>(opcodes, signed_name, 'b');
  auto reals = [&](const std::string& name, auto relation) {
    using R = decltype(relation);
    enter_comparison<R, float, double>(opcodes, name, 'f');
    opcodes["setp." + name + ".f16"] = {compare<OfStored<R, half>, u16>, 1, {2, 2}};
    opcodes["setp." + name + ".bf16"] = {compare<OfStored<R, bf16>, u16>, 1, {2, 2}};
    opcodes["setp." + name + ".f16x2"] = {compare_pair<R, half>, 1, {4, 4}};
    opcodes["setp." + name + ".bf16x2"] = {compare_pair<R, bf16>, 1, {4, 4}};
  };
  reals(signed_name, F());
  reals(signed_name + "u", Compare<kRelation, true>());
}

// ---- two halves of a register --------------------------------------------------------------------------------------------------

// mov of a vector: d[0] of {s[0], s[1], …}, or {d[0], d[1], …} of s[0].
template <class Whole, class Part> void pack(Warp& w, const Instruction& i, Mask mask) {
  for_lanes(mask, w.at<Whole>(i.d[0]), [&](int lane) {
    Whole made = 0;
    for (unsigned k = 0; k < sizeof(Whole) / sizeof(Part); ++k)
      made |= Whole(w.at<Part>(i.s[k])[lane]) << 8 * sizeof(Part) * k;
    return made;
  });
}
template <class Whole, class Part> void unpack(Warp& w, const Instruction& i, Mask mask) {
  Whole from[kLanes];  // one of the parts may be where it was
  memcpy(from, w.at<Whole>(i.s[0]), sizeof from);
  for (unsigned k = 0; k < sizeof(Whole) / sizeof(Part); ++k)
    if (i.d[k] != kNone) for_lanes(mask, w.at<Part>(i.d[k]), [&](int lane) { return Part(from[lane] >> 8 * sizeof(Part) * k); });
}
template <class Whole, class Part> void enter_packing(Opcodes& opcodes) {
  const std::string parts = std::to_string(sizeof(Whole) / sizeof(Part)), name = ".b" + std::to_string(8 * sizeof(Whole));
  opcodes["pack" + parts + name] = {pack<Whole, Part>, sizeof(Whole), {sizeof(Part), sizeof(Part), sizeof(Part), sizeof(Part)}};
  opcodes["unpack" + parts + name] = {unpack<Whole, Part>, sizeof(Part), {sizeof(Whole)}};
}

// ---- conversions ---------------------------------------------------------------------------------------------------------------

// To an integer, or to one within the type: the nearest, towards 0, −∞, +∞.
enum Rounding : u32 { kNearest, kTowardsZero, kDown, kUp };
template <class T> T rounded(T a, u32 how) {
  return how == kNearest ? std::nearbyint(a) : how == kTowardsZero ? std::trunc(a) : how == kDown ? std::floor(a) : std::ceil(a);
}
template <class D, class S> D converted(S a, u32 how) {
  if constexpr (std::is_same_v<S, half> || std::is_same_v<S, bf16>) {
    if constexpr (std::is_same_v<D, float>)
      return canonical(widened(a));
    else if constexpr (std::is_same_v<D, S>)
      return narrowed<D>(rounded(widened(a), how));
    else
      return converted<D>(widened(a), how);
  } else if constexpr (std::is_same_v<D, half> || std::is_same_v<D, bf16>) {
    return narrowed<D>(float(a));
  } else if constexpr (std::is_floating_point_v<S> && std::is_integral_v<D>) {
    constexpr D low = std::numeric_limits<D>::min(), high = std::numeric_limits<D>::max();
    if (a != a) return sizeof(D) == 8 || sizeof(S) == 8 ? D(D(1) << (8 * sizeof(D) - 1)) : 0;
    const S nearest = rounded(a, how);
    return nearest <= S(low) ? low : nearest >= S(high) ? high : D(nearest);
  } else if constexpr (std::is_floating_point_v<S> && std::is_same_v<S, D>) {
    return canonical(rounded(a, how));
  } else {
    return canonical(D(a));
  }
}
// An 8-bit value has a register of 16 or 32 bits, and others may have a wider one too: their low bits count.
template <class T> T read(const Warp& w, Operand operand, int width, int lane) {
  u64 bits = 0;
  memcpy(&bits, w.at<u8>(operand) + width * lane, width);
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T> void write(const Warp& w, Operand operand, int width, int lane, T value) {
  u64 bits = 0;
  if constexpr (std::is_integral_v<T> && std::is_signed_v<T>)
    bits = u64(s64(value));
  else
    memcpy(&bits, &value, sizeof value);
  memcpy(w.at<u8>(operand) + width * lane, &bits, width);
}
template <class D, class S> void convert(Warp& w, const Instruction& i, Mask mask) {
  if (i.width[0] == sizeof(D) && i.width[1] == sizeof(S)) {
    const S* a = w.at<S>(i.s[0]);
    return for_lanes(mask, w.at<D>(i.d[0]), [=, how = i.flags](int lane) { return converted<D>(a[lane], how); });
  }
  for (int lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1) write(w, i.d[0], i.width[0], lane, converted<D>(read<S>(w, i.s[0], i.width[1], lane), i.flags));
}
template <class T> constexpr bool is_real = std::is_floating_point_v<T> || std::is_same_v<T, half> || std::is_same_v<T, bf16>;
template <class D, class S> void enter_conversion(Opcodes& opcodes, const std::string& d, const std::string& s) {
  if (is_real<D> && sizeof(D) == 2 && sizeof(S) > 2 && !std::is_same_v<S, float>) return;  // it would be rounded twice
  const std::string types = "." + d + "." + s;
  auto enter = [&](const std::string& how, u32 flags) { opcodes["cvt" + how + types] = {convert<D, S>, 0, {0}, flags}; };
  if (is_real<S> && (!is_real<D> || std::is_same_v<D, S>)) {
    enter(".rni", kNearest), enter(".rzi", kTowardsZero), enter(".rmi", kDown), enter(".rpi", kUp);
  } else if (is_real<D> && (!is_real<S> || sizeof(D) < sizeof(S))) {
    enter(".rn", kNearest);
  } else {
    enter("", 0);
  }
}
template <class S> void enter_conversions(Opcodes& opcodes, const std::string& s) {
  enter_conversion<u8, S>(opcodes, "u8", s), enter_conversion<s8, S>(opcodes, "s8", s);
  enter_conversion<u16, S>(opcodes, "u16", s), enter_conversion<s16, S>(opcodes, "s16", s);
  enter_conversion<u32, S>(opcodes, "u32", s), enter_conversion<s32, S>(opcodes, "s32", s);
  enter_conversion<u64, S>(opcodes, "u64", s), enter_conversion<s64, S>(opcodes, "s64", s);
  enter_conversion<half, S>(opcodes, "f16", s), enter_conversion<bf16, S>(opcodes, "bf16", s);
  enter_conversion<float, S>(opcodes, "f32", s), enter_conversion<double, S>(opcodes, "f64", s);
}
template <class T> struct NarrowPair {  // cvt.rn.bf16x2.f32 d, high, low
  u32 operator()(float high, float low) const {
    return u32(bits_as<u16>(narrowed<T>(low))) | u32(bits_as<u16>(narrowed<T>(high))) << 16;
  }
};

}  // namespace

void enter_arithmetic(Opcodes& opcodes) {
  auto integers = [&](const std::string& name, auto f) {
    enter_same<2, u16, u32, u64>(opcodes, name, 'u', f), enter_same<2, s16, s32, s64>(opcodes, name, 's', f);
  };
  auto reals = [&](const std::string& name, auto f) { enter_same<2, float, double>(opcodes, name, 'f', f); };
  auto numbers = [&](const std::string& name, auto f) { reals(name, f), reals(name + ".rn", f), integers(name, f); };
  numbers("add", [](auto a, auto b) { return a + b; });
  numbers("sub", [](auto a, auto b) { return a - b; });
  integers("mul.lo", Multiply()), reals("mul", Multiply()), reals("mul.rn", Multiply()), integers("mul.hi", MultiplyHigh());
  integers("div", Divide()), reals("div.rn", Divide()), integers("rem", Remainder());
  integers("min", Extremum<true>()), reals("min", Extremum<true>()), reals("min.NaN", ExtremumOrNan<true>());
  integers("max", Extremum<false>()), reals("max", Extremum<false>()), reals("max.NaN", ExtremumOrNan<false>());
  auto wide = [&]<class T, class D>(T, D, const std::string& type) {
    opcodes["mul.wide." + type] = made<D, T, T>([](T a, T b) { return MultiplyAdd()(a, b, D()); });
    opcodes["mad.wide." + type] = made<D, T, T, D>(MultiplyAdd());
  };
  wide(u16(), u32(), "u16"), wide(s16(), s32(), "s16"), wide(u32(), u64(), "u32"), wide(s32(), s64(), "s32");
  for (const std::string sign : {"u", "s"}) {
    opcodes["mad.lo." + sign + "32"] = made<u32, u32, u32, u32>(MultiplyAdd());
    opcodes["mad.lo." + sign + "64"] = made<u64, u64, u64, u64>(MultiplyAdd());
  }
  enter_same<3, float, double>(opcodes, "fma.rn", 'f', [](auto a, auto b, auto c) { return std::fma(a, b, c); });
  enter_same<1, s16, s32, s64>(opcodes, "neg", 's', [](auto a) { return decltype(a)(0) - a; });
  enter_same<1, s16, s32, s64>(opcodes, "abs", 's', [](auto a) { return a < 0 ? decltype(a)(0) - a : a; });
  enter_same<1, float, double>(opcodes, "sqrt.rn", 'f', [](auto a) { return std::sqrt(a); });
  enter_same<1, float, double>(opcodes, "rcp.rn", 'f', [](auto a) { return 1 / a; });
  auto signs = [&]<class T>(T ones, const std::string& type) {  // of reals: they are bits
    static const T mask = ones;
    opcodes["neg." + type] = made<T, T>([](T a) { return a ^ mask; });
    opcodes["abs." + type] = made<T, T>([](T a) { return a & ~mask; });
  };
  signs(u32(0x8000'0000), "f32"), signs(u64(0x8000'0000'0000'0000), "f64");
  for (const std::string type : {"f16", "bf16"}) {
    opcodes["neg." + type] = made<u16, u16>([](u16 a) { return a ^ 0x8000; });
    opcodes["abs." + type] = made<u16, u16>([](u16 a) { return a & 0x7FFF; });
    opcodes["neg." + type + "x2"] = made<u32, u32>([](u32 a) { return a ^ 0x8000'8000; });
    opcodes["abs." + type + "x2"] = made<u32, u32>([](u32 a) { return a & 0x7FFF'7FFF; });
  }

  auto bits = [&](const std::string& name, auto f) {
    enter_same<2, u16, u32, u64>(opcodes, name, 'b', f);
    opcodes[name + ".pred"] = made<Predicate, Predicate, Predicate>(f);
  };
  bits("and", [](auto a, auto b) { return a & b; });
  bits("or", [](auto a, auto b) { return a | b; });
  bits("xor", [](auto a, auto b) { return a ^ b; });
  enter_same<1, u16, u32, u64>(opcodes, "not", 'b', [](auto a) { return ~a; });
  opcodes["not.pred"] = made<Predicate, Predicate>([](Predicate a) { return a ^ 1; });
  auto shifts = [&](const std::string& name, char letter, auto f, auto... zeros) {
    ((opcodes[name + "." + type_name<decltype(zeros)>(letter)] = made<decltype(zeros), decltype(zeros), u32>(f)), ...);
  };
  shifts("shl", 'b', ShiftLeft(), u16(), u32(), u64()), shifts("shr", 'b', ShiftRight(), u16(), u32(), u64());
  shifts("shr", 'u', ShiftRight(), u16(), u32(), u64()), shifts("shr", 's', ShiftRight(), s16(), s32(), s64());
  opcodes["bfe.u32"] = made<u32, u32, u32, u32>(ExtractBits()), opcodes["bfe.s32"] = made<s32, s32, u32, u32>(ExtractBits());
  opcodes["prmt.b32"] = made<u32, u32, u32, u32>(PermuteBytes());
  opcodes["lop3.b32"] = made<u32, u32, u32, u32, u32>(LookUp3());

  auto moves = [&]<class T>(T, const std::string& type) {  // what only moves bits, of any type
    const Opcode move = made<T, T>([](T a) { return a; });
    const Opcode select = made<T, T, T, Predicate>([](T a, T b, Predicate p) { return p ? a : b; });
    for (const std::string letter : {"b", "u", "s", "f"})
      opcodes["mov." + letter + type] = move, opcodes["selp." + letter + type] = select;
    for (const std::string space : {"global", "shared"})
      opcodes["cvta." + space + ".u" + type] = opcodes["cvta.to." + space + ".u" + type] = move;
  };
  moves(u16(), "16"), moves(u32(), "32"), moves(u64(), "64");
  opcodes["mov.pred"] = made<Predicate, Predicate>([](Predicate a) { return a; });
  enter_packing<u32, u16>(opcodes), enter_packing<u64, u32>(opcodes), enter_packing<u64, u16>(opcodes);

  // The bounds are those of the ISA: of the error itself for sin and cos, whose operands are within ±2π, else of its share.
  auto near = [&]<class... T>(const std::string& name, auto f, T...) {
    opcodes[name + ".f32"] = made<float, T...>(f);
    opcodes[name + ".ftz.f32"] = made<float, T...>([](T... a) { return flushed(decltype(f)()(flushed(a)...)); });
  };
  near("sin.approx", [](float a) { return off_by(std::sin(double(a)), a, 0x1p-20 * 0.7071); }, 0.f);
  near("cos.approx", [](float a) { return off_by(std::cos(double(a)), a, 0x1p-20 * 0.7071); }, 0.f);
  near("lg2.approx", Logarithm2(), 0.f);
  near("ex2.approx", [](float a) { return off_by_share(std::exp2(double(a)), a, 0x1p-22); }, 0.f);
  near("sqrt.approx", [](float a) { return off_by_share(std::sqrt(double(a)), a, 0x1p-23); }, 0.f);
  near("rcp.approx", [](float a) { return off_by_share(1 / double(a), a, 0x1p-23); }, 0.f);
  near("div.full", [](float a, float b) { return off_by_share(double(a) / double(b), a, 0x1p-22); }, 0.f, 0.f);

  enter_comparisons<kEqual>(opcodes, "eq", "eq"), enter_comparisons<kNotEqual>(opcodes, "ne", "ne");
  enter_comparisons<kLess>(opcodes, "lt", "lo"), enter_comparisons<kLessOrEqual>(opcodes, "le", "ls");
  enter_comparisons<kGreater>(opcodes, "gt", "hi"), enter_comparisons<kGreaterOrEqual>(opcodes, "ge", "hs");
  enter_comparison<Compare<kNumbers>, float, double>(opcodes, "num", 'f');
  enter_comparison<Compare<kNumbers, true>, float, double>(opcodes, "nan", 'f');

  enter_conversions<u8>(opcodes, "u8"), enter_conversions<s8>(opcodes, "s8"), enter_conversions<u16>(opcodes, "u16");
  enter_conversions<s16>(opcodes, "s16"), enter_conversions<u32>(opcodes, "u32"), enter_conversions<s32>(opcodes, "s32");
  enter_conversions<u64>(opcodes, "u64"), enter_conversions<s64>(opcodes, "s64"), enter_conversions<half>(opcodes, "f16");
  enter_conversions<bf16>(opcodes, "bf16"), enter_conversions<float>(opcodes, "f32"), enter_conversions<double>(opcodes, "f64");
  opcodes["cvt.rn.f16x2.f32"] = made<u32, float, float>(NarrowPair<half>());
  opcodes["cvt.rn.bf16x2.f32"] = made<u32, float, float>(NarrowPair<bf16>());
}

}  // namespace ptx
