"""The torch side that all ops share: layouts, copies, the choice of tiles, launches; csrc/common/op.h.

What runs here is traced by torch.compile, with symbolic sizes, as part of a `torch.library.triton_op`; so nothing depends on a
value in a tensor, and on a symbolic size only where a guard on it is harmless.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._core import dispatch
from . import direct, driver, elementwise

INTERPRETED = bool(triton.knobs.runtime.interpret)
WARPS = 4
# Elements of a tile: one vector for each of 128 threads, while all threads of a GPU together have no more to do than that; else
# 16 elements for each (AMD's wide warps make that 256 threads, with half as many). That halves the instructions that are the same
# for all of a thread's elements: a seeded bfloat16 q_sample on sm_90 takes 51 instructions per element with 8 of them, 45.5 with
# 16. Never more than an event's next power of two, nor less than a vector; what is left of the tile spans several samples.
THREADS = 32 * WARPS
MANY = 16 * THREADS
MANY_ELEMENTS = 1 << 20


class Batch(NamedTuple):
    """(B, *event) in memory, as Geometry in C++; channels and spatial are those of channels-last, else 1 and event."""

    size: int
    event: int
    channels: int
    spatial: int
    channels_last: bool


def batch_of(x, channels_last=None):
    size, event = x.shape[0], math.prod(x.shape[1:])
    channels_last = dispatch.is_channels_last(x) if channels_last is None else channels_last
    channels = x.shape[1] if channels_last else 1
    return Batch(size, event, channels, event // channels if channels_last else event, channels_last)


def plain(x):
    """`x` without the negative bit, which torch's dispatch takes off for ops; their functions are called without it."""
    return x.resolve_neg() if x.is_neg() else x


def operand(x, like, channels_last):
    """`x` in the layout of the batch, copied where it has another; refused where it does not fit, for memory safety."""
    if x.dim() != like.dim() or x.device != like.device:
        raise RuntimeError(f"expected a tensor of shape {tuple(like.shape)} on {like.device}, got {tuple(x.shape)} on {x.device}")
    x = plain(x)
    if channels_last:
        return x if dispatch.is_channels_last(x) else x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def same(x, like, channels_last, factor=1):
    """The same for a tensor of the shape of `like`, or of `factor` times its channels."""
    shape = like.shape if factor == 1 else (like.shape[0], factor * like.shape[1], *like.shape[2:])
    torch._check(x.shape == shape, lambda: f"expected shape {tuple(shape)}, got {tuple(x.shape)}")
    return operand(x, like, channels_last)


def apart(x, batch, like):
    """`x`, of the shape of `like`, and how many times as far apart its samples lie as they are large, and so do the positions of
    channels-last ones: 2 for a half of a tensor's channels, else 1, of a copy where need be."""
    if x.shape == like.shape and x.device == like.device and not x.is_neg():
        if batch.channels_last:
            step = 2 * batch.channels
            position = next((s for s, n in zip(x.stride()[:1:-1], x.shape[:1:-1], strict=True) if n != 1), 0)
            half = position == step and dispatch.has_channels_last_samples(x)
        else:
            half = not x.is_contiguous() and x[:1].is_contiguous()
        if half and (x.shape[0] == 1 or x.stride(0) == 2 * batch.event):
            return x, 2
    return same(x, like, batch.channels_last), 1


def each_sample(name, x, like, dtype):
    """Refuses what is not (B,) numbers of the type of the arithmetic."""
    if x.dim() != 1 or x.dtype != dtype or x.device != like.device or not x.is_contiguous():
        raise RuntimeError(f"{name}: expected a contiguous {dtype} tensor of shape (B,) on {like.device}")
    torch._check(x.shape[0] == like.shape[0], lambda: f"{name}: expected {like.shape[0]} elements, got {x.shape[0]}")


def arithmetic_of(x):
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def passes_floats_as_float32():
    """Whether a float reaches a kernel with 24 bits whatever its annotation: from Inductor's launches, and in the interpreter."""
    return INTERPRETED or dispatch.traced()


class Rows(NamedTuple):
    """The table and which row of it, as the kernels take them. `t` points anywhere where `index` is for all samples."""

    table: torch.Tensor
    t: torch.Tensor
    index: int
    count: int
    has_t: bool


