"""The log-probability of a reverse step: public function, eager reference, fakes, autograd. And what a step contributes to the
weight of a trajectory, for `log_likelihood`."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from .._core import checks, declared, dispatch
from .._core.tables import DDPM_STEP_COLUMNS, STEP_LOG_WEIGHT_COLUMNS
from ..schedule import LEARNED_VARIANCES, PREDICTIONS, VARIANCES, Prediction, Schedule, Variance
from . import ddpm_step
from .ddpm_step import OVERS, Over

Operands = declared.OPERANDS["step_log_prob"]
Method = Literal["ddpm", "ddim"]
METHODS = get_args(Method)


def step_log_prob(
    x_prev: torch.Tensor,
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    *,
    method: Method = "ddpm",
    eta: float | None = None,
    prediction: Prediction = "epsilon",
    variance: Variance | None = None,
    clip: float | None = None,
    over: Over = "sum",
) -> torch.Tensor:
    """The log-probability of the reverse step from x_t to x_{t−1}, what policy gradients take a diffusion model's policy to be:

        log p(x_{t−1} | x_t) = log N(x_{t−1}; μ, σ²) = −½·Σ[((x_{t−1} − μ)/σ)² + 2·log σ + log 2π]

    μ and σ are those of `ddpm_step`, or of `ddim_step` with eta > 0. μ is never rounded to half precision, as x_{t−1} is where it
    was sampled in that.

    Args:
        x_prev: x_{t−1}, the shape of x_t, any of the four dtypes.
        x_t: (B, *event), float16, bfloat16, float32 or float64, contiguous or channels-last; other strides are copied first.
        model_output: m, the shape of x_t, any of the four dtypes; (B, 2C, ...) with a learned variance, the second C channels
            being v. With classifier-free guidance m is u + g·(m − u).
        t: int or int64 tensor of shape (B,), 0-based, within 1 … T−1.
        schedule: a `Schedule` of T steps.
        method: "ddpm" or "ddim", the step that was taken.
        eta: of "ddim" only, a number within 0 … 1 and above 0, a constant where the call is compiled.
        prediction: what m predicts: "epsilon", "sample" (x0) or "v_prediction".
        variance: of "ddpm" only, "posterior", "beta", "learned" or "learned_range"; "posterior" if None.
        clip: a number c > 0; the x0 that m stands for is clamped to ±c.
        over: "sum" over the event, or "mean", which is 1/n of it for n elements and of a size that float32 resolves: the sum of 10⁵
            elements is some 10⁵, where float32 has steps of 0.01, and the ratio of two policies is the exponential of a difference.

    Returns (B,) in float32, or float64 where a tensor is: half precision computes in float32 and is not rounded to. Sums are made
    in a fixed order. Differentiable in m, v and x_t, twice, with x_{t−1} held fixed; where x_prev requires grad it gets one too,
    and that and forward-mode derivatives take the decomposed path, so detach a sample.

    Raises TypeError for wrong types or dtypes, ValueError for wrong shapes, devices or values. A step without noise has no density:
    eta = 0 is refused, and so is t = 0, at which neither step adds any, whatever the variance. A t = 0 in a tensor is treated as a
    timestep outside the schedule is in `ddpm_step`: on a GPU, where it cannot be seen without a synchronisation, that sample
    becomes NaN; in a compiled program on the CPU it raises RuntimeError.

    Sources: Ho et al. 2020, equations (1) and (6); Song et al. 2021 (DDIM), equation (12); as a policy: Black et al. 2024 (DDPO),
    section 4.3.
    """
    if eta is not None and type(eta) is not float:  # True would find the plan of 1.0
        eta = checks.number("eta", eta, low=0.0)
    others = getattr(x_prev, "dtype", None), eta
    plan = dispatch.plan("step_log_prob", schedule, x_t, model_output, (method, prediction, variance), others)
    if plan is None:
        plan = _make_plan(x_prev, x_t, model_output, schedule, method, eta, prediction, variance)
    _check_tensors(x_prev, x_t, model_output, plan.learned)
    checks.option("over", over, OVERS)
    if clip is not None:
        clip = checks.number("clip", clip, low=0.0, strict=True)
    own_t, index = dispatch.timestep(plan, t, x_t, 1)
    o = Operands(x_t, model_output, plan.rows, own_t, index, clip, plan.learned, ddpm_step.scale_of(over, x_t))
    try:
        return run(plan.call, plan.backend, x_prev, o)
    except (RuntimeError, TypeError):
        checks.timestep(t, x_t, plan.end, plan.note, 1)
        raise


def _make_plan(x_prev, x_t, model_output, schedule, method, eta, prediction, variance):
    checks.schedule(schedule)
    checks.option("method", method, METHODS)
    checks.option("prediction", prediction, PREDICTIONS)
    learned = variance in LEARNED_VARIANCES if isinstance(variance, str) else False
    if method == "ddpm":
        if eta is not None:
            raise ValueError(f"eta: expected None with method='ddpm', which has none, got {eta!r}")
        if variance is not None:
            checks.option("variance", variance, VARIANCES)
    else:
        if variance is not None:
            raise ValueError(f"variance: expected None with method='ddim', whose variance is eta's, got {variance!r}")
        _check_eta(eta)
    _check_tensors(x_prev, x_t, model_output, learned)
    dtype = checks.compute_dtype(checks.result_dtype(x_t, model_output))
    if x_prev.dtype == torch.float64:
        dtype = torch.float64
    if method == "ddpm":
        table = schedule.ddpm_step_table(prediction, "posterior" if variance is None else variance, x_t.device, dtype)
    else:
        table = schedule.ddim_step_table(prediction, eta, x_t.device, dtype)
    options = (method, prediction, variance), (x_prev.dtype, eta)
    return dispatch.make_plan("step_log_prob", schedule, x_t, model_output, dtype, table, *options, learned)


def _check_eta(eta):
    if eta is None:
        raise ValueError("eta: expected a number > 0 and ≤ 1 with method='ddim', got None")
    checks.number("eta", eta, low=0.0)
    if eta == 0.0:
        raise ValueError(f"eta: expected a number > 0 and ≤ 1, got {eta!r}; a step without noise has no density")
    if eta > 1.0:
        raise ValueError(f"eta: expected a number > 0 and ≤ 1, got {eta!r}")


def _check_tensors(x_prev, x_t, model_output, learned):
    checks.batched("x_t", x_t)
    (checks.two_channels if learned else checks.like)("model_output", model_output, "x_t", x_t)
    checks.like("x_prev", x_prev, "x_t", x_t)


def run(call, backend, x_prev, o):
    """`call`: the backend's op, None for the eager one."""
    recorded = torch.is_grad_enabled()
    if call is None or (recorded and x_prev.requires_grad):
        return reference(x_prev, o)
    if recorded and (o.x_t.requires_grad or o.model_output.requires_grad):
        x_t, model_output = dispatch.distinct((o.x_t, o.model_output))
        return _StepLogProb.apply(backend, x_t, model_output, (x_prev, *o[2:]))
    return call(x_prev, *o)


