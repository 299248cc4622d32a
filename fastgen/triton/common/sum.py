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

MOST_SUMS = 1024  # programs that share a sum at most: about as many as a large GPU runs at a time


@triton.jit
def few(values, V: tl.constexpr):
    """Sums of V neighbours in each row, as float64. They are a thread's own, so nothing moves between threads."""
    S: tl.constexpr = values.shape[0]
    E: tl.constexpr = values.shape[1]
    return tl.sum(values.reshape(S, E // V, V), 2).to(tl.float64)


@triton.jit
def sum_kernel(result, sums, outputs, chunks, divisor, S: tl.constexpr, C: tl.constexpr):
    """result[o] = Σ sums[o·chunks …] / divisor for S outputs of at most C chunks each."""
    output = tl.program_id(0) * S + tl.arange(0, S)[:, None]
    chunk = tl.arange(0, C)[None, :]
    inside = (output < outputs) & (chunk < chunks)
    total = tl.sum(tl.load(sums + output.to(tl.int64) * chunks + chunk, mask=inside, other=0.0), 1)
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
    chunks = torch.sym_min(blocks, torch.sym_max(MOST_SUMS // torch.sym_max(tiles, 1), 1))
    if isinstance(chunks, int) and chunks <= 1:
        return Sums(result, tiles, 1)
    return Sums(torch.empty((result.numel(), chunks), dtype=torch.float64, device=result.device), tiles * chunks, chunks)


def finish(result, sums, divisor):
    """The second launch: result = the sum over the chunks / divisor."""
    chunks = MOST_SUMS
    while not isinstance(sums.chunks, torch.SymInt) and chunks // 2 >= sums.chunks:
        chunks //= 2
    outputs = MOST_SUMS // chunks
    op.launch(
        op.wrap_triton(sum_kernel),
        *(triton.cdiv(result.numel(), outputs), result, result, sums.to, result.numel(), sums.chunks, divisor),
        S=outputs,
        C=chunks,
    )
