// ln, exp and log1p for the formulas, as polynomials, so that every lane of every instruction set (and the tail of a loop) gets
// the same bits. V: float, double, or a vector of either. The float coefficients are weighted minimax fits of the relative
// error; the double ones are Taylor series, long enough for an ulp.
#pragma once
#include "host_device.h"

namespace fastgen {

// Σ c_k x^k by Horner's rule, highest power first.
template <class V> FG_HD V polynomial(V, V accumulated) { return accumulated; }
template <class V, class... C> FG_HD V polynomial(V x, V accumulated, double next, C... rest) {
  return polynomial(x, fma(accumulated, x, splat<V>(next)), rest...);
}

constexpr double kLn2 = 0.693147180559945309417232121458;
// A number added and subtracted to round to the nearest integer.
template <class V> constexpr double kRounder = kIsDouble<V> ? 6755399441055744.0 : 12582912.0;

// ln(1 + f) for f in [√½ − 1, √2 − 1]; relative error 3e-8 in float before rounding.
template <class V> FG_HD V log1p_reduced(V f) {
  if constexpr (kIsDouble<V>) {
    // 2·atanh(s) with s = f/(2 + f), |s| ≤ 0.172: the first term left out is below 1e-18 of the sum
    const V s = f / (f + splat<V>(2.0)), s2 = s * s;
    const V tail = polynomial(s2, splat<V>(2.0 / 23), 2.0 / 21, 2.0 / 19, 2.0 / 17, 2.0 / 15, 2.0 / 13, 2.0 / 11, 2.0 / 9, 2.0 / 7,
                              2.0 / 5, 2.0 / 3);
    return fma(s * s2, tail, s + s);
  } else {
    const V tail = polynomial(f, splat<V>(0.08734836429357529), -0.14307518303394318, 0.14917974174022675, -0.16570508480072021,
                              0.19962072372436523, -0.25001755356788635, 0.33333951234817505, -0.49999991059303284);
    return fma(f * f, tail, f);
  }
}

// ln(u) for a normal u > 0; a few ulp, near u = 1 too.
template <class V> FG_HD V log_positive(V u) {
  // the exponent that leaves a mantissa in [√½, √2)
  constexpr auto root_half = kIsDouble<V> ? 0x3FE6A09E667F3BCDll : 0x3F3504F3ll;
  constexpr int mantissa_bits = kIsDouble<V> ? 52 : 23;
  const auto exponent = (bits(u) - Lanes<V>::splat_int(root_half)) >> mantissa_bits;
  const V f = from_bits(bits(u) - (exponent << mantissa_bits)) - splat<V>(1.0);
  return fma(to_real(exponent), splat<V>(kLn2), log1p_reduced(f));
}

// ln(1 + e) for e in [0, 1]; 2 ulp down to the smallest e. NaN stays NaN.
template <class V> FG_HD V log1p_unit(V e) {
  if constexpr (kIsDouble<V>) {
    // 1 + e = 2·(1 + (e − 1)/2) where e is above √2 − 1
    const auto upper = e > splat<V>(0.41421356237309503);
    const V l = log1p_reduced(select(upper, (e - splat<V>(1.0)) * splat<V>(0.5), e));
    return select(upper, l + splat<V>(kLn2), l);
  } else {
    // one fit for the whole range, relative error 3e-8: six instructions fewer than the reduction above
    const V tail = polynomial(e, splat<V>(0.005364825439855958), -0.030065796732173827, 0.0792045427807816, -0.1375380295017657,
                              0.19153655223918847, -0.2485716373892416, 0.3332132262660457, -0.49999647963834715);
    return fma(e * e, tail, e);
  }
}

// a·2ⁿ, rounded once where the result is subnormal; n is a whole number within ±252 (float) or ±2044 (double). In two factors,
// so that neither leaves the normal range.
template <class V> FG_HD V scale(V a, V n) {
  constexpr int bias = kIsDouble<V> ? 1023 : 127, mantissa_bits = kIsDouble<V> ? 52 : 23;
  const V rounder = splat<V>(kRounder<V>);
  const auto whole = bits(n + rounder) - bits(rounder);
  const auto half = whole >> 1;
  const V first = from_bits((half + Lanes<V>::splat_int(bias)) << mantissa_bits);
  const V second = from_bits((whole - half + Lanes<V>::splat_int(bias)) << mantissa_bits);
  return a * first * second;
}

// x = n·ln 2 + r with a whole number n, |r| ≤ ½·ln 2, and e^r = 1 + r + r²·tail.
template <class V> struct ReducedExp {
  V n, r, tail;
};
template <class V> FG_HD ReducedExp<V> reduced_exp(V x) {
  const V rounder = splat<V>(kRounder<V>);
  const V n = fma(x, splat<V>(1.0 / kLn2), rounder) - rounder;
  if constexpr (kIsDouble<V>) {
    V r = fma(n, splat<V>(-6.93147180369123816490e-01), x);
    r = fma(n, splat<V>(-1.90821492927058770002e-10), r);
    return {n, r,
            polynomial(r, splat<V>(1.0 / 6227020800.0), 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                       1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5)};
  } else {
    V r = fma(n, splat<V>(-0.693359375), x);
    r = fma(n, splat<V>(2.12194440e-4), r);
    return {n, r,
            polynomial(r, splat<V>(0.0013814467238262296), 0.008368780836462975, 0.04166839271783829, 0.1666651964187622,
                       0.4999999403953552)};
  }
}
template <class V> FG_HD V exp_reduced(const ReducedExp<V>& e) { return scale(polynomial(e.r, e.tail, 1.0, 1.0), e.n); }

// x where exp(x) neither overflows nor underflows, else the nearest number that makes it do so. NaN stays NaN.
template <class V> FG_HD V exp_bounds(V x) {
  return min(splat<V>(kIsDouble<V> ? 710.0 : 89.0), max(splat<V>(kIsDouble<V> ? -746.0 : -104.0), x));
}

// exp(x) for x ≤ 0; underflows through the subnormals to 0, NaN stays NaN.
template <class V> FG_HD V exp_negative(V x) { return exp_reduced(reduced_exp(max(splat<V>(kIsDouble<V> ? -746.0 : -104.0), x))); }

// exp(x); overflows to inf as well.
template <class V> FG_HD V exp(V x) { return exp_reduced(reduced_exp(exp_bounds(x))); }

// e^x, and e^x − 1 − x, which is small where x is: good to 1e-6 of itself in float.
template <class V> struct ExpAndExcess {
  V exp, excess;
};
template <class V> FG_HD ExpAndExcess<V> exp_and_excess(V x) {
  const ReducedExp<V> e = reduced_exp(exp_bounds(x));
  const V power = exp_reduced(e);
  return {power, select(e.n == splat<V>(0.0), e.r * e.r * e.tail, power - splat<V>(1.0) - x)};
}

// Whether the values below are good to a few ulp of V, or, of a float, only as good as data of half precision need: on a GPU in a
// sixth of the instructions, which bound a loss that moves two bytes per element.
enum Accuracy { kAccurate, kApproximate };

// exp(x) for x ≤ 0. kApproximate: relative error below 7e-7 + 8e-8·|x|, the latter since the exponent is rounded. As the square of
// a root, so that subnormal results are kept.
template <Accuracy kAccuracy, class V> FG_HD V exp_negative(V x) {
  if constexpr (kAccuracy == kAccurate || kIsDouble<V>) {
    return exp_negative(x);
  } else {
    const V root = exp2_approximation(x * splat<V>(0.5 / kLn2));
    return root * root;
  }
}

// a/b for 1 ≤ b ≤ 2. kApproximate: relative error below 2e-7.
template <Accuracy kAccuracy, class V> FG_HD V quotient(V a, V b) {
  if constexpr (kAccuracy == kAccurate || kIsDouble<V>) {
    return a / b;
  } else {
    return a * reciprocal_approximation(b);
  }
}

}  // namespace fastgen
