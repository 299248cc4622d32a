"""The log-probability that a Gaussian falls into a bin, and its derivatives: the formulas of csrc/common/log_bin.h, which says what
they are."""

import triton
import triton.language as tl

from .host_device import negative, product, splat
from .real_math import exp_negative, log1p_reduced, log_positive, polynomial

ERFCX = tl.constexpr(
    (
        0.000165867579132205869,
        -0.000182478015009397496,
        -0.00140835774849414154,
        0.00104048080188111195,
        0.00870021721254120713,
        -0.00794070690627213065,
        -0.054215900878737808,
        0.164035273274745072,
        -0.166030604332643213,
        -0.0927630388101870464,
        1.27697838155252872,
    )
)
ERFCX_DOUBLE = tl.constexpr(
    (
        8.86421901642709202e-10,
        9.88579883113936494e-10,
        -8.50039792977261535e-9,
        -1.3326363013003833e-8,
        4.1807846988455822e-8,
        1.01870006000728851e-7,
        -1.41600649402659861e-7,
        -6.16649607760435278e-7,
        3.56838391539922046e-7,
        3.47241460287568603e-6,
        -7.31510516415906191e-7,
        -2.01005679312892281e-5,
        4.94948499257059517e-6,
        1.25099352355631076e-4,
        -1.05159799815011777e-4,
        -7.79832272108399125e-4,
        1.88869035915615522e-3,
        2.52939181606623916e-3,
        -2.3770514918645887e-2,
        6.8308027343978475e-2,
        -0.119273663415306992,
        0.12964515870276062,
        -4.7562294353450872e-2,
        -0.135621106124581173,
        1.25300805826972965,
    )
)
AREA = tl.constexpr(
    (
        *(1.0 / 355687428096000, 1.0 / 1307674368000, 1.0 / 6227020800, 1.0 / 39916800, 1.0 / 362880),
        *(1.0 / 5040, 1.0 / 120, 1.0 / 6, 1.0),
    )
)
SECOND = tl.constexpr(
    (
        *(1.0 / (20922789888000 * 19), 1.0 / (87178291200 * 17), 1.0 / (479001600 * 15), 1.0 / (3628800 * 13), 1.0 / (40320 * 11)),
        *(1.0 / (720 * 9), 1.0 / (24 * 7), 1.0 / 10, 1.0 / 3),
    )
)
FIRST = tl.constexpr(
    (
        *(1.0 / (1307674368000 * 17), 1.0 / (6227020800 * 15), 1.0 / (39916800 * 13), 1.0 / (362880 * 11), 1.0 / (5040 * 9)),
        *(1.0 / (120 * 7), 1.0 / 30, 1.0 / 3),
    )
)
ROOT_HALF = tl.constexpr(0.70710678118654752440)
DENSITY = tl.constexpr(0.39894228040143267794)  # φ(0)
TWICE_DENSITY = tl.constexpr(0.79788456080286535588)


@triton.jit
def quotient(a, b):
    """a/b, which is a product on a GPU: nobody joins it with an addition that follows."""
    return product(a, splat(1.0, b) / b)


@triton.jit
def erfcx(x):
    """e^{x²}·erfc(x) for x ≥ 0."""
    below = tl.fma(splat(2.0, x), x, splat(1.0, x))
    if x.dtype == tl.float64:
        k = splat(3.0, x)
        return polynomial((x - k) / (x + k), ERFCX_DOUBLE, 25) / below
    else:
        k = splat(2.0, x)
        return polynomial((x - k) / (x + k), ERFCX, 11) / below


@triton.jit
def log1p_negative(s):
    """ln(1 − s) for s in [0, 1)."""
    return tl.where(s < splat(0.29, s), log1p_reduced(negative(s)), log_positive(splat(1.0, s) - s))


@triton.jit
def wide_bin(c, w, is_open):
    one, half = splat(1.0, c), splat(0.5, c)
    a = c - w
    b = tl.where(is_open, one, c + w)
    inside = a <= 0.0
    tail_a = erfcx(product(tl.abs(a), splat(ROOT_HALF, a)))
    tail_b = erfcx(product(b, splat(ROOT_HALF, b)))
    down_a = exp_negative(splat(-0.5, a) * a * a)
    down_b = tl.where(is_open, 0.0, exp_negative(splat(-0.5, b) * b * b))
    outside = product(half, tl.fma(down_a, tail_a, product(down_b, tail_b)))
    further = tl.where(is_open, 0.0, exp_negative(splat(-2.0, c) * tl.where(is_open, 0.0, c * w)))
    share = quotient(further * tail_b, tail_a)
    beyond = tl.fma(splat(-0.5, a) * a, a, log_positive(half * tail_a)) + log1p_negative(tl.where(inside, 0.0, share))
    value = negative(tl.where(inside, log1p_negative(tl.where(inside, outside, 0.0)), beyond))
    within = splat(DENSITY, c) / (one - outside)
    at_a = tl.where(inside, within * down_a, splat(DENSITY, c) / (half * tail_a * (one - share)))
    at_b = tl.where(inside, within * down_b, at_a * further)
    by_log_sigma = tl.where(is_open, negative(a) * at_a, tl.fma(b, at_b, product(negative(a), at_a)))
    return value, at_a - at_b, by_log_sigma


