"""ln, exp and log1p for the formulas, with the polynomials of csrc/common/real_math.h. For float32 and float64."""

import torch
import triton
import triton.language as tl

from .host_device import bits, from_bits, max_of, min_of, product, splat, to_real

LN2 = tl.constexpr(0.693147180559945309417232121458)
LOG1P_REDUCED = tl.constexpr(
    (
        0.08734836429357529,
        -0.14307518303394318,
        0.14917974174022675,
        -0.16570508480072021,
        0.19962072372436523,
        -0.25001755356788635,
        0.33333951234817505,
        -0.49999991059303284,
    )
)
LOG1P_REDUCED_DOUBLE = tl.constexpr((2 / 23, 2 / 21, 2 / 19, 2 / 17, 2 / 15, 2 / 13, 2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3))
LOG1P_UNIT = tl.constexpr(
    (
        0.005364825439855958,
        -0.030065796732173827,
        0.0792045427807816,
        -0.1375380295017657,
        0.19153655223918847,
        -0.2485716373892416,
        0.3332132262660457,
        -0.49999647963834715,
    )
)
EXP = tl.constexpr((0.0013814467238262296, 0.008368780836462975, 0.04166839271783829, 0.1666651964187622, 0.4999999403953552))
EXP_DOUBLE = tl.constexpr(
    (
        1 / 6227020800,
        1 / 479001600,
        1 / 39916800,
        1 / 3628800,
        1 / 362880,
        1 / 40320,
        1 / 5040,
        1 / 720,
        1 / 120,
        1 / 24,
        1 / 6,
        0.5,
    )
)


def is_half(dtype) -> bool:
    """Whether approximations are good enough for data of a dtype."""
    return dtype in (torch.bfloat16, torch.float16)


@triton.jit
def polynomial(x, coefficients: tl.constexpr, count: tl.constexpr):
    """Σ c_k x^k by Horner's rule, highest power first."""
    accumulated = splat(coefficients[0], x)
    for k in tl.static_range(1, count):
        accumulated = tl.fma(accumulated, x, splat(coefficients[k], x))
    return accumulated


@triton.jit
def log1p_reduced(f):
    """ln(1 + f) for f in [√½ − 1, √2 − 1]."""
    if f.dtype == tl.float64:
        s = f / (f + splat(2.0, f))  # 2·atanh(s)
        s2 = s * s
        return tl.fma(s * s2, polynomial(s2, LOG1P_REDUCED_DOUBLE, 11), s + s)
    else:
        return tl.fma(f * f, polynomial(f, LOG1P_REDUCED, 8), f)


@triton.jit
def log_positive(u):
    """ln(u) for a normal u > 0."""
    # the exponent that leaves a mantissa in [√½, √2)
    if u.dtype == tl.float64:
        exponent = (bits(u) - 0x3FE6A09E667F3BCD) >> 52
        f = from_bits(bits(u) - (exponent << 52)) - splat(1.0, u)
    else:
        exponent = (bits(u) - 0x3F3504F3) >> 23
        f = from_bits(bits(u) - (exponent << 23)) - splat(1.0, u)
    return tl.fma(to_real(exponent), splat(LN2, u), log1p_reduced(f))


@triton.jit
def log1p_unit(e):
    """ln(1 + e) for e in [0, 1]. NaN stays NaN."""
    if e.dtype == tl.float64:
        # 1 + e = 2·(1 + (e − 1)/2) where e is above √2 − 1
        upper = e > splat(0.41421356237309503, e)
        result = log1p_reduced(tl.where(upper, (e - splat(1.0, e)) * splat(0.5, e), e))
        return tl.where(upper, result + splat(LN2, e), result)
    else:
        return tl.fma(e * e, polynomial(e, LOG1P_UNIT, 8), e)


@triton.jit
def scale(a, n):
    """a·2ⁿ, rounded once where the result is subnormal. In two factors, so that neither leaves the normal range; and as a
    `product`, since the formulas add 1 to it."""
    if a.dtype == tl.float64:
        whole = n.to(tl.int64)
        half = whole >> 1
        return product(a * from_bits((half + 1023) << 52), from_bits((whole - half + 1023) << 52))
    else:
        whole = n.to(tl.int32)
        half = whole >> 1
        return product(a * from_bits((half + 127) << 23), from_bits((whole - half + 127) << 23))


@triton.jit
def reduced_exp(x):
    """n, r and tail with x = n·ln 2 + r, |r| ≤ ½·ln 2, and e^r = 1 + r + r²·tail."""
    if x.dtype == tl.float64:
        n = tl.fma(x, splat(1.0 / LN2, x), splat(6755399441055744.0, x)) - splat(6755399441055744.0, x)
        r = tl.fma(n, splat(-6.93147180369123816490e-01, x), x)
        r = tl.fma(n, splat(-1.90821492927058770002e-10, x), r)
        tail = polynomial(r, EXP_DOUBLE, 12)
    else:
        n = tl.fma(x, splat(1.0 / LN2, x), splat(12582912.0, x)) - splat(12582912.0, x)
        r = tl.fma(n, splat(-0.693359375, x), x)
        r = tl.fma(n, splat(2.12194440e-4, x), r)
        tail = polynomial(r, EXP, 5)
    return n, r, tail


@triton.jit
def exp_reduced(n, r, tail):
    one = splat(1.0, r)
    return scale(tl.fma(tl.fma(tail, r, one), r, one), n)


@triton.jit
def exp_bounds(x):
    """x where exp(x) neither overflows nor underflows, else the nearest number that makes it do so. NaN stays NaN."""
    if x.dtype == tl.float64:
        return min_of(splat(710.0, x), max_of(splat(-746.0, x), x))
    else:
        return min_of(splat(89.0, x), max_of(splat(-104.0, x), x))


@triton.jit
def exp_negative(x, APPROXIMATE: tl.constexpr = False):
    """exp(x) for x ≤ 0; underflows through the subnormals to 0, NaN stays NaN. APPROXIMATE: only as good as data of half precision
    need, as the square of a root, whose subnormals a GPU flushes."""
    if APPROXIMATE and x.dtype != tl.float64:
        root = tl.exp2(x * splat(0.5 / LN2, x))
        return product(root, root)
    else:
        n, r, tail = reduced_exp(max_of(splat(-746.0 if x.dtype == tl.float64 else -104.0, x), x))
        return exp_reduced(n, r, tail)


@triton.jit
def exp(x):
    """exp(x); overflows to inf as well."""
    n, r, tail = reduced_exp(exp_bounds(x))
    return exp_reduced(n, r, tail)


@triton.jit
def exp_and_excess(x):
    """e^x, and e^x − 1 − x, which is small where x is."""
    n, r, tail = reduced_exp(exp_bounds(x))
    power = exp_reduced(n, r, tail)
    return power, tl.where(n == 0.0, product(r * r, tail), power - splat(1.0, x) - x)
