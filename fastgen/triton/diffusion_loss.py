"""The training loss of a diffusion model: the formulas of csrc/diffusion_loss/diffusion_loss.h, the kernels and the ops."""

import triton
import triton.language as tl

from .._core import checks
from ..schedule import PREDICTIONS
from .common import op
from .common.bytes import real_of
from .common.driver import TILED, elements_of, part_of, place_of, tile_normals
from .common.elementwise import GIVEN_NOISE, NO_NOISE, SEEDED_NOISE, column, table_row, timestep_of, wide
from .common.host_device import max_of, min_of, negative, product, splat, stored
from .common.op import wrap_triton
from .common.sum import few_of_rows, finish, place_of_totals, sums_for, totals_of

EPSILON, SAMPLE = PREDICTIONS.index("epsilon"), PREDICTIONS.index("sample")

# The table's columns, DiffusionLossColumns in C++.
X0_FACTOR = tl.constexpr(0)
NOISE_FACTOR = tl.constexpr(1)
WEIGHT = tl.constexpr(2)
COLUMNS = tl.constexpr(3)
# LOSS in the kernels
MSE = tl.constexpr(0)
L1 = tl.constexpr(1)
HUBER = tl.constexpr(2)


@triton.jit
def less(m, factor, target):
    """m − factor·target. Where the factor is 0 the target is not looked at, were it infinite or NaN."""
    return tl.where(factor == 0.0, m, tl.fma(negative(factor), target, m))


@triton.jit
def residual(
    m,
    x0,
    noise,
    at,
    inside,
    r: tl.constexpr,
    z0,
    z1,
    z2,
    z3,
    x0_factor,
    noise_factor,
    X0: tl.constexpr,
    NOISE: tl.constexpr,
):
    """m less those parts of the target a·x0 + b·ε that the kernel has, of the elements at `at`."""
    R: tl.constexpr = x0_factor.dtype
    value = tl.load(m + at, mask=inside).to(R)
    if X0:
        value = tl.fma(negative(x0_factor), real_of(tl.load(x0 + at, mask=inside), R), value)
    if NOISE == GIVEN_NOISE:
        value = less(value, noise_factor, tl.load(noise + at, mask=inside).to(R))
    elif NOISE == SEEDED_NOISE:
        value = less(value, noise_factor, part_of(r, z0, z1, z2, z3))
    return value


@triton.jit
def loss_of(r, delta, LOSS: tl.constexpr):
    if LOSS == MSE:
        return r * r
    elif LOSS == L1:
        return tl.abs(r)
    else:
        size = tl.abs(r)
        return tl.where(size <= delta, splat(0.5, r) * r * r, delta * tl.fma(splat(-0.5, r), delta, size))


@triton.jit
def loss_slope(r, delta, LOSS: tl.constexpr):
    """dℓ/dr. NaN stays NaN; the slope of |r| at 0 is 0, as torch's."""
    if LOSS == MSE:
        return r + r
    elif LOSS == HUBER:
        return max_of(negative(delta), min_of(delta, r))
    else:
        return tl.where(r > 0.0, 1.0, tl.where(r < 0.0, -1.0, r))


@triton.jit
def delta_of(delta, EXACT_DELTA: tl.constexpr, R: tl.constexpr):
    return tl.full((1, 1), delta if EXACT_DELTA is None else EXACT_DELTA, R)


@triton.jit
def weight_of(row, in_table, weights, b, live, WEIGHTED: tl.constexpr):
    """The table's weight of each sample, times the caller's."""
    weight = column(row, in_table, WEIGHT)
    if WEIGHTED:
        weight = weight * tl.load(weights + b, mask=live, other=0.0)
    return weight


