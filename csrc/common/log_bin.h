// The log-probability that a Gaussian falls into a bin, and its derivatives, good in its relative error both where it is near 0 and
// far out in the tails. Host and device.
//
// c and w: the distance of the bin's middle from the mean and half the bin's width, in standard deviations; a = c − w, b = c + w;
// Q(x) = e^{−x²/2}·erfcx(x/√2)/2 the upper tail; of an open bin there is no b, and c may be negative, else c ≥ 0.
//
//   a ≤ 0           log1p(−Q(b) − Q(−a))
//   a > 0           log Q(a) + log1p(−Q(b)/Q(a)),   Q(b)/Q(a) = e^{−2cw}·erfcx(b/√2)/erfcx(a/√2)
//   w very small    log(2w·φ(c)) + log(sinh(y)/y) + log1p(−w²E/2),   y = cw, E the mean of s² over cosh(ys) for 0 < s < 1
//
// The last for bins so narrow that nearly all would be lost to the others' subtraction.
#pragma once
#include "real_math.h"

namespace fastgen {

constexpr double kRootHalf = 0.70710678118654752440;

// e^{x²}·erfc(x) for x ≥ 0: (1 + 2x) times that as a polynomial of (x − k)/(x + k); relative error 8e-8 in float before rounding,
// 1e-16 in double.
template <class V> FG_HD V erfcx(V x) {
  const V k = splat<V>(kIsDouble<V> ? 3.0 : 2.0);
  const V q = (x - k) / (x + k);
  const V below = fma(splat<V>(2.0), x, splat<V>(1.0));
  if constexpr (kIsDouble<V>) {
    return polynomial(q, splat<V>(8.86421901642709202e-10), 9.88579883113936494e-10, -8.50039792977261535e-9,
                      -1.3326363013003833e-8, 4.1807846988455822e-8, 1.01870006000728851e-7, -1.41600649402659861e-7,
                      -6.16649607760435278e-7, 3.56838391539922046e-7, 3.47241460287568603e-6, -7.31510516415906191e-7,
                      -2.01005679312892281e-5, 4.94948499257059517e-6, 1.25099352355631076e-4, -1.05159799815011777e-4,
                      -7.79832272108399125e-4, 1.88869035915615522e-3, 2.52939181606623916e-3, -2.3770514918645887e-2,
                      6.8308027343978475e-2, -0.119273663415306992, 0.12964515870276062, -4.7562294353450872e-2,
                      -0.135621106124581173, 1.25300805826972965) /
           below;
  } else {
    return polynomial(q, splat<V>(0.000165867579132205869), -0.000182478015009397496, -0.00140835774849414154,
                      0.00104048080188111195, 0.00870021721254120713, -0.00794070690627213065, -0.054215900878737808,
                      0.164035273274745072, -0.166030604332643213, -0.0927630388101870464, 1.27697838155252872) /
           below;
  }
}

// ln(1 − s) for s in [0, 1).
template <class V> FG_HD V log1p_negative(V s) {
  return select(s < splat<V>(0.29), log1p_reduced(-s), log_positive(splat<V>(1.0) - s));
}

// Minus the log-probability, and its derivatives by the middle's distance, in deviations, and by log σ.
template <class V> struct LogBin {
  V value, by_c, by_log_sigma;
};

template <class V> FG_HD LogBin<V> wide_bin(V c, V w, V open) {
  const V zero = splat<V>(0.0), one = splat<V>(1.0), half = splat<V>(0.5);
  const auto is_open = open != zero;
  const V a = c - w, b = select(is_open, one, c + w);
  const auto inside = a <= zero;
  const V tail_a = erfcx(abs(a) * splat<V>(kRootHalf)), tail_b = erfcx(b * splat<V>(kRootHalf));
  const V down_a = exp_negative(-half * a * a), down_b = select(is_open, zero, exp_negative(-half * b * b));
  const V outside = half * fma(down_a, tail_a, down_b * tail_b);
  const V further = select(is_open, zero, exp_negative(splat<V>(-2.0) * select(is_open, zero, c * w)));  // φ(b)/φ(a)
  const V share = further * tail_b / tail_a;
  LogBin<V> found;
  found.value = -select(inside, log1p_negative(select(inside, outside, zero)),
                        fma(-half * a, a, log_positive(half * tail_a)) + log1p_negative(select(inside, zero, share)));
  // φ(a)/P and φ(b)/P
  const V density = splat<V>(0.39894228040143267794);
  const V at_a = select(inside, density * down_a / (one - outside), density / (half * tail_a * (one - share)));
  const V at_b = select(inside, density * down_b / (one - outside), at_a * further);
  found.by_c = at_a - at_b;
  found.by_log_sigma = select(is_open, -a * at_a, b * at_b - a * at_a);
  return found;
}

template <class V> FG_HD LogBin<V> narrow_bin(V c, V w) {
  const V one = splat<V>(1.0), half = splat<V>(0.5), y = c * w, s = y * y;
  const auto near = y < one;
  // near: the integrals over s of cosh(ys), s²·cosh(ys) and s·sinh(ys)/y, as series in y²
  const V area = polynomial(s, splat<V>(1.0 / 355687428096000.0), 1.0 / 1307674368000, 1.0 / 6227020800.0, 1.0 / 39916800,
                            1.0 / 362880, 1.0 / 5040, 1.0 / 120, 1.0 / 6, 1.0);
  const V second = polynomial(s, splat<V>(1.0 / (20922789888000.0 * 19)), 1.0 / (87178291200.0 * 17), 1.0 / (479001600.0 * 15),
                              1.0 / (3628800.0 * 13), 1.0 / (40320.0 * 11), 1.0 / (720.0 * 9), 1.0 / (24.0 * 7), 1.0 / 10, 1.0 / 3);
  const V first = polynomial(s, splat<V>(1.0 / (1307674368000.0 * 17)), 1.0 / (6227020800.0 * 15), 1.0 / (39916800.0 * 13),
                             1.0 / (362880.0 * 11), 1.0 / (5040.0 * 9), 1.0 / (120.0 * 7), 1.0 / 30, 1.0 / 3);
  // far: e^{−2y}
  const V far_y = select(near, one, y), down = exp_negative(splat<V>(-2.0) * far_y);
  const V slope = select(near, y * first / area, (one + down) / (one - down) - one / far_y);  // of log(sinh(y)/y), Langevin's
  const V mean_square = select(near, second / area, one - (slope + slope) / far_y);
  const V ratio = select(near, log_positive(area), far_y - log_positive(far_y + far_y) + log1p_negative(down));
  const V less = half * w * w * mean_square;
  LogBin<V> found;
  found.value = -(fma(-half * c, c, log_positive(w * splat<V>(0.79788456080286535588))) + ratio + log1p_negative(less));
  found.by_c = c - w * slope;
  found.by_log_sigma = one - c * c + splat<V>(2.0) * y * slope - w * w * mean_square;
  return found;
}

// off: x0 less the mean; inverse_sigma: 1/σ. x0 says which bins are open, beyond ±0.999. by_c becomes the derivative by `off`.
template <class V> FG_HD LogBin<V> log_bin(V x0, V off, V inverse_sigma) {
  const V zero = splat<V>(0.0), one = splat<V>(1.0), end = splat<V>(0.999);
  const auto low = x0<-end, high = x0> end;
  const V open = select(low, one, select(high, one, zero));
  const V sign = select(low, -one, select(high, one, select(off < zero, -one, one)));
  const V c = sign * off * inverse_sigma, w = splat<V>(1.0 / 255) * inverse_sigma;
  const auto narrow = select(open == zero, w, one) < splat<V>(kIsDouble<V> ? 1e-3 : 0.0625);
  const LogBin<V> wide = wide_bin(select(narrow, splat<V>(2.0), c), select(narrow, one, w), open);
  const LogBin<V> thin = narrow_bin(select(narrow, c, zero), select(narrow, w, splat<V>(0.01)));
  return {select(narrow, thin.value, wide.value), sign * inverse_sigma * select(narrow, thin.by_c, wide.by_c),
          select(narrow, thin.by_log_sigma, wide.by_log_sigma)};
}

// The same as other libraries have it, with their errors: Φ(x) ≈ (1 + tanh(√(2/π)·(x + 0.044715·x³)))/2, and no probability below
// `floor`, where the derivatives are 0.
template <class V> struct ApproximateCdf {
  V value, density;
};
template <class V> FG_HD ApproximateCdf<V> approximate_cdf(V x) {
  const V one = splat<V>(1.0), half = splat<V>(0.5), scale = splat<V>(0.79788456080286535588), cubic = splat<V>(0.044715);
  const V u = scale * (x + cubic * (x * x * x)), e = exp_negative(splat<V>(-2.0) * abs(u)), d = one / (one + e);
  const V size = (one - e) * d;
  return {half * (one + select(u < splat<V>(0.0), -size, size)),
          splat<V>(2.0) * e * d * d * scale * (one + splat<V>(3.0) * cubic * (x * x))};
}
template <class V> FG_HD LogBin<V> approximate_log_bin(V x0, V off, V inverse_sigma, double floor) {
  const V zero = splat<V>(0.0), one = splat<V>(1.0), end = splat<V>(0.999), half_width = splat<V>(1.0 / 255);
  const auto low = x0<-end, high = x0> end;
  const V a = inverse_sigma * (off - half_width), b = inverse_sigma * (off + half_width);
  const ApproximateCdf<V> below = approximate_cdf(a), above = approximate_cdf(b);
  const V inside = select(low, above.value, select(high, one - below.value, above.value - below.value));
  const auto lost = inside < splat<V>(floor);
  const V found = select(lost, splat<V>(floor), inside), over = select(lost, zero, one) / found;
  const V at_a = select(low, zero, below.density) * over, at_b = select(high, zero, above.density) * over;
  return {-log_positive(found), inverse_sigma * (at_a - at_b), at_b * b - at_a * a};
}

}  // namespace fastgen
