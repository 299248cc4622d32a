"""A sample of a diagonal Gaussian as a function of its parameters, and its divergence from N(0, I): public function, eager
reference, fakes, autograd."""

from __future__ import annotations

from typing import Literal, overload

import torch

from .._core import checks, declared, dispatch, rng
from .._core.torch_cuda import TorchCudaGenerator
from . import gaussian_kl

Operands = declared.OPERANDS["reparameterize"]


@overload
def reparameterize(
    mean: torch.Tensor,
    log_variance: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | TorchCudaGenerator | None = None,
    offset: int = 0,
    clamp: tuple[float, float] | None = None,
    return_kl: Literal[False] = False,
) -> torch.Tensor: ...
@overload
def reparameterize(
    mean: torch.Tensor,
    log_variance: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | TorchCudaGenerator | None = None,
    offset: int = 0,
    clamp: tuple[float, float] | None = None,
    return_kl: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def reparameterize(
    mean: torch.Tensor,
    log_variance: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | TorchCudaGenerator | None = None,
    offset: int = 0,
    clamp: tuple[float, float] | None = None,
    return_kl: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """A sample of q = N(μ, σ²), the posterior of a variational autoencoder, as a function of its parameters; and from the same pass
    its divergence from the prior:

        z = μ + σ·ε,   σ = exp(½·log σ²),   ε ~ N(0, I)
        KL(q ‖ N(0, I)) = ½·Σ(μ² + σ² − 1 − log σ²)

    Args:
        mean: μ, (B, *event), float16, bfloat16, float32 or float64. Its samples may be contiguous or channels-last, and lie apart,
            as those of a half of a tensor (B, 2C, ...) do, of which no copy is made; other strides are copied first.
        log_variance: log σ², the shape of mean, any of the four dtypes.
        noise: ε itself, the shape of mean, any of the four dtypes.
        seed: int or int64 tensor of 1 or B elements; ε is then `fastgen.randn(mean.shape, seed=seed, offset=offset)`, made in
            registers and never stored, and made again in a backward.
        generator: a `torch.Generator`; ε is then `torch.randn(mean.shape, generator=generator, dtype=dtype)` in the result's dtype.
            Or a `TorchCudaGenerator`.
        offset: int within 0 … 2⁶³−1; with `seed` only.
        clamp: a pair of numbers that log_variance is clamped to, (−30, 20) in diffusers. Outside it gets no gradient.
        return_kl: whether to return the divergence as well.

    With no noise source, a seed is drawn from torch's default CPU generator. Returns z with the shape and layout of mean and the
    promoted dtype of the two; with return_kl=True (z, kl), where kl is (B,), in nats, in float32, or float64 where a parameter is
    that: half precision computes in float32, and z alone is rounded to it. The divergence is a sum of terms that are not negative,
    in a fixed order, and keeps its relative accuracy where q is nearly the prior. z is the same with it and without. Differentiable
    in mean and log_variance, twice; a gradient to noise and transforms of torch.func take the decomposed path.

    Raises TypeError for wrong types or dtypes, ValueError for wrong shapes, devices or values, before anything is drawn.

    Source: Kingma & Welling 2014, section 2.4 and appendix B.
    """
    check_parameters(mean, log_variance)
    if noise is not None:
        checks.like("noise", noise, "mean", mean)
    lowest, highest = checks.interval("clamp", clamp)
    checks.boolean("return_kl", return_kl)
    offset = rng.check_offset(offset)
    noise, seeds, seed = rng.noise_source("mean", mean, checks.result_dtype(mean, log_variance), noise, seed, generator)
    o = Operands(log_variance, noise, seeds, seed, offset, lowest, highest)
    backend = dispatch.backend_for(mean.device)
    recorded = torch.is_grad_enabled()
    if backend == "eager" or (recorded and noise is not None and noise.requires_grad):
        return reference(mean, o, return_kl)
    if recorded and (mean.requires_grad or log_variance.requires_grad):
        mean, log_variance = dispatch.distinct((mean, log_variance))
        return (_SampleAndKl if return_kl else _Sample).apply(backend, mean, log_variance, o[1:])
    return dispatch.op("reparameterize_kl" if return_kl else "reparameterize", backend)(mean, *o)


def check_parameters(mean, log_variance):
    checks.batched("mean", mean)
    checks.like("log_variance", log_variance, "mean", mean)


# ---- eager reference ------------------------------------------------------------------------------------------------------


def reference(mean, o, return_kl=False):
    """The kernel in plain PyTorch."""
    dtype = checks.result_dtype(mean, o.log_variance)
    half, noise = _half_and_noise(o, checks.compute_dtype(dtype))
    mean = mean.to(half.dtype)
    z = (mean + torch.exp(half) * noise).to(dtype)
    return (z, dispatch.sum_of_events(gaussian_kl.kl_of(half, mean))) if return_kl else z


def gradients(gradient, kl_gradient, mean, o):
    """Those to mean and log_variance of the gradients to z and the divergence, or to z alone; differentiable, as `reference` is."""
    half, noise = _half_and_noise(o, checks.compute_dtype(checks.result_dtype(gradient, o.log_variance)))
    to_mean = gradient.to(half.dtype)
    to_log_variance = 0.5 * to_mean * (torch.exp(half) * noise)
    if kl_gradient is not None:
        kl_gradient = kl_gradient.reshape(-1, *[1] * (half.dim() - 1))
        to_mean = to_mean + kl_gradient * mean.to(half.dtype)
        to_log_variance = to_log_variance + kl_gradient * gaussian_kl.kl_by_log_variance(half)
    return to_mean, gaussian_kl.where_inside(o, o.log_variance, to_log_variance).to(o.log_variance.dtype)


def _half_and_noise(o, dtype):
    """½·log σ², and ε."""
    noise = o.noise
    if noise is None:
        noise = rng.normals(o.log_variance.shape, o.seeds, o.seed, o.offset, o.log_variance.device, dtype)
    return 0.5 * gaussian_kl.clamped(o, o.log_variance.to(dtype)), noise.to(dtype)


# ---- fakes ----------------------------------------------------------------------------------------------------------------


@dispatch.register_fake("reparameterize")
def _fake(mean, o):
    dispatch.same_device(mean, o.log_variance, o.noise)
    return _like(mean, checks.result_dtype(mean, o.log_variance))


@dispatch.register_fake("reparameterize_kl")
def _fake_kl(mean, o):
    z = _fake(mean, o)
    return z, torch.empty(z.shape[:1], dtype=checks.compute_dtype(z.dtype), device=z.device)


@dispatch.register_fake("reparameterize_backward")
def _fake_backward(gradient, o):
    dispatch.same_device(o.log_variance, gradient, o.noise)
    return _like(o.log_variance)


@dispatch.register_fake("reparameterize_kl_backward")
def _fake_kl_backward(gradient, kl_gradient, mean, o):
    dispatch.same_device(o.log_variance, gradient, kl_gradient, mean, o.noise)
    return _like(o.log_variance, mean.dtype), _like(o.log_variance)


def _like(x, dtype=None):
    return dispatch.empty_like(x, dtype, channels_last=dispatch.has_channels_last_samples(x))


# ---- autograd -------------------------------------------------------------------------------------------------------------


class _Sample(torch.autograd.Function):
    """The gradient to the mean is that of z; that to log_variance is one kernel, which makes the same noise again. Where a second
    derivative may be asked for (create_graph), and under vmap, the same in torch ops."""

    @staticmethod
    def forward(ctx, backend, mean, log_variance, rest):
        ctx.mean_dtype = mean.dtype
        return dispatch.op("reparameterize", backend)(mean, *_saved(ctx, backend, None, log_variance, rest))

    @staticmethod
    def backward(ctx, gradient):
        return None, *_of_sample(ctx, gradient, ctx.mean_dtype, _restored(ctx)[1]), None


class _SampleAndKl(torch.autograd.Function):
    """The same for both results: one kernel, whichever of them has a gradient."""

    @staticmethod
    def forward(ctx, backend, mean, log_variance, rest):
        ctx.set_materialize_grads(False)
        return dispatch.op("reparameterize_kl", backend)(mean, *_saved(ctx, backend, mean, log_variance, rest))

    @staticmethod
    def backward(ctx, gradient, kl_gradient):
        if gradient is None and kl_gradient is None:
            return None, None, None, None
        mean, o = _restored(ctx)
        if kl_gradient is None:
            return None, *_of_sample(ctx, gradient, mean.dtype, o), None
        if gradient is None:
            kl = gaussian_kl.Operands(mean, o.log_variance, None, None, o.lowest, o.highest)
            to_mean, to_log_variance, _ = gaussian_kl.backward(ctx.backend, kl_gradient, kl)
            return None, to_mean.to(mean.dtype), to_log_variance, None
        if torch.is_grad_enabled() or dispatch.batched(gradient) or dispatch.batched(kl_gradient):
            to_mean, to_log_variance = gradients(gradient, kl_gradient, mean, o)
            return None, to_mean.to(mean.dtype), to_log_variance, None
        return None, *dispatch.op("reparameterize_kl_backward", ctx.backend)(gradient, kl_gradient, mean, *o), None


def _saved(ctx, backend, mean, log_variance, rest):
    o = Operands(log_variance, *rest)
    ctx.save_for_backward(mean, log_variance, o.noise, o.seeds)
    ctx.backend, ctx.others = backend, o._replace(log_variance=None, noise=None, seeds=None)
    return o


def _restored(ctx):
    mean, log_variance, noise, seeds = ctx.saved_tensors
    return mean, ctx.others._replace(log_variance=log_variance, noise=noise, seeds=seeds)


def _of_sample(ctx, gradient, mean_dtype, o):
    """The gradients to the mean and log_variance of that to z."""
    if not ctx.needs_input_grad[2]:
        return gradient.to(mean_dtype), None
    if torch.is_grad_enabled() or dispatch.batched(gradient):
        to_mean, to_log_variance = gradients(gradient, None, None, o)
        return to_mean.to(mean_dtype), to_log_variance
    return gradient.to(mean_dtype), dispatch.op("reparameterize_backward", ctx.backend)(gradient, *o)
