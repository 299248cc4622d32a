"""Scalar primitives that the formulas are written in, as csrc/common/host_device.h has them for C++.

Everything here and in the formulas is core `triton.language`: no inline assembly, no vendor's library. Multiplications and
additions that are one operation are written as tl.fma, and no others can be contracted, so that every backend rounds in the
same places whatever Triton's default for floating-point fusion is.
"""

import triton
import triton.language as tl


@triton.jit
def splat(a: tl.constexpr, like):
    """The constant `a` in the type of `like`; a bare Python number would become float32 in a float64 formula."""
    return tl.full((), a, like.dtype)


@triton.jit
def word(a: tl.constexpr):
    return tl.full((), a, tl.uint32)


@triton.jit
def negative(a):
    """−a. Not the operator, which is 0 − a: an instruction of its own, and 0 for a = 0."""
    return a * splat(-1.0, a)


@triton.jit
def product(a, b):
    """a·b, which nobody joins with an addition that follows."""
    return tl.fma(a, b, splat(0.0, b))


@triton.jit
def max_of(a, b):
    """b where either is NaN, as in C++."""
    return tl.where(a > b, a, b)


@triton.jit
def min_of(a, b):
    return tl.where(a < b, a, b)


@triton.jit
def bits(a):
    if a.dtype == tl.float64:
        return a.to(tl.int64, bitcast=True)
    else:
        return a.to(tl.int32, bitcast=True)


@triton.jit
def from_bits(a):
    if a.dtype == tl.int64:
        return a.to(tl.float64, bitcast=True)
    else:
        return a.to(tl.float32, bitcast=True)


@triton.jit
def to_real(a):
    if a.dtype == tl.int64:
        return a.to(tl.float64)
    else:
        return a.to(tl.float32)


@triton.jit
def multiply_wide(a, b):
    """32 × 32 → 64 bits: the high and the low word."""
    return tl.umulhi(a, b), a * b


@triton.jit
def stored(value, pointer):
    """`value` as the elements that `pointer` points to, rounded once; float64 goes to half precision through float32, as in C++."""
    if value.dtype == tl.float64 and pointer.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(pointer.dtype.element_ty)
