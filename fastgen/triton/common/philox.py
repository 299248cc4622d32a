"""Philox4x32-10 (Salmon et al., SC'11) and the contract's counter and key; csrc/common/philox.h says the same in C++."""

import triton
import triton.language as tl

from .host_device import multiply_wide, word


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(10):
        high0, low0 = multiply_wide(c0, word(0xD2511F53))
        high1, low1 = multiply_wide(c2, word(0xCD9E8D57))
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + word(0x9E3779B9)
        k1 = k1 + word(0xBB67AE85)
    return c0, c1, c2, c3


@triton.jit
def contract_words(group, sample, offset, seed):
    """Element group (j div 4), sample, offset and seed, the last two of 64 bits, to four random words."""
    return philox4x32(
        group.to(tl.uint32),
        sample.to(tl.uint32),
        offset.to(tl.uint32),
        (offset >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
