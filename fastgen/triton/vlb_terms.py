"""The terms of the variational bound: the formulas of csrc/vlb_terms/vlb_terms.h, the kernels and the ops."""

import triton
import triton.language as tl

from .._core import checks
from .common import op
from .common.bytes import real_of
from .common.driver import FLAT, TILED, elements_of, noise_of_elements, place_of, tile_normals
from .common.elementwise import GIVEN_NOISE, NO_NOISE, SEEDED_NOISE, column, table_row, timestep_of, wide
from .common.host_device import negative, product, splat, stored
from .common.log_bin import approximate_log_bin, log_bin
from .common.op import wrap_triton
from .common.real_math import exp, exp_and_excess
from .common.sum import few_of_rows, finish, place_of_totals, sums_for, totals_of
from .diffusion_loss import less, loss_of, loss_slope
from .q_sample import q_sample_formula, with_noise

# The table's columns, VlbTermsColumns in C++.
SCALE = tl.constexpr(0)
SIGMA = tl.constexpr(1)
X0_FROM_X = tl.constexpr(2)
X0_FROM_M = tl.constexpr(3)
MEAN_FROM_X0 = tl.constexpr(4)
LOG_POSTERIOR_VARIANCE = tl.constexpr(5)
SLOPE = tl.constexpr(6)
INTERCEPT = tl.constexpr(7)
CONSTANT = tl.constexpr(8)
PRECISION = tl.constexpr(9)
DECODER = tl.constexpr(10)
TARGET_FROM_X0 = tl.constexpr(11)
TARGET_FROM_NOISE = tl.constexpr(12)
LOSS_WEIGHT = tl.constexpr(13)
COLUMNS = tl.constexpr(14)
# DECODER_KIND in the kernels
DISCRETIZED = tl.constexpr(0)
GAUSSIAN = tl.constexpr(1)
CLAMPED_AT_12 = tl.constexpr(2)
# LOSS where there is no simple loss
NO_LOSS = tl.constexpr(-1)

LOG_TWO_PI = tl.constexpr(1.83787706640934548356)


@triton.jit
def term(
    x0,
    m,
    v,
    x_t,
    row,
    in_table,
    bound,
    CLIPPED: tl.constexpr,
    LEARNED: tl.constexpr,
    DECODER_KIND: tl.constexpr,
):
    """The term of each element, its derivatives by the distance of the means and by log σ², and whether the former reaches m."""
    mean_from_x0 = column(row, in_table, MEAN_FROM_X0)
    decoder = column(row, in_table, DECODER)
    intercept = column(row, in_table, INTERCEPT)
    found = tl.fma(column(row, in_table, X0_FROM_X), x_t, product(column(row, in_table, X0_FROM_M), m))
    reaches = tl.full((1, 1), 1.0, found.dtype)
    if CLIPPED:
        clamped = tl.where(found < negative(bound), negative(bound), tl.where(found > bound, bound, found))
        reaches = tl.where(clamped == found, 1.0, 0.0).to(found.dtype)
        found = clamped
    d = mean_from_x0 * (x0 - found)
    half = splat(0.5, d)
    if LEARNED:
        log_variance = tl.fma(column(row, in_table, SLOPE), v, intercept)
        ratio, excess = exp_and_excess(column(row, in_table, LOG_POSTERIOR_VARIANCE) - log_variance)  # e^{−r}
        precision = ratio * column(row, in_table, PRECISION)
        square = product(d * d, precision)
        value = product(half, excess + square)
        by_log_variance = half * (splat(1.0, d) - ratio - square)
    else:
        log_variance = intercept + tl.zeros_like(d)
        precision = column(row, in_table, PRECISION) + tl.zeros_like(d)
        value = tl.fma(half * precision * d, d, column(row, in_table, CONSTANT))
        by_log_variance = tl.zeros_like(d)
    by_d = precision * d
    # of floats: the maximum of integers is an instruction (redux) that the machine of the tests does not know
    decoded = tl.max(tl.max(tl.where(decoder == 0.0, 0.0, 1.0), 1), 0)
    if decoded > 0.0:  # of some sample of the tile's
        if DECODER_KIND == GAUSSIAN:
            precision = exp(negative(log_variance))
            square = product(d * d, precision)
            last = product(half, splat(LOG_TWO_PI, d) + log_variance + square)
            last_by_d = precision * d
            last_by_log_variance = half * (splat(1.0, d) - square)
        else:
            inverse_sigma = exp(splat(-0.5, d) * log_variance)
            if DECODER_KIND == DISCRETIZED:
                last, last_by_d, by_log_sigma = log_bin(x0, d, inverse_sigma)
            else:
                FLOOR: tl.constexpr = 1e-12 if DECODER_KIND == CLAMPED_AT_12 else 1e-15
                last, last_by_d, by_log_sigma = approximate_log_bin(x0, d, inverse_sigma, FLOOR)
            last_by_log_variance = half * by_log_sigma
        value = tl.where(decoder == 0.0, value, last)
        by_d = tl.where(decoder == 0.0, by_d, last_by_d)
        by_log_variance = tl.where(decoder == 0.0, by_log_variance, last_by_log_variance)
    return value, by_d, by_log_variance, reaches


