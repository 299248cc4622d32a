"""The divergence of two diagonal Gaussians: public function, eager reference, fakes, autograd."""

from __future__ import annotations

import math

import torch

from .._core import checks, declared, dispatch
from .bce_with_logits import REDUCTIONS, Reduction
from .vlb_terms import excess

Operands = declared.OPERANDS["gaussian_kl"]


def gaussian_kl(
    mean: torch.Tensor,
    log_variance: torch.Tensor,
    other_mean: torch.Tensor | None = None,
    other_log_variance: torch.Tensor | None = None,
    *,
    clamp: tuple[float, float] | None = None,
    reduction: Reduction = "none",
) -> torch.Tensor:
    """The divergence of a diagonal Gaussian from another, or from N(0, I):

        KL(N(μ, σ²) ‖ N(μ', σ'²)) = ½·Σ(log σ'² − log σ² − 1 + (σ² + (μ − μ')²)/σ'²)

    Args:
        mean: μ, (B, *event), float16, bfloat16, float32 or float64. Its samples may be contiguous or channels-last, and lie apart,
            as those of a half of a tensor (B, 2C, ...) do, of which no copy is made; other strides are copied first.
        log_variance: log σ², the shape of mean, any of the four dtypes.
        other_mean: μ', the shape of mean, any of the four dtypes; 0 if None.
        other_log_variance: log σ'², the shape of mean, any of the four dtypes; 0 if None.
        clamp: a pair of numbers that log_variance and other_log_variance are clamped to. Outside they get no gradient.
        reduction: "none": (B,), "mean" or "sum" over the samples.

    Returns (B,), or a scalar, in nats, summed over the event, in float32, or float64 where a tensor is: half precision computes in
    float32 and is not rounded to. It is a sum of terms that are not negative, in a fixed order, and keeps its relative accuracy
    where the two are nearly the same. Differentiable in all four, twice; transforms of torch.func take the decomposed path.

    Raises TypeError for wrong types or dtypes, ValueError for wrong shapes, devices or values.

    Source: Kingma & Welling 2014, appendix B, for N(0, I); Ho et al. 2020, equation (5), for two.
    """
    checks.batched("mean", mean)
    others = (("log_variance", log_variance), ("other_mean", other_mean), ("other_log_variance", other_log_variance))
    for name, x in others:
        if x is not None or name == "log_variance":
            checks.like(name, x, "mean", mean)
    checks.option("reduction", reduction, REDUCTIONS)
    o = Operands(mean, log_variance, other_mean, other_log_variance, *checks.interval("clamp", clamp))
    kl = _run(dispatch.backend_for(mean.device), o)
    return kl if reduction == "none" else kl.mean() if reduction == "mean" else kl.sum()


def _run(backend, o):
    if backend == "eager":
        return reference(o)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in o[:4]):
        return _GaussianKl.apply(backend, *dispatch.distinct(o[:4]), o[4:])
    return dispatch.op("gaussian_kl", backend)(*o)


# ---- eager reference ------------------------------------------------------------------------------------------------------


def reference(o):
    """The kernel in plain PyTorch."""
    half, w, _ = _apart(o)
    return dispatch.sum_of_events(kl_of(half, w))


def gradients(gradient, o):
    """Those to mean, log_variance and other_log_variance, None where there is no other; differentiable, as `reference` is."""
    half, w, inverse_sigma = _apart(o)
    gradient = gradient.reshape(-1, *[1] * (half.dim() - 1))
    by_log_variance = kl_by_log_variance(half)
    to_mean = gradient * (w if inverse_sigma is None else w * inverse_sigma)
    to_log_variance = where_inside(o, o.log_variance, gradient * by_log_variance).to(o.log_variance.dtype)
    to_other = None
    if o.other_log_variance is not None:
        to_other = where_inside(o, o.other_log_variance, -gradient * (by_log_variance + 0.5 * w * w)).to(o.other_log_variance.dtype)
    return to_mean, to_log_variance, to_other


