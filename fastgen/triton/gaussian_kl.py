"""The divergence of two diagonal Gaussians: the formulas of csrc/gaussian_kl/gaussian_kl.h, the kernels and the ops."""

import math

import torch
import triton
import triton.language as tl

from .._core import dispatch
from .common import op
from .common.driver import TILED, elements_of, place_of
from .common.host_device import max_of, min_of, negative, product, splat, stored
from .common.op import wrap_triton
from .common.real_math import exp, exp_and_excess
from .common.sum import few_of_rows, finish, place_of_totals, sums_for, totals_of


@triton.jit
def clamped(log_variance, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """LOWEST, HIGHEST: None where there is no such bound."""
    if LOWEST is not None:
        log_variance = max_of(splat(LOWEST, log_variance), log_variance)
    if HIGHEST is not None:
        log_variance = min_of(splat(HIGHEST, log_variance), log_variance)
    return log_variance


@triton.jit
def where_inside(log_variance, derivative, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    if LOWEST is not None:
        derivative = tl.where(log_variance < splat(LOWEST, log_variance), splat(0.0, derivative), derivative)
    if HIGHEST is not None:
        derivative = tl.where(log_variance > splat(HIGHEST, log_variance), splat(0.0, derivative), derivative)
    return derivative


@triton.jit
def deviation_ratio(h):
    """e^h, e^h − 1 − h and e^h − 1."""
    value, excess = exp_and_excess(h)
    return value, excess, tl.where(tl.abs(h) < splat(0.25, h), excess + h, value - splat(1.0, h))


@triton.jit
def kl_of(excess, less_one, w):
    return tl.fma(splat(0.5, w), tl.fma(w, w, product(less_one, less_one)), excess)


@triton.jit
def kl_by_log_variance(less_one):
    return splat(0.5, less_one) * less_one * (less_one + splat(2.0, less_one))


@triton.jit
def gaussians_apart(
    log_variance, mean, other_log_variance, other_mean, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, OTHER_VARIANCE: tl.constexpr
):
    """What `deviation_ratio` says of σ/σ', w and 1/σ'."""
    own, distance, inverse_sigma = clamped(log_variance, LOWEST, HIGHEST), mean - other_mean, splat(1.0, mean)
    w = distance
    if OTHER_VARIANCE:
        other = clamped(other_log_variance, LOWEST, HIGHEST)
        inverse_sigma = exp(splat(-0.5, other) * other)
        own = own - other
        w = product(distance, inverse_sigma)
    _, excess, less_one = deviation_ratio(product(splat(0.5, own), own))
    return excess, less_one, w, inverse_sigma


@triton.jit
def loaded(
    x,
    b,
    block,
    r: tl.constexpr,
    inside,
    event,
    channels,
    FACTOR: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The elements of a tensor whose samples lie FACTOR times as far apart as they are large, see `op.apart`."""
    j, _ = elements_of(block, r, event, channels, FACTOR, S, E, LAYOUT, WIDE)
    return tl.load(x + (FACTOR * (b.to(tl.int64) * event) + j), mask=inside, other=0.0).to(R)


@triton.jit
def parameters_of(
    log_variance,
    mean,
    other_log_variance,
    other_mean,
    b,
    block,
    r: tl.constexpr,
    inside,
    event,
    channels,
    OTHER_VARIANCE: tl.constexpr,
    OTHER_MEAN: tl.constexpr,
    FACTORS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The four, an absent one as 0. FACTORS: of log_variance and mean 2 · 1 + 1, or less, see `half_factors`."""
    own = loaded(log_variance, b, block, r, inside, event, channels, 1 + FACTORS % 2, R, S, E, LAYOUT, WIDE)
    own_mean = loaded(mean, b, block, r, inside, event, channels, 1 + FACTORS // 2, R, S, E, LAYOUT, WIDE)
    other, theirs = tl.zeros_like(own), tl.zeros_like(own)
    if OTHER_VARIANCE:
        other = loaded(other_log_variance, b, block, r, inside, event, channels, 1, R, S, E, LAYOUT, WIDE)
    if OTHER_MEAN:
        theirs = loaded(other_mean, b, block, r, inside, event, channels, 1, R, S, E, LAYOUT, WIDE)
    return own, own_mean, other, theirs


@triton.jit(do_not_specialize=["batch", "chunks"])
def gaussian_kl_kernel(
    result,
    log_variance,
    mean,
    other_log_variance,
    other_mean,
    batch,
    event,
    channels,
    blocks,
    chunks,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    OTHER_VARIANCE: tl.constexpr,
    OTHER_MEAN: tl.constexpr,
    FACTORS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """result: a sum for each chunk of each sample's work."""
    W: tl.constexpr = V if V <= E else E
    tile = tl.program_id(0) // chunks
    chunk = tl.program_id(0) - tile * chunks
    sums = tl.zeros((S, E // W), tl.float64)
    for k in range(tile * blocks + chunk, (tile + 1) * blocks, chunks):
        block, b, live = place_of(k, blocks, batch, S, LAYOUT, WIDE)
        values = tl.zeros((S, E), R)
        for r in tl.static_range(4 if LAYOUT == TILED else 1):
            _, inside = elements_of(block, r, event, channels, 1, S, E, LAYOUT, WIDE)
            inside = inside & live
            own, own_mean, other, theirs = parameters_of(
                *(log_variance, mean, other_log_variance, other_mean, b, block, r, inside, event, channels),
                *(OTHER_VARIANCE, OTHER_MEAN, FACTORS, R, S, E, LAYOUT, WIDE),
            )
            excess, less_one, w, _ = gaussians_apart(own, own_mean, other, theirs, LOWEST, HIGHEST, OTHER_VARIANCE)
            values += tl.where(inside, kl_of(excess, less_one, w), 0.0)
        sums += few_of_rows(values, W)
    at_own, is_own = place_of_totals(chunks, batch, S, LAYOUT != TILED)
    tl.store(result + at_own, stored(totals_of(sums, LAYOUT != TILED), result), mask=is_own)


@triton.jit(do_not_specialize=["batch"])
def gaussian_kl_backward_kernel(
    to_log_variance,
    to_mean,
    to_other,
    gradient,
    log_variance,
    mean,
    other_log_variance,
    other_mean,
    batch,
    event,
    channels,
    blocks,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    OTHER_VARIANCE: tl.constexpr,
    OTHER_MEAN: tl.constexpr,
    FACTORS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    block, b, live = place_of(tl.program_id(0), blocks, batch, S, LAYOUT, WIDE)
    upstream = tl.load(gradient + b, mask=live, other=0.0)
    for r in tl.static_range(4 if LAYOUT == TILED else 1):
        j, inside = elements_of(block, r, event, channels, 1, S, E, LAYOUT, WIDE)
        inside = inside & live
        at = b.to(tl.int64) * event + j
        own, own_mean, other, theirs = parameters_of(
            *(log_variance, mean, other_log_variance, other_mean, b, block, r, inside, event, channels),
            *(OTHER_VARIANCE, OTHER_MEAN, FACTORS, R, S, E, LAYOUT, WIDE),
        )
        _, less_one, w, inverse_sigma = gaussians_apart(own, own_mean, other, theirs, LOWEST, HIGHEST, OTHER_VARIANCE)
        by_own = kl_by_log_variance(less_one)
        by_log_variance = where_inside(own, product(upstream, by_own), LOWEST, HIGHEST)
        tl.store(to_log_variance + at, stored(by_log_variance, to_log_variance), mask=inside)
        tl.store(to_mean + at, stored(upstream * (w * inverse_sigma), to_mean), mask=inside)
        if OTHER_VARIANCE:
            by_other = negative(tl.fma(splat(0.5, w) * w, w, by_own))
            by_other = where_inside(other, upstream * by_other, LOWEST, HIGHEST)
            tl.store(to_other + at, stored(by_other, to_other), mask=inside)


def bound(value):
    """Of a kernel, None where it is infinite."""
    return None if math.isinf(value) else value


def dtype_of(tensors):
    """Of the arithmetic."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def flags_of(o, factors, dtype, cut):
    """What all kernels of two Gaussians are compiled for, from the operands, `half_factors`, `dtype_of` and the tiling."""
    arithmetic = tl.float64 if dtype == torch.float64 else tl.float32
    return {"LOWEST": bound(o.lowest), "HIGHEST": bound(o.highest), "FACTORS": factors, "R": arithmetic, **cut.parameters}


def half_factors(log_variance, mean):
    """FACTORS of the kernels, from what `op.apart` says of the two."""
    return (log_variance - 1) + 2 * (mean - 1)


class _Call:
    """What both directions make of their arguments. The placeholders where a tensor is absent are never read."""

    def __init__(self, o):
        batch = self.batch = op.batch_of(o.mean, dispatch.has_channels_last_samples(o.mean))
        self.mean, mean_factor = op.apart(o.mean, batch, o.mean)
        self.log_variance, own_factor = op.apart(o.log_variance, batch, o.mean)
        others = [x if x is None else op.same(x, o.mean, batch.channels_last) for x in (o.other_log_variance, o.other_mean)]
        tensors = [self.log_variance, self.mean, *(x for x in others if x is not None)]
        self.dtype = dtype_of(tensors)
        factors = half_factors(own_factor, mean_factor)
        self.cut = op.tiling(batch, tensors, False, False, factors > 0)
        self.pointers = (self.log_variance, self.mean, *(self.mean if x is None else x for x in others))
        others = {"OTHER_VARIANCE": o.other_log_variance is not None, "OTHER_MEAN": o.other_mean is not None}
        self.flags = flags_of(o, factors, self.dtype, self.cut) | others

    def derivative(self, x):
        return op.empty_like(self.mean, x.dtype, channels_last=self.batch.channels_last)


def gaussian_kl(o):
    call = _Call(o)
    cut = call.cut
    result = op.empty(o.mean.shape[:1], call.dtype, o.mean.device)
    sums = sums_for(result, cut.tiles, cut.blocks)
    op.launch(
        wrap_triton(gaussian_kl_kernel),
        *(sums.programs, call.mean, sums.to, *call.pointers),
        *(cut.batch, cut.event, cut.channels, cut.blocks, sums.chunks),
        **call.flags,
    )
    if sums.to is not result:
        finish(result, sums, 1)
    return result


def gaussian_kl_backward(gradient, o):
    call = _Call(o)
    cut = call.cut
    gradient = op.plain(gradient).contiguous()
    op.each_sample("gradient", gradient, o.mean, call.dtype)
    to_mean, to_log_variance = call.derivative(o.mean), call.derivative(o.log_variance)
    other = o.other_log_variance
    to_other = op.empty((0,), call.dtype, o.mean.device) if other is None else call.derivative(other)
    op.launch(
        wrap_triton(gaussian_kl_backward_kernel),
        *(cut.tiles * cut.blocks, call.mean, to_log_variance, to_mean, to_mean if other is None else to_other),
        *(gradient, *call.pointers, cut.batch, cut.event, cut.channels, cut.blocks),
        **call.flags,
    )
    return to_mean, to_log_variance, to_other
