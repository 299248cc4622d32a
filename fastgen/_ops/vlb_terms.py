"""The terms of the variational bound: public function, eager reference, fakes, autograd."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from .._core import checks, declared, dispatch, rng
from ..schedule import LEARNED_VARIANCES, PREDICTIONS, VARIANCES, Prediction, Schedule, Variance
from . import diffusion_loss as simple
from .bce_with_logits import REDUCTIONS, Reduction

Operands = declared.OPERANDS["vlb_terms"]
Decoder = Literal["discretized", "gaussian"]
Unit = Literal["nats", "bits_per_dim"]
DECODERS, UNITS = get_args(Decoder), get_args(Unit)
# Of the op's decoders the other two, which end at these probabilities: those of guided-diffusion and denoising-diffusion-pytorch.
CLAMPED_DECODERS = {1e-12: 2, 1e-15: 3}


def vlb_terms(
    model_output: torch.Tensor,
    x0: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    *,
    x_t: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    offset: int = 0,
    prediction: Prediction = "epsilon",
    variance: Variance = "posterior",
    clip: float | None = None,
    decoder: Decoder = "discretized",
    detach_mean: bool = False,
    unit: Unit = "nats",
    reduction: Reduction = "none",
) -> torch.Tensor:
    """The term of the variational bound at each sample's own timestep, of a network's output m at x_t:

        t ≥ 1:  KL(q(x_{t−1} | x_t, x0) ‖ p(x_{t−1} | x_t)) = ½·Σ(log σ²/β̃ − 1 + (β̃ + (μ̃ − μ)²)/σ²),   p = N(μ, σ²)
        t = 0:  −log p(x0 | x_1) = −Σ log(Φ((x0 + 1/255 − μ)/σ) − Φ((x0 − 1/255 − μ)/σ))

    μ and σ are those of `ddpm_step`, μ̃ and β̃ those of `q_posterior`. At t = 0 the variances "posterior" and "beta" are β̃_1, a
    learned one is what the network says; "discretized" is Ho et al.'s decoder, in which the bins of the lowest and the highest of
    256 values in −1 … 1 are open, and "gaussian" takes the density N(μ, σ²) at x0 instead. x_t is given, or made anew in registers
    from x0 as `q_sample` made it: no noise tensor is stored.

    Args:
        model_output: m, the shape of x0, any of the four dtypes; (B, 2C, ...) with a learned variance, the second C channels
            being v.
        x0: (B, *event), float16, bfloat16, float32, float64 or uint8, contiguous or channels-last; other strides are copied first.
            A byte u stands for u/127.5 − 1, the middle of its bin, made of it in registers and rounded once.
        t: int or int64 tensor of shape (B,), 0-based, within 0 … T−1.
        schedule: a `Schedule` of T steps.
        x_t: the network's input, the shape of x0, any of the four floating dtypes but float64 where neither m nor x0 is; or one of
            noise and seed in its place.
        noise: ε, the shape of x0, any of the four floating dtypes, where `q_sample` was given it.
        seed: int or int64 tensor of 1 or B elements, as given to `q_sample`.
        offset: int within 0 … 2⁶³−1, as given to `q_sample`; with `seed` only.
        prediction: what m predicts: "epsilon", "sample" (x0) or "v_prediction".
        variance: σ² = β̃_t ("posterior"), β_t ("beta"), exp(v) ("learned"), or β_t^f·β̃_t^{1−f} with f = (v+1)/2
            ("learned_range").
        clip: a number c > 0; the x0 that m stands for is clamped to ±c.
        decoder: "discretized" or "gaussian", of the term at t = 0.
        detach_mean: with a learned variance only: v alone gets a gradient, as in the hybrid loss. What μ̃ − μ is counts as constant,
            for gradients to x0, x_t and noise too.
        unit: "nats", the sum over the event, or "bits_per_dim", the mean over the event divided by ln 2.
        reduction: "none": (B,), "mean" or "sum" over the samples.

    Returns (B,), or a scalar, in float32, or float64 where m or x0 is: half precision computes in float32 and is not rounded
    to. Sums are made in a fixed order. Log-probabilities keep their relative accuracy in the tails and near 0: nothing is clamped.
    Differentiable in m, twice; gradients to a floating x0, x_t or noise and forward-mode derivatives take the decomposed path.

    Raises TypeError for wrong types or dtypes, ValueError for wrong shapes, devices or values. A timestep outside the schedule
    is treated as in `q_sample`.

    Sources: Ho et al. 2020, equations (5), (7) and (13); learned variances, the hybrid loss: Nichol & Dhariwal 2021.
    """
    plan = dispatch.plan("vlb_terms", schedule, model_output, x0, prediction, variance)
    if plan is None:
        plan = _make_plan(model_output, x0, schedule, prediction, variance, None)
    _check_tensors(model_output, x0, x_t, noise, plan.learned)
    checks.option("decoder", decoder, DECODERS)
    checks.option("unit", unit, UNITS)
    checks.option("reduction", reduction, REDUCTIONS)
    checks.boolean("detach_mean", detach_mean)
    if clip is not None:
        clip = checks.number("clip", clip, low=0.0, strict=True)
    if detach_mean and not plan.learned:
        raise ValueError(f"detach_mean: expected False with variance={variance!r}, of which nothing is learned but the mean")
    scale = 1.0 if unit == "nats" else bits_per_dim(x0)
    source = _noise_source(x0, x_t, noise, seed), offset
    terms = _terms(plan, model_output, x0, t, x_t, source, clip, DECODERS.index(decoder), scale, True, detach_mean)
    return terms if reduction == "none" else terms.mean() if reduction == "mean" else terms.sum()


def hybrid_loss(model_output, x0, t, schedule, source, prediction, variance, decoder, vlb_weight, simple_loss, gamma, reduction):
    """`diffusion_loss` with a learned variance: w·ℓ(m − target) + λ·T·L_t of each element, L_t in bits, added up at once."""
    weighting = "uniform" if gamma is None else gamma
    option = prediction, weighting
    plan = dispatch.plan("vlb_terms", schedule, model_output, x0, option, variance)
    if plan is None:
        plan = _make_plan(model_output, x0, schedule, prediction, variance, weighting)
    noise, seed, offset = source
    loss, delta, weights = simple_loss
    _check_tensors(model_output, x0, None, noise, True)
    checks.option("decoder", decoder, DECODERS)
    checks.option("loss", loss, simple.LOSSES)
    checks.option("reduction", reduction, REDUCTIONS)
    vlb_weight = checks.number("vlb_weight", vlb_weight, low=0.0) * len(schedule) / math.log(2.0)
    hybrid = simple.LOSSES.index(loss), checks.number("delta", delta, low=0.0, strict=True), weights, vlb_weight
    # A compiled program is for events of one size, which is among its constants, and for batches of any.
    mean_of_each = reduction == "mean" and dispatch.traced()
    scale = (
        1.0 if reduction == "sum" else _over(x0.numel() if reduction == "mean" and not mean_of_each else math.prod(x0.shape[1:]))
    )
    if noise is None and seed is None:
        raise ValueError("noise, seed: expected the one that q_sample was given, of which x_t is made again; got neither")
    source = _noise_source(x0, None, noise, seed), offset
    each_sample = reduction == "none" or mean_of_each
    terms = _terms(plan, model_output, x0, t, None, source, None, DECODERS.index(decoder), scale, each_sample, True, hybrid)
    return terms.mean() if mean_of_each else terms


NOT_HYBRID = -1, 1.0, None, 1.0
BY_ITSELF, WITH_SIMPLE, APART, WITH_ERROR = "by itself", "with simple", "apart", "with error"


def terms_with(
    coefficients,
    model_output,
    x0,
    t,
    *,
    x_t=None,
    noise=None,
    seed=None,
    clip=None,
    decoder=0,
    learned=False,
    detach_mean=False,
    what=BY_ITSELF,
    vlb_weight=1.0,
    reduction="none",
):
    """`vlb_terms` in bits per dimension times `vlb_weight`, with the `Coefficients` of another library, rows of the columns of
    `tables.VLB_TERMS_COLUMNS`, and one of the op's own decoders.

    what: WITH_SIMPLE, plus the mean of the squared errors, or APART: that mean, and the term. Or WITH_ERROR: the term, and the mean
    of the squared errors of x̂0, without gradients, None where that is no sum of the same pass."""
    plan = dispatch.plan("vlb_terms", coefficients, model_output, x0, learned)
    if plan is None:
        _check_tensors(model_output, x0, None, None, learned)
        dtype = checks.compute_dtype(checks.result_dtype(model_output, x0))
        table = coefficients.table(x0.device, dtype)
        plan = dispatch.make_plan("vlb_terms", coefficients, model_output, x0, dtype, table, learned, None, learned)
    _check_tensors(model_output, x0, x_t, noise, plan.learned)
    scale, hybrid = _over(math.prod(x0.shape[1:])) if reduction == "none" else _over(x0.numel()), NOT_HYBRID
    if what in (WITH_SIMPLE, APART):
        hybrid = 0, 1.0, None, vlb_weight / math.log(2.0)
    else:
        scale = scale * vlb_weight / math.log(2.0)
    source = _noise_source(x0, x_t, noise, seed), 0
    run = {APART: _run_apart, WITH_ERROR: _run_with_error}.get(what, _run)
    return _terms(plan, model_output, x0, t, x_t, source, clip, decoder, scale, reduction == "none", detach_mean, hybrid, run)


def _terms(plan, model_output, x0, t, x_t, source, clip, decoder, scale, each_sample, detach_mean, hybrid=NOT_HYBRID, run=None):
    own_t, index = dispatch.timestep(plan, t, x0)
    (noise, seeds, seed), offset = source
    offset = rng.check_offset(offset)
    if plan.rows.dtype != torch.float64 and x_t is not None and x_t.dtype == torch.float64:
        raise TypeError("x_t: expected no float64 where neither x0 nor model_output is, got float64")
    loss, delta, weights, vlb_weight = hybrid
    if weights is not None:
        weights = simple.checked_weights(weights, x0, plan.rows.dtype)
    o = Operands(
        *(model_output, x0, plan.rows, own_t, index, x_t, noise, seeds, seed, offset, clip, plan.learned, decoder, scale),
        *(each_sample, loss, delta, weights, vlb_weight),
    )
    try:
        return (run or _run)(plan, o, detach_mean)
    except (RuntimeError, TypeError):
        checks.timestep(t, x0, plan.end, plan.note)
        raise


def bits_per_dim(x0):
    """What nats are to be multiplied by; of no dimensions 0 nats are 0 bits."""
    return 1.0 / (max(math.prod(x0.shape[1:]), 1) * math.log(2.0))


def _over(count):
    """1/count, and a factor that makes NaN of the sum of nothing."""
    return 1.0 / count if count else math.inf


def _make_plan(model_output, x0, schedule, prediction, variance, weighting):
    checks.schedule(schedule)
    checks.option("prediction", prediction, PREDICTIONS)
    checks.option("variance", variance, VARIANCES)
    learned = variance in LEARNED_VARIANCES
    _check_tensors(model_output, x0, None, None, learned)
    dtype = checks.compute_dtype(checks.result_dtype(model_output, x0))
    table = schedule.vlb_terms_table(prediction, variance, x0.device, dtype, weighting)
    option = prediction if weighting is None else (prediction, weighting)
    return dispatch.make_plan("vlb_terms", schedule, model_output, x0, dtype, table, option, variance, learned)


def _check_tensors(model_output, x0, x_t, noise, learned):
    checks.batched("x0", x0, or_bytes=True)
    if learned:
        checks.two_channels("model_output", model_output, "x0", x0)
    else:
        checks.like("model_output", model_output, "x0", x0)
    for name, x in (("x_t", x_t), ("noise", noise)):
        if x is not None:
            checks.like(name, x, "x0", x0)


def _noise_source(x0, x_t, noise, seed):
    if x_t is not None:
        if noise is not None or seed is not None:
            raise ValueError("x_t, noise, seed: expected one of them, got x_t and another")
        return None, None, None
    if noise is None and seed is None:
        raise ValueError("x_t, noise, seed: expected x_t, or what q_sample was given to make it, got none of them")
    return rng.noise_source("x0", x0, x0.dtype, noise, seed, None)


def _run(plan, o, detach_mean):
    if _decomposed(plan, o):
        return reference(o, detach_mean)
    if torch.is_grad_enabled() and o.model_output.requires_grad:
        return _VlbTerms.apply(plan.backend, detach_mean, o.model_output, o[1:])
    return plan.call(*o)


def _decomposed(plan, o):
    others = (o.x0, o.x_t, o.noise, o.weights)
    return plan.call is None or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in others))


def _run_apart(plan, o, detach_mean):
    """The simple loss and the term of a hybrid loss."""
    parts = _parts(o)
    if _decomposed(plan, o):
        return tuple(reference(part, detach_mean) for part in parts)
    if torch.is_grad_enabled() and o.model_output.requires_grad:
        return _Parts.apply(plan.backend, detach_mean, o.model_output, o[1:])
    return tuple(plan.call(*part) for part in parts)


def _run_with_error(plan, o, detach_mean):
    if _WITH_ERROR and plan.backend == "cpp" and o.x0.is_cpu:
        return dispatch.op("vlb_terms_and_error", "cpp")(*o)
    return _run(plan, o, detach_mean), None


def _parts(o):
    return o._replace(vlb_weight=0.0), o._replace(loss=-1, vlb_weight=1.0, scale=o.scale * o.vlb_weight)


# ---- eager reference ------------------------------------------------------------------------------------------------------

HALF_BIN = 1.0 / 255
ENDS = 0.999  # beyond which a bin is open (Ho et al.'s released code)


def reference(o, detach_mean=False):
    """The kernel in plain PyTorch. rows: (T, 14), the columns of `tables.VLB_TERMS_COLUMNS`."""
    rows = dispatch.gathered(o.rows, o.t, o.index, o.x0.dim())
    scale, sigma, x0_from_x, x0_from_m, mean_from_x0, log_posterior, slope, intercept, constant, precision, decoder = rows[:11]
    dtype, noise = o.rows.dtype, o.noise
    x0, m, v = dispatch.real_of(o.x0, dtype), o.model_output.to(dtype), None
    if o.learned:
        m, v = m.chunk(2, 1)
    if o.x_t is not None:
        x_t = o.x_t.to(dtype)
    else:
        if noise is None:
            noise = rng.normals(o.x0.shape, o.seeds, o.seed, o.offset, o.x0.device, dtype)
        x_t = dispatch.with_noise(scale * x0, sigma, noise)
    found = x0_from_x * x_t + x0_from_m * m
    if o.clip is not None:
        bound = min(o.clip, torch.finfo(dtype).max)
        found = found.clamp(-bound, bound)
    off = mean_from_x0 * (x0 - found)  # μ̃ − μ, and at t = 0 x0 − μ
    if detach_mean:
        off = off.detach()
    log_variance = intercept.expand_as(off) if v is None else slope * v + intercept
    if v is None:
        kl = constant + 0.5 * precision * off * off
    else:
        kl = 0.5 * (excess(log_variance - log_posterior) + off * off * torch.exp(-log_variance))
    if o.t is None and o.index > 0:
        terms = kl
    else:
        terms = torch.where(decoder == 0, kl, _decoded(o.decoder, x0, off, log_variance))
    if o.loss >= 0:
        from_x0, from_noise, weight = rows[11:]
        r = dispatch.with_noise(m - from_x0 * x0, -from_noise, noise)
        losses = simple.weighted(weight, o.weights, r.dim()) * simple.loss_of(r, o.loss, o.delta)
        terms = losses + o.vlb_weight * terms if o.vlb_weight else losses
    return o.scale * (dispatch.sum_of_events(terms) if o.each_sample else terms.sum())


def _decoded(decoder, x0, off, log_variance):
    if decoder == 1:
        return _gaussian(off, log_variance)
    if decoder == 0:
        return -log_bin(x0, off, 0.5 * log_variance)
    (floor,) = (floor for floor, index in CLAMPED_DECODERS.items() if index == decoder)
    return -_log_approximate_bin(x0, off, torch.exp(-0.5 * log_variance), floor)


def excess(x):
    """x − 1 + e^{−x}, which is small where x is: x²/2 − x³/6 …"""
    near = x.abs() < 0.5
    small = torch.where(near, x, 0.0)
    sum_of = torch.zeros_like(x)
    for k in range(18 if x.dtype == torch.float64 else 9, 1, -1):
        sum_of = (1.0 - small * sum_of) / k
    return torch.where(near, small * small * sum_of, x - 1.0 + torch.exp(torch.where(near, 0.0, -x)))


def _gaussian(off, log_variance):
    return 0.5 * (math.log(2.0 * math.pi) + log_variance + off * off * torch.exp(-log_variance))


def _log_approximate_bin(x0, off, inverse_sigma, floor):
    """With Φ(x) ≈ (1 + tanh(√(2/π)·(x + 0.044715·x³)))/2, and no probability below `floor`."""
    cdf = lambda x: 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))))  # noqa: E731
    above, below = cdf(inverse_sigma * (off + HALF_BIN)), cdf(inverse_sigma * (off - HALF_BIN))
    inside = torch.where(x0 < -ENDS, above, torch.where(x0 > ENDS, 1.0 - below, above - below))
    return torch.log(inside.clamp(min=floor))


def log_bin(x0, off, log_sigma):
    """log P(x0 − 1/255 < X < x0 + 1/255) of X ~ N(x0 − off, σ²), for the ends of −1 … 1 without the bound that lies outside.

    With the bin's middle at c deviations from the mean and half its width w of them, a = c − w and b = c + w:

        a ≤ 0           log1p(−Q(b) − Q(−a))                                     Q(x) = e^{−x²/2}·erfcx(x/√2)/2, the upper tail
        a > 0           log Q(a) + log1p(−Q(b)/Q(a))                             in which Q(b)/Q(a) has a factor e^{−2cw}
        w very small    log(2w·φ(c)) + log(sinh(y)/y) + log1p(−w²E/2)            y = cw, E the mean of s² over cosh(ys), 0 < s < 1

    The last for bins so narrow that what the others subtract is nearly all of it.
    """
    sigma = torch.exp(log_sigma)
    low, high = x0 < -ENDS, x0 > ENDS
    ends = low | high
    c = torch.where(low, -off, torch.where(high, off, off.abs())) / sigma
    w = HALF_BIN / sigma
    narrow = (w < (1e-3 if x0.dtype == torch.float64 else 0.0625)) & ~ends
    return torch.where(narrow, _log_narrow(torch.where(narrow, c, 0.0), torch.where(narrow, w, 1.0)), _log_wide(c, w, ends, narrow))


def _log_wide(c, w, ends, narrow):
    w, c = torch.where(narrow, 1.0, w), torch.where(narrow, 2.0, c)
    a, b = c - w, torch.where(ends, 1.0, c + w)
    inside = a <= 0
    tail_a, tail_b = (torch.special.erfcx(x * math.sqrt(0.5)) for x in (a.abs(), b))
    outside = 0.5 * (torch.exp(-0.5 * a * a) * tail_a + torch.where(ends, 0.0, torch.exp(-0.5 * b * b) * tail_b))
    share = torch.where(ends | inside, 0.0, torch.exp(-2.0 * torch.where(ends, 0.0, c * w)) * tail_b / tail_a)
    beyond = -0.5 * a * a + torch.log(0.5 * tail_a) + torch.log1p(-share)
    return torch.where(inside, torch.log1p(-torch.where(inside, outside, 0.0)), beyond)


def _log_narrow(c, w):
    y = c * w
    near = y < 1
    small, large = torch.where(near, y, 1.0), torch.where(near, 1.0, y)
    s = small * small
    powers = [_series(s, k) for k in (0, 1)]  # the integrals of cosh(ys) and of s²·cosh(ys)
    log_ratio = torch.where(near, torch.log(powers[0]), large - torch.log(2.0 * large) + torch.log1p(-torch.exp(-2.0 * large)))
    square = torch.where(near, powers[1] / powers[0], 1.0 - 2.0 * (1.0 / torch.tanh(large) - 1.0 / large) / large)
    return -0.5 * c * c + torch.log(w * math.sqrt(2.0 / math.pi)) + log_ratio + torch.log1p(-0.5 * w * w * square)


def _series(s, k):
    """Σ_j s^j/((2j)!·(2j + 2k + 1))"""
    total = torch.zeros_like(s)
    for j in range(9, -1, -1):
        total = total * s + 1.0 / (math.factorial(2 * j) * (2 * j + 2 * k + 1))
    return total


# ---- fakes ----------------------------------------------------------------------------------------------------------------


@dispatch.register_fake("vlb_terms")
def _fake(o):
    dispatch.same_device(o.model_output, o.x0, o.rows, o.t, o.x_t, o.noise, o.weights)
    dtype = checks.compute_dtype(checks.result_dtype(o.model_output, o.x0))
    return torch.empty(o.x0.shape[:1] if o.each_sample else (), dtype=dtype, device=o.x0.device)


@dispatch.register_fake("vlb_terms_and_error")
def _fake_and_error(o):
    return _fake(o), _fake(o)


@dispatch.register_fake("vlb_terms_and_gradient")
def _fake_and_gradient(o, detach_mean, apart):
    terms, gradient = _fake(o), dispatch.empty_like(o.x0, o.model_output.dtype, 2 if o.learned else 1)
    return terms, torch.empty_like(terms) if apart else terms.new_empty(0), gradient


@dispatch.register_fake("vlb_terms_backward")
def _fake_backward(gradient, o, detach_mean):
    dispatch.same_device(_fake(o), gradient)
    return dispatch.empty_like(o.x0, o.model_output.dtype, 2 if o.learned else 1)


# ---- autograd -------------------------------------------------------------------------------------------------------------


# Ops of the CPU alone.
_AHEAD, _WITH_ERROR = dispatch.has("vlb_terms_and_gradient"), dispatch.has("vlb_terms_and_error")


class _VlbTerms(torch.autograd.Function):
    """One fused kernel back, which makes the same noise again. Where a second derivative may be asked for (create_graph), the
    reference's own derivative.

    On the CPU, where noise and exponentials cost more than memory, the forward writes the derivative for an upstream gradient of 1
    too, and the first backward multiplies it and hands it on."""

    @staticmethod
    def forward(ctx, backend, detach_mean, model_output, rest):
        o = _saved(ctx, backend, detach_mean, model_output, rest)
        if _makes_ahead(o, backend):
            terms, _, ctx.made = dispatch.op("vlb_terms_and_gradient", backend)(*o, detach_mean, False)
            return terms
        return dispatch.op("vlb_terms", backend)(*o)

    @staticmethod
    def backward(ctx, gradient):
        o = _restored(ctx)
        made, ctx.made = ctx.made, None  # given away once: whoever gets it may write to it
        if torch.is_grad_enabled() or dispatch.batched(gradient):
            return None, None, _decomposed_backward(o, ctx.detach_mean, gradient), None
        if made is not None and dispatch.multiplied((made,), gradient):
            return None, None, made, None
        made = None  # its memory, before another is allocated
        return None, None, dispatch.op("vlb_terms_backward", ctx.backend)(gradient, *o, ctx.detach_mean), None


class _Parts(torch.autograd.Function):
    """The simple loss and the term, whose sum has one fused kernel back."""

    @staticmethod
    def forward(ctx, backend, detach_mean, model_output, rest):
        ctx.set_materialize_grads(False)
        o = _saved(ctx, backend, detach_mean, model_output, rest)
        if _makes_ahead(o, backend):
            term, simple, ctx.made = dispatch.op("vlb_terms_and_gradient", backend)(*o, detach_mean, True)
            return simple, term
        return tuple(dispatch.op("vlb_terms", backend)(*part) for part in _parts(o))

    @staticmethod
    def backward(ctx, *gradients):
        o = _restored(ctx)
        made, ctx.made = ctx.made, None
        given = [(part, g) for part, g in zip(_parts(o), gradients, strict=True) if g is not None]
        if torch.is_grad_enabled() or any(dispatch.batched(g) for _, g in given):
            found = [_decomposed_backward(part, ctx.detach_mean, g) for part, g in given]
        else:
            if len(given) == 2 and _one(*gradients):
                if made is not None and dispatch.multiplied((made,), gradients[0]):
                    return None, None, made, None
                given = [(o, gradients[0])]
            found = [dispatch.op("vlb_terms_backward", ctx.backend)(g, *part, ctx.detach_mean) for part, g in given]
        return None, None, sum(found[1:], found[0]) if found else None, None


def _makes_ahead(o, backend):
    """In a narrower dtype than the arithmetic's a product with the upstream gradients would be rounded twice, so there the backward
    has to make it."""
    rounds_once = o.model_output.dtype == o.rows.dtype or not o.each_sample
    return _AHEAD and rounds_once and dispatch.makes_ahead(backend, o.model_output)


def _one(a, b):
    """Whether two gradients are one tensor, as autograd has it for those of a sum."""
    plain = type(a) is type(b) is torch.Tensor and not torch.compiler.is_compiling()  # a fake tensor has no address
    return plain and a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _saved(ctx, backend, detach_mean, model_output, rest):
    o = Operands(model_output, *rest)
    ctx.save_for_backward(model_output, o.x0, o.t, o.x_t, o.noise, o.seeds, o.weights)
    ctx.backend, ctx.detach_mean, ctx.made = backend, detach_mean, None
    ctx.others = o._replace(model_output=None, x0=None, t=None, x_t=None, noise=None, seeds=None, weights=None)
    return o


def _restored(ctx):
    model_output, x0, t, x_t, noise, seeds, weights = ctx.saved_tensors
    return ctx.others._replace(model_output=model_output, x0=x0, t=t, x_t=x_t, noise=noise, seeds=seeds, weights=weights)


def _decomposed_backward(o, detach_mean, gradient):
    with torch.enable_grad():
        m = o.model_output if o.model_output.requires_grad else o.model_output.detach().requires_grad_()
        terms = reference(o._replace(model_output=m), detach_mean)
        (to_m,) = torch.autograd.grad(terms, m, gradient, create_graph=True, materialize_grads=True)
    return to_m
