"""The reverse step of DDPM, and with another table of DDIM: the formula of csrc/ddpm_step/ddpm_step.h, its kernel and the ops.

x0 = clip(P·x + Q·m),   y = U·x0 + V·x + W·m + S·z;   without clipping y = A·x + B·m + S·z

Where a network was run without its condition too, and said u, m stands for u + g·(m − u): classifier-free guidance. With a
learned variance the deviation is S·exp(L·v + M), v being the second half of the network's channels and S 0 or 1. The code's words
for the coefficients are those of the header.
"""

import triton
import triton.language as tl

from .._core import checks
from .common import op
from .common.driver import FLAT, TILED, elements_of, part_of, place_of, tile_normals
from .common.elementwise import GIVEN_NOISE, NO_NOISE, SEEDED_NOISE, column, table_row, timestep_of
from .common.host_device import negative, stored
from .common.op import wrap_triton
from .common.real_math import exp
from .q_sample import with_noise

# The table's columns, DdpmStepColumns in C++.
X0_FROM_X = tl.constexpr(0)
X0_FROM_M = tl.constexpr(1)
Y_FROM_X0 = tl.constexpr(2)
Y_FROM_X = tl.constexpr(3)
Y_FROM_X_UNCLIPPED = tl.constexpr(4)
Y_FROM_M_UNCLIPPED = tl.constexpr(5)
SIGMA = tl.constexpr(6)
SLOPE = tl.constexpr(7)
INTERCEPT = tl.constexpr(8)
Y_FROM_M = tl.constexpr(9)
COLUMNS = tl.constexpr(10)
# CLIP in the kernel
NO_CLIP = tl.constexpr(0)
CLAMP = tl.constexpr(1)
THRESHOLD = tl.constexpr(2)


@triton.jit
def guided(m, u, g):
    """What m stands for where there is a u."""
    return tl.fma(g, m - u, u)


@triton.jit
def clamp(x, bound):
    """NaN passes, as through torch.clamp."""
    x = tl.where(x < negative(bound), negative(bound), x)
    return tl.where(x > bound, bound, x)


@triton.jit
def ddpm_mean(y_from_x, x, y_from_m, m):
    """The mean of y where x0 is not clipped: A·x + B·m."""
    return tl.fma(y_from_x, x, y_from_m * m)


