"""The likelihood of a model's chain, estimated from trajectories of the forward process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .._core import checks, dispatch, rng
from .._ops.q_sample import q_step
from .._ops.step_log_prob import forward_log_weight, step_log_weight
from .._ops.vlb_terms import Decoder, vlb_terms
from .._sampling.arguments import network_kwargs, progress_bar
from ..schedule import Prediction, Schedule, Variance
from .variational_bound import checked_chunk, checked_clip, default_chunk, output_for, repeated, sum_of_columns


class LogLikelihood(NamedTuple):
    """What `log_likelihood` returns, (B,) each: the estimate, its standard error, and the effective sample size."""

    __module__ = "fastgen"  # what a pickle says, whatever module this becomes

    estimate: torch.Tensor
    error: torch.Tensor
    ess: torch.Tensor


@torch.no_grad()
def log_likelihood(
    model: Callable[..., Any],
    x0: torch.Tensor,
    schedule: Schedule,
    *,
    trajectories: int,
    seed: int | torch.Tensor,
    chunk: int | None = None,
    prediction: Prediction = "epsilon",
    variance: Variance = "posterior",
    clip: float | None = None,
    decoder: Decoder = "gaussian",
    model_kwargs: dict[str, Any] | None = None,
    progress: bool = False,
) -> LogLikelihood:
    """log p_θ(x0), which `variational_bound` bounds, from K trajectories of the forward process, x_t ~ q(x_t | x_{t−1}):

        p_θ(x0) = E[w],    w = p(x_T)·Π_t p_θ(x_{t−1} | x_t)/q(x_t | x_{t−1}),    p(x_T) = N(0, I)

        estimate = log (1/K)·Σ_k w_k,    error = √(Σ_k (w_k − w̄)²/(K·(K−1)))/w̄,    ess = (Σ_k w_k)²/Σ_k w_k²

        x_t   = q_step(x_{t−1}, t, schedule, seed=…, offset=t),    each trajectory having a seed made from the sample's
        log w = log p(x_T) + Σ_t log p_θ(x_{t−1} | x_t)/q(x_t | x_{t−1}),    one launch for each t, both densities at once

    exp(estimate) is unbiased, and so in the mean estimate is below log p_θ(x0): with K = 1 it is minus the bound, more
    trajectories tighten it (Burda et al. 2016). The error is that of the delta method, which holds where it is small. Where the ess
    is near 1, one trajectory outweighs all others: the estimate is then a bound of little more worth than the variational one, and
    the error says too little. The logarithms of the weights scatter by some multiple of √n for n elements of imperfect predictions,
    so take this for data of few dimensions and the bound for images.

    p_θ is the chain that `sample` draws from with method "ddpm" and the same prediction, variance and clip, but that at t = 0 its
    variance is that of `vlb_terms`.

    The random-number contract says how the seeds are made. Nothing depends on `chunk`, nor with a seed for each sample on how the
    data is split into batches, but for rounding: that of the network's own arithmetic, and on a GPU that of sums over an event,
    which it shares out by how many there are. Of more trajectories the first are the same.

    Args:
        model: a callable (x, timesteps, **model_kwargs) → m, as `sample` calls it, of n·B samples at once: x (n·B, *event) in
            float32, or float64 where x0 is, in the layout of x0, and timesteps int64 (n·B,), all alike; neither to be written to.
            It returns m, or a tuple that begins with it, or an object that has it as `.sample`; m is (n·B, *event), or
            (n·B, 2C, ...) with a learned variance, in any of the four dtypes. Whether it is in training mode is left as it is.
        x0: (B, *event), float16, bfloat16, float32, float64 or uint8, contiguous or channels-last; other strides are copied
            first. A byte u stands for u/127.5 − 1. Trajectories are never in half precision, whose rounding is no draw of q.
        schedule: a `Schedule` of T steps. Of a respaced one the likelihood is that of the model of these steps.
        trajectories: K, an int ≥ 1.
        seed: int or int64 tensor of 1 or B elements.
        chunk: how many trajectories go through the network in one call, n: more take more memory and fewer launches. If None,
            64 div B, but at least 1.
        prediction: "epsilon", "sample" or "v_prediction", what m is.
        variance: "posterior", "beta", "learned" or "learned_range", as of `vlb_terms`.
        clip: a number c > 0; the x0 that m stands for is clamped to ±c.
        decoder: "gaussian", the density of p_θ at x0; or "discretized", the probability of its bin, as of `vlb_terms`.
        model_kwargs: a dict of what else the network is given; dicts, lists and tuples of tensors may be in it. Tensors with B as
            their first dimension are repeated for the n trajectories of a call, once for all calls; all else is passed on as it is.
        progress: show a progress bar; needs tqdm.

    Returns a `LogLikelihood` (estimate, error, ess), (B,) each, in nats, float64. Of one trajectory the error is NaN. Sums over
    steps and trajectories are float64, in an order that depends on T and K alone. Gradients are not recorded.

    Raises TypeError or ValueError naming the argument, before the network is called; of what the network returns, then.
    ImportError for progress without tqdm.

    Sources: equation (4.8) of Sunmook Choi's lecture note "Generative Models", 2023; Sohl-Dickstein et al. 2015,
    section 2.3; Ho et al. 2020, equations (1) and (2).
    """
    clip = checked_clip(model, x0, schedule, prediction, variance, decoder, clip)
    batch, dtype = len(x0), checks.compute_dtype(torch.get_default_dtype() if x0.dtype is torch.uint8 else x0.dtype)
    seeds, number = rng.check_seed(seed, batch, x0.device)
    table = schedule.step_log_weight_table(prediction, variance, x0.device, dtype)
    if table.rows.size(0) < len(schedule):
        raise ValueError(f"schedule: expected coefficients for each of its {len(schedule)} steps{table.note}")
    count = _checked_trajectories(trajectories)
    size = min(default_chunk(batch) if chunk is None else checked_chunk(chunk), count)
    kwargs = network_kwargs(model_kwargs, None, batch, False)
    bar = progress_bar() if checks.boolean("progress", progress) else None

    trajectory_seeds = rng.more_seeds(count, batch, seeds, number, x0.device)
    start = dispatch.empty_like(x0, dtype).copy_(dispatch.real_of(x0, dtype))
    options: dict[str, Any] = {"prediction": prediction, "variance": variance, "clip": clip}
    of_steps = schedule.timestep_tensor(x0.device)
    kwargs_of = {n: repeated(kwargs, batch, n) for n in {size, count % size} if n}

    def log_weights_of(seeds, shown):
        """(n, B), of the trajectories with these seeds, which go through the network together."""
        n = len(seeds)
        x_prev, log_weights = _copies(start, n), torch.zeros(n * batch, dtype=torch.float64, device=x0.device)
        for t in range(len(schedule)):
            # a tensor of its own for each call, for a network that keeps what it is given
            x = q_step(x_prev, t, schedule, seed=seeds.flatten(), offset=t)
            m = output_for(model, x, of_steps[t].repeat(n * batch), kwargs_of[n], variance)
            if t > 0 or decoder == "gaussian":
                log_weights += step_log_weight(x_prev, x, m, t, schedule, **options)
            else:
                log_weights -= vlb_terms(m, x_prev, 0, schedule, x_t=x, decoder=decoder, **options)
                log_weights += forward_log_weight(x_prev, x, schedule)
            x_prev = x
            if shown is not None:
                shown.update(n)
        return log_weights.view(n, batch)

    def all_log_weights(shown):
        return torch.cat([log_weights_of(some, shown) for some in trajectory_seeds.split(size)])

    if bar is None:
        log_weights = all_log_weights(None)
    else:
        with bar(total=count * len(schedule), desc="log-likelihood", unit="step") as shown:
            log_weights = all_log_weights(shown)
    return _estimated(log_weights)


def _checked_trajectories(trajectories) -> int:
    trajectories = checks.integer("trajectories", trajectories)
    if trajectories < 1:
        raise ValueError(f"trajectories: expected an int ≥ 1, got {trajectories}")
    return trajectories


def _copies(x, count):
    """The samples of x `count` times, in its layout."""
    if count == 1:
        return x
    made = dispatch.empty_like(x, samples=count * len(x))
    made.unflatten(0, (count, len(x))).copy_(x)
    return made


def _estimated(log_weights) -> LogLikelihood:
    """Of log-weights (K, B). The weights are taken over the largest of them, so that none overflows."""
    count, largest = len(log_weights), log_weights.amax(0)
    largest = torch.where(largest.isinf(), 0.0, largest)  # where x0 has no probability at all its logarithm is −∞
    weights = torch.exp(log_weights - largest).T
    mean = sum_of_columns(weights) / count
    scatter = sum_of_columns((weights - mean[:, None]).square())
    error = torch.sqrt(scatter / count / (count - 1)) / mean if count > 1 else torch.full_like(mean, math.nan)
    ess = (count * mean) ** 2 / sum_of_columns(weights.square())
    return LogLikelihood(largest + torch.log(mean), error, ess)
