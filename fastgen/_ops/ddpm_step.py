"""The reverse step, DDPM's and with another table DDIM's: public functions, eager reference, fakes, autograd."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args, overload

import torch

from .._core import checks, declared, dispatch, rng, torch_noise
from .._core.tables import DDPM_STEP_COLUMNS
from .._core.torch_cuda import TorchCudaGenerator
from ..schedule import LEARNED_VARIANCES, PREDICTIONS, VARIANCES, Prediction, Schedule, Variance
from .q_sample import scaled

Operands = declared.OPERANDS["ddpm_step"]
Over = Literal["sum", "mean"]
OVERS = get_args(Over)


@overload
def ddpm_step(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    *,
    prediction: Prediction = "epsilon",
    variance: Variance = "posterior",
    clip: float | None = None,
    threshold: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | TorchCudaGenerator | None = None,
    unconditional_output: torch.Tensor | None = None,
    guidance_scale: float | None = None,
    return_x0: Literal[False] = False,
    return_log_prob: Literal[False] = False,
    log_prob_over: Over = "sum",
    out: torch.Tensor | None = None,
) -> torch.Tensor: ...
@overload
def ddpm_step(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    *,
    prediction: Prediction = "epsilon",
    variance: Variance = "posterior",
    clip: float | None = None,
    threshold: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | TorchCudaGenerator | None = None,
    unconditional_output: torch.Tensor | None = None,
    guidance_scale: float | None = None,
    return_x0: Literal[True],
    return_log_prob: Literal[False] = False,
    log_prob_over: Over = "sum",
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def ddpm_step(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    *,
    prediction: Prediction = "epsilon",
    variance: Variance = "posterior",
    clip: float | None = None,
    threshold: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | TorchCudaGenerator | None = None,
    unconditional_output: torch.Tensor | None = None,
    guidance_scale: float | None = None,
    return_x0: Literal[False] = False,
    return_log_prob: Literal[True],
    log_prob_over: Over = "sum",
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def ddpm_step(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    *,
    prediction: Prediction = "epsilon",
    variance: Variance = "posterior",
    clip: float | None = None,
    threshold: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | TorchCudaGenerator | None = None,
    unconditional_output: torch.Tensor | None = None,
    guidance_scale: float | None = None,
    return_x0: Literal[True],
    return_log_prob: Literal[True],
    log_prob_over: Over = "sum",
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
def ddpm_step(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    *,
    prediction: Prediction = "epsilon",
    variance: Variance = "posterior",
    clip: float | None = None,
    threshold: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | TorchCudaGenerator | None = None,
    unconditional_output: torch.Tensor | None = None,
    guidance_scale: float | None = None,
    return_x0: bool = False,
    return_log_prob: bool = False,
    log_prob_over: Over = "sum",
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """One step x_t → x_{t−1} of the reverse process:

        x0      = clip(P·x_t + Q·m)                         m = model_output; P, Q by `prediction`
        x_{t−1} = μ(x0, x_t) + σ_t·z,   z ~ N(0, I)         μ = √ᾱ_{t−1}·β_t/(1−ᾱ_t)·x0 + √α_t·(1−ᾱ_{t−1})/(1−ᾱ_t)·x_t

    which for epsilon prediction without clipping is μ = (x_t − β_t/√(1−ᾱ_t)·m)/√α_t. At t = 0 no noise is added.

    Args:
        x_t: (B, *event), float16, bfloat16, float32 or float64, contiguous or channels-last; other strides are copied first.
        model_output: like x_t, any of the four dtypes; (B, 2C, ...) with a learned variance, the second C channels being v.
        t: int or int64 tensor of shape (B,), 0-based, within 0 … T−1.
        schedule: a `Schedule` of T steps.
        prediction: "epsilon" (P = 1/√ᾱ_t, Q = −√(1/ᾱ_t − 1)), "sample" (0, 1) or "v_prediction" (√ᾱ_t, −√(1−ᾱ_t)).
        variance: σ_t² = β̃_t ("posterior"), β_t ("beta"), exp(v) ("learned"), or β_t^f·β̃_t^{1−f} with f = (v+1)/2
            ("learned_range").
        clip: a number c > 0; x0 is clamped to ±c.
        threshold: floating tensor (B,) of bounds s > 0, which are not checked; x0 becomes
            clamp(x0, ±s)/s. Not together with clip. No gradient.
        noise: z itself, the shape of x_t, any of the four dtypes.
        seed: int or int64 tensor of 1 or B elements; z is then `fastgen.randn(x_t.shape, seed=seed, offset=t)`, made in
            registers and never stored.
        generator: a `torch.Generator`; z is then `torch.randn(x_t.shape, generator=generator)` in the result's dtype, bit for
            bit, drawn at t = 0 too; on the CPU mostly made in the kernel (see `torch_randn`). Or a `TorchCudaGenerator`.
        unconditional_output, guidance_scale: classifier-free guidance, both or neither. m is then u + g·(m − u), u being what the
            network returned without the condition, of the shape and dtype of model_output, and g a number, a constant where the
            call is compiled; a learned variance stays that of model_output. No tensor is made, nor launch, but where gradients
            are recorded.
        return_x0: return (x_{t−1}, x0).
        return_log_prob: return (x_{t−1}, l) or (x_{t−1}, x0, l) with l = log p(x_{t−1} | x_t) (B,), `step_log_prob` of the x_{t−1}
            that is returned, made in the same pass; in a second one with return_x0 or where gradients are recorded. Those of l
            reach x_t and both outputs, with x_{t−1} held fixed. For t ≥ 1, and without a threshold.
        log_prob_over: what l adds up its elements to, their "sum" or their "mean".
        out: where to write x_{t−1}; may be x_t itself.

    With no noise source, a seed is drawn from torch's default CPU generator. Returns x_{t−1} with the shape and layout of x_t
    and the promoted dtype of x_t and model_output. Differentiable in x_t, both outputs and noise. Half precision computes in
    float32 and rounds once.

    Raises TypeError for wrong types or dtypes, ValueError for wrong shapes, devices or values, before anything is written. A
    timestep outside the schedule in a tensor on a GPU, where it cannot be seen without a synchronisation, makes that sample
    NaN; in a compiled program on the CPU it raises RuntimeError. The same holds for the last step of a schedule with zero
    terminal SNR under epsilon prediction, which has no finite coefficients.

    Sources: Ho et al. 2020, equations (6), (7) and (11); learned variances: Nichol & Dhariwal 2021, equation (15);
    v: Salimans & Ho 2022; threshold: Saharia et al. 2022 (Imagen), section 2.3; guidance: Ho & Salimans 2022, equation (6) with
    w = g − 1.
    """
    guidance = ()
    if unconditional_output is not None or guidance_scale is not None:
        guidance = _checked_guidance(unconditional_output, guidance_scale)
    plan = dispatch.plan("ddpm_step", schedule, x_t, model_output, prediction, variance)
    if plan is None:
        checks.schedule(schedule)
        checks.option("prediction", prediction, PREDICTIONS)
        checks.option("variance", variance, VARIANCES)
        learned = variance in LEARNED_VARIANCES
        dtype = _check_inputs(x_t, model_output, learned)
        table = schedule.ddpm_step_table(prediction, variance, x_t.device, dtype)
        plan = dispatch.make_plan("ddpm_step", schedule, x_t, model_output, dtype, table, prediction, variance, learned)
    if return_log_prob is not False:
        over = _checked_over(return_log_prob, log_prob_over)
        return _with_log_prob(plan, x_t, model_output, t, clip, threshold, noise, seed, generator, guidance, return_x0, over, out)
    return _reverse_step(plan, x_t, model_output, t, clip, threshold, noise, seed, generator, guidance, return_x0, out)


@overload
def ddim_step(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    *,
    eta: float = 0.0,
    prediction: Prediction = "epsilon",
    clip: float | None = None,
    threshold: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | TorchCudaGenerator | None = None,
    unconditional_output: torch.Tensor | None = None,
    guidance_scale: float | None = None,
    return_x0: Literal[False] = False,
    return_log_prob: Literal[False] = False,
    log_prob_over: Over = "sum",
    out: torch.Tensor | None = None,
) -> torch.Tensor: ...
@overload
def ddim_step(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    *,
    eta: float = 0.0,
    prediction: Prediction = "epsilon",
    clip: float | None = None,
    threshold: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | TorchCudaGenerator | None = None,
    unconditional_output: torch.Tensor | None = None,
    guidance_scale: float | None = None,
    return_x0: Literal[True],
    return_log_prob: Literal[False] = False,
    log_prob_over: Over = "sum",
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def ddim_step(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    *,
    eta: float = 0.0,
    prediction: Prediction = "epsilon",
    clip: float | None = None,
    threshold: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | TorchCudaGenerator | None = None,
    unconditional_output: torch.Tensor | None = None,
    guidance_scale: float | None = None,
    return_x0: Literal[False] = False,
    return_log_prob: Literal[True],
    log_prob_over: Over = "sum",
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def ddim_step(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    *,
    eta: float = 0.0,
    prediction: Prediction = "epsilon",
    clip: float | None = None,
    threshold: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | TorchCudaGenerator | None = None,
    unconditional_output: torch.Tensor | None = None,
    guidance_scale: float | None = None,
    return_x0: Literal[True],
    return_log_prob: Literal[True],
    log_prob_over: Over = "sum",
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
def ddim_step(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    *,
    eta: float = 0.0,
    prediction: Prediction = "epsilon",
    clip: float | None = None,
    threshold: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | TorchCudaGenerator | None = None,
    unconditional_output: torch.Tensor | None = None,
    guidance_scale: float | None = None,
    return_x0: bool = False,
    return_log_prob: bool = False,
    log_prob_over: Over = "sum",
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """One step x_t → x_{t−1} of the DDIM family:

        x0      = clip(P·x_t + Q·m),   ε = (x_t − √ᾱ_t·x0)/√(1−ᾱ_t)
        x_{t−1} = √ᾱ_{t−1}·x0 + √(1−ᾱ_{t−1}−σ_t²)·ε + σ_t·z
        σ_t     = η·√((1−ᾱ_{t−1})/(1−ᾱ_t))·√(1−ᾱ_t/ᾱ_{t−1})

    η = 0 is deterministic (no noise is drawn or read), η = 1 is `ddpm_step` with variance "posterior". ε is read off the
    clipped x0. x_{t−1} is the previous step of `schedule`, so respace the schedule for larger strides.

    eta: a number within 0 … 1, a constant where the call is compiled; above 0 with return_log_prob. The other arguments, the result
    and the errors are those of `ddpm_step`.

    Source: Song et al. 2021 (DDIM), equations (12) and (16).
    """
    if type(eta) is not float:  # True would find the plan of 1.0
        eta = checks.number("eta", eta, low=0.0)
    guidance = ()
    if unconditional_output is not None or guidance_scale is not None:
        guidance = _checked_guidance(unconditional_output, guidance_scale)
    plan = dispatch.plan("ddim_step", schedule, x_t, model_output, prediction, eta)
    if plan is None:
        checks.schedule(schedule)
        checks.option("prediction", prediction, PREDICTIONS)
        eta = checks.number("eta", eta, low=0.0)
        if eta > 1.0:
            raise ValueError(f"eta: expected a number within 0 … 1, got {eta!r}")
        dtype = _check_inputs(x_t, model_output, False)
        table = schedule.ddim_step_table(prediction, eta, x_t.device, dtype)
        plan = dispatch.make_plan("ddim_step", schedule, x_t, model_output, dtype, table, prediction, eta)
    if return_log_prob is not False:
        over = _checked_over(return_log_prob, log_prob_over)
        if eta == 0.0:
            raise ValueError(f"eta: expected a number > 0 with return_log_prob, got {eta!r}; a step without noise has no density")
        return _with_log_prob(plan, x_t, model_output, t, clip, threshold, noise, seed, generator, guidance, return_x0, over, out)
    return _reverse_step(plan, x_t, model_output, t, clip, threshold, noise, seed, generator, guidance, return_x0, out)


def step_with(
    coefficients,
    x_t,
    model_output,
    t,
    *,
    learned=False,
    clip=None,
    threshold=None,
    noise=None,
    seed=None,
    generator=None,
    unconditional_output=None,
    guidance_scale=None,
    return_x0=False,
    out=None,
):
    """`ddpm_step` with the `Coefficients` of another library, whose t counts their rows; `learned`: their variance is."""
    guidance = ()
    if unconditional_output is not None or guidance_scale is not None:
        guidance = _checked_guidance(unconditional_output, guidance_scale)
    plan = dispatch.plan("ddpm_step", coefficients, x_t, model_output, learned)
    if plan is None:
        dtype = _check_inputs(x_t, model_output, learned)
        table = coefficients.table(x_t.device, dtype)
        plan = dispatch.make_plan("ddpm_step", coefficients, x_t, model_output, dtype, table, learned, learned=learned)
    return _reverse_step(plan, x_t, model_output, t, clip, threshold, noise, seed, generator, guidance, return_x0, out)


def plain_rows(coefficients, x_t, model_output):
    """The rows for `plain_step` of what is like these tensors and requires no grad, once a `step_with` has gone well; None where
    it was not the compiled op that ran."""
    plan = dispatch.plan("ddpm_step", coefficients, x_t, model_output, False)
    return None if plan is None or plan.careful else plan.rows


def steps_alike(method, schedule, x_t, model_output, options, seed):
    """Once a step "ddpm" or "ddim" of these tensors has gone well with these options and seed: (x_t, model_output, t,
    unconditional_output=None) → x_{t−1} of further ones, at int timesteps of the schedule and without gradients, by the compiled
    op alone. It refuses with a RuntimeError or TypeError what is not like them. None where it was not the compiled op that ran."""
    option = options["variance" if method == "ddpm" else "eta"]
    plan = dispatch.plan(method + "_step", schedule, x_t, model_output, options["prediction"], option)
    if plan is None or plan.careful:
        return None
    call, rows = plan.call, plan.rows
    given = seed if plan.noisy else None
    rest = (None, given, None) if isinstance(given, torch.Tensor) else (None, None, given)
    clip, scale = options["clip"], options.get("guidance_scale")
    if clip is not None or plan.learned or scale is not None:
        rest += clip, None, plan.learned
    if scale is None:
        return lambda x, m, t: call(x, m, rows, None, t, *rest)
    return lambda x, m, t, unconditional_output: call(x, m, rows, None, t, *rest, unconditional_output, scale)


def _checked_guidance(u, scale):
    if u is None or scale is None:
        got = "only the former" if scale is None else "only the latter"
        raise ValueError(f"unconditional_output, guidance_scale: expected both or neither, got {got}")
    checks.any_tensor("unconditional_output", u)
    return u, checks.number("guidance_scale", scale, low=-math.inf, strict=True)


def _reverse_step(plan, x_t, model_output, t, clip, threshold, noise, seed, generator, guidance, return_x0, out):
    given_t = t
    if type(t) is int and 0 <= t < plan.end:
        t, index = None, t
    elif isinstance(t, torch.Tensor) and not plan.careful:
        index = 0
    else:
        checks.batched("x_t", x_t)
        t, index = checks.timestep(t, x_t, plan.end, plan.note)
    if clip is not None or threshold is not None:
        clip, threshold = _checked_bounds(plan, x_t, clip, threshold)
    if return_x0 is not False and return_x0 is not True:
        raise TypeError(f"return_x0: expected a bool, got {type(return_x0).__name__}")
    if type(generator) is torch.Generator and noise is None and seed is None and plan.noisy and not plan.careful:
        given = x_t, model_output, given_t, None, plan, threshold, guidance, out
        result = _with_torch_noise(given, t, index, generator, clip, return_x0)
        if result is not None:
            return result
    # before a seed is drawn or noise is dropped; of what else is wrong a compiled op complains before it writes
    if plan.careful or (noise is None and seed is None) or (noise is not None and not plan.noisy):
        _check_tensors(x_t, model_output, given_t, noise, plan, threshold, guidance, out)
    elif out is not None and torch.is_grad_enabled():
        checks.ungraded_output(out, x_t, model_output, noise, *guidance[:1])
    seeds = None
    if noise is not None or generator is not None or type(seed) is not int or not 0 <= seed < 2**63:
        noise, seeds, seed = _noise_source(plan, x_t, noise, seed, generator)
    elif not plan.noisy:
        seed = None
    recorded = x_t.requires_grad or model_output.requires_grad or (noise is not None and noise.requires_grad)
    recorded = recorded or (guidance and guidance[0].requires_grad)
    try:
        whole = plan.careful or plan.learned or return_x0 or recorded or guidance or seeds is not None or out is not None
        if whole or clip is not None or threshold is not None:
            operands = (x_t, model_output, plan.rows, t, index, noise, seeds, seed, clip, threshold, plan.learned, *guidance)
            if recorded and out is None and plan.call is not None and torch.is_grad_enabled():
                return _recorded(plan, Operands(*operands), return_x0)
            return _run(plan, operands, return_x0, out)
        # The usual call. Of its operands those that are left out need not be converted; a tuple of them all would take 0.2 µs.
        if seed is None:
            return plan.call(x_t, model_output, plan.rows, t, index, noise)
        return plan.call(x_t, model_output, plan.rows, t, index, noise, seeds, seed)
    except (RuntimeError, TypeError):
        _check_tensors(x_t, model_output, given_t, noise, plan, threshold, guidance, out)
        raise


def _with_torch_noise(given, t, index, generator, clip, return_x0):
    """With the noise of `generator` made in the compiled kernel; None where that cannot be. given: what `_check_tensors` takes."""
    x_t, model_output, _, _, plan, threshold, guidance, out = given
    source = torch_noise.source(generator, x_t, plan.dtype)
    if source is None:
        return None
    if torch.is_grad_enabled():
        if x_t.requires_grad or model_output.requires_grad or (guidance and guidance[0].requires_grad):
            return None
        if out is not None:
            checks.ungraded_output(out, x_t, model_output, *guidance[:1])
    y = torch.empty(x_t.shape, dtype=plan.dtype, device=x_t.device) if out is None else out
    x0 = torch.empty_like(y) if return_x0 else None
    operands = x_t, model_output, plan.rows, t, index, None, None, None, clip, threshold, plan.learned, *(guidance or (None, 1.0))
    source.run(dispatch.DIRECT[plan.op + "_torch"], *operands, x0, check=lambda: _check_tensors(*given), out=y)
    if out is not None:
        dispatch.written(out)
    return (y, x0) if return_x0 else y


def _checked_over(return_log_prob, over):
    checks.boolean("return_log_prob", return_log_prob)
    checks.option("log_prob_over", over, OVERS)
    return over


def scale_of(over, x):
    """What a sum over the event is multiplied by."""
    return 1.0 if over == "sum" else 1.0 / max(math.prod(x.shape[1:]), 1)


def _with_log_prob(plan, x_t, model_output, t, clip, threshold, noise, seed, generator, guidance, return_x0, over, out):
    """The step and its log-probability: one op, or where x0 or gradients are asked for two."""
    if threshold is not None:
        raise ValueError("threshold: expected None with return_log_prob, got one")
    if clip is not None:
        clip, _ = _checked_bounds(plan, x_t, clip, None)
    checks.boolean("return_x0", return_x0)
    recorded = x_t.requires_grad or model_output.requires_grad or (isinstance(noise, torch.Tensor) and noise.requires_grad)
    recorded = torch.is_grad_enabled() and (recorded or (bool(guidance) and guidance[0].requires_grad))
    two = plan.call is None or recorded or return_x0
    given = x_t, model_output, t, noise, plan, None, guidance, out, 1
    if two or plan.careful or (noise is None and seed is None):
        _check_tensors(*given)
    elif out is not None and torch.is_grad_enabled():
        checks.ungraded_output(out, x_t, model_output, noise, *guidance[:1])
    t, index = dispatch.timestep(plan, t, x_t, 1)
    seeds = None
    if noise is not None or generator is not None or type(seed) is not int or not 0 <= seed < 2**63:
        noise, seeds, seed = _noise_source(plan, x_t, noise, seed, generator)
    scale = scale_of(over, x_t)
    if two:
        o = Operands(x_t, model_output, plan.rows, t, index, noise, seeds, seed, clip, None, plan.learned, *guidance)
        results = _step_then_log_prob(plan, o, scale, return_x0, recorded)
    else:
        operands = x_t, model_output, plan.rows, t, index, clip, plan.learned, scale, noise, seeds, seed, *(guidance or (None, 1.0))
        # dynamo takes an op's out= only if it is contiguous
        into = out is not None and not (torch.compiler.is_compiling() and not out.is_contiguous())
        try:
            if into:
                log_prob = dispatch.op(plan.op + "_log_prob_out", plan.backend)(*operands, out=out)
                return dispatch.written(out), log_prob
            results = dispatch.op(plan.op + "_log_prob", plan.backend)(*operands)
        except (RuntimeError, TypeError):
            _check_tensors(*given)
            raise
    return results if out is None else (out.copy_(results[0]), *results[1:])


def _step_then_log_prob(plan, o, scale, return_x0, recorded):
    from . import step_log_prob as density  # which imports this module

    if o.unconditional is not None:
        o = o._replace(model_output=_guided_output(*o[:2], o.unconditional, o.guidance, plan), unconditional=None)
    made: Any = _recorded(plan, o, return_x0) if recorded and plan.call is not None else _run(plan, o, return_x0, None)
    x_prev, *x0 = [x.to(plan.dtype) for x in (made if return_x0 else (made,))]
    call = None if plan.call is None else dispatch.op("step_log_prob", plan.backend)
    of = density.Operands(*o[:5], o.clip, plan.learned, scale)
    return x_prev, *x0, density.run(call, plan.backend, x_prev.detach(), of)


def _guided_output(x_t, m, u, g, plan):
    """In torch ops, whose gradients torch knows; the result is rounded once all the same."""
    return _guided(m.to(plan.rows.dtype), u.to(plan.rows.dtype), g, x_t.shape[1] if plan.learned else None)


def _checked_bounds(plan, x_t, clip, threshold):
    if clip is not None and (type(clip) is not float or not 0.0 < clip < math.inf):
        clip = checks.number("clip", clip, low=0.0, strict=True)
    if threshold is not None:
        checks.batched("x_t", x_t)
        threshold = _checked_threshold(threshold, clip, x_t, plan.rows.dtype)
    return clip, threshold


def _noise_source(plan, x_t, noise, seed, generator):
    """(noise, seeds, seed), of which at most one is not None; all None where no row of the plan takes noise."""
    if not plan.noisy and noise is None and seed is None:
        if generator is not None:
            rng.check_generator(generator, x_t.device)  # and leave its state as it is
        return None, None, None
    checks.batched("x_t", x_t)
    source = rng.noise_source("x_t", x_t, plan.dtype, noise, seed, generator)
    return source if plan.noisy else (None, None, None)


def _recorded(plan, o, return_x0):
    dtype = plan.dtype
    if o.unconditional is not None:
        m = _guided_output(o.x_t, o.model_output, o.unconditional, o.guidance, plan)
        o = o._replace(model_output=m, unconditional=None, guidance=1.0)
    y, x0 = _DdpmStep.apply(plan, return_x0, *o)
    return (y.to(dtype), x0.to(dtype)) if return_x0 else y.to(dtype)


def _run(plan, operands, return_x0, out):
    if plan.call is None:
        y, x0 = reference(Operands(*operands))
        y = y if out is None else out.copy_(y)
        return (y, x0) if return_x0 else y
    if out is not None:
        x0 = {"x0": dispatch.empty_like(operands[0], plan.dtype)} if return_x0 else {}
        dispatch.op(plan.op + "_out", plan.backend)(*operands, **x0, out=out)
        dispatch.written(out)
        return (out, x0["x0"]) if return_x0 else out
    return dispatch.op(plan.op + "_x0", plan.backend)(*operands) if return_x0 else plan.call(*operands)


def _check_inputs(x_t, model_output, learned):
    """The dtype of the result."""
    checks.batched("x_t", x_t)
    (checks.two_channels if learned else checks.like)("model_output", model_output, "x_t", x_t)
    return checks.result_dtype(x_t, model_output)


def _check_tensors(x_t, model_output, t, noise, plan, threshold, guidance, out, begin=0):
    _check_inputs(x_t, model_output, plan.learned)
    u = guidance[0] if guidance else None
    if guidance:
        checks.exactly_like("unconditional_output", u, "model_output", model_output)
    checks.timestep(t, x_t, plan.end, plan.note, begin)
    if noise is not None:
        checks.like("noise", noise, "x_t", x_t)
    if out is not None:
        inputs = {"x_t": x_t, "model_output": model_output, "noise": noise, "threshold": threshold, "unconditional_output": u}
        checks.output(out, x_t.shape, plan.dtype, x_t.device, inputs)


def _checked_threshold(threshold, clip, x_t, dtype):
    if clip is not None:
        raise ValueError("clip, threshold: expected at most one, got both")
    checks.tensor("threshold", threshold)
    if threshold.device != x_t.device:
        raise ValueError(f"threshold: expected a tensor on {x_t.device} like x_t, got one on {threshold.device}")
    if threshold.dim() != 1 or threshold.shape[0] != x_t.shape[0]:
        raise ValueError(f"threshold: expected shape ({x_t.shape[0]},), one bound per sample, got {tuple(threshold.shape)}")
    if torch.is_grad_enabled() and threshold.requires_grad:
        raise ValueError("threshold: expected a tensor that does not require grad, got one that does; detach it")
    return threshold.to(dtype).contiguous()


def dynamic_bound(x0, quantile, low, high=None):
    """What `threshold` is in Imagen: of each sample of x0 (B, *event) the `quantile` of |x0|, linear between two elements as
    torch.quantile is, within `low` … `high`; NaN where x0 has one. (B,), in the dtype of the arithmetic, with no synchronisation.

    The elements above are looked for instead of all being sorted: of (8, 3, 64, 64) at 0.995 that takes a 24th of torch.quantile's
    time, at 0.5 a half, and a sample may have more than torch.quantile's 2²⁴ elements.
    """
    batch, count = x0.shape[0], math.prod(x0.shape[1:])
    x0 = x0.to(checks.compute_dtype(x0.dtype))
    if count == 0:
        return x0.new_full((batch,), low)
    if x0.dim() > 2 and not x0.is_contiguous():  # channels-last: a quantile has no order, so it is taken in that of the memory
        x0 = x0.movedim(1, -1)
    rank = quantile * (count - 1)
    below = int(rank)
    largest = x0.abs().reshape(batch, count).topk(count - below, dim=1).values
    bound = largest[:, -1]
    if rank > below:
        bound = torch.lerp(bound, largest[:, -2], rank - below)
    return torch.minimum(bound, largest[:, 0]).clamp(min=low, max=high)  # a NaN is the largest, and passes both


# ---- eager reference ------------------------------------------------------------------------------------------------------


def reference(o):
    """The kernel in plain PyTorch: (x_{t−1}, x0). rows: (T, 10), the columns of `DDPM_STEP_COLUMNS`."""
    dtype, shape, noise = checks.result_dtype(o.x_t, o.model_output), o.x_t.shape, o.noise
    c = columns(o)
    m, v = mean_and_variance(o)
    y, x0 = mean(o, c, m)
    if noise is None and (o.seeds is not None or o.seed is not None):
        noise = rng.normals(shape, o.seeds, o.seed, o.index if o.t is None else o.t, y.device, y.dtype)
    sigma = c["sigma"]
    if o.learned and noise is not None:
        noise = torch.exp(torch.where(sigma == 0, 0.0, c["slope"] * v + c["intercept"])) * noise.to(y.dtype)
    return dispatch.with_noise(y, sigma, noise).to(dtype), x0.to(dtype)


def mean(o, c, m):
    """μ and x0 in the dtype of the arithmetic, of the columns c and of m in that dtype."""
    x = o.x_t.to(o.rows.dtype)
    x0 = c["x0_from_x"] * x + c["x0_from_m"] * m
    if o.clip is None and o.threshold is None:
        return c["y_from_x_unclipped"] * x + c["y_from_m_unclipped"] * m, x0
    x0 = _clipped(x0, o.clip, o.threshold)
    # where m has no weight beside x0 it is not looked at, were it infinite or NaN
    return dispatch.with_noise(c["y_from_x0"] * x0 + c["y_from_x"] * x, c["y_from_m"], m), x0


def _guided(m, u, g, channels):
    """u + g·(m − u); of `channels` channels, if given, the others being those of m."""
    if channels is None:
        return u + g * (m - u)
    u = u[:, :channels]
    return torch.cat([u + g * (m[:, :channels] - u), m[:, channels:]], dim=1)


def mean_and_variance(o) -> tuple[torch.Tensor, Any]:
    """m, and v where the variance is learned, else None; in the dtype of the arithmetic."""
    m, channels = o.model_output.to(o.rows.dtype), o.x_t.shape[1] if o.learned else None
    if o.unconditional is not None:
        m = _guided(m, o.unconditional.to(o.rows.dtype), o.guidance, channels)
    return (m[:, :channels], m[:, channels:]) if o.learned else (m, None)


def columns(o):
    return dict(zip(DDPM_STEP_COLUMNS, dispatch.gathered(o.rows, o.t, o.index, o.x_t.dim()), strict=True))


def _clipped(x0, clip, threshold):
    if clip is not None:
        clip = min(clip, torch.finfo(x0.dtype).max)
        return x0.clamp(-clip, clip)
    bound = _per_sample(threshold, x0.dim())
    return x0.clamp(-bound, bound) / bound


def _per_sample(values, dim):
    return values.reshape(-1, *[1] * (dim - 1))


# ---- fakes ----------------------------------------------------------------------------------------------------------------


@dispatch.register_fake("ddpm_step", "ddim_step")
def _fake(o):
    dispatch.same_device(o.x_t, o.model_output, o.rows, o.t, o.noise, o.threshold, o.unconditional)
    return dispatch.empty_like(o.x_t, checks.result_dtype(o.x_t, o.model_output))


@dispatch.register_fake("ddpm_step_x0", "ddim_step_x0")
def _fake_x0(o):
    return _fake(o), _fake(o)


@dispatch.register_fake("ddpm_step_plain")
def _fake_plain(x_t, model_output, rows, index, noise, seed, clip):
    return _fake_x0(Operands(x_t, model_output, rows, None, index, noise))


@dispatch.register_fake("ddpm_step_torch_plain")
def _fake_torch_plain(states, noise_dtype, fused, x_t, model_output, rows, index, clip):
    return _fake_x0(Operands(x_t, model_output, rows, None, index))


# ---- autograd -------------------------------------------------------------------------------------------------------------


class _DdpmStep(torch.autograd.Function):
    """The backward is one scaling kernel per input where the step is affine; with clipping or a learned variance it is
    written in torch ops, which also serve a second backward. Gradients pass through a clamp where x0 is within its bounds."""

    @staticmethod
    def forward(ctx, plan, return_x0, *arguments):
        o = Operands(*arguments)
        ctx.affine = o.clip is None and o.threshold is None and not o.learned
        inputs = (None, None, None) if ctx.affine else (o.x_t, o.model_output, o.noise)
        ctx.save_for_backward(o.t, o.threshold, o.seeds, *inputs)
        ctx.others = o._replace(t=None, threshold=None, seeds=None, x_t=None, model_output=None, noise=None)
        ctx.dtypes = o.x_t.dtype, o.model_output.dtype, None if o.noise is None else o.noise.dtype
        ctx.shape, ctx.backend = o.x_t.shape, plan.backend
        ctx.set_materialize_grads(False)
        if return_x0:
            return dispatch.op(plan.op + "_x0", plan.backend)(*arguments)
        return plan.call(*arguments), None

    @staticmethod
    def backward(ctx, y_gradient, x0_gradient):
        t, threshold, seeds, x_t, model_output, noise = ctx.saved_tensors
        o = ctx.others._replace(t=t, threshold=threshold, seeds=seeds, x_t=x_t, model_output=model_output, noise=noise)
        backward = _affine_backward if ctx.affine else _general_backward
        x, m, noise = backward(ctx, o, y_gradient, x0_gradient, Operands(*ctx.needs_input_grad[2:]))
        return None, None, *dispatch.gradients(Operands, x_t=x, model_output=m, noise=noise)


def _affine_backward(ctx, o, y_gradient, x0_gradient, needed):
    x_dtype, m_dtype, noise_dtype = ctx.dtypes

    def gradient(y_column, x0_column, dtype):
        terms = [
            scaled(o.rows, DDPM_STEP_COLUMNS.index(column), g, o.t, o.index, ctx.backend)
            for g, column in ((y_gradient, y_column), (x0_gradient, x0_column))
            if g is not None and column is not None
        ]
        return sum(terms[1:], terms[0]).to(dtype) if terms else None

    return (
        gradient("y_from_x_unclipped", "x0_from_x", x_dtype) if needed.x_t else None,
        gradient("y_from_m_unclipped", "x0_from_m", m_dtype) if needed.model_output else None,
        gradient("sigma", None, noise_dtype) if needed.noise else None,
    )


def _general_backward(ctx, o, y_gradient, x0_gradient, needed):
    x_dtype, m_dtype, noise_dtype = ctx.dtypes
    c, x = columns(o), o.x_t.to(o.rows.dtype)
    m, v = mean_and_variance(o)
    g = torch.zeros_like(x) if y_gradient is None else y_gradient.to(x.dtype)
    g0 = torch.zeros_like(x) if x0_gradient is None else x0_gradient.to(x.dtype)
    # Through x0 to both inputs. Without a clip y's own gradient reaches them by the unclipped columns, else by y_from_x0.
    if o.clip is None and o.threshold is None:
        to_x, to_m = c["y_from_x_unclipped"] * g + c["x0_from_x"] * g0, c["y_from_m_unclipped"] * g + c["x0_from_m"] * g0
    else:
        raw = c["x0_from_x"] * x + c["x0_from_m"] * m
        inner = c["y_from_x0"] * g + g0
        if o.threshold is None:
            inner = torch.where(raw.abs() <= o.clip, inner, 0.0)
        else:
            bound = _per_sample(o.threshold, x.dim())
            inner = torch.where(raw.abs() <= bound, inner, 0.0) / bound
        to_x, to_m = c["y_from_x"] * g + c["x0_from_x"] * inner, c["y_from_m"] * g + c["x0_from_m"] * inner
    to_noise = None
    if o.learned:  # where sigma is 0 neither v nor the noise is looked at, were they infinite or NaN
        to_v = torch.zeros_like(to_m)
        if o.noise is not None or o.seeds is not None or o.seed is not None:
            z = o.noise
            if z is None:
                z = rng.normals(ctx.shape, o.seeds, o.seed, o.index if o.t is None else o.t, x.device, x.dtype)
            still = c["sigma"] == 0
            deviation = c["sigma"] * torch.exp(torch.where(still, 0.0, c["slope"] * v + c["intercept"]))
            to_v = torch.where(still, 0.0, g * deviation * c["slope"] * z.to(x.dtype))
            to_noise = g * deviation
        to_m = torch.cat([to_m, to_v], dim=1)
    elif needed.noise:
        to_noise = c["sigma"] * g
    return (
        to_x.to(x_dtype) if needed.x_t else None,
        to_m.to(m_dtype) if needed.model_output else None,
        to_noise.to(noise_dtype) if needed.noise and to_noise is not None else None,
    )


plain_step: Any = dispatch.DIRECT.get("ddpm_step_plain")  # (x_t, model_output, rows, t, noise, seed, clip) → (x_{t−1}, x0)
torch_plain_step: Any = dispatch.DIRECT.get("ddpm_step_torch_plain")  # the same with torch's noise, of a `torch_noise.Source`
