"""What an element-wise op reads besides its tensors: coefficient rows and the streams of noise; csrc/common/elementwise.h."""

import triton
import triton.language as tl

# Where noise comes from, NOISE in the kernels: of several `seeds`, which is a pointer, or of the one number `seed`.
NO_NOISE = tl.constexpr(0)
GIVEN_NOISE = tl.constexpr(1)
SEEDED_NOISE = tl.constexpr(2)
# SEEDS in the kernels
SEED_IS_NUMBER = tl.constexpr(0)
SEED_IN_MEMORY = tl.constexpr(1)
SEED_OF_EACH_SAMPLE = tl.constexpr(2)
SEED_IS_COMPLEMENT = tl.constexpr(3)


@triton.jit
def wide(number):
    """An argument as int64; a plain `.to` would not do where a compiler has made it a constant."""
    return tl.full((1, 1), number, tl.int64)


@triton.jit
def timestep_of(t, index, b, live, HAS_T: tl.constexpr):
    if HAS_T:
        return tl.load(t + b, mask=live, other=0)
    else:
        return wide(index)


@triton.jit
def table_row(rows, step, count, COLUMNS: tl.constexpr):
    """Where each sample's row begins, and whether it is inside the table, of which nothing else is ever read."""
    inside = (step >= 0) & (step < count)
    return rows + tl.where(inside, step, 0) * COLUMNS, inside


@triton.jit
def column(row, inside, k: tl.constexpr):
    return tl.where(inside, tl.load(row + k), float("nan"))


@triton.jit
def seed_of(seeds, seed, b, live, SEEDS: tl.constexpr):
    if SEEDS == SEED_OF_EACH_SAMPLE:
        return tl.load(seeds + b, mask=live, other=0)
    elif SEEDS == SEED_IN_MEMORY:
        return tl.load(seeds + tl.zeros((1, 1), tl.int32))
    elif SEEDS == SEED_IS_COMPLEMENT:
        return ~wide(seed)
    else:
        return wide(seed)
