"""The noise that diffusers would draw on a CUDA GPU, of a `fastgen.TorchCudaGenerator` that is given as a step's `generator`."""

from __future__ import annotations

from typing import Any

import torch

from ..._core.torch_cuda import TorchCudaGenerator


def draws_as_cuda(rng, generator) -> bool:
    """Whether a step's noise comes from here: of rng="torch-cuda", unless torch's own generator on a GPU draws it anyway."""
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    if any(isinstance(each, TorchCudaGenerator) for each in generators):
        return True
    return rng == "torch-cuda" and not all(isinstance(each, torch.Generator) and each.device.type == "cuda" for each in generators)


def noise_as_cuda(generator, like) -> dict[str, Any]:
    """As diffusers' randn_tensor does it: with a list of generators each sample is a tensor of its own."""
    shape, batch = like.shape, like.shape[0]
    if isinstance(generator, (list, tuple)) and len(generator) == 1:
        generator = generator[0]
    if not isinstance(generator, (list, tuple)):
        return {"noise": _checked(generator).randn(shape, dtype=like.dtype, device=like.device)}
    if len(generator) != batch:
        raise ValueError(f"generator: expected one, or a list of {batch}, one for each sample, got a list of {len(generator)}")
    generator = [_checked(each) for each in generator]
    return {"noise": torch.cat([each.randn((1, *shape[1:]), dtype=like.dtype, device=like.device) for each in generator])}


def _checked(generator) -> TorchCudaGenerator:
    if isinstance(generator, TorchCudaGenerator):
        return generator
    if isinstance(generator, torch.Generator):
        raise ValueError(
            f'generator: expected a fastgen.TorchCudaGenerator with rng="torch-cuda", got a torch.Generator on {generator.device}, '
            "which does not say how far a CUDA generator would have come; pass "
            f"fastgen.TorchCudaGenerator({generator.initial_seed()}, device_like=...), and draw the first sample from it too"
        )
    got = "None, whose noise would be torch's default generator's" if generator is None else type(generator).__name__
    raise ValueError(f'generator: expected a fastgen.TorchCudaGenerator with rng="torch-cuda", got {got}')


def check_before_diffusers_own(rng, generator, why) -> None:
    """diffusers' own step takes a torch.Generator only."""
    if draws_as_cuda(rng, generator):
        raise ValueError(
            f'generator: expected a torch.Generator, and rng "exact" or "fused", where fastgen does not cover the step ({why}), '
            f'got {type(generator).__name__} and rng="{rng}"'
        )
