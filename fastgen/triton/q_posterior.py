"""q(x_{t−1} | x_t, x_0): the formula of csrc/q_posterior/q_posterior.h, its kernel and the op."""

import triton
import triton.language as tl

from .._core import checks
from .common import op
from .common.driver import elements_of, place_of
from .common.elementwise import column, table_row, timestep_of
from .common.host_device import stored
from .common.op import wrap_triton

# The table's columns, QPosteriorColumns in C++.
MEAN_FROM_X0 = tl.constexpr(0)
MEAN_FROM_X = tl.constexpr(1)
VARIANCE = tl.constexpr(2)
LOG_VARIANCE = tl.constexpr(3)
COLUMNS = tl.constexpr(4)


@triton.jit
def q_posterior_mean(mean_from_x0, x0, mean_from_x, x):
    return tl.fma(mean_from_x0, x0, mean_from_x * x)


@triton.jit(do_not_specialize=["index", "count", "batch"])
def q_posterior_kernel(
    mean,
    variance,
    log_variance,
    x0,
    x,
    rows,
    t,
    index: tl.int64,
    count,
    batch,
    event,
    blocks,
    HAS_T: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    R: tl.constexpr = rows.dtype.element_ty
    block, b, live = place_of(tl.program_id(0), blocks, batch, S, LAYOUT, WIDE)
    row, in_table = table_row(rows, timestep_of(t, index, b, live, HAS_T), count, COLUMNS)
    of_sample = live & (block == 0)
    # where all samples share a row, it is one number
    tl.store(variance + b, tl.broadcast_to(column(row, in_table, VARIANCE), (S, 1)), mask=of_sample)
    tl.store(log_variance + b, tl.broadcast_to(column(row, in_table, LOG_VARIANCE), (S, 1)), mask=of_sample)
    j, inside = elements_of(block, 0, event, 1, 1, S, E, LAYOUT, WIDE)
    inside = inside & live
    at = b.to(tl.int64) * event + j
    x0 = tl.load(x0 + at, mask=inside).to(R)
    mean_from_x0, mean_from_x = column(row, in_table, MEAN_FROM_X0), column(row, in_table, MEAN_FROM_X)
    y = q_posterior_mean(mean_from_x0, x0, mean_from_x, tl.load(x + at, mask=inside).to(R))
    tl.store(mean + at, stored(y, mean), mask=inside)


def q_posterior(o):
    batch = op.batch_of(o.x0)
    mean = op.empty_like(o.x0, checks.result_dtype(o.x0, o.x_t))
    x0, x_t = op.operand(o.x0, o.x0, batch.channels_last), op.same(o.x_t, o.x0, batch.channels_last)
    rows = op.rows_of(o.rows, o.t, o.index, COLUMNS.value, x0, checks.compute_dtype(mean.dtype))
    variance = op.empty((batch.size, *[1] * (x0.dim() - 1)), rows.table.dtype, x0.device)
    log_variance = op.empty(variance.shape, variance.dtype, x0.device)
    cut = op.tiling(batch, (x0, x_t), seeded=False, merge=False)
    blocks = cut.blocks if batch.event else 1  # a sample without elements has a variance too
    op.launch(
        wrap_triton(q_posterior_kernel),
        *(cut.tiles * blocks, x0, mean, variance, log_variance, x0, x_t, rows.table, rows.t, rows.index, rows.count),
        *(cut.batch, cut.event, blocks),
        HAS_T=rows.has_t,
        **cut.parameters,
    )
    return mean, variance, log_variance
