"""The log-probability of a reverse step, and what it contributes to the weight of a trajectory: the formulas of
csrc/step_log_prob/step_log_prob.h, the kernels and the ops."""

import torch
import triton
import triton.language as tl

from .._core import checks
from .common import op
from .common.driver import FLAT, TILED, elements_of, noise_of_elements, place_of, tile_normals
from .common.elementwise import NO_NOISE, SEEDED_NOISE, column, table_row, timestep_of
from .common.host_device import negative, product, splat, stored
from .common.op import wrap_triton
from .common.real_math import exp, log_positive
from .common.sum import few_of_rows, finish, place_of_totals, sums_for, totals_of
from .ddpm_step import (
    COLUMNS,
    INTERCEPT,
    SIGMA,
    SLOPE,
    X0_FROM_M,
    X0_FROM_X,
    Y_FROM_M,
    Y_FROM_M_UNCLIPPED,
    Y_FROM_X,
    Y_FROM_X0,
    Y_FROM_X_UNCLIPPED,
    clamp,
    ddpm_mean,
    guided,
)
from .q_sample import with_noise

HALF_LOG_TWO_PI = tl.constexpr(0.91893853320467274178)
# Of the weights: a table whose 1/σ is in the place of σ, and whose intercept is that of log(σ/√β), with three columns more.
INVERSE_SIGMA = SIGMA
FORWARD_SCALE = tl.constexpr(COLUMNS.value)
FORWARD_INVERSE_SIGMA = tl.constexpr(COLUMNS.value + 1)
PRIOR = tl.constexpr(COLUMNS.value + 2)
WEIGHT_COLUMNS = tl.constexpr(COLUMNS.value + 3)


@triton.jit
def deviation(row, in_table, LEARNED: tl.constexpr):
    """1/σ, and log σ or what it is with v = 0; NaN where the step takes no noise."""
    sigma = column(row, in_table, SIGMA)
    if sigma.dtype == tl.float64:
        noisy = sigma >= splat(2.2250738585072014e-308, sigma)
    else:
        noisy = sigma >= splat(1.17549435e-38, sigma)
    if LEARNED:
        log_sigma = column(row, in_table, INTERCEPT)
    else:
        log_sigma = log_positive(sigma)
    inverse = splat(1.0, sigma) / tl.where(noisy, sigma, splat(1.0, sigma))
    return tl.where(noisy, inverse, float("nan")), tl.where(noisy, log_sigma, float("nan"))


@triton.jit
def step_mean(x, m, row, in_table, bound, CLIPPED: tl.constexpr):
    """μ, and whether its derivative goes through x0."""
    if CLIPPED:
        found = tl.fma(column(row, in_table, X0_FROM_X), x, product(column(row, in_table, X0_FROM_M), m))
        x0 = clamp(found, bound)
        y = tl.fma(column(row, in_table, Y_FROM_X0), x0, product(column(row, in_table, Y_FROM_X), x))
        # m goes the way of noise: where it has no weight it is not looked at, were it infinite or NaN
        return with_noise(y, column(row, in_table, Y_FROM_M), m), tl.where(x0 == found, 1.0, 0.0).to(found.dtype)
    else:
        y = ddpm_mean(column(row, in_table, Y_FROM_X_UNCLIPPED), x, column(row, in_table, Y_FROM_M_UNCLIPPED), m)
        return y, tl.full((1, 1), 1.0, y.dtype)


@triton.jit
def log_prob(d, v, slope, inverse_sigma, log_sigma, LEARNED: tl.constexpr):
    """The log-probability of d = x_{t−1} − μ, u and 1/σ."""
    if LEARNED:
        log_sigma = tl.fma(slope, v, log_sigma)
        inverse_sigma = exp(negative(log_sigma))
    u = product(d, inverse_sigma)
    return negative(tl.fma(splat(0.5, u) * u, u, log_sigma + splat(HALF_LOG_TWO_PI, u))), u, inverse_sigma


