"""The losses of a GAN: the formulas of csrc/gan_loss/gan_loss.h, their kernels and the ops.

All logits of a tensor have one target, which is a constant of the kernel, so nothing is multiplied by a target of 0. The terms of
a tensor are e = e^−|x| and what is made of it.
"""

import torch
import triton
import triton.language as tl

from .._ops.gan_loss import KINDS, MINIMAX, dense, empty_like, refuse, result_dtype, target_of
from .common import direct, op
from .common.driver import flat_elements
from .common.host_device import max_of, negative, product, splat, stored
from .common.op import wrap_triton
from .common.real_math import exp_negative, is_half, log1p_unit
from .common.sum import MOST_SUMS, TILE, few, is_one, programs_of, scratch, sum_kernel, sum_of_chunks

MONITORS = 4


@triton.jit
def gan_logit(x, APPROXIMATE: tl.constexpr):
    """e^−|x|, which all of the values below share."""
    return exp_negative(negative(tl.abs(x)), APPROXIMATE)


@triton.jit
def softplus(u, e):
    """softplus(u) for u = ±x."""
    return max_of(splat(0.0, u), u) + log1p_unit(e)


@triton.jit
def gan_loss_formula(x, e, TARGET: tl.constexpr):
    if TARGET == 0.0:
        return softplus(x, e)
    elif TARGET == 1.0:
        return softplus(negative(x), e)
    else:
        slope = tl.where(x < splat(0.0, x), splat(TARGET, x), splat(1.0 - TARGET, x))
        return tl.fma(tl.abs(x), slope, log1p_unit(e))


@triton.jit
def gan_gradient(x, e, positive_part, negative_part):
    """scale · (negative·σ(x) − positive·σ(−x)), the two being multiplied by scale already."""
    right = x >= splat(0.0, x)
    minus = negative(positive_part)
    return tl.fma(tl.where(right, minus, negative_part), e, tl.where(right, negative_part, minus)) / (splat(1.0, e) + e)


@triton.jit
def gan_probability(x, e):
    """σ(x)."""
    one = splat(1.0, e)
    # not as a quotient, whose last multiplication would be joined with the sum that follows
    return product(tl.where(x >= splat(0.0, x), one, e), one / (one + e))


@triton.jit
def gan_right(u):
    """Whether the discriminator is right, u being x for a real sample and −x for a generated one: 1, 0, or a half where it is
    undecided. NaN stays NaN."""
    zero = splat(0.0, u)
    return tl.where(u > zero, splat(1.0, u), tl.where(u < zero, zero, u + splat(0.5, u)))


@triton.jit
def gan_factor(count, R: tl.constexpr, MEAN: tl.constexpr, MINUS: tl.constexpr):
    """What the sum over a tensor's logits counts for in the loss: ±1, or ±1/count."""
    factor = tl.full((), -1.0 if MINUS else 1.0, R)
    if MEAN:
        factor = factor / tl.full((), count, tl.int64).to(R)
    return factor


@triton.jit
def few_terms(values, inside, V: tl.constexpr):
    return few(tl.where(inside, values, splat(0.0, values)), V)


@triton.jit(do_not_specialize=["tiles", "tensors", "first", "chunks"])
def gan_sums_kernel(
    losses,
    monitored,
    x,
    count,
    tiles,
    tensors,
    first,
    chunks,
    TARGET: tl.constexpr,
    REAL: tl.constexpr,
    BOTH: tl.constexpr,
    MEAN: tl.constexpr,
    MINUS: tl.constexpr,
    WITH_MONITORS: tl.constexpr,
    DOUBLE: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
):
    """A program's part of the loss, to losses[first + program], and of the four monitors, to monitored[k·chunks + first + program]:
    the probabilities of real and of generated samples, the accuracy and the value. tensors: how many there are of x's side; BOTH:
    whether there are others."""
    R: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    loss = few(tl.zeros((E,), R), V)
    if WITH_MONITORS:
        probability = loss
        right = loss
        log_term = loss
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        begin, element, inside = flat_elements(tile, count, E)
        logit = tl.load(x + begin + element, mask=inside).to(R)
        e = gan_logit(logit, APPROXIMATE)
        loss += few_terms(gan_loss_formula(logit, e, TARGET), inside, V)
        if WITH_MONITORS:
            u = logit if REAL else negative(logit)
            probability += few_terms(gan_probability(logit, e), inside, V)
            right += few_terms(gan_right(u), inside, V)
            log_term += few_terms(softplus(negative(u), e), inside, V)
    place = first + tl.program_id(0)
    tl.store(losses + place, stored(gan_factor(count, tl.float64, MEAN, MINUS) * tl.sum(loss, 0), losses))
    if WITH_MONITORS:
        # of nothing, ∞·0: NaN, as the mean of nothing is
        mean = tl.full((), 1.0, tl.float64) / (
            tl.full((), count, tl.int64).to(tl.float64) * tl.full((), tensors, tl.int64).to(tl.float64)
        )
        mean_probability = mean * tl.sum(probability, 0)
        nothing = tl.full((), 0.0, tl.float64)
        accuracy = mean * tl.sum(right, 0)
        if BOTH:
            accuracy = accuracy * tl.full((), 0.5, tl.float64)
        value = negative(mean * tl.sum(log_term, 0))
        tl.store(monitored + place, stored(mean_probability if REAL else nothing, monitored))
        tl.store(monitored + (chunks + place), stored(nothing if REAL else mean_probability, monitored))
        tl.store(monitored + (2 * chunks + place), stored(accuracy, monitored))
        tl.store(monitored + (3 * chunks + place), stored(value, monitored))


