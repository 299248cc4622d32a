"""The element-wise driver: which elements a program instance has, and the noise that goes with them.

A tile of S samples × E elements is a program's; the four normals of a Philox call are put side by side by `tl.join`, which moves
nothing between threads where a thread's elements are V = 4 consecutive ones, or 8 by two calls where the narrowest operand has
two bytes: 128-bit accesses either way. Three layouts:

    FLAT      contiguous, or any dense order where no logical index is needed
    TILED     channels-last with whole groups in a channel: the four positions of S groups × E channels, one lane each
    GATHERED  any other channels-last: the logical order, each element with its own address

csrc/common/device_driver.h has Vectors, Tiles and Groups for these.

A function here that returns in one branch returns in its `else` too: the compiler, unlike the interpreter, reads the code after a
return as well.
"""

import triton
import triton.language as tl

from .elementwise import GIVEN_NOISE, SEED_OF_EACH_SAMPLE, SEEDED_NOISE, seed_of
from .normal import contract_normals

FLAT = tl.constexpr(0)
TILED = tl.constexpr(1)
GATHERED = tl.constexpr(2)


@triton.jit
def samples_of(tile, S: tl.constexpr, LAYOUT: tl.constexpr, WIDE: tl.constexpr):
    """The samples of a tile, as a column; a TILED one is of a single sample."""
    if WIDE:
        tile = tile.to(tl.int64)
    if LAYOUT == TILED:
        return tile + tl.zeros((1, 1), tl.int32)
    else:
        return tile * S + tl.arange(0, S)[:, None]


@triton.jit
def place_of(k, blocks, batch, S: tl.constexpr, LAYOUT: tl.constexpr, WIDE: tl.constexpr):
    """Of tile k, counted over the blocks of the first samples, then of the next: its block, its samples, whether there are such."""
    tile = k // blocks
    b = samples_of(tile, S, LAYOUT, WIDE)
    return k - tile * blocks, b, b < batch


@triton.jit
def quads_of(block, channels, S: tl.constexpr, E: tl.constexpr, STEP: tl.constexpr):
    """The groups of four positions (a column) and every STEP-th of the channels (a row) of a TILED tile."""
    across = tl.cdiv(channels, E)
    down = block // across
    channel = (block - down * across) * E + STEP * tl.arange(0, E // STEP)
    return down * S + tl.arange(0, S)[:, None], channel[None, :]


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
    many times the channels the operand has; WIDE: whether a sample has more elements than int32 counts, or the batch samples."""
    # a branch for each layout: what comes after a return is compiled as well
    if WIDE:
        block = block.to(tl.int64)
    if LAYOUT == TILED:
        quad, channel = quads_of(block, channels, S, E, 1)
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
def side_by_side(z0, z1, z2, z3, S: tl.constexpr, E: tl.constexpr):
    """Rows of E: z0, z1, z2, z3 of the first of each, of the second, …"""
    return four(z0, z1, z2, z3).reshape(S, E)


@triton.jit
def eight_side_by_side(z0, z1, z2, z3, z4, z5, z6, z7, S: tl.constexpr, E: tl.constexpr):
    return tl.join(four(z0, z1, z2, z3), four(z4, z5, z6, z7)).permute(0, 1, 4, 2, 3).reshape(S, E)


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
        # V channels are a thread's: their calls are made one after another, or the normals would have to change threads
        quad, channel = quads_of(block, channels, S, E, V)
        quads = event // channels // 4
        group = channel * quads + quad
        n0 = contract_normals(group, sample, offset, seed, R)
        n1 = contract_normals(group + quads, sample, offset, seed, R)
        n2 = contract_normals(group + 2 * quads, sample, offset, seed, R)
        n3 = contract_normals(group + 3 * quads, sample, offset, seed, R)
        if V == 8:
            n4 = contract_normals(group + 4 * quads, sample, offset, seed, R)
            n5 = contract_normals(group + 5 * quads, sample, offset, seed, R)
            n6 = contract_normals(group + 6 * quads, sample, offset, seed, R)
            n7 = contract_normals(group + 7 * quads, sample, offset, seed, R)
            z0 = eight_side_by_side(n0[0], n1[0], n2[0], n3[0], n4[0], n5[0], n6[0], n7[0], S, E)
            z1 = eight_side_by_side(n0[1], n1[1], n2[1], n3[1], n4[1], n5[1], n6[1], n7[1], S, E)
            z2 = eight_side_by_side(n0[2], n1[2], n2[2], n3[2], n4[2], n5[2], n6[2], n7[2], S, E)
            z3 = eight_side_by_side(n0[3], n1[3], n2[3], n3[3], n4[3], n5[3], n6[3], n7[3], S, E)
        else:
            z0 = side_by_side(n0[0], n1[0], n2[0], n3[0], S, E)
            z1 = side_by_side(n0[1], n1[1], n2[1], n3[1], S, E)
            z2 = side_by_side(n0[2], n1[2], n2[2], n3[2], S, E)
            z3 = side_by_side(n0[3], n1[3], n2[3], n3[3], S, E)
        return z0, z1, z2, z3
    elif V == 8:
        group = block * (E // 4) + 2 * tl.arange(0, E // 8)[None, :]
        z0, z1, z2, z3 = contract_normals(group, sample, offset, seed, R)
        z4, z5, z6, z7 = contract_normals(group + 1, sample, offset, seed, R)
        z = eight_side_by_side(z0, z1, z2, z3, z4, z5, z6, z7, S, E)
        return z, z, z, z
    else:
        group = block * (E // 4) + tl.arange(0, E // 4)[None, :]
        z0, z1, z2, z3 = contract_normals(group, sample, offset, seed, R)
        z = side_by_side(z0, z1, z2, z3, S, E)
        return z, z, z, z


@triton.jit
def part_of(r: tl.constexpr, z0, z1, z2, z3):
    lanes = (z0, z1, z2, z3)
    return lanes[r]


@triton.jit
def noise_of_elements(noise, at, inside, r: tl.constexpr, z0, z1, z2, z3, like, NOISE: tl.constexpr):
    """ε, given, made, or where there is none `like`, which nobody reads then."""
    if NOISE == GIVEN_NOISE:
        return tl.load(noise + at, mask=inside, other=0.0).to(like.dtype)
    elif NOISE == SEEDED_NOISE:
        return part_of(r, z0, z1, z2, z3)
    else:
        return like