@triton.jit
def step_log_weight_of(x_prev, x, m, v, row, in_table, bound, CLIPPED: tl.constexpr, LEARNED: tl.constexpr):
    """What an element contributes to the logarithm of its trajectory's weight."""
    forward_inverse_sigma = column(row, in_table, FORWARD_INVERSE_SIGMA)
    log_ratio = column(row, in_table, INTERCEPT)
    if LEARNED:
        log_ratio = tl.fma(column(row, in_table, SLOPE), v, log_ratio)
        inverse_sigma = product(exp(negative(log_ratio)), forward_inverse_sigma)
    else:
        inverse_sigma = column(row, in_table, INVERSE_SIGMA)
    mean, _ = step_mean(x, m, row, in_table, bound, CLIPPED)
    u = product(x_prev - mean, inverse_sigma)
    w = product(tl.fma(negative(column(row, in_table, FORWARD_SCALE)), x_prev, x), forward_inverse_sigma)
    prior = product(column(row, in_table, PRIOR), tl.fma(splat(0.5, x) * x, x, splat(HALF_LOG_TWO_PI, x)))
    return tl.fma(splat(0.5, u) * (w - u), w + u, negative(log_ratio + prior))


@triton.jit
def bound_of(clip, EXACT_CLIP: tl.constexpr, R: tl.constexpr):
    return tl.full((1, 1), clip if EXACT_CLIP is None else EXACT_CLIP, R)


@triton.jit
def second_half(at, event, channels, LAYOUT: tl.constexpr):
    """v comes as many elements after m as a sample has, or where channels lie innermost, as a position has."""
    return at + (event if LAYOUT == FLAT else channels)


