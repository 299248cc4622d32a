"""Sums in a fixed order: the same bits on every run. csrc/common/device_sum.h and cuda_sum.cuh.

A program adds the values of its tiles, a few neighbours in the type of the arithmetic and those sums in float64, and leaves its
own sum; a second launch adds those. In one launch, the last program would have to be told from the others by an atomic counter,
which somebody has to have zeroed, or wait for them as the CUDA kernel does, which only NVIDIA's memory model is documented for.
How many programs there are depends on the sizes alone, so the result does not depend on the GPU.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import op
from .host_device import stored
from .op import wrap_triton

MOST_SUMS = 1024  # programs that share a sum at most: about as many as a large GPU runs at a time
# So many are added in the type of the arithmetic: what one thread has of a tile where a warp has 64 threads, and half of it where
# it has 32. Widening and adding in float64 takes one instruction each, of which a GPU for games does two a cycle.
FEW = tl.constexpr(8)
TILE = op.MANY * op.INTERPRETED_FACTOR if op.INTERPRETED else op.MANY
# Tiles that one program adds alone: a second launch takes as long.
ALONE = 4


def sharing(tiles, most=MOST_SUMS):
    """How many programs share `tiles` tiles, one at least: then that one writes the result, and there is no second launch."""
    return torch.sym_min(most, torch.sym_max(1, tiles - ALONE + 1))


def programs_of(count):
    """The same for `count` values in flat tiles."""
    return sharing(triton.cdiv(count, TILE))


def is_one(programs):
    """Not asked of a symbolic number, which would put a guard on it."""
    return not isinstance(programs, torch.SymInt) and programs == 1


def scratch(outputs, programs, like):
    """Room for `outputs` sums of each of the programs, given as one number for each launch. Symbolic ones count as the most there
    may be: a size that may be 1 gets a guard."""
    chunks = sum(MOST_SUMS if isinstance(n, torch.SymInt) else n for n in programs)
    return op.empty((outputs * chunks,), torch.float64, like.device)


@triton.jit
def few(values, V: tl.constexpr):
    """The sums of FEW values each of a tile, as float64: of one thread's where V neighbours are that, so nothing moves between
    threads."""
    E: tl.constexpr = values.shape[0]
    return tl.sum(tl.sum(values.reshape(FEW // V, E // FEW, V), 2), 0).to(tl.float64)


@triton.jit
def few_of_rows(values, V: tl.constexpr):
    """The same with V values in place of FEW, in each row."""
    S: tl.constexpr = values.shape[0]
    E: tl.constexpr = values.shape[1]
    return tl.sum(values.reshape(S, E // V, V), 2).to(tl.float64)


@triton.jit
def totals_of(sums, EACH: tl.constexpr):
    """What the rows of a program's sums come to: one total for each sample of its tile, or where not EACH one of all."""
    total = tl.sum(sums, 1)
    return total if EACH else tl.sum(total, 0) + tl.zeros((1,), tl.float64)


@triton.jit
def place_of_totals(chunks, batch, S: tl.constexpr, EACH: tl.constexpr):
    """Where in the result of `sums_for` those of a program's S samples go, and which of them are there. By itself, since
    torch.compile takes all that a call's address may depend on for written to: beside the totals, that was every input."""
    if EACH:
        tile = tl.program_id(0) // chunks
        b = tile.to(tl.int64) * S + tl.arange(0, S)
        return b * chunks + (tl.program_id(0) - tile * chunks), b < batch
    else:
        at = tl.program_id(0) + tl.zeros((1,), tl.int32)
        return at, at == at


@triton.jit
def sum_of_chunks(sums, chunks, output, outputs, S: tl.constexpr, C: tl.constexpr):
    """Σ sums[o·chunks …] of each of S outputs o (a column), C chunks at a time."""
    total = tl.zeros((S, C), tl.float64)
    for first in range(0, chunks, C):
        chunk = first + tl.arange(0, C)[None, :]
        inside = (output < outputs) & (chunk < chunks)
        total += tl.load(sums + output.to(tl.int64) * chunks + chunk, mask=inside, other=0.0)
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=["outputs", "chunks", "divisor"])
def sum_kernel(result, sums, outputs, chunks, divisor, S: tl.constexpr, C: tl.constexpr):
    """result[o] = Σ sums[o·chunks …] / divisor, for S outputs o in each program."""
    total = sum_of_chunks(sums, chunks, tl.program_id(0) * S + tl.arange(0, S)[:, None], outputs, S, C)
    total = total / tl.full((1,), divisor, tl.int64).to(tl.float64)
    output = tl.program_id(0) * S + tl.arange(0, S)
    tl.store(result + output, stored(total, result), mask=output < outputs)


class Sums(NamedTuple):
    """Where the programs leave their sums, `chunks` for each of the outputs: the result itself where one is all there is."""

    to: torch.Tensor
    programs: int
    chunks: int


def sums_for(result, tiles, blocks):
    """For `tiles` programs, or groups of programs, that each share `blocks` blocks."""
    chunks = sharing(blocks, torch.sym_max(1, MOST_SUMS // torch.sym_max(1, tiles)))
    if is_one(chunks):
        return Sums(result, tiles, 1)
    return Sums(op.empty((result.numel(), chunks), torch.float64, result.device), tiles * chunks, chunks)


def finish(result, sums, divisor):
    """The second launch: result = the sum over the chunks / divisor."""
    chunks = MOST_SUMS
    while not isinstance(sums.chunks, torch.SymInt) and chunks // 2 >= sums.chunks:
        chunks //= 2
    outputs = MOST_SUMS // chunks
    op.launch(
        wrap_triton(sum_kernel),
        *(triton.cdiv(result.numel(), outputs), result, result, sums.to, result.numel(), sums.chunks, divisor),
        S=outputs,
        C=chunks,
    )