@triton.jit(do_not_specialize=["index", "seed", "offset", "count", "batch", "tiles", "chunks", "divisor"])
def diffusion_loss_kernel(
    result,
    m,
    x0,
    noise,
    rows,
    t,
    seeds,
    weights,
    delta: tl.float64,
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
    divisor,
    EXACT_DELTA: tl.constexpr,
    HAS_T: tl.constexpr,
    NOISE: tl.constexpr,
    SEEDS: tl.constexpr,
    X0: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LOSS: tl.constexpr,
    EACH: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """result: a sum for each chunk of the work, or for each chunk of each sample, divided by `divisor`."""
    R: tl.constexpr = rows.dtype.element_ty
    W: tl.constexpr = V if V <= E else E
    # the tiles first, first + chunks, … before last, of all samples, or of the program's own
    chunk = tl.program_id(0)
    first = chunk
    last = tiles * blocks
    if EACH:
        tile = tl.program_id(0) // chunks
        chunk = tl.program_id(0) - tile * chunks
        first = tile * blocks + chunk
        last = (tile + 1) * blocks
    sums = tl.zeros((S, E // W), tl.float64)
    for k in range(first, last, chunks):
        block, b, live = place_of(k, blocks, batch, S, LAYOUT, WIDE)
        row, in_table = table_row(rows, timestep_of(t, index, b, live, HAS_T), count, COLUMNS)
        x0_factor = column(row, in_table, X0_FACTOR)
        noise_factor = column(row, in_table, NOISE_FACTOR)
        weight = weight_of(row, in_table, weights, b, live, WEIGHTED)
        z0, z1, z2, z3 = None, None, None, None
        if NOISE == SEEDED_NOISE:
            z0, z1, z2, z3 = tile_normals(
                block, b, live, wide(offset), seeds, seed, event, channels, R, SEEDS, S, E, V, LAYOUT, WIDE
            )
        values = tl.zeros((S, E), R)
        for r in tl.static_range(4 if LAYOUT == TILED else 1):
            j, inside = elements_of(block, r, event, channels, 1, S, E, LAYOUT, WIDE)
            inside = inside & live
            at = b.to(tl.int64) * event + j
            left = residual(m, x0, noise, at, inside, r, z0, z1, z2, z3, x0_factor, noise_factor, X0, NOISE)
            loss = product(weight, loss_of(left, delta_of(delta, EXACT_DELTA, R), LOSS))
            values += tl.where(inside, loss, 0.0)
        sums += few_of_rows(values, W)
    by = tl.full((1,), divisor, tl.int64).to(tl.float64)
    at_own, is_own = place_of_totals(chunks, batch, S, EACH and LAYOUT != TILED)
    tl.store(result + at_own, stored(totals_of(sums, EACH and LAYOUT != TILED) / by, result), mask=is_own)


@triton.jit(do_not_specialize=["index", "seed", "offset", "count", "batch", "divisor"])
def diffusion_loss_backward_kernel(
    to_m,
    to_x0,
    gradient,
    m,
    x0,
    noise,
    rows,
    t,
    seeds,
    weights,
    delta: tl.float64,
    index: tl.int64,
    seed: tl.int64,
    offset: tl.int64,
    count,
    batch,
    event,
    channels,
    blocks,
    divisor,
    EXACT_DELTA: tl.constexpr,
    HAS_T: tl.constexpr,
    NOISE: tl.constexpr,
    SEEDS: tl.constexpr,
    X0: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LOSS: tl.constexpr,
    EACH: tl.constexpr,
    TO_X0: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    R: tl.constexpr = rows.dtype.element_ty
    block, b, live = place_of(tl.program_id(0), blocks, batch, S, LAYOUT, WIDE)
    row, in_table = table_row(rows, timestep_of(t, index, b, live, HAS_T), count, COLUMNS)
    x0_factor = column(row, in_table, X0_FACTOR)
    noise_factor = column(row, in_table, NOISE_FACTOR)
    upstream = tl.load(gradient + b, mask=live, other=0.0) if EACH else tl.load(gradient + tl.zeros((1, 1), tl.int32))
    weight = weight_of(row, in_table, weights, b, live, WEIGHTED) * (upstream / tl.full((1, 1), divisor, tl.int64).to(R))
    z0, z1, z2, z3 = None, None, None, None
    if NOISE == SEEDED_NOISE:
        z0, z1, z2, z3 = tile_normals(block, b, live, wide(offset), seeds, seed, event, channels, R, SEEDS, S, E, V, LAYOUT, WIDE)
    for r in tl.static_range(4 if LAYOUT == TILED else 1):
        j, inside = elements_of(block, r, event, channels, 1, S, E, LAYOUT, WIDE)
        inside = inside & live
        at = b.to(tl.int64) * event + j
        left = residual(m, x0, noise, at, inside, r, z0, z1, z2, z3, x0_factor, noise_factor, X0, NOISE)
        slope = weight * loss_slope(left, delta_of(delta, EXACT_DELTA, R), LOSS)
        tl.store(to_m + at, stored(slope, to_m), mask=inside)
        if TO_X0:
            tl.store(to_x0 + at, stored(negative(x0_factor) * slope, to_x0), mask=inside)


class _Call:
    """What both directions make of their arguments. The placeholders where a tensor is absent are never read."""

    def __init__(self, outputs, o):
        x0, weights, prediction, loss, reduction = o.x0, o.weights, o.prediction, o.loss, o.reduction
        batch = op.batch_of(o.model_output)
        m = self.m = op.operand(o.model_output, o.model_output, batch.channels_last)
        if x0.shape != m.shape or x0.device != m.device or not (0 <= loss <= 2 and 0 <= reduction <= 2 and 0 <= prediction <= 2):
            raise RuntimeError("expected an x0 of the shape and device of model_output, and options within 0 … 2")
        rows = op.rows_of(o.rows, o.t, o.index, COLUMNS.value, m, checks.compute_dtype(checks.result_dtype(m, x0)))
        x0 = rows.table if prediction == EPSILON else op.same(x0, m, batch.channels_last)
        z = op.noise_of(*((None,) * 3 if prediction == SAMPLE else (o.noise, o.seeds, o.seed)), m, rows.table)
        if prediction != SAMPLE and z.kind == NO_NOISE.value:
            raise RuntimeError("noise, seed: expected one of them")
        noise = op.same(o.noise, m, batch.channels_last) if z.kind == GIVEN_NOISE.value else rows.table
        if weights is not None:
            op.each_sample("weights", weights, m, rows.table.dtype)
        exact = op.passes_floats_as_float32() and rows.table.itemsize == 8
        merge = not rows.has_t and weights is None and reduction != 0
        self.cut = op.tiling(batch, (m, x0, noise, *outputs), z.kind == SEEDED_NOISE.value, merge)
        self.table, self.dtype = rows.table, rows.table.dtype
        self.divisor = (batch.event, batch.size * batch.event, 1)[reduction]
        self.pointers = (m, x0, noise, rows.table, rows.t, z.seeds, rows.table if weights is None else weights)
        self.numbers = (0.0 if exact else o.delta, rows.index, z.seed, o.offset, rows.count)
        self.flags = {
            "EXACT_DELTA": o.delta if exact else None,
            "HAS_T": rows.has_t,
            "NOISE": z.kind,
            "SEEDS": z.seeds_kind,
            "X0": prediction != EPSILON,
            "WEIGHTED": weights is not None,
            "LOSS": loss,
            "EACH": reduction == 0,
            **self.cut.parameters,
        }


def diffusion_loss(o):
    call = _Call((), o)
    cut, each = call.cut, o.reduction == 0
    result = op.empty(o.x0.shape[:1] if each else (), call.dtype, o.x0.device)
    sums = sums_for(result, cut.tiles if each else 1, cut.blocks if each else cut.tiles * cut.blocks)
    op.launch(
        wrap_triton(diffusion_loss_kernel),
        *(sums.programs, call.m, sums.to, *call.pointers, *call.numbers, cut.batch, cut.event, cut.channels),
        *(cut.tiles, cut.blocks, sums.chunks, call.divisor if sums.to is result else 1),
        **call.flags,
    )
    if sums.to is not result:
        finish(result, sums, call.divisor)
    return result


def _backward(gradient, o, to_x0):
    to_m = op.empty_like(o.model_output)
    call = _Call((to_m,) if to_x0 is None else (to_m, to_x0), o)
    cut, each = call.cut, o.reduction == 0
    gradient = op.plain(gradient).contiguous()
    if each:
        op.each_sample("gradient", gradient, o.model_output, call.dtype)
    elif gradient.dim() != 0 or gradient.dtype != call.dtype or gradient.device != o.model_output.device:
        raise RuntimeError(f"gradient: expected one number, {call.dtype} on {o.model_output.device}")
    op.launch(
        wrap_triton(diffusion_loss_backward_kernel),
        *(cut.tiles * cut.blocks, call.m, to_m, call.table if to_x0 is None else to_x0, gradient, *call.pointers, *call.numbers),
        *(cut.batch, cut.event, cut.channels, cut.blocks, call.divisor),
        TO_X0=to_x0 is not None,
        **call.flags,
    )
    return to_m


def diffusion_loss_backward(gradient, o):
    return _backward(gradient, o, None)


def diffusion_loss_backward_x0(gradient, o):
    to_x0 = op.empty_like(o.model_output, o.x0.dtype)
    return _backward(gradient, o, to_x0), to_x0