@triton.jit(do_not_specialize=["index", "count", "batch", "chunks"])
def step_log_prob_kernel(
    result,
    x_prev,
    x,
    m,
    rows,
    t,
    clip: tl.float64,
    scale: tl.float64,
    index: tl.int64,
    count,
    batch,
    event,
    channels,
    blocks,
    chunks,
    EXACT_CLIP: tl.constexpr,
    EXACT_SCALE: tl.constexpr,
    CLIPPED: tl.constexpr,
    LEARNED: tl.constexpr,
    HAS_T: tl.constexpr,
    WEIGHS: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """result: a sum for each chunk of each sample's work, times `scale`; WEIGHS: of the weights, with their table."""
    R: tl.constexpr = rows.dtype.element_ty
    W: tl.constexpr = V if V <= E else E
    FACTOR: tl.constexpr = 2 if LEARNED else 1
    tile = tl.program_id(0) // chunks
    chunk = tl.program_id(0) - tile * chunks
    sums = tl.zeros((S, E // W), tl.float64)
    for k in range(tile * blocks + chunk, (tile + 1) * blocks, chunks):
        block, b, live = place_of(k, blocks, batch, S, LAYOUT, WIDE)
        row, in_table = table_row(rows, timestep_of(t, index, b, live, HAS_T), count, WEIGHT_COLUMNS if WEIGHS else COLUMNS)
        if not WEIGHS:
            inverse_sigma, log_sigma = deviation(row, in_table, LEARNED)
            slope = column(row, in_table, SLOPE)
        values = tl.zeros((S, E), R)
        first = b.to(tl.int64) * event
        for r in tl.static_range(4 if LAYOUT == TILED else 1):
            j, inside = elements_of(block, r, event, channels, 1, S, E, LAYOUT, WIDE)
            inside = inside & live
            j_m, _ = elements_of(block, r, event, channels, FACTOR, S, E, LAYOUT, WIDE)
            at = FACTOR * first + j_m
            x_value = tl.load(x + first + j, mask=inside, other=0.0).to(R)
            m_value = tl.load(m + at, mask=inside, other=0.0).to(R)
            v = m_value
            if LEARNED:
                v = tl.load(m + second_half(at, event, channels, LAYOUT), mask=inside, other=0.0).to(R)
            x_prev_value = tl.load(x_prev + first + j, mask=inside, other=0.0).to(R)
            bound = bound_of(clip, EXACT_CLIP, R)
            if WEIGHS:
                value = step_log_weight_of(x_prev_value, x_value, m_value, v, row, in_table, bound, CLIPPED, LEARNED)
            else:
                mean, _ = step_mean(x_value, m_value, row, in_table, bound, CLIPPED)
                value, _, _ = log_prob(x_prev_value - mean, v, slope, inverse_sigma, log_sigma, LEARNED)
            values += tl.where(inside, value, 0.0)
        sums += few_of_rows(values, W)
    by = tl.full((1,), scale if EXACT_SCALE is None else EXACT_SCALE, tl.float64)
    at_own, is_own = place_of_totals(chunks, batch, S, LAYOUT != TILED)
    tl.store(result + at_own, stored(totals_of(sums, LAYOUT != TILED) * by, result), mask=is_own)


@triton.jit(do_not_specialize=["index", "seed", "count", "batch", "chunks"])
def ddpm_step_log_prob_kernel(
    result,
    out,
    x,
    m,
    unconditional,
    noise,
    rows,
    t,
    seeds,
    clip: tl.float64,
    guidance: tl.float64,
    scale: tl.float64,
    index: tl.int64,
    seed: tl.int64,
    count,
    batch,
    event,
    channels,
    blocks,
    chunks,
    EXACT_CLIP: tl.constexpr,
    EXACT_GUIDANCE: tl.constexpr,
    EXACT_SCALE: tl.constexpr,
    CLIPPED: tl.constexpr,
    LEARNED: tl.constexpr,
    GUIDED: tl.constexpr,
    HAS_T: tl.constexpr,
    NOISE: tl.constexpr,
    SEEDS: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out: x_{t−1}; result: of what is stored of it, as in `step_log_prob_kernel`."""
    R: tl.constexpr = rows.dtype.element_ty
    W: tl.constexpr = V if V <= E else E
    FACTOR: tl.constexpr = 2 if LEARNED else 1
    tile = tl.program_id(0) // chunks
    chunk = tl.program_id(0) - tile * chunks
    sums = tl.zeros((S, E // W), tl.float64)
    for k in range(tile * blocks + chunk, (tile + 1) * blocks, chunks):
        block, b, live = place_of(k, blocks, batch, S, LAYOUT, WIDE)
        step = timestep_of(t, index, b, live, HAS_T)
        row, in_table = table_row(rows, step, count, COLUMNS)
        z0, z1, z2, z3 = None, None, None, None
        if NOISE == SEEDED_NOISE:
            z0, z1, z2, z3 = tile_normals(block, b, live, step, seeds, seed, event, channels, R, SEEDS, S, E, V, LAYOUT, WIDE)
        # After the normals, whose ten rounds need the registers: before them, two of these were spilled on sm_100.
        inverse_sigma, log_sigma = deviation(row, in_table, LEARNED)
        slope = column(row, in_table, SLOPE)
        sigma = column(row, in_table, SIGMA)
        values = tl.zeros((S, E), R)
        first = b.to(tl.int64) * event
        for r in tl.static_range(4 if LAYOUT == TILED else 1):
            j, inside = elements_of(block, r, event, channels, 1, S, E, LAYOUT, WIDE)
            inside = inside & live
            j_m, _ = elements_of(block, r, event, channels, FACTOR, S, E, LAYOUT, WIDE)
            at = FACTOR * first + j_m
            x_value = tl.load(x + first + j, mask=inside, other=0.0).to(R)
            m_value = tl.load(m + at, mask=inside, other=0.0).to(R)
            v = m_value
            if LEARNED:
                v = tl.load(m + second_half(at, event, channels, LAYOUT), mask=inside, other=0.0).to(R)
            if GUIDED:
                g = tl.full((1, 1), guidance if EXACT_GUIDANCE is None else EXACT_GUIDANCE, R)
                m_value = guided(m_value, tl.load(unconditional + at, mask=inside, other=0.0).to(R), g)
            mean, _ = step_mean(x_value, m_value, row, in_table, bound_of(clip, EXACT_CLIP, R), CLIPPED)
            z = noise_of_elements(noise, first + j, inside, r, z0, z1, z2, z3, x_value, NOISE)
            if LEARNED:
                z = product(z, exp(tl.fma(slope, v, column(row, in_table, INTERCEPT))))
            kept = stored(with_noise(mean, sigma, z), out)
            tl.store(out + first + j, kept, mask=inside)
            value, _, _ = log_prob(kept.to(R) - mean, v, slope, inverse_sigma, log_sigma, LEARNED)
            values += tl.where(inside, value, 0.0)
        sums += few_of_rows(values, W)
    by = tl.full((1,), scale if EXACT_SCALE is None else EXACT_SCALE, tl.float64)
    at_own, is_own = place_of_totals(chunks, batch, S, LAYOUT != TILED)
    tl.store(result + at_own, stored(totals_of(sums, LAYOUT != TILED) * by, result), mask=is_own)


@triton.jit(do_not_specialize=["index", "count", "batch"])
def step_log_prob_backward_kernel(
    to_m,
    to_x,
    gradient,
    x_prev,
    x,
    m,
    rows,
    t,
    clip: tl.float64,
    scale: tl.float64,
    index: tl.int64,
    count,
    batch,
    event,
    channels,
    blocks,
    EXACT_CLIP: tl.constexpr,
    EXACT_SCALE: tl.constexpr,
    CLIPPED: tl.constexpr,
    LEARNED: tl.constexpr,
    HAS_T: tl.constexpr,
    TO_X: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    R: tl.constexpr = rows.dtype.element_ty
    FACTOR: tl.constexpr = 2 if LEARNED else 1
    block, b, live = place_of(tl.program_id(0), blocks, batch, S, LAYOUT, WIDE)
    row, in_table = table_row(rows, timestep_of(t, index, b, live, HAS_T), count, COLUMNS)
    inverse_sigma, log_sigma = deviation(row, in_table, LEARNED)
    slope = column(row, in_table, SLOPE)
    upstream = tl.load(gradient + b, mask=live, other=0.0) * tl.full((1, 1), scale if EXACT_SCALE is None else EXACT_SCALE, R)
    # The row is read before anything is stored, since after a store the compiler would read it again.
    if CLIPPED:
        from_x = column(row, in_table, Y_FROM_X)
        from_m = column(row, in_table, Y_FROM_M)
        from_x0 = column(row, in_table, Y_FROM_X0)
        x0_from_x = column(row, in_table, X0_FROM_X)
        x0_from_m = column(row, in_table, X0_FROM_M)
    else:
        from_x = column(row, in_table, Y_FROM_X_UNCLIPPED)
        from_m = column(row, in_table, Y_FROM_M_UNCLIPPED)
    first = b.to(tl.int64) * event
    for r in tl.static_range(4 if LAYOUT == TILED else 1):
        j, inside = elements_of(block, r, event, channels, 1, S, E, LAYOUT, WIDE)
        inside = inside & live
        j_m, _ = elements_of(block, r, event, channels, FACTOR, S, E, LAYOUT, WIDE)
        at = FACTOR * first + j_m
        second = second_half(at, event, channels, LAYOUT)
        x_value = tl.load(x + first + j, mask=inside, other=0.0).to(R)
        m_value = tl.load(m + at, mask=inside, other=0.0).to(R)
        v = m_value
        if LEARNED:
            v = tl.load(m + second, mask=inside, other=0.0).to(R)
        mean, reaches = step_mean(x_value, m_value, row, in_table, bound_of(clip, EXACT_CLIP, R), CLIPPED)
        d = tl.load(x_prev + first + j, mask=inside, other=0.0).to(R) - mean
        _, u, inverse = log_prob(d, v, slope, inverse_sigma, log_sigma, LEARNED)
        by_mean = upstream * u * inverse
        if CLIPPED:
            by_x0 = from_x0 * reaches
            by_m = by_mean * tl.fma(by_x0, x0_from_m, from_m)
            by_x = by_mean * tl.fma(by_x0, x0_from_x, from_x)
        else:
            by_m = by_mean * from_m
            by_x = by_mean * from_x
        tl.store(to_m + at, stored(by_m, to_m), mask=inside)
        if LEARNED:
            by_v = upstream * tl.fma(u, u, splat(-1.0, u)) * slope
            tl.store(to_m + second, stored(by_v, to_m), mask=inside)
        if TO_X:
            tl.store(to_x + first + j, stored(by_x, to_x), mask=inside)


class _Call:
    """What both directions make of their arguments."""

    def __init__(self, outputs, x_prev, o, columns=COLUMNS):
        batch = op.batch_of(o.x_t)
        x = self.x = op.operand(o.x_t, o.x_t, batch.channels_last)
        m = op.same(o.model_output, x, batch.channels_last, 2 if o.learned else 1)
        x_prev = op.same(x_prev, x, batch.channels_last)
        dtype = checks.compute_dtype(checks.result_dtype(x, m))
        rows = op.rows_of(o.rows, o.t, o.index, columns.value, x, torch.promote_types(dtype, x_prev.dtype))
        exact = op.passes_floats_as_float32() and rows.table.itemsize == 8
        self.cut = op.tiling(batch, (x, m, x_prev, *outputs), False, False, o.learned)
        self.dtype, self.table = rows.table.dtype, rows.table
        self.pointers = (x_prev, x, m, rows.table, rows.t)
        self.numbers = (0.0 if o.clip is None or exact else o.clip, 0.0 if exact else o.scale, rows.index, rows.count)
        self.flags = {
            "EXACT_CLIP": o.clip if exact else None,
            "EXACT_SCALE": o.scale if exact else None,
            "CLIPPED": o.clip is not None,
            "LEARNED": o.learned,
            "HAS_T": rows.has_t,
            **self.cut.parameters,
        }


def step_log_prob(x_prev, o):
    return _sums(_Call((), x_prev, o), o, False)


def step_log_weight(x_prev, o):
    return _sums(_Call((), x_prev, o, WEIGHT_COLUMNS), o, True)


def _sums(call, o, weighs):
    cut = call.cut
    result = op.empty(o.x_t.shape[:1], call.dtype, o.x_t.device)
    sums = sums_for(result, cut.tiles, cut.blocks)
    op.launch(
        wrap_triton(step_log_prob_kernel),
        *(sums.programs, call.x, sums.to, *call.pointers, *call.numbers),
        *(cut.batch, cut.event, cut.channels, cut.blocks, sums.chunks),
        WEIGHS=weighs,
        **call.flags,
    )
    if sums.to is not result:
        finish(result, sums, 1)
    return result


def _backward(gradient, x_prev, o, to_x):
    to_m = op.empty_like(o.x_t, o.model_output.dtype, 2 if o.learned else 1)
    call = _Call((to_m,) if to_x is None else (to_m, to_x), x_prev, o)
    cut = call.cut
    gradient = op.plain(gradient).contiguous()
    op.each_sample("gradient", gradient, o.x_t, call.dtype)
    op.launch(
        wrap_triton(step_log_prob_backward_kernel),
        *(cut.tiles * cut.blocks, call.x, to_m, call.table if to_x is None else to_x, gradient, *call.pointers, *call.numbers),
        *(cut.batch, cut.event, cut.channels, cut.blocks),
        TO_X=to_x is not None,
        **call.flags,
    )
    return to_m


def step_log_prob_backward(gradient, x_prev, o):
    return _backward(gradient, x_prev, o, None)


def step_log_prob_backward_x(gradient, x_prev, o):
    to_x = op.empty_like(o.x_t)
    return _backward(gradient, x_prev, o, to_x), to_x


def _step(o, noise, seeds, seed, unconditional, guidance, out):
    """x_{t−1} into `out`; the log-probabilities."""
    batch, factor = op.batch_of(o.x_t), 2 if o.learned else 1
    x = op.operand(o.x_t, o.x_t, batch.channels_last)
    m = op.same(o.model_output, x, batch.channels_last, factor)
    u = None if unconditional is None else op.same(unconditional, x, batch.channels_last, factor)
    if u is not None and u.dtype != m.dtype:
        raise RuntimeError(f"unconditional: expected {m.dtype} like model_output, got {u.dtype}")
    dtype = checks.result_dtype(x, m)
    rows = op.rows_of(o.rows, o.t, o.index, COLUMNS.value, x, checks.compute_dtype(dtype))
    z = op.noise_of(noise, seeds, seed, x, rows.table)
    if z.kind == NO_NOISE.value:
        raise RuntimeError("noise, seed: expected one of them")
    given = rows.table if noise is None else op.same(noise, x, batch.channels_last)
    cut = op.tiling(batch, (x, m, given, out), z.kind == SEEDED_NOISE.value, False, o.learned)
    result = op.empty(o.x_t.shape[:1], rows.table.dtype, o.x_t.device)
    sums = sums_for(result, cut.tiles, cut.blocks)
    exact = op.passes_floats_as_float32() and rows.table.itemsize == 8

    def launch(out):
        op.launch(
            wrap_triton(ddpm_step_log_prob_kernel),
            *(sums.programs, x, sums.to, out, x, m, rows.table if u is None else u, given, rows.table, rows.t, z.seeds),
            *(0.0 if o.clip is None or exact else o.clip, 0.0 if exact else guidance, 0.0 if exact else o.scale),
            *(rows.index, z.seed, rows.count, cut.batch, cut.event, cut.channels, cut.blocks, sums.chunks),
            EXACT_CLIP=o.clip if exact else None,
            EXACT_GUIDANCE=guidance if exact and u is not None else None,
            EXACT_SCALE=o.scale if exact else None,
            CLIPPED=o.clip is not None,
            LEARNED=o.learned,
            GUIDED=u is not None,
            HAS_T=rows.has_t,
            NOISE=z.kind,
            SEEDS=z.seeds_kind,
            **cut.parameters,
        )

    op.into(out, x, dtype, batch, launch)
    if sums.to is not result:
        finish(result, sums, 1)
    return result


def ddpm_step_log_prob(o, *rest):
    out = op.empty_like(o.x_t, checks.result_dtype(o.x_t, o.model_output))
    return out, _step(o, *rest, out)


def ddpm_step_log_prob_out(o, *rest):
    return _step(o, *rest)