@triton.jit
def narrow_bin(c, w):
    one = splat(1.0, c)
    y = product(c, w)
    s = y * y
    near = y < 1.0
    area = polynomial(s, AREA, 9)
    far_y = tl.where(near, one, y)
    down = exp_negative(splat(-2.0, y) * far_y)
    slope = tl.where(near, y * polynomial(s, FIRST, 8) / area, quotient(one + down, one - down) - quotient(one, far_y))
    mean_square = tl.where(near, polynomial(s, SECOND, 9) / area, one - quotient(slope + slope, far_y))
    ratio = tl.where(near, log_positive(area), far_y - log_positive(far_y + far_y) + log1p_negative(down))
    square = product(w * w, mean_square)
    value = (
        tl.fma(splat(-0.5, c) * c, c, log_positive(w * splat(TWICE_DENSITY, w)))
        + ratio
        + log1p_negative(product(splat(0.5, w), square))
    )
    by_c = tl.fma(negative(w), slope, c)
    by_log_sigma = tl.fma(splat(2.0, y) * y, slope, tl.fma(negative(c), c, one)) - square
    return negative(value), by_c, by_log_sigma


@triton.jit
def log_bin(x0, off, inverse_sigma):
    """Minus the log-probability of x0's bin, x0 being `off` from the mean, and its derivatives by `off` and by log σ."""
    one = splat(1.0, off)
    low, high = x0 < splat(-0.999, x0), x0 > splat(0.999, x0)
    is_open = low | high
    sign = tl.where(low, -1.0, tl.where(high, 1.0, tl.where(off < 0.0, -1.0, 1.0))).to(off.dtype)
    c = product(sign * off, inverse_sigma)
    w = product(splat(1.0 / 255, off), inverse_sigma)
    narrow = (w < splat(1e-3 if off.dtype == tl.float64 else 0.0625, w)) & (~is_open)
    value, by_c, by_log_sigma = wide_bin(tl.where(narrow, one + one, c), tl.where(narrow, one, w), is_open)
    thin, thin_by_c, thin_by_log_sigma = narrow_bin(tl.where(narrow, c, one * 0.0), tl.where(narrow, w, splat(0.01, w)))
    by_off = sign * inverse_sigma * tl.where(narrow, thin_by_c, by_c)
    return tl.where(narrow, thin, value), by_off, tl.where(narrow, thin_by_log_sigma, by_log_sigma)


@triton.jit
def approximate_cdf(x):
    """Φ(x) and its derivative."""
    one = splat(1.0, x)
    u = splat(TWICE_DENSITY, x) * (x + product(splat(0.044715, x), x * x * x))
    e = exp_negative(splat(-2.0, x) * tl.abs(u))
    d = one / (one + e)
    size = product(one - e, d)
    slope = splat(2.0, x) * e * d * d * splat(TWICE_DENSITY, x)
    value = product(splat(0.5, x), one + tl.where(u < 0.0, negative(size), size))
    return value, product(slope, one + product(splat(3.0 * 0.044715, x), x * x))


@triton.jit
def approximate_log_bin(x0, off, inverse_sigma, FLOOR: tl.constexpr):
    """The same with other libraries' approximation of Φ, and no probability below FLOOR."""
    one, half_width = splat(1.0, off), splat(1.0 / 255, off)
    low, high = x0 < splat(-0.999, x0), x0 > splat(0.999, x0)
    a = product(inverse_sigma, off - half_width)
    b = product(inverse_sigma, off + half_width)
    below, density_a = approximate_cdf(a)
    above, density_b = approximate_cdf(b)
    inside = tl.where(low, above, tl.where(high, one - below, above - below))
    lost = inside < splat(FLOOR, off)
    found = tl.where(lost, splat(FLOOR, off), inside)
    over = tl.where(lost, 0.0, one / found).to(off.dtype)
    at_a = product(tl.where(low, 0.0, density_a).to(off.dtype), over)
    at_b = product(tl.where(high, 0.0, density_b).to(off.dtype), over)
    return negative(log_positive(found)), inverse_sigma * (at_a - at_b), tl.fma(at_b, b, product(negative(at_a), a))
