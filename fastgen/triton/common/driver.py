"""The element-wise driver: which elements a program instance has, and the noise that goes with them.

A tile of S samples × E elements is a program's; the four normals of a Philox call are put side by side by `tl.join`, which moves
nothing between threads where a thread's elements are V = 4 consecutive ones, or 8 by two calls where the narrowest operand has
two bytes: 128-bit accesses either way. Three layouts:

    FLAT      contiguous, or any dense order where no logical index is needed
    TILED     channels-last with whole groups in a channel: the four positions of S groups × E channels, one lane each
    GATHERED  any other channels-last: the logical order, each element with its own address

csrc/common/device_driver.h has Vectors, Tiles and Groups for these.

What one of them returns stands in an `else` wherever another does: the compiler, unlike the interpreter, reads on after a return.
"""

import triton
import triton.language as tl

from .elementwise import SEED_OF_EACH_SAMPLE, seed_of
from .normal import contract_normals

FLAT = tl.constexpr(0)
TILED = tl.constexpr(1)
GATHERED = tl.constexpr(2)


@triton.jit
def samples_of(tile, S: tl.constexpr, LAYOUT: tl.constexpr):
    """The samples of a tile, as a column; a TILED one is of a single sample."""
    if LAYOUT == TILED:
        return tile + tl.zeros((1, 1), tl.int32)
    else:
        return tile * S + tl.arange(0, S)[:, None]


@triton.jit
def quads_of(block, channels, S: tl.constexpr, E: tl.constexpr):
    """The groups of four positions (a column) and the channels (a row) of a TILED tile."""
    across = tl.cdiv(channels, E)
    down = block // across
    return down * S + tl.arange(0, S)[:, None], (block - down * across) * E + tl.arange(0, E)[None, :]


@triton.jit
def elements_of(
    block,
    r: tl.constexpr,
    event,
    channels,
    FACTOR: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Where in its sample's memory each element of part r of the tile lies, and whether there is such an element. FACTOR: how
    many times the channels the operand has; WIDE: whether a sample has more elements than int32 counts."""
    # a branch for each layout: what comes after a return is compiled as well
    if WIDE:
        block = block.to(tl.int64)
    if LAYOUT == TILED:
        quad, channel = quads_of(block, channels, S, E)
        position = 4 * quad + r
        return position * (channels * FACTOR) + channel, (position * channels < event) & (channel < channels)
    elif LAYOUT == GATHERED:
        spatial = event // channels
        j = block * E + tl.arange(0, E)[None, :]
        channel = j // spatial
        return (j - channel * spatial) * (channels * FACTOR) + channel, j < event
    else:
        j = block * E + tl.arange(0, E)[None, :]
        return j, j < event


@triton.jit
def flat_elements(block, count, E: tl.constexpr):
    """Of a tile of the `count` elements in the order of memory: where it begins, the E elements from there on, and whether there
    are such. Only the beginning takes 64 bits, and that is one number for all threads."""
    begin = tl.full((), block, tl.int64) * E
    element = tl.arange(0, E)
    return begin, element, element < tl.full((), count, tl.int64) - begin


@triton.jit
def four(z0, z1, z2, z3):
    """z0 … z3 as two new dimensions, in that order."""
    return tl.join(tl.join(z0, z2), tl.join(z1, z3))


@triton.jit
def tile_normals(
    block,
    b,
    live,
    offset,
    seeds,
    seed,
    event,
    channels,
    R: tl.constexpr,
    SEEDS: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The normals of the tile: those of each part where it is TILED, else those of the one part, four times."""
    seed = seed_of(seeds, seed, b, live, SEEDS)
    sample = b
    if SEEDS == SEED_OF_EACH_SAMPLE:
        sample = tl.zeros_like(b)
    if WIDE:
        block = block.to(tl.int64)
    if LAYOUT == TILED:
        quad, channel = quads_of(block, channels, S, E)
        return contract_normals(channel * (event // channels // 4) + quad, sample, offset, seed, R)
    elif V == 8:
        group = block * (E // 4) + 2 * tl.arange(0, E // 8)[None, :]
        z0, z1, z2, z3 = contract_normals(group, sample, offset, seed, R)
        z4, z5, z6, z7 = contract_normals(group + 1, sample, offset, seed, R)
        z = tl.join(four(z0, z1, z2, z3), four(z4, z5, z6, z7)).permute(0, 1, 4, 2, 3).reshape(S, E)
        return z, z, z, z
    else:
        group = block * (E // 4) + tl.arange(0, E // 4)[None, :]
        z0, z1, z2, z3 = contract_normals(group, sample, offset, seed, R)
        z = four(z0, z1, z2, z3).reshape(S, E)
        return z, z, z, z


@triton.jit
def part_of(r: tl.constexpr, z0, z1, z2, z3):
    lanes = (z0, z1, z2, z3)
    return lanes[r]
