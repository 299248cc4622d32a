"""q(x_t | x_0) and q(x_t | x_{t−1}): the formula of csrc/q_sample/q_sample.h, its kernel and the ops."""

import torch
import triton
import triton.language as tl

from .._core import checks
from .._ops.q_sample import result_dtype
from .common import op
from .common.bytes import real_of
from .common.driver import TILED, elements_of, part_of, place_of, tile_normals
from .common.elementwise import GIVEN_NOISE, SEEDED_NOISE, column, table_row, timestep_of, wide
from .common.host_device import stored
from .common.op import wrap_triton

# The table's columns, QSampleColumns in C++.
SCALE = tl.constexpr(0)
SIGMA = tl.constexpr(1)
COLUMNS = tl.constexpr(2)


@triton.jit
def q_sample_formula(scale, x):
    return scale * x


@triton.jit
def add_noise(y, sigma, z):
    return tl.fma(sigma, z, y)


@triton.jit
def with_noise(y, sigma, z):
    """The same; where sigma is 0 the noise is not looked at, were it infinite or NaN."""
    return tl.where(sigma == 0.0, y, add_noise(y, sigma, z))


@triton.jit(do_not_specialize=["index", "seed", "offset", "count", "batch"])
def q_sample_kernel(
    out,
    x,
    noise,
    rows,
    t,
    seeds,
    index: tl.int64,
    seed: tl.int64,
    offset: tl.int64,
    count,
    batch,
    event,
    channels,
    blocks,
    HAS_T: tl.constexpr,
    NOISE: tl.constexpr,
    SEEDS: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    R: tl.constexpr = rows.dtype.element_ty
    block, b, live = place_of(tl.program_id(0), blocks, batch, S, LAYOUT, WIDE)
    row, in_table = table_row(rows, timestep_of(t, index, b, live, HAS_T), count, COLUMNS)
    scale = column(row, in_table, SCALE)
    sigma = column(row, in_table, SIGMA)
    if NOISE == SEEDED_NOISE:
        z0, z1, z2, z3 = tile_normals(block, b, live, wide(offset), seeds, seed, event, channels, R, SEEDS, S, E, V, LAYOUT, WIDE)
    first = b.to(tl.int64) * event
    for r in tl.static_range(4 if LAYOUT == TILED else 1):
        j, inside = elements_of(block, r, event, channels, 1, S, E, LAYOUT, WIDE)
        inside = inside & live
        y = q_sample_formula(scale, real_of(tl.load(x + first + j, mask=inside), R))
        if NOISE == GIVEN_NOISE:
            y = with_noise(y, sigma, tl.load(noise + first + j, mask=inside).to(R))
        elif NOISE == SEEDED_NOISE:
            y = with_noise(y, sigma, part_of(r, z0, z1, z2, z3))
        tl.store(out + first + j, stored(y, out), mask=inside)


def _run(o, out, dtype):
    batch = op.batch_of(o.x)
    x = op.operand(o.x, o.x, batch.channels_last)
    rows = op.rows_of(o.rows, o.t, o.index, COLUMNS.value, x, checks.compute_dtype(dtype))
    z = op.noise_of(o.noise, o.seeds, o.seed, x, rows.table)
    noise = rows.table if o.noise is None else op.same(o.noise, x, batch.channels_last)
    cut = op.tiling(batch, (x, noise, out), z.kind == SEEDED_NOISE.value, not rows.has_t)

    def launch(out):
        op.launch(
            wrap_triton(q_sample_kernel),
            *(cut.tiles * cut.blocks, x, out, x, noise, rows.table, rows.t, z.seeds, rows.index, z.seed, o.offset),
            *(rows.count, cut.batch, cut.event, cut.channels, cut.blocks),
            HAS_T=rows.has_t,
            NOISE=z.kind,
            SEEDS=z.seeds_kind,
            **cut.parameters,
        )

    op.into(out, x, dtype, batch, launch)
    return out


def q_sample(o):
    dtype = result_dtype(o)
    return _run(o, op.empty_like(o.x, dtype), dtype)


def q_sample_out(o, out):
    _run(o, out, out.dtype if o.x.dtype is torch.uint8 else o.x.dtype)
