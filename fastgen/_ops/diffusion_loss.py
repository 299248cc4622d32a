"""The training loss of a diffusion model: public function, eager reference, fakes, autograd."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from .._core import checks, declared, dispatch, rng
from ..schedule import LEARNED_VARIANCES, PREDICTIONS, LearnedVariance, Prediction, Schedule
from . import vlb_terms as bound
from .bce_with_logits import REDUCTIONS, Reduction

Operands = declared.OPERANDS["diffusion_loss"]
Loss = Literal["mse", "l1", "huber"]
LOSSES = get_args(Loss)
EPSILON, SAMPLE = PREDICTIONS.index("epsilon"), PREDICTIONS.index("sample")


def diffusion_loss(
    model_output: torch.Tensor,
    x0: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    *,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    offset: int = 0,
    prediction: Prediction = "epsilon",
    loss: Loss = "mse",
    delta: float = 1.0,
    weighting: Literal["min_snr"] | torch.Tensor | None = None,
    snr_gamma: float = 5.0,
    reduction: Reduction = "mean",
    variance: LearnedVariance | None = None,
    vlb_weight: float = 0.001,
    decoder: Literal["discretized", "gaussian"] = "discretized",
) -> torch.Tensor:
    """The error of a network's output m at x_t = `q_sample(x0, t, schedule, seed=s)`, made with the same seed:

        loss = mean of w_t·ℓ(m − target),   target = ε, x0 or v = √ᾱ_t·ε − √(1−ᾱ_t)·x0

    ε is the noise that `q_sample` added. It is made anew in registers, here and in the backward, from the same seed and offset:
    no noise tensor is ever stored. With a learned variance it is the hybrid loss, in the same one launch: the mean of

        w_t·ℓ(m − target) + λ·T·L_t

    in which L_t is the element's term of the variational bound, `vlb_terms`, in bits, whose gradient reaches v alone.

    Args:
        model_output: m, the shape of x0, float16, bfloat16, float32 or float64; of half precision under autocast, say.
            (B, 2C, ...) with a learned variance, the second C channels being v.
        x0: (B, *event), any of the four dtypes, or uint8: a byte u stands for u/127.5 − 1, made of it in registers and rounded
            once. Not read for epsilon prediction without a variance.
        t: int or int64 tensor of shape (B,), 0-based, within 0 … T−1, as given to `q_sample`.
        schedule: a `Schedule` of T steps.
        noise: ε itself, the shape of x0, any of the four floating dtypes, where `q_sample` was given it.
        seed: int or int64 tensor of 1 or B elements, as given to `q_sample`. Either is needed unless prediction is "sample" and no
            variance is learned.
        offset: int within 0 … 2⁶³−1, as given to `q_sample`; with `seed` only.
        prediction: what m predicts: "epsilon", "sample" (x0) or "v_prediction".
        loss: "mse" (ℓ(r) = r²), "l1" (|r|) or "huber" (r²/2 where |r| ≤ δ, else δ·(|r| − δ/2)).
        delta: a number δ > 0; with loss "huber" only.
        weighting: None (w = 1), "min_snr" or a floating tensor (B,) of weights. With SNR = ᾱ_t/(1−ᾱ_t), min-SNR-γ is
            w = min(SNR, γ)/SNR for epsilon, min(SNR, γ) for sample and min(SNR, γ)/(SNR + 1) for v prediction.
        snr_gamma: a number γ > 0; with weighting "min_snr" only.
        reduction: "mean" (over all elements), "sum", or "none": (B,), each sample's mean over its elements.
        variance: None, or what v says: "learned" (log σ²) or "learned_range", as in `ddpm_step`.
        vlb_weight: a number λ ≥ 0; with a learned variance only. T·L_t stands for the whole bound where t is uniform: 1/T weighs
            the term as the simple loss.
        decoder: of L_0, "discretized" or "gaussian", as in `vlb_terms`; with a learned variance only.

    Returns a scalar, or (B,), in float32, or float64 where m or x0 is: half precision computes in float32 and is not rounded
    to. The mean of nothing is NaN. Sums are made in a fixed order, of float32 within runs of at most 1024 elements and of
    float64 beyond: the same bits on every run, for any number of threads. Differentiable in m, in a floating x0 where the target
    depends on it, twice; gradients to noise or weights, with a learned variance those to x0 too, and forward-mode derivatives take
    the decomposed path.

    Raises TypeError for wrong types or dtypes, ValueError for wrong shapes, devices or values. A timestep outside the schedule
    is treated as in `q_sample`.

    Sources: Ho et al. 2020, equation (14); v: Salimans & Ho 2022; min-SNR-γ: Hang et al. 2023, equation (6) and section 3.4; the
    hybrid loss: Nichol & Dhariwal 2021, equation (16).
    """
    weights = None
    if isinstance(weighting, torch.Tensor):
        weights, weighting = weighting, None
    gamma = None
    if weighting is not None:
        if not isinstance(weighting, str) or weighting != "min_snr":
            raise ValueError(f"weighting: expected None, 'min_snr' or a tensor of shape (B,), got {weighting!r}")
        gamma = checks.number("snr_gamma", snr_gamma, low=0.0, strict=True)
    if variance is not None:
        checks.option("variance", variance, LEARNED_VARIANCES)
        source, simple = (noise, seed, offset), (loss, delta, weights)
        return bound.hybrid_loss(
            model_output, x0, t, schedule, source, prediction, variance, decoder, vlb_weight, simple, gamma, reduction
        )
    plan = dispatch.plan("diffusion_loss", schedule, model_output, x0, prediction, gamma)
    if plan is None:
        plan = _make_plan(model_output, x0, schedule, prediction, gamma)
    return _loss_by(plan, model_output, x0, t, noise, seed, offset, prediction, loss, delta, weights, reduction)


def loss_with(coefficients, model_output, x0, t, *, noise=None, seed=None, prediction="epsilon", reduction="mean"):
    """`diffusion_loss` with the `Coefficients` of another library: rows of the columns of `tables.DIFFUSION_LOSS_COLUMNS`."""
    plan = dispatch.plan("diffusion_loss", coefficients, model_output, x0, prediction)
    if plan is None:
        _check_tensors(model_output, x0, None)
        dtype = checks.compute_dtype(checks.result_dtype(model_output, x0))
        table = coefficients.table(x0.device, dtype)
        plan = dispatch.make_plan("diffusion_loss", coefficients, model_output, x0, dtype, table, prediction)
    return _loss_by(plan, model_output, x0, t, noise, seed, 0, prediction, "mse", 1.0, None, reduction)


def _loss_by(plan, model_output, x0, t, noise, seed, offset, prediction, loss, delta, weights, reduction):
    if plan.careful:
        _check_tensors(model_output, x0, noise)
    try:
        options = PREDICTIONS.index(prediction), LOSSES.index(loss), REDUCTIONS.index(reduction)
    except ValueError:
        checks.option("loss", loss, LOSSES)
        checks.option("reduction", reduction, REDUCTIONS)
        raise
    if delta != 1.0 or type(delta) is not float:
        delta = checks.number("delta", delta, low=0.0, strict=True)
    given_t = t
    t, index = dispatch.timestep(plan, t, x0)
    if offset != 0 or type(offset) is not int:
        offset = rng.check_offset(offset)
    seeds = None
    if noise is not None or type(seed) is not int or not 0 <= seed < 2**63:
        noise, seeds, seed = _noise_source(model_output, x0, noise, seed, options[0])
    if weights is not None:
        weights = checked_weights(weights, x0, plan.rows.dtype)
    prediction, loss, reduction = options
    operands = (model_output, x0, plan.rows, t, index, noise, seeds, seed, offset, weights, prediction, loss, delta, reduction)
    recorded = model_output.requires_grad or x0.requires_grad or (noise is not None and noise.requires_grad)
    try:
        if recorded or plan.call is None or weights is not None:
            return _run(plan, Operands(*operands))
        return plan.call(*operands)
    except (RuntimeError, TypeError):
        _check_tensors(model_output, x0, noise)
        checks.timestep(given_t, x0, plan.end, plan.note)
        raise


def _make_plan(model_output, x0, schedule, prediction, gamma):
    checks.schedule(schedule)
    checks.option("prediction", prediction, PREDICTIONS)
    _check_tensors(model_output, x0, None)
    dtype = checks.compute_dtype(checks.result_dtype(model_output, x0))
    table = schedule.diffusion_loss_table(prediction, gamma, x0.device, dtype)
    return dispatch.make_plan("diffusion_loss", schedule, model_output, x0, dtype, table, prediction, gamma)


def _check_tensors(model_output, x0, noise):
    checks.batched("x0", x0, or_bytes=True)
    checks.like("model_output", model_output, "x0", x0)
    if noise is not None:
        checks.like("noise", noise, "x0", x0)


def _noise_source(model_output, x0, noise, seed, prediction):
    if prediction == SAMPLE:  # the target is x0: whatever q_sample got may be given, and is not needed
        if noise is not None or seed is not None:
            rng.noise_source("x0", x0, x0.dtype, noise, seed, None)
        if noise is not None:
            _check_tensors(model_output, x0, noise)
        return None, None, None
    if noise is None and seed is None:
        raise ValueError("noise, seed: expected the one that q_sample was given, since the target has that noise; got neither")
    checks.batched("x0", x0, or_bytes=True)
    return rng.noise_source("x0", x0, x0.dtype, noise, seed, None)


def checked_weights(weights, x0, dtype):
    checks.tensor("weighting", weights)
    if weights.device != x0.device:
        raise ValueError(f"weighting: expected a tensor on {x0.device} like x0, got one on {weights.device}")
    if weights.dim() != 1 or weights.shape[0] != x0.shape[0]:
        raise ValueError(f"weighting: expected shape ({x0.shape[0]},), one weight per sample, got {tuple(weights.shape)}")
    return weights.to(dtype).contiguous()


def _run(plan, o):
    if plan.call is None:
        return reference(o)
    if torch.is_grad_enabled():
        if (o.noise is not None and o.noise.requires_grad) or (o.weights is not None and o.weights.requires_grad):
            return reference(o)
        if o.model_output.requires_grad or o.x0.requires_grad:
            return _DiffusionLoss.apply(plan.backend, *dispatch.distinct((o.model_output, o.x0)), o[2:])
    return plan.call(*o)


# ---- eager reference ------------------------------------------------------------------------------------------------------


def reference(o):
    """The kernel in plain PyTorch. rows: (T, 3), the columns of `tables.DIFFUSION_LOSS_COLUMNS`; the options are indices."""
    from_x0, from_noise, weight = dispatch.gathered(o.rows, o.t, o.index, o.x0.dim())
    r = _residual(o, from_x0, from_noise)
    losses = weighted(weight, o.weights, r.dim()) * loss_of(r, o.loss, o.delta)
    if o.reduction == 0:
        return losses.reshape(len(losses), -1).mean(1) if r.numel() else dispatch.sum_of_events(losses) / 0.0
    return losses.mean() if o.reduction == 1 else losses.sum()


def _residual(o, from_x0, from_noise):
    dtype, noise = o.rows.dtype, o.noise
    r = o.model_output.to(dtype)
    if o.prediction != EPSILON:
        r = r - from_x0 * dispatch.real_of(o.x0, dtype)
    if o.prediction == SAMPLE:
        return r
    if noise is None:
        noise = rng.normals(o.x0.shape, o.seeds, o.seed, o.offset, o.x0.device, dtype)
    return dispatch.with_noise(r, -from_noise, noise)


def loss_of(r, loss, delta):
    if loss == 0:
        return r * r
    size = r * _sign(r)  # |r|, but with a derivative of NaN where r is
    if loss == 1:
        return size
    inner = size.clamp(max=delta)
    return inner * (size - 0.5 * inner)


def _slope(r, loss, delta):
    if loss == 0:
        return 2 * r
    return _sign(r) if loss == 1 else r.clamp(-delta, delta)


def _sign(r):
    r = r.detach()
    return torch.where(r.isnan(), r, r.sign())


def weighted(factor, weights, dim):
    return factor if weights is None else factor * weights.reshape(-1, *[1] * (dim - 1))


# ---- fakes ----------------------------------------------------------------------------------------------------------------


@dispatch.register_fake("diffusion_loss")
def _fake(o):
    dispatch.same_device(o.model_output, o.x0, o.rows, o.t, o.noise, o.weights)
    dtype = checks.compute_dtype(checks.result_dtype(o.model_output, o.x0))
    return torch.empty(o.x0.shape[:1] if o.reduction == 0 else (), dtype=dtype, device=o.x0.device)


@dispatch.register_fake("diffusion_loss_and_gradient")
def _fake_and_gradient(o):
    return _fake(o), dispatch.empty_like(o.model_output)


@dispatch.register_fake("diffusion_loss_backward")
def _fake_backward(gradient, o):
    dispatch.same_device(_fake(o), gradient)
    return dispatch.empty_like(o.model_output)


@dispatch.register_fake("diffusion_loss_backward_x0")
def _fake_backward_x0(gradient, o):
    return _fake_backward(gradient, o), dispatch.empty_like(o.model_output, o.x0.dtype)


_AHEAD = dispatch.has("diffusion_loss_and_gradient")  # an op of the CPU alone


# ---- autograd -------------------------------------------------------------------------------------------------------------


class _DiffusionLoss(torch.autograd.Function):
    """One fused kernel back, which makes the same noise again: g·w·ℓ'(r) to the model's output and −a times that to x0, a being
    the target's share of it. Where a second derivative may be asked for (create_graph), the same in torch ops.

    On the CPU, where noise costs more than memory, the forward of a mean or sum writes the derivative for g = 1 too, and the first
    backward hands it on: with the noise made three times, q_sample, loss and backward took 1.62 ns per element at 4 M, and made
    twice 1.22 (AMD EPYC, Zen 4, 2 threads)."""

    @staticmethod
    def forward(ctx, backend, model_output, x0, rest):
        o = Operands(model_output, x0, *rest)
        # where it is not read, x0 may be changed by the time of the backward, and freed
        ctx.save_for_backward(model_output, None if o.prediction == EPSILON else x0, o.t, o.noise, o.seeds, o.weights)
        ctx.backend, ctx.x0_dtype = backend, x0.dtype
        ctx.others = o._replace(model_output=None, x0=None, t=None, noise=None, seeds=None, weights=None)
        ctx.made = None
        if _AHEAD and o.reduction and not ctx.needs_input_grad[2] and dispatch.makes_ahead(backend, model_output):
            loss, ctx.made = dispatch.op("diffusion_loss_and_gradient", backend)(*o)
            return loss
        return dispatch.op("diffusion_loss", backend)(*o)

    @staticmethod
    def backward(ctx, gradient):
        model_output, x0, t, noise, seeds, weights = ctx.saved_tensors
        decomposed = torch.is_grad_enabled() or dispatch.batched(gradient)
        made, ctx.made = ctx.made, None  # given away once: whoever gets it may write to it
        if made is not None and not decomposed and dispatch.multiplied((made,), gradient):
            return None, made, None, None
        made = None  # its memory, before another is allocated
        if x0 is None:
            x0 = model_output
            if x0.dtype != ctx.x0_dtype:
                x0 = model_output.new_empty((), dtype=ctx.x0_dtype).expand_as(model_output)
        o = ctx.others._replace(model_output=model_output, x0=x0, t=t, noise=noise, seeds=seeds, weights=weights)
        to_x0, x0_needed = None, ctx.needs_input_grad[2] and o.prediction != EPSILON
        if decomposed:
            from_x0, from_noise, weight = dispatch.gathered(o.rows, t, o.index, x0.dim())
            r = _residual(o, from_x0, from_noise)
            scale = 1.0 if o.reduction == 2 else 1.0 / max(r.numel() if o.reduction == 1 else r[:1].numel(), 1)
            g = gradient if o.reduction else gradient.reshape(-1, *[1] * (r.dim() - 1))
            to_r = scale * g * weighted(weight, weights, r.dim()) * _slope(r, o.loss, o.delta)
            to_x0 = (-from_x0 * to_r).to(x0.dtype) if x0_needed else None
            return None, to_r.to(model_output.dtype), to_x0, None
        if x0_needed:
            to_model_output, to_x0 = dispatch.op("diffusion_loss_backward_x0", ctx.backend)(gradient, *o)
        else:
            to_model_output = dispatch.op("diffusion_loss_backward", ctx.backend)(gradient, *o)
        return None, to_model_output, to_x0, None