# ---- the weights of trajectories ------------------------------------------------------------------------------------------


def step_log_weight(x_prev, x_t, model_output, t, schedule, *, prediction="epsilon", variance="posterior", clip=None):
    """The logarithm of what the step t contributes to the weight of a trajectory x_0 … x_T that the forward process made:

        log p(x_{t−1} | x_t)/q(x_t | x_{t−1}),    q(x_t | x_{t−1}) = N(√α·x_{t−1}, β),   and at t = T−1 log N(x_T; 0, 1) too

    (B,), added up over the event, in one launch: the sum over t is the logarithm in equation (4.8). μ and σ are those of
    `step_log_prob`, σ at t = 0 that of `vlb_terms`. No gradients are recorded. t is an int or an int64 tensor (B,)."""
    option = prediction, variance
    plan = dispatch.plan("step_log_weight", schedule, x_t, model_output, option, x_prev.dtype)
    if plan is None:
        learned = variance in LEARNED_VARIANCES
        _check_tensors(x_prev, x_t, model_output, learned)
        dtype = checks.compute_dtype(torch.promote_types(checks.result_dtype(x_t, model_output), x_prev.dtype))
        table = schedule.step_log_weight_table(prediction, variance, x_t.device, dtype)
        plan = dispatch.make_plan("step_log_weight", schedule, x_t, model_output, dtype, table, option, x_prev.dtype, learned)
    return _weighed(plan, x_prev, x_t, model_output, t, clip)


