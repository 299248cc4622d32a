"""Box–Muller on the words of Philox: u = (a + ½)·2⁻³², φ = 2π·b·2⁻³², z = √(−2 ln u)·(cos φ, sin φ); csrc/common/normal.h.

Not tl.sin and tl.cos, whose reduction of a large argument costs a stack frame in every thread; nor tl.log, which is dearer than
our polynomial: a seeded bfloat16 q_sample takes 45 instructions per element on sm_90 with these, 52 with tl.log, 53 with tl.log2.
"""

import triton
import triton.language as tl

from .host_device import bits, from_bits, splat, word
from .philox import contract_words
from .real_math import log_positive, polynomial

SINE = tl.constexpr((-0.0001951528392964974, 0.00833216030150652, -0.16666655242443085))
COSINE = tl.constexpr((2.44331567955669e-05, -0.0013887316454201937, 0.04166664555668831, -0.5, 1.0))
SINE_DOUBLE = tl.constexpr(
    (1 / 355687428096000, -1 / 1307674368000, 1 / 6227020800, -1 / 39916800, 1 / 362880, -1 / 5040, 1 / 120, -1 / 6)
)
COSINE_DOUBLE = tl.constexpr(
    (
        -1 / 6402373705728000,
        1 / 20922789888000,
        -1 / 87178291200,
        1 / 479001600,
        -1 / 3628800,
        1 / 40320,
        -1 / 720,
        1 / 24,
        -0.5,
        1.0,
    )
)


@triton.jit
def with_sign(a, sign):
    """`a`, negative where bit 31 of `sign`, whose other bits are 0, is set."""
    if a.dtype == tl.float64:
        return from_bits(bits(a) ^ (sign.to(tl.int64) << 32))
    else:
        return from_bits(bits(a) ^ sign.to(tl.int32, bitcast=True))


@triton.jit
def sincos_within_eighth(a):
    """sin and cos of an angle within ±π/4."""
    a2 = a * a
    if a.dtype == tl.float64:
        s = tl.fma(a * a2, polynomial(a2, SINE_DOUBLE, 8), a)
        c = polynomial(a2, COSINE_DOUBLE, 10)
    else:
        s = tl.fma(a * a2, polynomial(a2, SINE, 3), a)
        c = polynomial(a2, COSINE, 5)
    return s, c


@triton.jit
def turn_by_quarters(quarters, s, c):
    """sin and cos of an angle whose own are s and c, after as many quarter turns as bits 31 and 30 say: odd ones swap the two, the
    sine is negative after 2 and 3, the cosine after 1 and 2."""
    odd = (quarters & word(0x40000000)) != word(0)
    sine = with_sign(tl.where(odd, c, s), quarters & word(0x80000000))
    cosine = with_sign(tl.where(odd, s, c), (quarters + word(0x40000000)) & word(0x80000000))
    return sine, cosine


@triton.jit
def sincos_turn(turn, R: tl.constexpr):
    """sin and cos of 2π·turn·2⁻³². The nearest quarter turn is taken off in integers, exactly; what is left is within ±π/4."""
    shifted = turn + word(0x20000000)
    rest = (shifted & word(0x3FFFFFFF)).to(tl.int32) - 0x20000000
    s, c = sincos_within_eighth(rest.to(R) * tl.full((), 1.4629180792671596e-09, R))  # 2π·2⁻³²
    return turn_by_quarters(shifted, s, c)


@triton.jit
def box_muller(a, b, R: tl.constexpr):
    """Words in, a pair of normals out."""
    u = tl.fma(a.to(R), tl.full((), 2.0**-32, R), tl.full((), 2.0**-33, R))
    log_u = log_positive(u)
    radius = tl.sqrt(log_u * splat(-2.0, log_u))
    sine, cosine = sincos_turn(b, R)
    return radius * cosine, radius * sine


@triton.jit
def contract_normals(group, sample, offset, seed, R: tl.constexpr):
    """The contract: the four normals of an element group of a sample, in float32 or float64."""
    r0, r1, r2, r3 = contract_words(group, sample, offset, seed)
    z0, z1 = box_muller(r0, r1, R)
    z2, z3 = box_muller(r2, r3, R)
    return z0, z1, z2, z3
