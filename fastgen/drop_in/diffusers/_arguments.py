"""Checks of the arguments of diffusers' methods. NotCovered: diffusers' own code has to run, and complains of what is wrong."""

from __future__ import annotations

import torch

from ..._core.checks import FLOATING
from .._patch import NotCovered
from ._remembered import INTEGERS

_compiling = torch.compiler.is_compiling


def predicting_part(settings, model_output, sample):
    """(the part of the network's output that predicts, whether another part is about the variance)."""
    if settings.step_problem:
        raise NotCovered(settings.step_problem)
    check_like_sample("model_output", model_output, sample)
    shape = sample.shape
    if model_output.shape == shape:
        if settings.learned:
            raise NotCovered("the model's output has no part for the learned variance")
        return model_output, False
    if settings.learned and model_output.shape == (*shape[:1], 2 * shape[1], *shape[2:]):
        return model_output[:, : shape[1]], True
    raise NotCovered(f"shapes {tuple(model_output.shape)} and {tuple(shape)}")


def check_like_sample(name, y, sample):
    """Whether `y`, the argument `name`, and the sample are dense floating tensors on one device."""
    x = sample
    on_cpu = type(y) is type(x) is torch.Tensor and x.is_cpu and y.is_cpu and x.layout is y.layout is torch.strided
    if on_cpu and x.dtype is y.dtype in FLOATING and x.dim() and not (x.is_nested or y.is_nested):
        return  # Nearly every call ends here.
    if not isinstance(y, torch.Tensor) or not isinstance(x, torch.Tensor):
        raise NotCovered(f"{name} of type {type(y).__name__} for a sample of type {type(x).__name__}")
    if x.is_nested or y.is_nested:
        raise NotCovered("nested tensors")
    if x.dim() == 0:
        raise NotCovered("a sample without dimensions")
    if y.dtype not in FLOATING or x.dtype not in FLOATING:
        raise NotCovered(f"dtypes {y.dtype} and {x.dtype}")
    if y.device != x.device:
        raise NotCovered(f"devices {y.device} and {x.device}")
    if y.layout is not torch.strided or x.layout is not torch.strided:
        raise NotCovered(f"layouts {y.layout} and {x.layout}")


def check_variance_noise(variance_noise, sample, model_output, generator, seed):
    """DDIM's argument, where it is used."""
    check_like_sample("variance_noise", variance_noise, sample)
    if variance_noise.shape != sample.shape or variance_noise.dtype not in (sample.dtype, model_output.dtype):
        raise NotCovered(f"variance_noise of {variance_noise.dtype} and shape {tuple(variance_noise.shape)}")
    if generator is not None or seed is not None:
        raise NotCovered("variance_noise beside a generator or a seed")


def step_timestep(remembered, timestep, sample, has_step):
    """The timestep of a step: an int, or an int64 tensor with one for each sample. has_step: see `Settings.coefficients`."""
    t = remembered.host_timestep(timestep)
    if t is not None:
        if not 0 <= t < remembered.settings.end or (has_step is not None and not has_step[t]):
            raise NotCovered(f"timestep {t} is not one that the scheduler visits, or its coefficients are not finite")
        return t
    t = timestep_of_each(timestep, sample)
    if t.is_cpu and not _compiling() and not all(0 <= i < len(has_step) and has_step[i] for i in t.tolist()):
        raise NotCovered("among the timesteps is one that the scheduler does not visit, or whose coefficients are not finite")
    return t


def timestep_of_each(timesteps, sample):
    """An int64 tensor on the sample's device, with a timestep for each sample."""
    if not isinstance(timesteps, torch.Tensor) or timesteps.dtype not in INTEGERS:
        raise NotCovered(f"a timestep of type {getattr(timesteps, 'dtype', type(timesteps).__name__)}")
    batch = sample.shape[0]
    if timesteps.numel() not in (1, batch):
        raise NotCovered(f"{timesteps.numel()} timesteps for {batch} samples")
    t = timesteps.to(sample.device, torch.int64).reshape(-1)
    return t.expand(batch) if t.numel() != batch else t