@triton.jit(do_not_specialize=["index", "seed", "count", "batch"])
def ddpm_step_kernel(
    out,
    x0_out,
    x,
    m,
    noise,
    rows,
    t,
    seeds,
    threshold,
    unconditional,
    clip: tl.float64,
    guidance: tl.float64,
    index: tl.int64,
    seed: tl.int64,
    count,
    batch,
    event,
    channels,
    blocks,
    HAS_T: tl.constexpr,
    NOISE: tl.constexpr,
    SEEDS: tl.constexpr,
    CLIP: tl.constexpr,
    EXACT_CLIP: tl.constexpr,
    LEARNED: tl.constexpr,
    GUIDED: tl.constexpr,
    EXACT_GUIDANCE: tl.constexpr,
    X0: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    R: tl.constexpr = rows.dtype.element_ty
    FACTOR: tl.constexpr = 2 if LEARNED else 1
    block, b, live = place_of(tl.program_id(0), blocks, batch, S, LAYOUT, WIDE)
    step = timestep_of(t, index, b, live, HAS_T)
    row, in_table = table_row(rows, step, count, COLUMNS)
    # where a kernel gets floats with 24 bits, a float64 step has them as constants of the kernel
    if CLIP == THRESHOLD:
        bound = tl.load(threshold + b, mask=live, other=1.0)
        inverse = 1.0 / bound
    elif CLIP == CLAMP:
        bound = tl.full((1, 1), clip if EXACT_CLIP is None else EXACT_CLIP, R)
    if GUIDED:
        g = tl.full((1, 1), guidance if EXACT_GUIDANCE is None else EXACT_GUIDANCE, R)
    # The row is read before anything is stored, since after a store the compiler would read it again.
    if CLIP != NO_CLIP or X0:
        x0_from_x = column(row, in_table, X0_FROM_X)
        x0_from_m = column(row, in_table, X0_FROM_M)
    if CLIP != NO_CLIP:
        y_from_x0 = column(row, in_table, Y_FROM_X0)
        y_from_x = column(row, in_table, Y_FROM_X)
        y_from_m = column(row, in_table, Y_FROM_M)
    else:
        y_from_x = column(row, in_table, Y_FROM_X_UNCLIPPED)
        y_from_m = column(row, in_table, Y_FROM_M_UNCLIPPED)
    if NOISE != NO_NOISE:
        sigma = column(row, in_table, SIGMA)
        if LEARNED:
            slope = column(row, in_table, SLOPE)
            intercept = column(row, in_table, INTERCEPT)
    if NOISE == SEEDED_NOISE:
        z0, z1, z2, z3 = tile_normals(block, b, live, step, seeds, seed, event, channels, R, SEEDS, S, E, V, LAYOUT, WIDE)
    first = b.to(tl.int64) * event
    for r in tl.static_range(4 if LAYOUT == TILED else 1):
        j, inside = elements_of(block, r, event, channels, 1, S, E, LAYOUT, WIDE)
        inside = inside & live
        x_value = tl.load(x + first + j, mask=inside).to(R)
        at = first + j
        if LEARNED:
            j_m, _ = elements_of(block, r, event, channels, FACTOR, S, E, LAYOUT, WIDE)
            at = FACTOR * first + j_m
        m_value = tl.load(m + at, mask=inside).to(R)
        if GUIDED:
            m_value = guided(m_value, tl.load(unconditional + at, mask=inside).to(R), g)
        if CLIP != NO_CLIP or X0:
            x0 = tl.fma(x0_from_x, x_value, x0_from_m * m_value)
        if CLIP != NO_CLIP:
            x0 = clamp(x0, bound)
            if CLIP == THRESHOLD:
                x0 = x0 * inverse
            # m goes the way of noise: where it has no weight it is not looked at, were it infinite or NaN
            y = with_noise(tl.fma(y_from_x0, x0, y_from_x * x_value), y_from_m, m_value)
        else:
            y = ddpm_mean(y_from_x, x_value, y_from_m, m_value)
        if NOISE != NO_NOISE:
            if NOISE == GIVEN_NOISE:
                z = tl.load(noise + first + j, mask=inside).to(R)
            else:
                z = part_of(r, z0, z1, z2, z3)
            if LEARNED:
                # v comes as many elements after m as a sample has, or where channels lie innermost, as a position has
                v = tl.load(m + at + (event if LAYOUT == FLAT else channels), mask=inside).to(R)
                z = z * exp(tl.fma(slope, v, intercept))
            y = with_noise(y, sigma, z)
        tl.store(out + first + j, stored(y, out), mask=inside)
        if X0:
            tl.store(x0_out + first + j, stored(x0, x0_out), mask=inside)


def _run(o, out, x0_out=None):
    batch, factor = op.batch_of(o.x_t), 2 if o.learned else 1
    x = op.operand(o.x_t, o.x_t, batch.channels_last)
    m = op.same(o.model_output, x, batch.channels_last, factor)
    u = None if o.unconditional is None else op.same(o.unconditional, x, batch.channels_last, factor)
    if u is not None and u.dtype != m.dtype:
        raise RuntimeError(f"unconditional: expected {m.dtype} like model_output, got {u.dtype}")
    dtype = checks.result_dtype(x, m)
    rows = op.rows_of(o.rows, o.t, o.index, COLUMNS.value, x, checks.compute_dtype(dtype))
    z = op.noise_of(o.noise, o.seeds, o.seed, x, rows.table)
    noise = rows.table if o.noise is None else op.same(o.noise, x, batch.channels_last)
    clip_kind = NO_CLIP if o.clip is None and o.threshold is None else CLAMP if o.threshold is None else THRESHOLD
    if o.threshold is not None:
        op.each_sample("threshold", o.threshold, x, rows.table.dtype)
    merge = not rows.has_t and o.threshold is None
    cut = op.tiling(batch, (x, m, noise, out), z.kind == SEEDED_NOISE.value, merge, o.learned)
    exact = op.passes_floats_as_float32() and rows.table.itemsize == 8
    numbers = (0.0 if o.clip is None or exact else o.clip, 0.0 if exact else o.guidance)

    def launch(out, x0_out):
        op.launch(
            wrap_triton(ddpm_step_kernel),
            *(cut.tiles * cut.blocks, x, out, rows.table if x0_out is None else x0_out, x, m, noise, rows.table, rows.t, z.seeds),
            *(rows.table if o.threshold is None else o.threshold, rows.table if u is None else u, *numbers),
            *(rows.index, z.seed, rows.count, cut.batch, cut.event, cut.channels, cut.blocks),
            HAS_T=rows.has_t,
            NOISE=z.kind,
            SEEDS=z.seeds_kind,
            CLIP=clip_kind.value,
            EXACT_CLIP=o.clip if exact else None,
            LEARNED=o.learned,
            GUIDED=u is not None,
            EXACT_GUIDANCE=o.guidance if exact and u is not None else None,
            X0=x0_out is not None,
            **cut.parameters,
        )

    if x0_out is None:
        op.into(out, x, dtype, batch, lambda out: launch(out, None))
    else:
        op.into(out, x, dtype, batch, lambda out: op.into(x0_out, x, dtype, batch, lambda x0_out: launch(out, x0_out)))


def _empty(o):
    return op.empty_like(o.x_t, checks.result_dtype(o.x_t, o.model_output))


def ddpm_step(o):
    out = _empty(o)
    _run(o, out)
    return out


def ddpm_step_x0(o):
    out, x0 = _empty(o), _empty(o)
    _run(o, out, x0)
    return out, x0


def ddpm_step_out(o, x0, out):
    _run(o, out, x0)
