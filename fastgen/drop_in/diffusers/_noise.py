"""Where a step's noise comes from, as arguments of `step_with`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..._core.dispatch import backend_for, functorch_is_active
from ..._core.rng import random_seed
from ..._core.torch_noise import TO_FILL, randn, source, untouched
from ._torch_cuda import draws_as_cuda, noise_as_cuda

# Of a step whose coefficient of the noise is 0: neither noise nor a seed is drawn.
NO_NOISE: dict[str, Any] = {"seed": 0}

_compiling = torch.compiler.is_compiling


def noise_source(rng, generator, seed, model_output) -> dict[str, Any]:
    """Of noise of the shape of `model_output`, which is drawn or gets its seed here. rng: "exact", "fused" or
    "torch-cuda"."""
    if seed is not None:
        return {"seed": seed}
    if draws_as_cuda(rng, generator):
        return noise_as_cuda(generator, model_output)
    if rng == "fused":
        return {"seed": _drawn_seed(generator, model_output.shape[0])}
    return {"noise": _drawn_noise(generator, model_output)}


def _drawn_noise(generator, m):
    """What diffusers' randn_tensor gives, made faster where that can be."""
    if generator is None or (type(generator) is torch.Generator and generator.device == m.device):
        return randn(m.shape, generator, m.dtype, m.device)
    if isinstance(generator, list) and len(generator) > 1 and untouched() and backend_for(m.device) == "cpp":
        noise = torch.empty(m.shape, dtype=m.dtype, device=m.device)
        found = source(generator, noise, m.dtype, TO_FILL)
        if found is not None:
            found.fill(noise)
            return noise
    return randn_tensor(m.shape, generator=generator, device=m.device, dtype=m.dtype)


def check_one_source(generator, seed):
    if generator is not None and seed is not None:
        raise ValueError("generator, seed: expected at most one, got both")


def _drawn_seed(generator, batch):
    if isinstance(generator, (list, tuple)):
        if len(generator) == 1:
            return _drawn_seed(generator[0], batch)
        if len(generator) != batch:
            raise ValueError(f"generator: expected one, or a list of {batch}, one for each sample, got a list of {len(generator)}")
        return torch.cat([_random_bits(one) for one in generator])
    if generator is None and (_compiling() or functorch_is_active()):
        return None  # the op draws it, in the graph, or for each sample of a vmap
    if generator is None or generator.device.type == "cpu":
        return random_seed(generator)
    return _random_bits(generator)


def _random_bits(generator):
    return torch.empty(1, dtype=torch.int64, device=generator.device).random_(generator=generator)
