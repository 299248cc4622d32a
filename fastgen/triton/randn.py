"""z itself: the contract's normals with nothing done to them; or torch's own on a CUDA GPU, the formula of csrc/randn/randn.h."""

import math

import triton
import triton.language as tl

from .._core.torch_cuda import BLOCK, launched
from .common import op
from .common.driver import elements_of, place_of, side_by_side, tile_normals
from .common.elementwise import SEED_OF_EACH_SAMPLE, seed_of, wide
from .common.host_device import bits, splat, stored
from .common.normal import sincos_within_eighth, turn_by_quarters
from .common.op import wrap_triton
from .common.philox import philox4x32
from .common.real_math import log_positive


@triton.jit(do_not_specialize=["seed", "offset", "batch"])
def randn_kernel(
    out,
    seeds,
    seed: tl.int64,
    offset: tl.int64,
    batch,
    event,
    blocks,
    R: tl.constexpr,
    SEEDS: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    block, b, live = place_of(tl.program_id(0), blocks, batch, S, LAYOUT, WIDE)
    z = tile_normals(block, b, live, wide(offset), seeds, seed, event, 1, R, SEEDS, S, E, V, LAYOUT, WIDE)
    j, inside = elements_of(block, 0, event, 1, 1, S, E, LAYOUT, WIDE)
    tl.store(out + b.to(tl.int64) * event + j, stored(z[0], out), mask=inside & live)


def randn(out, o):
    batch = op.batch_of(out)
    z = op.noise_of(None, o.seeds, o.seed, out)
    if batch.channels_last or not out.is_contiguous() or z.kind == op.elementwise.NO_NOISE.value:
        raise RuntimeError("expected a contiguous out, and a seed")
    cut = op.tiling(batch, (out,), seeded=True, merge=False)
    op.launch(
        wrap_triton(randn_kernel),
        *(cut.tiles * cut.blocks, out, out, z.seeds, z.seed, o.offset, cut.batch, cut.event, cut.blocks),
        R=op.arithmetic_of(out),
        SEEDS=z.seeds_kind,
        **cut.parameters,
    )


# ---- torch's numbers on a CUDA GPU ----------------------------------------------------------------------------------------


@triton.jit
def rounded_quarters(angle, quarters_of: tl.constexpr, rounder: tl.constexpr):
    """How many quarter turns there are in an angle, quarters_of to a unit: as a number, and in bits 31 and 30."""
    shifted = tl.fma(angle, splat(quarters_of, angle), splat(rounder, angle))
    return shifted - splat(rounder, angle), bits(shifted).to(tl.uint32) << 30


@triton.jit
def sincos_radians(angle):
    """sin and cos of an angle within 0 … 2π, of float32."""
    quarters, turns = rounded_quarters(angle, 0.63661977236758134308, 12582912.0)  # 2/π
    rest = tl.fma(quarters, splat(-1.5703125, angle), angle)
    rest = tl.fma(quarters, splat(-4.837512969970703125e-4, angle), rest)
    rest = tl.fma(quarters, splat(-7.54978995489188216e-8, angle), rest)
    s, c = sincos_within_eighth(rest)
    return turn_by_quarters(turns, s, c)


@triton.jit
def sincos_half_turns(angle):
    """sin and cos of π·angle for an angle within 0 … 2, of float64."""
    quarters, turns = rounded_quarters(angle, 2.0, 6755399441055744.0)
    rest = tl.fma(quarters, splat(-0.5, angle), angle)
    s, c = sincos_within_eighth(rest * splat(3.14159265358979323846, angle))
    return turn_by_quarters(turns, s, c)


@triton.jit
def curand_box_muller(a, b):
    """Box–Muller as cuRAND has it, of 32 bits each. The sine and cosine are more exact than a GPU's own, which cuRAND takes."""
    u = tl.fma(a.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)  # 2⁻³², 2⁻³³
    angle = tl.fma(b.to(tl.float32), 1.4629181016789677e-09, 7.314590508394838e-10)  # the float 2π, times 2⁻³² and 2⁻³³
    log_u = log_positive(u)
    radius = tl.sqrt(log_u * splat(-2.0, log_u))
    sine, cosine = sincos_radians(angle)
    return sine * radius, cosine * radius


@triton.jit
def curand_double(low, high, scale: tl.constexpr):
    """The 53 bits of two words as (x + ½)·scale."""
    x = (low.to(tl.uint64) ^ (high.to(tl.uint64) << 21)).to(tl.int64).to(tl.float64)
    return tl.fma(x, tl.full((), scale, tl.float64), tl.full((), scale / 2, tl.float64))


@triton.jit
def curand_box_muller_double(r0, r1, r2, r3):
    log_u = log_positive(curand_double(r0, r1, 2.0**-53))
    radius = tl.sqrt(log_u * splat(-2.0, log_u))
    sine, cosine = sincos_half_turns(curand_double(r2, r3, 2.0**-52))
    return sine * radius, cosine * radius


@triton.jit
def curand_normals(counter, thread, seed, DOUBLE: tl.constexpr):
    """The numbers of one turn of some of torch's threads: four, or two and those once more."""
    zero = tl.zeros_like(thread).to(tl.uint32)
    low, high = counter.to(tl.uint32) + zero, (counter >> 32).to(tl.uint32) + zero
    k0, k1 = seed.to(tl.uint32) + zero, (seed >> 32).to(tl.uint32) + zero
    r0, r1, r2, r3 = philox4x32(low, high, thread.to(tl.uint32), zero, k0, k1)
    if DOUBLE:
        z0, z1 = curand_box_muller_double(r0, r1, r2, r3)
        return z0, z1, z0, z1
    else:
        z0, z1 = curand_box_muller(r0, r1)
        z2, z3 = curand_box_muller(r2, r3)
        return z0, z1, z2, z3


@triton.jit(do_not_specialize=["seed", "offset"])
def randn_torch_cuda_kernel(
    out,
    seeds,
    seed: tl.int64,
    offset: tl.int64,
    event,
    threads,
    turns,
    SEEDS: tl.constexpr,
    E: tl.constexpr,
):
    """A program does what E of torch's threads do in one turn, four neighbours at a time: so no number has to change threads."""
    DOUBLE: tl.constexpr = out.dtype.element_ty == tl.float64
    piece, columns = tl.program_id(0), tl.cdiv(threads, E)
    turn_of_any = piece // columns
    column = piece - turn_of_any * columns
    sample = turn_of_any // turns
    turn = (turn_of_any - sample * turns).to(tl.int64)
    seed = seed_of(seeds, seed, sample + tl.zeros((1, 1), tl.int32), True, SEEDS)
    counter = (wide(offset) >> 2) + turn
    first = column * E + 4 * tl.arange(0, E // 4)[None, :]
    n0 = curand_normals(counter, first, seed, DOUBLE)
    n1 = curand_normals(counter, first + 1, seed, DOUBLE)
    n2 = curand_normals(counter, first + 2, seed, DOUBLE)
    n3 = curand_normals(counter, first + 3, seed, DOUBLE)
    thread = column * E + tl.arange(0, E)[None, :]
    numbers: tl.constexpr = 2 if DOUBLE else 4
    wide_threads, wide_event = tl.full((), threads, tl.int64), tl.full((), event, tl.int64)
    begin = turn * numbers * wide_threads
    to = out + sample.to(tl.int64) * wide_event + begin
    for k in tl.static_range(numbers):
        row = k * wide_threads
        z = side_by_side(n0[k], n1[k], n2[k], n3[k], 1, E)
        tl.store(to + row + thread, stored(z, out), mask=(thread < threads) & (thread < wide_event - begin - row))


def randn_torch_cuda(out, o, threads):
    if not out.is_contiguous() or (o.seeds is None and o.seed is None) or o.offset % 4 or threads % BLOCK:
        raise RuntimeError(f"expected a contiguous out, a seed, an offset that 4 divides and threads that {BLOCK} divides")
    z = op.noise_of(None, o.seeds, o.seed, out)
    each = z.seeds_kind == SEED_OF_EACH_SAMPLE.value
    samples, event = (out.shape[0], math.prod(out.shape[1:])) if each else (1, out.numel())
    launch, turns = launched(event, threads, out.dtype)
    # four or eight elements of a row for each thread, AMD's wide warps included: 128 bits of float32, since T is a multiple of 256,
    # where an event is one of 4
    tile = 8 * op.THREADS * (op.INTERPRETED_FACTOR if op.INTERPRETED else 1)
    op.launch(
        wrap_triton(randn_torch_cuda_kernel),
        *(samples * turns * triton.cdiv(launch, tile), out, out, z.seeds, z.seed, o.offset, event, launch, turns),
        SEEDS=z.seeds_kind,
        E=tile,
    )