def forward_log_weight(x0, x_1, schedule):
    """−log q(x_1 | x0) (B,), for a decoder that has a probability of its own in the place of the density p(x0 | x_1); of a schedule
    of one step with log N(x_1; 0, 1)."""
    plan = dispatch.plan("forward_log_weight", schedule, x_1, x0)
    if plan is None:
        dtype = checks.compute_dtype(checks.result_dtype(x_1, x0))
        table = schedule.forward_log_weight_table(x_1.device, dtype)
        plan = dispatch.make_plan("forward_log_weight", schedule, x_1, x0, dtype, table, kernel="step_log_weight")
    return _weighed(plan, x0, x_1, x_1, 0, None)  # x_1 as the network's output: the row multiplies it by 0


def _weighed(plan, x_prev, x_t, model_output, t, clip):
    _check_tensors(x_prev, x_t, model_output, plan.learned)
    own_t, index = dispatch.timestep(plan, t, x_t)
    o = Operands(x_t, model_output, plan.rows, own_t, index, clip, plan.learned, 1.0)
    try:
        return weight_reference(x_prev, o) if plan.call is None else plan.call(x_prev, *o)
    except (RuntimeError, TypeError):
        checks.timestep(t, x_t, plan.end, plan.note)
        raise


# ---- eager reference ------------------------------------------------------------------------------------------------------


def reference(x_prev, o):
    """The kernel in plain PyTorch. rows: (T, 10), the columns of `tables.DDPM_STEP_COLUMNS`."""
    step = ddpm_step.Operands(o.x_t, o.model_output, o.rows, o.t, o.index, clip=o.clip, learned=o.learned)
    c = ddpm_step.columns(step)
    m, v = ddpm_step.mean_and_variance(step)
    mean, _ = ddpm_step.mean(step, c, m)
    sigma = torch.where(c["sigma"] == 0, torch.nan, c["sigma"])  # of a learned variance 0 or 1
    log_sigma = torch.log(sigma)
    if o.learned:
        log_sigma = log_sigma + c["slope"] * v + c["intercept"]
        u = (x_prev.to(mean.dtype) - mean) * torch.exp(-log_sigma)
    else:
        u = (x_prev.to(mean.dtype) - mean) / sigma
    terms = -0.5 * u * u - (log_sigma + 0.5 * math.log(2.0 * math.pi))
    return o.scale * dispatch.sum_of_events(terms)


def weight_reference(x_prev, o):
    """The kernel of the weights in plain PyTorch. rows: (T, 13), the columns of `tables.STEP_LOG_WEIGHT_COLUMNS`."""
    step = ddpm_step.Operands(o.x_t, o.model_output, o.rows[:, : len(DDPM_STEP_COLUMNS)], o.t, o.index, clip=o.clip)
    m, v = ddpm_step.mean_and_variance(step._replace(learned=o.learned))
    mean, _ = ddpm_step.mean(step, ddpm_step.columns(step), m)
    c = dict(zip(STEP_LOG_WEIGHT_COLUMNS, dispatch.gathered(o.rows, o.t, o.index, o.x_t.dim()), strict=True))
    x, x_prev = o.x_t.to(mean.dtype), x_prev.to(mean.dtype)
    log_ratio, inverse_sigma = c["intercept"], c["inverse_sigma"]
    if o.learned:
        log_ratio = c["slope"] * v + log_ratio
        inverse_sigma = torch.exp(-log_ratio) * c["forward_inverse_sigma"]
    u = (x_prev - mean) * inverse_sigma
    w = (x - c["forward_scale"] * x_prev) * c["forward_inverse_sigma"]
    prior = c["prior"] * (0.5 * x * x + 0.5 * math.log(2.0 * math.pi))
    return o.scale * dispatch.sum_of_events(0.5 * (w - u) * (w + u) - (log_ratio + prior))


# ---- fakes ----------------------------------------------------------------------------------------------------------------


@dispatch.register_fake("step_log_prob", "step_log_weight")
def _fake(x_prev, o):
    dispatch.same_device(o.x_t, o.model_output, o.rows, o.t, x_prev)
    dtype = checks.compute_dtype(checks.result_dtype(o.x_t, o.model_output))
    return torch.empty(o.x_t.shape[:1], dtype=torch.promote_types(dtype, x_prev.dtype), device=o.x_t.device)


