"""What the drop-in may stand for: which code of diffusers the tests have run, and which schedulers the coefficients speak for."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm_parallel import DDPMParallelScheduler

from ...schedule import PREDICTIONS
from .._patch import full_name
from .._source import fingerprint
from . import _known_code

SCHEDULERS = (DDPMScheduler, DDPMParallelScheduler, DDIMScheduler)
# The methods that a step of diffusers calls and a table of coefficients replaces, unless a scheduler has one of its own
REPLACED_BY_TABLES = ("_get_variance", "previous_timestep", "_threshold_sample")
# What these methods were when diffusers was imported
IMPORTED_METHODS = {base: {name: getattr(base, name, None) for name in REPLACED_BY_TABLES} for base in SCHEDULERS}

_VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range")


def why_untested(base, name) -> str:
    """Why the drop-in may not stand for a method of `base`, a class of diffusers: the tests have not run its code, or not that of a
    method that it calls. "" where it may. All ten methods take 48 ms of one core the first time, with the import of diffusers, and
    0.5 ms after."""
    called = [x for x in (name, *REPLACED_BY_TABLES) if hasattr(base, x)] if "step" in name else [name]
    untested = [x for x in called if fingerprint(getattr(base, x)) not in _known_code.KNOWN.get(full_name(base, x), ())]
    if not untested:
        return ""
    named = f"{base.__name__}'s {' and '.join(untested)}"
    return f"the tests have not run the code of {named} in diffusers {diffusers.__version__}"


def tensor_problem(attributes, name) -> str:
    """Why the values of `attributes[name]` cannot be had; "" where they can."""
    x = attributes[name]
    usable = isinstance(x, torch.Tensor) and not x.is_meta and not x.requires_grad
    return "" if usable else f"{name} is no tensor, or has no values, or requires grad"


def step_problem(scheduler) -> str:
    """Why diffusers' own code has to make this scheduler's reverse steps; "" where fastgen can."""
    config, cls = scheduler._internal_dict, type(scheduler)
    base = next(base for base in cls.__mro__ if base in SCHEDULERS)
    for name in REPLACED_BY_TABLES:
        if name in scheduler.__dict__ or getattr(cls, name, None) is not IMPORTED_METHODS[base][name]:
            return f"{cls.__name__} has a {name} of its own"
    if problem := tensor_problem(scheduler.__dict__, "timesteps"):
        return problem
    if config.prediction_type not in PREDICTIONS:
        return f"prediction_type is {config.prediction_type!r}"
    if config.clip_sample and not config.thresholding and not config.clip_sample_range > 0:
        return f"clip_sample_range is {config.clip_sample_range!r}"
    return "" if base is DDIMScheduler else _variance_problem(config.variance_type, scheduler.variance_type)


def _variance_problem(configured, on_scheduler):
    if configured not in _VARIANCE_TYPES:
        return f"variance_type is {configured!r}"
    if configured != on_scheduler:
        return f"variance_type is {configured!r} in the configuration and {on_scheduler!r} on the scheduler"
    return ""
