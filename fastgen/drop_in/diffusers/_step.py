"""A reverse step by the long way, which checks everything, and the two methods that add noise."""

from __future__ import annotations

import torch

from ..._core import checks
from ..._ops.ddpm_step import dynamic_bound, step_with
from ..._ops.q_sample import noised_with
from .._patch import NotCovered
from ._arguments import check_like_sample, predicting_part, step_timestep, timestep_of_each
from ._coefficients import DDPM_BATCH_NO_NOISE
from ._noise import NO_NOISE
from ._remembered import remembered
from ._short_way import keep

_DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in checks.FLOATING}  # dynamo guards on keys by their text
_compiling = torch.compiler.is_compiling


def reverse_step(scheduler, key, model_output, timestep, sample, draw):
    """(previous sample, x0) with the table `key`; draw(t, m) gives the arguments of `step_with` that say where noise of m's shape
    comes from. Raises NotCovered before anything is drawn."""
    looked_at = remembered(scheduler)
    settings = looked_at.settings
    m, learned = predicting_part(settings, model_output, sample)
    coefficients, has_step = settings.coefficients(key)
    t = step_timestep(looked_at, timestep, sample, has_step)
    if settings.thresholding and torch.is_grad_enabled() and (sample.requires_grad or m.requires_grad):
        raise NotCovered("gradients go through the quantile of dynamic thresholding")
    noise = draw(t, m)
    threshold = _threshold(settings, key, sample, m, t) if settings.thresholding else None
    if settings.prediction == "sample" and settings.clip is None and threshold is None:
        return step_with(coefficients, sample, model_output, t, learned=learned, **noise), m
    y, x0 = step_with(
        *(coefficients, sample, model_output, t), learned=learned, clip=settings.clip, threshold=threshold, return_x0=True, **noise
    )
    if settings.suits_plain_step and key != DDPM_BATCH_NO_NOISE and not _compiling():
        keep(looked_at, key, coefficients, has_step, sample, model_output)
    return y, x0.to(m.dtype) if settings.prediction == "sample" else x0


def _threshold(settings, key, sample, m, t):
    """The bound of each sample in dynamic thresholding."""
    x0 = m if settings.prediction == "sample" else step_with(settings.coefficients(("x0", *key))[0], sample, m, t, **NO_NOISE)
    return dynamic_bound(x0, settings.quantile, 1.0, settings.largest_bound)


def noised(name, scheduler, x, noise, timesteps, float32_coefficients):
    """What the method `name` gives: "add_noise" or "get_velocity"."""
    check_like_sample("noise", noise, x)
    if noise.shape != x.shape or noise.dtype != x.dtype:
        raise NotCovered(f"shapes {tuple(x.shape)} and {tuple(noise.shape)}, dtypes {x.dtype} and {noise.dtype}")
    settings = remembered(scheduler).settings
    if settings.noising_problem:
        raise NotCovered(settings.noising_problem)
    key = name, "float32" if float32_coefficients and x.dtype.itemsize == 2 else _DTYPE_NAMES[x.dtype]
    coefficients, _ = settings.coefficients(key)
    try:
        return noised_with(coefficients, x, timestep_of_each(timesteps, x), noise=noise)
    except ValueError as error:  # a timestep below 0, which counts from the end in diffusers, or beyond
        raise NotCovered(error) from None
