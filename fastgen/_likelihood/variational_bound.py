"""The variational bound of a model's negative log-likelihood, by one pass of the network over noised data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from .._core import checks, dispatch, rng
from .._ops.prior_kl import prior_kl
from .._ops.q_sample import q_sample
from .._ops.vlb_terms import DECODERS, UNITS, Decoder, Unit, vlb_terms
from .._sampling.arguments import network_kwargs, progress_bar
from .._sampling.network import output_of
from ..schedule import LEARNED_VARIANCES, PREDICTIONS, VARIANCES, Prediction, Schedule, Variance

BATCH = 64  # samples that the network is given at once, where `chunk` says nothing


class VariationalBound(NamedTuple):
    """What `variational_bound` returns: total (B,), prior (B,), and terms (B, K), a column for each timestep."""

    __module__ = "fastgen"  # what a pickle says, whatever module this becomes

    total: torch.Tensor
    prior: torch.Tensor
    terms: torch.Tensor


@torch.no_grad()
def variational_bound(
    model: Callable[..., Any],
    x0: torch.Tensor,
    schedule: Schedule,
    *,
    seed: int | torch.Tensor,
    timesteps: Sequence[int] | torch.Tensor | None = None,
    chunk: int | None = None,
    unit: Unit = "bits_per_dim",
    prediction: Prediction = "epsilon",
    variance: Variance = "posterior",
    clip: float | None = None,
    decoder: Decoder = "discretized",
    model_kwargs: dict[str, Any] | None = None,
    progress: bool = False,
) -> VariationalBound:
    """An upper bound of −log p_θ(x0), what a model's chain leaves of the data's likelihood, from one draw of x_t at each timestep:

        total = L_T + Σ_t L_t,    L_T = KL(q(x_T | x0) ‖ N(0, I)),    L_t = KL(q(x_{t−1} | x_t, x0) ‖ p_θ(x_{t−1} | x_t)),  t ≥ 1
                                                                      L_0 = −log p_θ(x0 | x_1)

        x_t = q_sample(x0, t, schedule, seed=seed, offset=t)
        m   = model(x_t, schedule.timesteps[t], **model_kwargs)
        L_t = vlb_terms(m, x0, t, schedule, x_t=x_t),    L_T = prior_kl(x0, schedule)

    Its mean over the noise is the bound; `total` is an unbiased estimate of that. p_θ is the chain that `sample` draws from with
    method "ddpm" and the same prediction, variance and clip, but that the decoder ends it. Bits per dimension, as papers report
    them, are those of "discretized", for data of 256 values in −1 … 1.

    A term can be made anew alone, with the seed and the offset t. With a seed for each sample nothing depends on how the data is
    split into batches, and nothing ever depends on `chunk`, but for what the network's own arithmetic makes of the size of its
    batch.

    Args:
        model: a callable (x, timesteps, **model_kwargs) → m, as `sample` calls it, of n·B samples at once: x (n·B, *event) in the
            dtype and layout of x0, in place of uint8 float32, or torch's default dtype where that is float64; and timesteps int64
            (n·B,), neither to be written to; all samples at one timestep, then all at the next. It returns m, or a tuple that
            begins with it, or an object that has it as `.sample`; m is (n·B, *event), or (n·B, 2C, ...) with a learned variance, in
            any of the four floating dtypes. Whether it is in training mode is left as it is.
        x0: (B, *event), float16, bfloat16, float32, float64 or uint8, contiguous or channels-last; other strides are copied first.
            A byte u stands for u/127.5 − 1, as in `q_sample`, `vlb_terms` and `prior_kl`.
        schedule: a `Schedule` of T steps. A respaced one bounds the likelihood of the model of these steps.
        seed: int or int64 tensor of 1 or B elements.
        timesteps: the t of the K columns of `terms`: a sequence of ints within 0 … T−1 or an int tensor (K,), which is read on the
            host, once; all, in order, if None. Of given ones total is L_T + T/K·Σ_k L_k: unbiased where they were drawn
            uniformly. A timestep that comes twice has the same noise twice.
        chunk: how many timesteps go through the network in one call, n: more take more memory and fewer launches. If None,
            64 div B, but at least 1.
        unit: "bits_per_dim", the mean over the event divided by ln 2, or "nats", the sum over the event.
        prediction: "epsilon", "sample" or "v_prediction", what m is.
        variance: "posterior", "beta", "learned" or "learned_range", as of `vlb_terms`.
        clip: a number c > 0; the x0 that m stands for is clamped to ±c.
        decoder: "discretized", or "gaussian" for the density of p_θ at x0.
        model_kwargs: a dict of what else the network is given; dicts, lists and tuples of tensors may be in it. Tensors with B as
            their first dimension are repeated for the n timesteps of a call, once for all calls; all else is passed on as it is.
        progress: show a progress bar; needs tqdm.

    Returns a `VariationalBound` (total, prior, terms): (B,), (B,) and (B, K) in float32, or float64 where x0 or, but for the prior,
    m is. Terms are
    added in an order that depends on K alone. Gradients are not recorded: a loss is `vlb_terms`.

    Raises TypeError or ValueError naming the argument, before the network is called; of what the network returns, then.
    ImportError for progress without tqdm.

    Sources: Ho et al. 2020, equation (5); theorem 8 of Sunmook Choi's lecture note "Generative Models", 2023, equation (4.10);
    bits per dimension as in Nichol & Dhariwal 2021, section 3.
    """
    clip = checked_clip(model, x0, schedule, prediction, variance, decoder, clip)
    checks.option("unit", unit, UNITS)
    batch = len(x0)
    seeds, number = rng.check_seed(seed, batch, x0.device)
    own_seed = number if seeds is None else seeds
    table = schedule.vlb_terms_table(prediction, variance, x0.device, checks.compute_dtype(x0.dtype))
    chosen = _checked_timesteps(timesteps, schedule, table)
    size = min(default_chunk(batch) if chunk is None else checked_chunk(chunk), len(chosen))
    kwargs = network_kwargs(model_kwargs, None, batch, False)
    bar = progress_bar() if checks.boolean("progress", progress) else None

    x0 = _laid_out(x0)
    dtype = checks.compute_dtype(torch.get_default_dtype()) if x0.dtype is torch.uint8 else x0.dtype
    options: dict[str, Any] = {"prediction": prediction, "variance": variance, "clip": clip, "decoder": decoder, "unit": unit}
    # What the network gets is made for all calls at once, on the device, where an index would have to come from the host: nothing
    # waits for a copy, and no call has the schedule's own tensor.
    of_steps = schedule.timestep_tensor(x0.device).unbind()
    given = torch.stack([of_steps[t] for t in chosen]).repeat_interleave(batch)
    kwargs_of = {count: repeated(kwargs, batch, count) for count in {size, len(chosen) % size} if count}

    def terms_of(first):
        """Those of one call of the network."""
        ts = chosen[first : first + size]
        x = dispatch.empty_like(x0, dtype, samples=len(ts) * batch)  # anew for each call, for a network that keeps what it is given
        parts = [slice(k * batch, (k + 1) * batch) for k in range(len(ts))]
        for t, part in zip(ts, parts, strict=True):
            q_sample(x0, t, schedule, seed=own_seed, offset=t, out=x[part])
        m = output_for(model, x, given[first * batch : (first + len(ts)) * batch], kwargs_of[len(ts)], variance)
        return [vlb_terms(m[part], x0, t, schedule, x_t=x[part], **options) for t, part in zip(ts, parts, strict=True)]

    found = []
    if bar is None:
        for first in range(0, len(chosen), size):
            found += terms_of(first)
    else:
        with bar(total=len(chosen), desc="variational bound", unit="step") as shown:
            for first in range(0, len(chosen), size):
                found += terms_of(first)
                shown.update(len(found) - first)
    terms = torch.stack(found, 1)
    prior = prior_kl(x0, schedule, unit=unit)
    return VariationalBound(prior + len(schedule) / len(chosen) * sum_of_columns(terms), prior, terms)


def _checked_timesteps(timesteps, schedule, table) -> list[int]:
    end = table.rows.size(0)
    if timesteps is None:
        if end < len(schedule):
            raise ValueError(f"schedule: expected coefficients for each of its {len(schedule)} steps{table.note}")
        return list(range(end))
    expected = "a sequence of ints or an int tensor"
    if isinstance(timesteps, torch.Tensor):
        if timesteps.dtype.is_floating_point or timesteps.dtype.is_complex or timesteps.dtype is torch.bool:
            raise TypeError(f"timesteps: expected {expected}, got dtype {checks._dtype(timesteps.dtype)}")
        if timesteps.dim() != 1:
            raise ValueError(f"timesteps: expected shape (K,), got {tuple(timesteps.shape)}")
        timesteps = timesteps.tolist()
    elif isinstance(timesteps, (str, bytes)) or not isinstance(timesteps, Iterable):
        raise TypeError(f"timesteps: expected {expected}, got {type(timesteps).__name__}")
    found = [checks.integer("timesteps", t, "ints") for t in timesteps]
    if not found:
        raise ValueError("timesteps: expected at least one, got none")
    for t in found:
        if not 0 <= t < end:
            raise ValueError(f"timesteps: expected ints within 0 … {end - 1}, got {t}{table.note}")
    return found


def checked_clip(model, x0, schedule, prediction, variance, decoder, clip) -> float | None:
    """The clip, after the checks of what a chain is judged by."""
    checks.function("model", model)
    checks.batched("x0", x0, or_bytes=True)
    checks.schedule(schedule)
    checks.option("prediction", prediction, PREDICTIONS)
    checks.option("variance", variance, VARIANCES)
    checks.option("decoder", decoder, DECODERS)
    if variance in LEARNED_VARIANCES and x0.dim() < 2:
        raise ValueError(f"x0: expected shape (B, C, ...) for a learned variance, got {tuple(x0.shape)}")
    return None if clip is None else checks.number("clip", clip, low=0.0, strict=True)


def output_for(model, x, timesteps, kwargs, variance):
    """What the network says of x, in the shape that it must have."""
    m, expected = output_of(model(x, timesteps, **kwargs)), tuple(x.shape)
    if variance in LEARNED_VARIANCES:
        expected = x.shape[0], 2 * x.shape[1], *x.shape[2:]
    if tuple(m.shape) != expected:
        raise ValueError(f"model: expected an output of shape {expected} for {tuple(x.shape)}, got {tuple(m.shape)}")
    return m


def default_chunk(batch: int) -> int:
    return max(1, BATCH // max(batch, 1))


def checked_chunk(chunk) -> int:
    chunk = checks.integer("chunk", chunk)
    if chunk < 1:
        raise ValueError(f"chunk: expected an int ≥ 1, got {chunk}")
    return chunk


def _laid_out(x0):
    """`x0`, copied once where each op would copy it: where it is neither contiguous nor channels-last."""
    return x0 if dispatch.empty_like(x0).stride() == x0.stride() else x0.contiguous()


def repeated(kwargs, batch, count):
    """The network's other arguments for `count` times the samples."""
    if count == 1:
        return kwargs

    def repeat(x):
        return torch.cat([x] * count) if isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == batch else x

    return pytree.tree_map(repeat, kwargs)


def sum_of_columns(terms):
    """(B,) of (B, K), by halves: element by element, since in which order torch's own sum adds depends on how many samples
    there are."""
    while (count := terms.size(1)) > 1:
        half = math.ceil(count / 2)
        low = terms[:, :half].clone()
        low[:, : count - half] += terms[:, half:]
        terms = low
    return terms[:, 0]
