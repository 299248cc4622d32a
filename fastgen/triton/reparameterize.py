"""A sample of a diagonal Gaussian as a function of its parameters: the formulas of csrc/reparameterize/reparameterize.h, the
kernels and the ops."""

import triton
import triton.language as tl

from .._core import checks, dispatch
from .common import op
from .common.driver import TILED, elements_of, noise_of_elements, place_of, tile_normals
from .common.elementwise import NO_NOISE, SEEDED_NOISE, wide
from .common.host_device import product, splat, stored
from .common.op import wrap_triton
from .common.real_math import exp
from .common.sum import few_of_rows, finish, place_of_totals, sums_for, totals_of
from .gaussian_kl import (
    clamped,
    deviation_ratio,
    dtype_of,
    flags_of,
    half_factors,
    kl_by_log_variance,
    kl_of,
    loaded,
    where_inside,
)


@triton.jit
def half_log_variance(log_variance, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    return product(splat(0.5, log_variance), clamped(log_variance, LOWEST, HIGHEST))


@triton.jit
def reparameterize_formula(sigma, mean, z):
    return tl.fma(sigma, z, mean)


@triton.jit
def z_by_log_variance(gradient, sigma, z):
    return splat(0.5, sigma) * gradient * (sigma * z)


@triton.jit(do_not_specialize=["seed", "offset", "batch"])
def reparameterize_kernel(
    out,
    log_variance,
    mean,
    noise,
    seeds,
    seed: tl.int64,
    offset: tl.int64,
    batch,
    event,
    channels,
    blocks,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    FACTORS: tl.constexpr,
    R: tl.constexpr,
    NOISE: tl.constexpr,
    SEEDS: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    block, b, live = place_of(tl.program_id(0), blocks, batch, S, LAYOUT, WIDE)
    z0, z1, z2, z3 = None, None, None, None
    if NOISE == SEEDED_NOISE:
        z0, z1, z2, z3 = tile_normals(block, b, live, wide(offset), seeds, seed, event, channels, R, SEEDS, S, E, V, LAYOUT, WIDE)
    for r in tl.static_range(4 if LAYOUT == TILED else 1):
        j, inside = elements_of(block, r, event, channels, 1, S, E, LAYOUT, WIDE)
        inside = inside & live
        at = b.to(tl.int64) * event + j
        own = loaded(log_variance, b, block, r, inside, event, channels, 1 + FACTORS % 2, R, S, E, LAYOUT, WIDE)
        own_mean = loaded(mean, b, block, r, inside, event, channels, 1 + FACTORS // 2, R, S, E, LAYOUT, WIDE)
        z = noise_of_elements(noise, at, inside, r, z0, z1, z2, z3, own, NOISE)
        sigma = exp(half_log_variance(own, LOWEST, HIGHEST))
        tl.store(out + at, stored(reparameterize_formula(sigma, own_mean, z), out), mask=inside)


@triton.jit(do_not_specialize=["seed", "offset", "batch", "chunks"])
def reparameterize_kl_kernel(
    result,
    out,
    log_variance,
    mean,
    noise,
    seeds,
    seed: tl.int64,
    offset: tl.int64,
    batch,
    event,
    channels,
    blocks,
    chunks,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    FACTORS: tl.constexpr,
    R: tl.constexpr,
    NOISE: tl.constexpr,
    SEEDS: tl.constexpr,
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
            own = loaded(log_variance, b, block, r, inside, event, channels, 1 + FACTORS % 2, R, S, E, LAYOUT, WIDE)
            own_mean = loaded(mean, b, block, r, inside, event, channels, 1 + FACTORS // 2, R, S, E, LAYOUT, WIDE)
            z = noise_of_elements(noise, at, inside, r, z0, z1, z2, z3, own, NOISE)
            sigma, excess, less_one = deviation_ratio(half_log_variance(own, LOWEST, HIGHEST))
            tl.store(out + at, stored(reparameterize_formula(sigma, own_mean, z), out), mask=inside)
            values += tl.where(inside, kl_of(excess, less_one, own_mean), 0.0)
        sums += few_of_rows(values, W)
    at_own, is_own = place_of_totals(chunks, batch, S, LAYOUT != TILED)
    tl.store(result + at_own, stored(totals_of(sums, LAYOUT != TILED), result), mask=is_own)


@triton.jit(do_not_specialize=["seed", "offset", "batch"])
def reparameterize_backward_kernel(
    to_log_variance,
    to_mean,
    gradient,
    kl_gradient,
    log_variance,
    mean,
    noise,
    seeds,
    seed: tl.int64,
    offset: tl.int64,
    batch,
    event,
    channels,
    blocks,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    KL: tl.constexpr,
    FACTORS: tl.constexpr,
    R: tl.constexpr,
    NOISE: tl.constexpr,
    SEEDS: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """KL: whether the divergence has a gradient, without which to_mean is not written nor mean read."""
    block, b, live = place_of(tl.program_id(0), blocks, batch, S, LAYOUT, WIDE)
    z0, z1, z2, z3 = None, None, None, None
    if NOISE == SEEDED_NOISE:
        z0, z1, z2, z3 = tile_normals(block, b, live, wide(offset), seeds, seed, event, channels, R, SEEDS, S, E, V, LAYOUT, WIDE)
    if KL:
        upstream = tl.load(kl_gradient + b, mask=live, other=0.0)
    for r in tl.static_range(4 if LAYOUT == TILED else 1):
        j, inside = elements_of(block, r, event, channels, 1, S, E, LAYOUT, WIDE)
        inside = inside & live
        at = b.to(tl.int64) * event + j
        own = loaded(log_variance, b, block, r, inside, event, channels, 1 + FACTORS % 2, R, S, E, LAYOUT, WIDE)
        of_z = tl.load(gradient + at, mask=inside, other=0.0).to(R)
        z = noise_of_elements(noise, at, inside, r, z0, z1, z2, z3, own, NOISE)
        half = half_log_variance(own, LOWEST, HIGHEST)
        if KL:
            sigma, _, less_one = deviation_ratio(half)
            own_mean = loaded(mean, b, block, r, inside, event, channels, 1 + FACTORS // 2, R, S, E, LAYOUT, WIDE)
            by_log_variance = tl.fma(upstream, kl_by_log_variance(less_one), z_by_log_variance(of_z, sigma, z))
            tl.store(to_mean + at, stored(tl.fma(upstream, own_mean, of_z), to_mean), mask=inside)
        else:
            by_log_variance = z_by_log_variance(of_z, exp(half), z)
        by_log_variance = where_inside(own, by_log_variance, LOWEST, HIGHEST)
        tl.store(to_log_variance + at, stored(by_log_variance, to_log_variance), mask=inside)


class _Call:
    """What all make of their arguments, in the layout of `like`. The placeholders where a tensor is absent are never read."""

    def __init__(self, like, o, mean, gradient, outputs):
        batch = self.batch = op.batch_of(like, dispatch.has_channels_last_samples(like))
        log_variance, own_factor = op.apart(o.log_variance, batch, like)
        mean, mean_factor = (log_variance, 1) if mean is None else op.apart(mean, batch, like)
        self.gradient = gradient if gradient is None else op.same(gradient, like, batch.channels_last)
        tensors = [x for x in (log_variance, mean, self.gradient) if x is not None]
        self.dtype = dtype_of(tensors)
        z = op.noise_of(o.noise, o.seeds, o.seed, log_variance)
        if z.kind == NO_NOISE.value:
            raise RuntimeError("noise, seed: expected one of them")
        noise = log_variance if o.noise is None else op.same(o.noise, like, batch.channels_last)
        self.x, self.outputs = log_variance, [op.empty_like(like, dtype, channels_last=batch.channels_last) for dtype in outputs]
        factors = half_factors(own_factor, mean_factor)
        self.cut = op.tiling(batch, (*tensors, noise, *self.outputs), z.kind == SEEDED_NOISE.value, False, factors > 0)
        self.pointers = (log_variance, mean, noise, z.seeds, z.seed, o.offset)
        self.sizes = (self.cut.batch, self.cut.event, self.cut.channels, self.cut.blocks)
        self.flags = flags_of(o, factors, self.dtype, self.cut) | {"NOISE": z.kind, "SEEDS": z.seeds_kind}


def reparameterize(mean, o):
    call = _Call(mean, o, mean, None, (checks.result_dtype(mean, o.log_variance),))
    (out,), cut = call.outputs, call.cut
    op.launch(wrap_triton(reparameterize_kernel), cut.tiles * cut.blocks, call.x, out, *call.pointers, *call.sizes, **call.flags)
    return out


def reparameterize_kl(mean, o):
    call = _Call(mean, o, mean, None, (checks.result_dtype(mean, o.log_variance),))
    (out,), cut = call.outputs, call.cut
    result = op.empty(mean.shape[:1], call.dtype, mean.device)
    sums = sums_for(result, cut.tiles, cut.blocks)
    op.launch(
        wrap_triton(reparameterize_kl_kernel),
        *(sums.programs, call.x, sums.to, out, *call.pointers, *call.sizes, sums.chunks),
        **call.flags,
    )
    if sums.to is not result:
        finish(result, sums, 1)
    return out, result


def _backward(gradient, kl_gradient, mean, o):
    dtypes = (o.log_variance.dtype,) if mean is None else (o.log_variance.dtype, mean.dtype)
    call = _Call(o.log_variance, o, mean, gradient, dtypes)
    cut, to_log_variance = call.cut, call.outputs[0]
    if mean is not None:
        kl_gradient = op.plain(kl_gradient).contiguous()
        op.each_sample("kl_gradient", kl_gradient, o.log_variance, call.dtype)
    op.launch(
        wrap_triton(reparameterize_backward_kernel),
        *(cut.tiles * cut.blocks, call.x, to_log_variance, call.outputs[-1], call.gradient),
        *(call.gradient if mean is None else kl_gradient, *call.pointers, *call.sizes),
        KL=mean is not None,
        **call.flags,
    )
    return call.outputs


def reparameterize_backward(gradient, o):
    return _backward(gradient, None, None, o)[0]


def reparameterize_kl_backward(gradient, kl_gradient, mean, o):
    to_log_variance, to_mean = _backward(gradient, kl_gradient, mean, o)
    return to_mean, to_log_variance