@triton.jit
def gan_finish_kernel(loss, monitored, losses, parts, chunks, C: tl.constexpr):
    """The sums of the chunks: program 0 that of the loss, the others those of the monitors."""
    output = tl.program_id(0)
    if output == 0:
        total = tl.sum(sum_of_chunks(losses, chunks, tl.zeros((1, 1), tl.int32), 1, 1, C), 0)
        tl.store(loss, stored(total, loss))
    else:
        total = tl.sum(sum_of_chunks(parts, chunks, output - 1 + tl.zeros((1, 1), tl.int32), 4, 1, C), 0)
        tl.store(monitored + (output - 1), stored(total, monitored))


@triton.jit
def gan_gradient_kernel(
    out,
    x,
    upstream,
    count,
    TARGET: tl.constexpr,
    MEAN: tl.constexpr,
    MINUS: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    DOUBLE: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    E: tl.constexpr,
):
    R: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    scale = gan_factor(count, R, MEAN, MINUS)  # not in float64, whose division takes 100 instructions
    if HAS_UPSTREAM:
        scale = scale * tl.load(upstream).to(R)
    positive_part = scale * splat(TARGET, scale)
    negative_part = scale * splat(1.0 - TARGET, scale)
    begin, element, inside = flat_elements(tl.program_id(0), count, E)
    logit = tl.load(x + begin + element, mask=inside).to(R)
    gradient = gan_gradient(logit, gan_logit(logit, APPROXIMATE), positive_part, negative_part)
    tl.store(out + begin + element, stored(gradient, out), mask=inside)


def _check(o):
    refuse(o)
    count, real, kind, reduction = len(o.logits), o.real, o.kind, o.reduction
    if not (0 <= real <= count and 0 <= kind <= len(KINDS) and reduction in (1, 2)):
        raise RuntimeError(f"expected 0 ≤ real ≤ {count}, a kind 0 … 2 and reduction 1 or 2, got {real}, {kind}, {reduction}")


def _own(k, o):
    """What a kernel has to know of tensor k."""
    double = result_dtype(o.logits) == torch.float64
    return {
        "TARGET": target_of(k, o),
        "MEAN": o.reduction == 1,
        "MINUS": o.kind == MINIMAX,
        "DOUBLE": double,
        "APPROXIMATE": is_half(o.logits[k].dtype) and not double,
    }


def _gradients(gradient, o):
    made = []
    for k, x in enumerate(o.logits):
        x = op.plain(x if dense(x) else x.contiguous())
        out = direct.made(empty_like(x))
        tile = op.flat_tile(x.numel(), (x,))
        op.launch(
            wrap_triton(gan_gradient_kernel),
            *(triton.cdiv(x.numel(), tile), x, out, x, x if gradient is None else op.plain(gradient), x.numel()),
            HAS_UPSTREAM=gradient is not None,
            E=tile,
            **_own(k, o),
        )
        made.append(out)
    return made


def gan_loss(o, monitors, gradients):
    """One launch for each tensor, and one that adds their parts up where there is more than one program."""
    _check(o)
    dtype, device, fake = result_dtype(o.logits), o.logits[0].device, len(o.logits) - o.real
    loss = op.empty((), dtype, device)
    monitored = op.empty((MONITORS,), dtype, device) if monitors else None
    programs = [programs_of(x.numel()) for x in o.logits]
    chunks = sum(programs)
    alone = is_one(chunks)
    losses = loss if alone else scratch(1, programs, loss)
    parts = monitored if alone or not monitors else scratch(MONITORS, programs, loss)
    first = 0
    for k, x in enumerate(o.logits):
        x = op.plain(x if dense(x) else x.contiguous())
        op.launch(
            wrap_triton(gan_sums_kernel),
            *(programs[k], x, losses, parts if monitors else x, x, x.numel(), triton.cdiv(x.numel(), TILE)),
            *(o.real if k < o.real else fake, first, chunks),
            REAL=k < o.real,
            BOTH=o.real > 0 and fake > 0,
            WITH_MONITORS=monitors,
            E=TILE,
            V=op.vector_of((x,), 1),
            **_own(k, o),
        )
        first = first + programs[k]
    if not alone and monitors:
        op.launch(wrap_triton(gan_finish_kernel), 1 + MONITORS, loss, loss, monitored, losses, parts, chunks, C=MOST_SUMS)
    elif not alone:
        op.launch(wrap_triton(sum_kernel), 1, loss, loss, losses, 1, chunks, 1, S=1, C=MOST_SUMS)
    made = [loss, monitored] if monitors else [loss]
    return made + _gradients(None, o) if gradients else made


def gan_loss_backward(gradient, o):
    _check(o)
    refuse(o._replace(logits=[gradient, *o.logits]))
    if gradient.numel() != 1:
        raise RuntimeError(f"gradient: expected one element, got shape {tuple(gradient.shape)}")
    return _gradients(gradient, o)
