"""q(x_{t−1} | x_t, x_0): public function, eager reference, fake, autograd."""

from __future__ import annotations

import torch

from .._core import checks, declared, dispatch
from .._core.tables import Q_POSTERIOR_COLUMNS, Coefficients
from ..schedule import Schedule
from .q_sample import check_schedule, scaled

Operands = declared.OPERANDS["q_posterior"]
MEAN_FROM_X0, MEAN_FROM_X = map(Q_POSTERIOR_COLUMNS.index, ("mean_from_x0", "mean_from_x"))


def q_posterior(
    x0: torch.Tensor, x_t: torch.Tensor, t: int | torch.Tensor, schedule: Schedule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The posterior of the forward process, N(x_{t−1}; mean, variance·I):

        mean     = √ᾱ_{t−1}·β_t/(1−ᾱ_t) · x0 + √α_t·(1−ᾱ_{t−1})/(1−ᾱ_t) · x_t
        variance = β̃_t = β_t·(1−ᾱ_{t−1})/(1−ᾱ_t)

    Args:
        x0, x_t: (B, *event), float16, bfloat16, float32 or float64, contiguous or channels-last; other strides are copied
            first.
        t: int or int64 tensor of shape (B,), 0-based, within 0 … T−1.
        schedule: a `Schedule` of T steps.

    Returns (mean, variance, log_variance): the mean with the shape and layout of x0 and the promoted dtype of x0 and x_t,
    differentiable in both; the other two of shape (B, 1, …, 1) in float32 (float64 where the mean is). β̃_0 is 0, and
    log_variance has log β̃_1 in its place.

    Raises as `fastgen.q_sample` does.

    Source: Ho et al. 2020, equations (6) and (7), and the clipped log-variance of their code.
    """
    return _posterior(Schedule.q_posterior_table, x0, x_t, t, schedule)


def posterior_with(coefficients, x0, x_t, t):
    """`q_posterior` with the `Coefficients` of another library: U·x0 + V·x_t, and its variance and log-variance."""
    return _posterior(Coefficients.table, x0, x_t, t, coefficients)


def _posterior(table, x0, x_t, t, schedule):
    plan = dispatch.plan("q_posterior", schedule, x0, x_t)
    if plan is None:
        check_schedule(schedule)
        _check_tensors(x0, x_t)
        dtype = checks.result_dtype(x0, x_t)
        plan = dispatch.make_plan("q_posterior", schedule, x0, x_t, dtype, table(schedule, x0.device, dtype))
    _check_tensors(x0, x_t)
    t, index = checks.timestep(t, x0, plan.end, plan.note)
    operands = (x0, x_t, plan.rows, t, index)
    if plan.call is None:
        return reference(Operands(*operands))
    if torch.is_grad_enabled() and (x0.requires_grad or x_t.requires_grad):
        return _QPosterior.apply(plan, *operands)
    return plan.call(*operands)


def _check_tensors(x0, x_t):
    checks.batched("x0", x0)
    checks.like("x_t", x_t, "x0", x0)


# ---- eager reference ------------------------------------------------------------------------------------------------------


def reference(o):
    """The kernel in plain PyTorch. rows: (T, 4), the columns of `tables.Q_POSTERIOR_COLUMNS`."""
    mean_from_x0, mean_from_x, variance, log_variance = dispatch.gathered(o.rows, o.t, o.index, o.x0.dim())
    mean = mean_from_x0 * o.x0.to(o.rows.dtype) + mean_from_x * o.x_t.to(o.rows.dtype)
    shape = (o.x0.shape[0], *[1] * (o.x0.dim() - 1))
    return mean.to(checks.result_dtype(o.x0, o.x_t)), variance.expand(shape).clone(), log_variance.expand(shape).clone()


# ---- fake -----------------------------------------------------------------------------------------------------------------


@dispatch.register_fake("q_posterior")
def _fake(o):
    dispatch.same_device(o.x0, o.x_t, o.rows, o.t)
    per_sample = torch.empty((o.x0.shape[0], *[1] * (o.x0.dim() - 1)), dtype=o.rows.dtype, device=o.x0.device)
    return dispatch.empty_like(o.x0, checks.result_dtype(o.x0, o.x_t)), per_sample, torch.empty_like(per_sample)


# ---- autograd -------------------------------------------------------------------------------------------------------------


class _QPosterior(torch.autograd.Function):
    """Affine in both inputs, so each gradient is a scaled copy of the mean's."""

    @staticmethod
    def forward(ctx, plan, *arguments):
        o = Operands(*arguments)
        ctx.save_for_backward(o.t)
        ctx.row, ctx.backend, ctx.dtypes = (o.rows, o.index), plan.backend, (o.x0.dtype, o.x_t.dtype)
        ctx.set_materialize_grads(False)  # no zeros for the variances
        mean, variance, log_variance = plan.call(*arguments)
        ctx.mark_non_differentiable(variance, log_variance)
        return mean, variance, log_variance

    @staticmethod
    def backward(ctx, gradient, *_):
        if gradient is None:
            return None, *dispatch.gradients(Operands)
        (t,), (rows, index), needed = ctx.saved_tensors, ctx.row, Operands(*ctx.needs_input_grad[1:])
        x0 = scaled(rows, MEAN_FROM_X0, gradient, t, index, ctx.backend).to(ctx.dtypes[0]) if needed.x0 else None
        x_t = scaled(rows, MEAN_FROM_X, gradient, t, index, ctx.backend).to(ctx.dtypes[1]) if needed.x_t else None
        return None, *dispatch.gradients(Operands, x0=x0, x_t=x_t)
