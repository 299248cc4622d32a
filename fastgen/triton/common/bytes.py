"""The bytes of images, and the numbers within −1 … 1 that they stand for; csrc/common/bytes.h."""

import triton
import triton.language as tl

from .host_device import bits, product, splat


@triton.jit
def value_of_byte(byte):
    """u/127.5 − 1 of a byte u, given as a number: rounded once, in the last of these operations."""
    k = tl.fma(byte, splat(2.0, byte), splat(-255.0, byte))
    if byte.dtype == tl.float64:
        first = k * splat(16843009.0 / 4294967296.0, k)
        return tl.fma(first, splat(1.0 / 4294967296.0, k), first)
    else:
        first = k * splat(65793.0 / 16777216.0, k)
        return tl.fma(first, splat(1.0 / 16777216.0, k), first)


@triton.jit
def byte_of_value(x):
    """The whole number nearest to (x + 1)·127.5, x clamped to −1 … 1, and of two that are as near the even one; 0 of NaN."""
    low, high = splat(-1.0, x), splat(1.0, x)
    x = tl.where(x > low, x, low)  # NaN is not
    x = tl.where(x < high, x, high)
    scaled = product(x + high, splat(127.5, x))
    # a sum whose last place is 1 rounds
    if x.dtype == tl.float64:
        return (bits(scaled + splat(6755399441055744.0, x)) & 255).to(tl.uint8)
    else:
        return (bits(scaled + splat(12582912.0, x)) & 255).to(tl.uint8)


@triton.jit
def real_of(data, R: tl.constexpr):
    """What was loaded, in the type of the arithmetic."""
    if data.dtype == tl.uint8:
        return value_of_byte(data.to(R))
    else:
        return data.to(R)