def rows_of(rows, t, index, columns, x, dtype):
    if rows.shape[1:] != (columns,) or rows.device != x.device or rows.dtype != dtype:
        raise RuntimeError(
            f"rows: expected a (T, {columns}) {dtype} table on {x.device}, got {rows.dtype}, {tuple(rows.shape)} on {rows.device}"
        )
    if t is not None:
        if t.dtype != torch.int64 or t.device != x.device:
            raise RuntimeError(f"t: expected an int64 tensor on {x.device}, got {t.dtype} on {t.device}")
        torch._check(t.shape[0] == x.shape[0], lambda: f"t: expected shape ({x.shape[0]},), got {tuple(t.shape)}")
    return Rows(rows.contiguous(), rows if t is None else t.contiguous(), index, rows.shape[0], t is not None)


class Noise(NamedTuple):
    """NOISE and SEEDS of the kernels and what they need. `seeds` points at `unused` where there are none."""

    kind: int
    seeds_kind: int
    seeds: torch.Tensor
    seed: int


def noise_of(noise, seeds, seed, x, unused=None):
    """`unused`: a tensor that is in memory anyway. Inductor makes a copy of its own of each argument that is still to be computed,
    so not `x` once more."""
    unused = x if unused is None else unused
    kind, seeds_kind = elementwise.NO_NOISE, elementwise.SEED_IS_NUMBER
    if noise is not None:
        kind, seed = elementwise.GIVEN_NOISE, 0
    elif seeds is not None:
        kind = elementwise.SEEDED_NOISE
        if seeds.dtype != torch.int64 or seeds.dim() > 1:
            raise RuntimeError(f"seed: expected an int64 tensor of 1 or B elements, got {seeds.dtype}, {tuple(seeds.shape)}")
        if seeds.numel() == 1 and seeds.is_cpu and not x.is_cpu:
            seed = int(seeds)  # one host value is read where it lies
        elif seeds.device != x.device:
            raise RuntimeError(f"seed: expected a tensor on {x.device}, got one on {seeds.device}")
        else:
            # a batch of one is both; the counter's b is 0 either way
            each = seeds.dim() == 1 and seeds.shape[0] != 1
            seeds_kind = elementwise.SEED_OF_EACH_SAMPLE if each else elementwise.SEED_IN_MEMORY
            if each:
                torch._check(seeds.shape[0] == x.shape[0], lambda: f"seed: expected {x.shape[0]} elements, got {seeds.shape[0]}")
            return Noise(kind.value, seeds_kind.value, seeds.contiguous(), 0)
    elif seed is not None:
        kind = elementwise.SEEDED_NOISE
        if dispatch.traced() and seed < -(2**31):
            # Inductor hands over any number that is not above int32 as one of int32; the complement is above
            return Noise(kind.value, elementwise.SEED_IS_COMPLEMENT.value, unused, -1 - seed)
    return Noise(kind.value, seeds_kind.value, unused, 0 if seed is None else seed)


class Tiling(NamedTuple):
    """How a batch is cut into tiles: the kernels' parameters, and how many tiles of samples by how many blocks there are."""

    batch: int
    event: int
    channels: int
    tiles: int
    blocks: int
    S: int
    E: int
    V: int
    LAYOUT: int
    WIDE: bool

    @property
    def parameters(self):
        return {"S": self.S, "E": self.E, "V": self.V, "LAYOUT": self.LAYOUT, "WIDE": self.WIDE}