@triton.jit
def number_of(number, EXACT: tl.constexpr, R: tl.constexpr):
    return tl.full((1, 1), number if EXACT is None else EXACT, R)


@triton.jit
def network_input(x0, given, z, at, inside, row, in_table, GIVEN: tl.constexpr):
    """x_t of the elements at `at`."""
    if GIVEN:
        return real_of(tl.load(given + at, mask=inside, other=0), x0.dtype)
    else:
        return with_noise(q_sample_formula(column(row, in_table, SCALE), x0), column(row, in_table, SIGMA), z)


@triton.jit
def left_of_target(m, x0, z, row, in_table):
    """What `diffusion_loss` is the loss of."""
    left = tl.fma(negative(column(row, in_table, TARGET_FROM_X0)), x0, m)
    return less(left, column(row, in_table, TARGET_FROM_NOISE), z)


@triton.jit
def loss_weight(row, in_table, weights, b, live, WEIGHTED: tl.constexpr):
    weight = column(row, in_table, LOSS_WEIGHT)
    if WEIGHTED:
        weight = weight * tl.load(weights + b, mask=live, other=0.0)
    return weight


@triton.jit(do_not_specialize=["index", "seed", "offset", "count", "batch", "tiles", "chunks"])
def vlb_terms_kernel(
    result,
    m,
    x0,
    given,
    noise,
    rows,
    t,
    seeds,
    weights,
    clip: tl.float64,
    scale: tl.float64,
    delta: tl.float64,
    vlb_weight: tl.float64,
    index: tl.int64,
    seed: tl.int64,
    offset: tl.int64,
    count,
    batch,
    event,
    channels,
    tiles,
    blocks,
    chunks,
    EXACT_CLIP: tl.constexpr,
    EXACT_SCALE: tl.constexpr,
    EXACT_DELTA: tl.constexpr,
    EXACT_VLB_WEIGHT: tl.constexpr,
    CLIPPED: tl.constexpr,
    LEARNED: tl.constexpr,
    DECODER_KIND: tl.constexpr,
    TERM: tl.constexpr,
    LOSS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EACH: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_T: tl.constexpr,
    NOISE: tl.constexpr,
    SEEDS: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """result: a sum for each chunk of the work, or for each chunk of each sample's, times `scale`."""
    R: tl.constexpr = rows.dtype.element_ty
    W: tl.constexpr = V if V <= E else E
    FACTOR: tl.constexpr = 2 if LEARNED else 1
    # the tiles first, first + chunks, … before last, of all samples, or of the program's own
    chunk = tl.program_id(0)
    first_tile = chunk
    last = tiles * blocks
    if EACH:
        tile = tl.program_id(0) // chunks
        chunk = tl.program_id(0) - tile * chunks
        first_tile = tile * blocks + chunk
        last = (tile + 1) * blocks
    sums = tl.zeros((S, E // W), tl.float64)
    for k in range(first_tile, last, chunks):
        block, b, live = place_of(k, blocks, batch, S, LAYOUT, WIDE)
        row, in_table = table_row(rows, timestep_of(t, index, b, live, HAS_T), count, COLUMNS)
        z0, z1, z2, z3 = None, None, None, None
        if NOISE == SEEDED_NOISE:
            z0, z1, z2, z3 = tile_normals(
                block, b, live, wide(offset), seeds, seed, event, channels, R, SEEDS, S, E, V, LAYOUT, WIDE
            )
        values = tl.zeros((S, E), R)
        first = b.to(tl.int64) * event
        for r in tl.static_range(4 if LAYOUT == TILED else 1):
            j, inside = elements_of(block, r, event, channels, 1, S, E, LAYOUT, WIDE)
            inside = inside & live
            x0_value = real_of(tl.load(x0 + first + j, mask=inside, other=0), R)
            z = noise_of_elements(noise, first + j, inside, r, z0, z1, z2, z3, x0_value, NOISE)
            x_t = network_input(x0_value, given, z, first + j, inside, row, in_table, GIVEN)
            j_m, _ = elements_of(block, r, event, channels, FACTOR, S, E, LAYOUT, WIDE)
            at = FACTOR * first + j_m
            v = x0_value
            if LEARNED:
                v = tl.load(m + at + (event if LAYOUT == FLAT else channels), mask=inside, other=0.0).to(R)
            m_value = real_of(tl.load(m + at, mask=inside, other=0), R)  # prior_kl gives x0 in its place
            value = tl.zeros_like(x0_value)
            if TERM:
                value, _, _, _ = term(
                    x0_value, m_value, v, x_t, row, in_table, number_of(clip, EXACT_CLIP, R), CLIPPED, LEARNED, DECODER_KIND
                )
            if LOSS != NO_LOSS:
                loss = loss_of(left_of_target(m_value, x0_value, z, row, in_table), number_of(delta, EXACT_DELTA, R), LOSS)
                weight = loss_weight(row, in_table, weights, b, live, WEIGHTED)
                value = tl.fma(weight, loss, product(number_of(vlb_weight, EXACT_VLB_WEIGHT, R), value))
            values += tl.where(inside, value, 0.0)
        sums += few_of_rows(values, W)
    by = tl.full((1,), scale if EXACT_SCALE is None else EXACT_SCALE, tl.float64)
    at_own, is_own = place_of_totals(chunks, batch, S, EACH and LAYOUT != TILED)
    tl.store(result + at_own, stored(totals_of(sums, EACH and LAYOUT != TILED) * by, result), mask=is_own)


@triton.jit(do_not_specialize=["index", "seed", "offset", "count", "batch"])
def vlb_terms_backward_kernel(
    to_m,
    gradient,
    m,
    x0,
    given,
    noise,
    rows,
    t,
    seeds,
    weights,
    clip: tl.float64,
    scale: tl.float64,
    delta: tl.float64,
    vlb_weight: tl.float64,
    index: tl.int64,
    seed: tl.int64,
    offset: tl.int64,
    count,
    batch,
    event,
    channels,
    blocks,
    EXACT_CLIP: tl.constexpr,
    EXACT_SCALE: tl.constexpr,
    EXACT_DELTA: tl.constexpr,
    EXACT_VLB_WEIGHT: tl.constexpr,
    CLIPPED: tl.constexpr,
    LEARNED: tl.constexpr,
    DECODER_KIND: tl.constexpr,
    TERM: tl.constexpr,
    LOSS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EACH: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_T: tl.constexpr,
    NOISE: tl.constexpr,
    SEEDS: tl.constexpr,
    DETACHED: tl.constexpr,
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
    upstream = tl.load(gradient + b, mask=live, other=0.0) if EACH else tl.load(gradient + tl.zeros((1, 1), tl.int32))
    by = number_of(scale, EXACT_SCALE, R)
    weight = by
    if LOSS != NO_LOSS:
        weight = loss_weight(row, in_table, weights, b, live, WEIGHTED) * by
        by = by * number_of(vlb_weight, EXACT_VLB_WEIGHT, R)
    to_mean = column(row, in_table, MEAN_FROM_X0) * column(row, in_table, X0_FROM_M)
    slope = column(row, in_table, SLOPE)
    z0, z1, z2, z3 = None, None, None, None
    if NOISE == SEEDED_NOISE:
        z0, z1, z2, z3 = tile_normals(block, b, live, wide(offset), seeds, seed, event, channels, R, SEEDS, S, E, V, LAYOUT, WIDE)
    first = b.to(tl.int64) * event
    for r in tl.static_range(4 if LAYOUT == TILED else 1):
        j, inside = elements_of(block, r, event, channels, 1, S, E, LAYOUT, WIDE)
        inside = inside & live
        x0_value = real_of(tl.load(x0 + first + j, mask=inside, other=0), R)
        z = noise_of_elements(noise, first + j, inside, r, z0, z1, z2, z3, x0_value, NOISE)
        x_t = network_input(x0_value, given, z, first + j, inside, row, in_table, GIVEN)
        j_m, _ = elements_of(block, r, event, channels, FACTOR, S, E, LAYOUT, WIDE)
        at = FACTOR * first + j_m
        second = at + (event if LAYOUT == FLAT else channels)
        v = x0_value
        if LEARNED:
            v = tl.load(m + second, mask=inside, other=0.0).to(R)
        m_value = tl.load(m + at, mask=inside, other=0.0).to(R)
        by_d, by_log_variance, reaches = tl.zeros_like(x0_value), tl.zeros_like(x0_value), tl.zeros_like(x0_value)
        if TERM:
            _, by_d, by_log_variance, reaches = term(
                x0_value, m_value, v, x_t, row, in_table, number_of(clip, EXACT_CLIP, R), CLIPPED, LEARNED, DECODER_KIND
            )
        if DETACHED:
            by_m = tl.zeros_like(x0_value)
        else:
            by_m = negative(by * by_d * to_mean) * reaches
        if LOSS != NO_LOSS:
            left = left_of_target(m_value, x0_value, z, row, in_table)
            by_m = tl.fma(weight, loss_slope(left, number_of(delta, EXACT_DELTA, R), LOSS), by_m)
        tl.store(to_m + at, stored(upstream * by_m, to_m), mask=inside)
        if LEARNED:
            tl.store(to_m + second, stored(upstream * (by * by_log_variance * slope), to_m), mask=inside)


class _Call:
    """What both directions make of their arguments. The placeholders where a tensor is absent are never read."""

    def __init__(self, outputs, o):
        batch, factor = op.batch_of(o.x0), 2 if o.learned else 1
        x0 = self.x0 = op.operand(o.x0, o.x0, batch.channels_last)
        m = op.same(o.model_output, x0, batch.channels_last, factor)
        rows = op.rows_of(o.rows, o.t, o.index, COLUMNS.value, x0, checks.compute_dtype(checks.result_dtype(m, x0)))
        given = rows.table if o.x_t is None else op.same(o.x_t, x0, batch.channels_last)
        z = op.noise_of(*((None,) * 3 if o.x_t is not None else (o.noise, o.seeds, o.seed)), x0, rows.table)
        if o.x_t is None and z.kind == NO_NOISE.value:
            raise RuntimeError("x_t, noise, seed: expected one of them")
        if not (0 <= o.decoder <= 3 and -1 <= o.loss <= 2):
            raise RuntimeError("expected a decoder within 0 … 3 and a loss within -1 … 2")
        if o.loss >= 0 and o.x_t is not None:
            raise RuntimeError("x_t: expected none with a loss, whose target has the noise")
        noise = op.same(o.noise, x0, batch.channels_last) if z.kind == GIVEN_NOISE.value else rows.table
        if o.weights is not None:
            op.each_sample("weights", o.weights, x0, rows.table.dtype)
        exact = op.passes_floats_as_float32() and rows.table.itemsize == 8
        tensors = (x0, m, noise, *outputs) if o.x_t is None else (x0, m, given, *outputs)
        self.cut = op.tiling(batch, tensors, z.kind == SEEDED_NOISE.value, False, o.learned, True)
        self.dtype = rows.table.dtype
        self.pointers = (m, x0, given, noise, rows.table, rows.t, z.seeds, rows.table if o.weights is None else o.weights)
        floats = (0.0 if o.clip is None else o.clip, o.scale, o.delta, o.vlb_weight)
        self.numbers = (*((0.0,) * 4 if exact else floats), rows.index, z.seed, o.offset, rows.count)
        self.flags = {
            "EXACT_CLIP": o.clip if exact else None,
            "EXACT_SCALE": o.scale if exact else None,
            "EXACT_DELTA": o.delta if exact else None,
            "EXACT_VLB_WEIGHT": o.vlb_weight if exact else None,
            "CLIPPED": o.clip is not None,
            "LEARNED": o.learned,
            "DECODER_KIND": o.decoder,
            "TERM": o.loss < 0 or o.vlb_weight != 0,
            "LOSS": o.loss,
            "WEIGHTED": o.weights is not None,
            "EACH": o.each_sample,
            "GIVEN": o.x_t is not None,
            "HAS_T": rows.has_t,
            "NOISE": z.kind,
            "SEEDS": z.seeds_kind,
            **self.cut.parameters,
        }


def vlb_terms(o):
    call = _Call((), o)
    cut, each = call.cut, o.each_sample
    result = op.empty(o.x0.shape[:1] if each else (), call.dtype, o.x0.device)
    sums = sums_for(result, cut.tiles if each else 1, cut.blocks if each else cut.tiles * cut.blocks)
    op.launch(
        wrap_triton(vlb_terms_kernel),
        *(sums.programs, call.x0, sums.to, *call.pointers, *call.numbers),
        *(cut.batch, cut.event, cut.channels, cut.tiles, cut.blocks, sums.chunks),
        **call.flags,
    )
    if sums.to is not result:
        finish(result, sums, 1)
    return result


def vlb_terms_backward(gradient, o, detach_mean):
    to_m = op.empty_like(o.x0, o.model_output.dtype, 2 if o.learned else 1)
    call = _Call((to_m,), o)
    cut = call.cut
    gradient = op.plain(gradient).contiguous()
    if o.each_sample:
        op.each_sample("gradient", gradient, o.x0, call.dtype)
    elif gradient.dim() != 0 or gradient.dtype != call.dtype or gradient.device != o.x0.device:
        raise RuntimeError(f"gradient: expected one number, {call.dtype} on {o.x0.device}")
    op.launch(
        wrap_triton(vlb_terms_backward_kernel),
        *(cut.tiles * cut.blocks, call.x0, to_m, gradient, *call.pointers, *call.numbers),
        *(cut.batch, cut.event, cut.channels, cut.blocks),
        DETACHED=detach_mean,
        **call.flags,
    )
    return to_m
