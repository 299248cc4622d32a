"""The term of the variational bound that no network has part in, by the kernel of vlb_terms: public function, eager reference."""

from __future__ import annotations

import torch

from .._core import checks, dispatch
from .._core.tables import VLB_TERMS_COLUMNS
from ..schedule import Schedule
from .bce_with_logits import REDUCTIONS, Reduction
from .vlb_terms import UNITS, Operands, Unit, bits_per_dim

MEAN_FROM_X0, CONSTANT = map(VLB_TERMS_COLUMNS.index, ("mean_from_x0", "constant"))


def prior_kl(x0: torch.Tensor, schedule: Schedule, *, unit: Unit = "nats", reduction: Reduction = "none") -> torch.Tensor:
    """The divergence of the last noised data from the prior, the term L_T of the variational bound:

        L_T = KL(q(x_T | x0) ‖ N(0, I)) = ½·Σ(ᾱ·x0² + (1 − ᾱ) − 1 − log(1 − ᾱ)),   ᾱ = ᾱ_{T−1}, the last of the schedule

    It has no parameters, and says how much of x0 the schedule leaves in what sampling takes for pure noise.

    Args:
        x0: (B, *event), float16, bfloat16, float32, float64 or uint8, contiguous or channels-last; other strides are copied first.
            A byte u stands for u/127.5 − 1, rounded once.
        schedule: a `Schedule`, whose last step counts.
        unit: "nats", the sum over the event, or "bits_per_dim", the mean over the event divided by ln 2.
        reduction: "none": (B,), "mean" or "sum" over the samples.

    Returns (B,), or a scalar, in float32, or float64 where x0 is: half precision computes in float32 and is not rounded to. −ᾱ −
    log(1 − ᾱ) keeps its relative accuracy where ᾱ is tiny. With a zero terminal signal-to-noise ratio the result is exactly 0. An
    x0 that is NaN or infinite makes it NaN. Differentiable in a floating x0, twice, on the decomposed path.

    Raises TypeError for wrong types or dtypes, ValueError for wrong shapes or values.

    Source: Ho et al. 2020, equation (5) and section 3.1.
    """
    plan = dispatch.plan("prior_kl", schedule, x0, x0)
    if plan is None:
        checks.schedule(schedule)
        checks.batched("x0", x0, or_bytes=True)
        dtype = checks.compute_dtype(x0.dtype)
        table = schedule.prior_kl_table(x0.device, dtype)
        plan = dispatch.make_plan("prior_kl", schedule, x0, x0, dtype, table, kernel="vlb_terms")
    checks.batched("x0", x0, or_bytes=True)
    checks.option("unit", unit, UNITS)
    checks.option("reduction", reduction, REDUCTIONS)
    scale = 1.0 if unit == "nats" else bits_per_dim(x0)
    terms = _run(plan, x0, scale)
    return terms if reduction == "none" else terms.mean() if reduction == "mean" else terms.sum()


def _run(plan, x0, scale):
    if plan.call is None or (x0.requires_grad and torch.is_grad_enabled()):
        return reference(x0, plan.rows, scale)
    # x0 stands for the network's output and for x_t too: the row multiplies both by 0, and a kernel reads the same lines again
    o = Operands(
        model_output=x0,
        x0=x0,
        rows=plan.rows,
        t=None,
        index=0,
        x_t=x0,
        noise=None,
        seeds=None,
        seed=None,
        offset=0,
        clip=None,
        learned=False,
        decoder=0,
        scale=scale,
        each_sample=True,
        loss=-1,
        delta=1.0,
        weights=None,
        vlb_weight=1.0,
    )
    return plan.call(*o)


# ---- eager reference ------------------------------------------------------------------------------------------------------


def reference(x0, rows, scale):
    """The kernel in plain PyTorch, as far as this row needs it. rows: (1, 14), the columns of `tables.VLB_TERMS_COLUMNS`."""
    mean_from_x0, constant = rows[0, MEAN_FROM_X0], rows[0, CONSTANT]
    x0 = dispatch.real_of(x0, rows.dtype)
    mean = mean_from_x0 * (x0 - 0.0 * x0)  # what is taken for x0 is 0, and as in the kernel NaN where x0 is not finite
    terms = constant + 0.5 * mean * mean
    return scale * dispatch.sum_of_events(terms)