def kl_of(half, w):
    """Of elements, from log(σ/σ') and (μ − μ')/σ': a sum of what is never negative."""
    less_one = torch.expm1(half)
    return excess(-half) + 0.5 * (less_one * less_one + w * w)


def kl_by_log_variance(half):
    """½·((σ/σ')² − 1)."""
    less_one = torch.expm1(half)
    return 0.5 * less_one * (less_one + 2.0)


def clamped(o, log_variance):
    """Within the bounds of the operands. Not torch.clamp, whose derivative is 0 where the value is NaN."""
    if (o.lowest, o.highest) == (-math.inf, math.inf):
        return log_variance
    above = torch.where(log_variance < o.lowest, o.lowest, log_variance)
    return torch.where(above > o.highest, o.highest, above)


def where_inside(o, log_variance, derivative):
    """0 outside the bounds."""
    if (o.lowest, o.highest) == (-math.inf, math.inf):
        return derivative
    return torch.where((log_variance < o.lowest) | (log_variance > o.highest), 0.0, derivative)


def _apart(o):
    """log(σ/σ'), (μ − μ')/σ', and 1/σ' or None."""
    dtype = _compute_dtype(o)
    mean, own = o.mean.to(dtype), clamped(o, o.log_variance.to(dtype))
    distance = mean if o.other_mean is None else mean - o.other_mean.to(dtype)
    if o.other_log_variance is None:
        return 0.5 * own, distance, None
    other = clamped(o, o.other_log_variance.to(dtype))
    inverse_sigma = torch.exp(-0.5 * other)
    return 0.5 * (own - other), distance * inverse_sigma, inverse_sigma


def _compute_dtype(o):
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in o[:4]) else torch.float32


# ---- fakes ----------------------------------------------------------------------------------------------------------------


@dispatch.register_fake("gaussian_kl")
def _fake(o):
    dispatch.same_device(*(x for x in o[:4] if x is not None))
    return torch.empty(o.mean.shape[:1], dtype=_compute_dtype(o), device=o.mean.device)


@dispatch.register_fake("gaussian_kl_backward")
def _fake_backward(gradient, o):
    kl = _fake(o)
    dispatch.same_device(kl, gradient)
    channels_last = dispatch.has_channels_last_samples(o.mean)
    like = lambda x: dispatch.empty_like(o.mean, x.dtype, channels_last=channels_last)  # noqa: E731
    return like(o.mean), like(o.log_variance), kl.new_empty(0) if o.other_log_variance is None else like(o.other_log_variance)


# ---- autograd -------------------------------------------------------------------------------------------------------------


class _GaussianKl(torch.autograd.Function):
    """One fused kernel back. Where a second derivative may be asked for (create_graph), and under vmap, the same in torch ops."""

    @staticmethod
    def forward(ctx, backend, mean, log_variance, other_mean, other_log_variance, bounds):
        ctx.save_for_backward(mean, log_variance, other_mean, other_log_variance)
        ctx.backend, ctx.bounds = backend, bounds
        return dispatch.op("gaussian_kl", backend)(mean, log_variance, other_mean, other_log_variance, *bounds)

    @staticmethod
    def backward(ctx, gradient):
        o = Operands(*ctx.saved_tensors, *ctx.bounds)
        to_other_mean = None
        if ctx.needs_input_grad[3] and o.other_mean.dtype != o.mean.dtype:  # of which the one may not be rounded as the other is
            to_mean, to_log_variance, to_other = gradients(gradient, o)
        else:
            to_mean, to_log_variance, to_other = backward(ctx.backend, gradient, o)
        if ctx.needs_input_grad[3]:
            to_other_mean = -to_mean.to(o.other_mean.dtype)
        return None, to_mean.to(o.mean.dtype), to_log_variance, to_other_mean, to_other, None


def backward(backend, gradient, o):
    """The gradients to mean, in torch ops not rounded to its dtype, log_variance and other_log_variance, None where there is no
    other."""
    if torch.is_grad_enabled() or dispatch.batched(gradient):
        return gradients(gradient, o)
    found = dispatch.op("gaussian_kl_backward", backend)(gradient, *o)
    return found if o.other_log_variance is not None else (*found[:2], None)