def tiling(batch, tensors, seeded, merge, keep=False, heavy=False):
    """`seeded`: whether the logical index matters; `keep`: so does the layout; `merge`: the samples do not, all having one row;
    `heavy`: a formula of so many registers that half a tile is enough for a program."""
    size, event, channels, layout = batch.size, batch.event, batch.channels, driver.FLAT
    if batch.channels_last and (seeded or keep):
        layout = driver.TILED if batch.spatial % 4 == 0 else driver.GATHERED
    elif merge and not seeded and not keep:
        size, event = 1, size * event
    vector, total = vector_of(tensors), flat_tile(size * event, tensors)
    if heavy and not INTERPRETED:
        total = max(total // 2, vector * THREADS)
    if layout is driver.TILED:
        total = max(total, 4 * vector * THREADS)  # a vector for each thread at each of the four positions
        across = _power_of_two(channels, vector, total // 4)
        down = total // 4 // across
        tiles, blocks = size, triton.cdiv(channels, across) * triton.cdiv(batch.spatial // 4, down)
        wide = 2 * event >= 2**31 - 4 * total or size >= 2**31
        return Tiling(size, event, channels, tiles, blocks, down, across, vector, layout.value, wide)
    elements = _power_of_two(event, 4, total)
    samples, vector = total // elements, min(vector, elements)
    wide = 2 * event >= 2**31 - total or size >= 2**31 - samples
    return Tiling(
        *(size, event, channels, triton.cdiv(size, samples), triton.cdiv(event, elements)),
        *(samples, elements, vector, layout.value, wide),
    )


def vector_of(tensors, least=4):
    """How many neighbours are a thread's: 128 bits of the narrowest operand, but `least` at least."""
    # sm_100 has accesses of 256 bits, but Triton 3.6 … 3.9 make none, were addresses multiples of 32. Packed pairs (fma.rn.f32x2)
    # they make there of a plain product and sum of bfloat16 operands, but none of q_sample and ddpm_step.
    # Bytes do not count: beside 16 of them a thread would have 64 bytes of a float32 result.
    return max(least, 16 // min((x.itemsize for x in tensors if x.dtype is not torch.uint8), default=4))


def flat_tile(count, tensors):
    """Elements of a tile for kernels that take `count` elements in the order of memory."""
    total = MANY if isinstance(count, torch.SymInt) or count >= MANY_ELEMENTS else vector_of(tensors) * THREADS
    return total * INTERPRETED_FACTOR if INTERPRETED else total


# The interpreter takes as long for a large tile as for a small one.
INTERPRETED_FACTOR = 8


def _power_of_two(n, low, high):
    """The next one from n on, within low … high; the highest where n is symbolic, which needs no guard."""
    if isinstance(n, torch.SymInt):
        return high
    power = low
    while power < n and power < high:
        power *= 2
    return power


def wrap_triton(kernel):
    """`torch.library.wrap_triton` where a tracer looks on; else the kernel, whose launch is then a millisecond faster."""
    return torch.library.wrap_triton(kernel) if dispatch.traced() else kernel


def launch(kernel, programs, x, *arguments, **parameters):
    """The one launch of an op, on the device and current stream of `x`. Nothing is launched for no programs."""
    if isinstance(programs, int) and programs == 0:
        return
    if dispatch.traced():  # whoever compiles the graph sets the device, and the options to their defaults
        kernel[(programs,)](*arguments, **parameters)
    else:
        with _device_of(x):
            compiled = kernel[(programs,)](*arguments, **parameters, num_warps=WARPS, enable_fp_fusion=False)
            direct.launched(kernel, compiled, programs, arguments, parameters)


def _device_of(x):
    if x.is_cpu or x.device.index == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    return torch.accelerator.device_index(x.device.index)


def empty(shape, dtype, device):
    return direct.made(torch.empty(shape, dtype=dtype, device=device))


def empty_like(x, dtype=None, factor=1, channels_last=None):
    """`dispatch.empty_like`; what an op allocates for its result, or between its launches."""
    return direct.made(dispatch.empty_like(x, dtype, factor, channels_last=channels_last))


def into(out, x, dtype, batch, launch_to):
    """Calls `launch_to` with `out`, or with a tensor of the batch's layout that is then copied to it. Refuses what is not like `x`
    but for its dtype."""
    if out.dim() != x.dim() or out.device != x.device or out.dtype != dtype:
        raise RuntimeError(f"out: expected {dtype} on {x.device} of shape {tuple(x.shape)}, got {out.dtype}, {tuple(out.shape)}")
    torch._check(out.shape == x.shape, lambda: f"out: expected shape {tuple(x.shape)}, got {tuple(out.shape)}")
    fits = dispatch.is_channels_last(out) if batch.channels_last else out.is_contiguous()
    if fits:
        launch_to(out)
    else:
        own = dispatch.empty_like(x, dtype)
        launch_to(own)
        out.copy_(own)