@dispatch.register_fake("step_log_prob_and_gradient")
def _fake_and_gradient(x_prev, o):
    return _fake(x_prev, o), dispatch.empty_like(o.x_t, o.model_output.dtype, 2 if o.learned else 1)


@dispatch.register_fake("step_log_prob_backward")
def _fake_backward(gradient, x_prev, o):
    dispatch.same_device(_fake(x_prev, o), gradient)
    return dispatch.empty_like(o.x_t, o.model_output.dtype, 2 if o.learned else 1)


@dispatch.register_fake("step_log_prob_backward_x")
def _fake_backward_x(gradient, x_prev, o):
    return _fake_backward(gradient, x_prev, o), dispatch.empty_like(o.x_t)


@dispatch.register_fake("ddpm_step_log_prob", "ddim_step_log_prob")
def _fake_step(o, noise, seeds, seed, unconditional, guidance):
    dispatch.same_device(o.x_t, o.model_output, o.rows, o.t, noise, unconditional)
    dtype = checks.result_dtype(o.x_t, o.model_output)
    log_prob = torch.empty(o.x_t.shape[:1], dtype=checks.compute_dtype(dtype), device=o.x_t.device)
    return dispatch.empty_like(o.x_t, dtype), log_prob


# ---- autograd -------------------------------------------------------------------------------------------------------------


_AHEAD = dispatch.has("step_log_prob_and_gradient")  # an op of the CPU alone


class _StepLogProb(torch.autograd.Function):
    """One fused kernel back. Where a second derivative may be asked for (create_graph), the reference's own derivative.

    On the CPU, where the gradient is wanted to m alone, the forward writes it for an upstream gradient of 1 too: what it is made of
    is then read once. The first backward multiplies it and hands it on, and a later one makes it anew. Until then, or until the
    graph is gone, it takes as much memory as m."""

    @staticmethod
    def forward(ctx, backend, x_t, model_output, rest):
        x_prev, *others = rest
        o = Operands(x_t, model_output, *others)
        ctx.save_for_backward(x_t, model_output, x_prev, o.t)
        ctx.backend, ctx.others, ctx.made = backend, o._replace(x_t=None, model_output=None, t=None), None
        # in a narrower dtype than the arithmetic's a product with the upstream gradient would be rounded twice
        to_m_alone = ctx.needs_input_grad[2] and not ctx.needs_input_grad[1] and model_output.dtype == o.rows.dtype
        if _AHEAD and to_m_alone and dispatch.makes_ahead(backend, model_output):
            log_prob, ctx.made = dispatch.op("step_log_prob_and_gradient", backend)(x_prev, *o)
            return log_prob
        return dispatch.op("step_log_prob", backend)(x_prev, *o)

    @staticmethod
    def backward(ctx, gradient):
        x_t, model_output, x_prev, t = ctx.saved_tensors
        o = ctx.others._replace(x_t=x_t, model_output=model_output, t=t)
        needed = ctx.needs_input_grad[1:3]
        made, ctx.made = ctx.made, None  # given away once: whoever gets it may write to it
        if torch.is_grad_enabled() or dispatch.batched(gradient):
            return None, *_decomposed(gradient, x_prev, o, needed), None
        if made is not None and dispatch.multiplied((made,), gradient):
            return None, None, made, None
        made = None  # its memory, before another is allocated
        to_x = None
        if needed[0]:
            to_m, to_x = dispatch.op("step_log_prob_backward_x", ctx.backend)(gradient, x_prev, *o)
        else:
            to_m = dispatch.op("step_log_prob_backward", ctx.backend)(gradient, x_prev, *o)
        return None, to_x, to_m if needed[1] else None, None


def _decomposed(gradient, x_prev, o, needed):
    """The gradients to x_t and m, each as if the other did not depend on it: of views, since m is often made from x_t."""
    with torch.enable_grad():
        x, m = (
            (y.view_as(y) if y.requires_grad else y.detach().requires_grad_()) if need else y
            for y, need in zip((o.x_t, o.model_output), needed, strict=True)
        )
        terms = reference(x_prev, o._replace(x_t=x, model_output=m))
        inputs = [y for y, need in zip((x, m), needed, strict=True) if need]
        found = iter(torch.autograd.grad(terms, inputs, gradient, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needed]
