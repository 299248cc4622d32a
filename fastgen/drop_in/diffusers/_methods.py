"""What takes the place of diffusers' methods. Each function of `FAST_METHODS` and `LOOKING_METHODS` makes a method from diffusers'
own and `Options`; these are None for a subclass, whose instances have their own, in `_fastgen_options`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, DDPMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm_parallel import DDPMParallelScheduler, DDPMParallelSchedulerOutput

from .._patch import NotCovered, fall_through, full_name
from .._source import mark_replacement
from ._arguments import check_variance_noise
from ._coefficients import DDPM, DDPM_BATCH_NO_NOISE
from ._noise import NO_NOISE, check_one_source, noise_source
from ._remembered import remembered
from ._short_way import fast_output, short_step
from ._step import noised, reverse_step
from ._torch_cuda import check_before_diffusers_own

_compiling = torch.compiler.is_compiling
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class Options(NamedTuple):
    rng: str = "exact"
    float32_coefficients: bool = False


def _replacing(original, extra=""):
    """A decorator: the function takes the name and the documentation of diffusers' own, but shows its own signature."""

    def decorate(function):
        function.__signature__ = inspect.signature(function)
        functools.update_wrapper(function, original)
        mark_replacement(function, original)
        function.__doc__ = (original.__doc__ or "") + extra
        return function

    return decorate


_SEED_DOC = """
            seed (`int` or int64 `torch.Tensor` of 1 or B elements, *optional*):
                fastgen's: the noise is `fastgen.randn(sample.shape, seed=seed, offset=timestep)`, made in the kernel.
        """


# ---- reverse steps ------------------------------------------------------------------------------------------------------------


def _ddpm_step(output_class, original, options):
    @_replacing(original, _SEED_DOC)
    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> DDPMSchedulerOutput | DDPMParallelSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        if seed is None and not _is_dynamo_compiling():
            result = short_step(self, options, DDPM, model_output, timestep, sample, generator, output_class, return_dict)
            if result is not None:
                return result

        def draw(t, m):
            if t == 0 if type(t) is int else t.is_cpu and not _compiling() and not t.any():
                return NO_NOISE if seed is None else {"seed": seed}
            return noise_source((options or self._fastgen_options).rng, generator, seed, m)

        try:
            check_one_source(generator, seed)
            previous, x0 = reverse_step(self, DDPM, model_output, timestep, sample, draw)
        except NotCovered as why:
            check_before_diffusers_own((options or self._fastgen_options).rng, generator, why)
            _before_diffusers_own(f"{type(self).__name__}.step", why, seed)
            return original(self, model_output, timestep, sample, generator=generator, return_dict=return_dict)
        return _output(output_class, previous, x0) if return_dict else (previous, x0)

    return step


def _ddim_step(original, options):
    @_replacing(original, _SEED_DOC)
    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        seed: int | torch.Tensor | None = None,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        if seed is None and variance_noise is None and type(eta) is float and not _is_dynamo_compiling():
            key = "ddim", eta, bool(use_clipped_model_output)
            result = short_step(self, options, key, model_output, timestep, sample, generator, DDIMSchedulerOutput, return_dict)
            if result is not None:
                return result

        def draw(t, m):
            if eta == 0:
                return NO_NOISE if seed is None else {"seed": seed}
            if variance_noise is None:
                return noise_source((options or self._fastgen_options).rng, generator, seed, m)
            return {"noise": variance_noise}

        try:
            check_one_source(generator, seed)
            if self.num_inference_steps is None:
                raise NotCovered("set_timesteps has not been called")
            if not isinstance(eta, (int, float)) or not 0 <= eta <= 1:
                raise NotCovered(f"eta is {eta!r}")
            if eta > 0 and variance_noise is not None:
                check_variance_noise(variance_noise, sample, model_output, generator, seed)
            key = "ddim", float(eta), bool(use_clipped_model_output)
            previous, x0 = reverse_step(self, key, model_output, timestep, sample, draw)
        except NotCovered as why:
            if eta != 0 and variance_noise is None:
                check_before_diffusers_own((options or self._fastgen_options).rng, generator, why)
            _before_diffusers_own("DDIMScheduler.step", why, seed)
            return original(
                *(self, model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict)
            )
        return _output(DDIMSchedulerOutput, previous, x0) if return_dict else (previous, x0)

    return step


def _output(output_class, previous, x0):
    if _compiling():
        return output_class(prev_sample=previous, pred_original_sample=x0)
    return fast_output(output_class, previous, x0)


def _before_diffusers_own(what, why, seed):
    """Says that diffusers' own method runs, in which there is no `seed`."""
    if seed is not None:
        raise ValueError(f"seed: expected None where fastgen does not cover the step ({why}), got {seed!r}")
    fall_through(what, why)


def _batch_step_no_noise(original, options):
    @_replacing(original)
    def batch_step_no_noise(self, model_output: torch.Tensor, timesteps: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        try:
            return reverse_step(self, DDPM_BATCH_NO_NOISE, model_output, timesteps, sample, lambda t, m: NO_NOISE)[0]
        except NotCovered as why:
            fall_through("DDPMParallelScheduler.batch_step_no_noise", why)
            return original(self, model_output, timesteps, sample)

    return batch_step_no_noise


def diffusers_own(why, original):
    """diffusers' own method, in a subclass whose others may be fastgen's."""

    signature = inspect.signature(original)
    without_eta = 0.0 if "eta" in signature.parameters else 1.0  # of DDPM's step, which draws noise

    @functools.wraps(original)
    def method(self, *arguments, seed=None, **keywords):
        if original.__name__ == "step":
            call = signature.bind(self, *arguments, **keywords).arguments
            if call.get("eta", without_eta) != 0:
                check_before_diffusers_own(self._fastgen_options.rng, call.get("generator"), why)
        _before_diffusers_own(full_name(type(self), original.__name__), why, seed)
        return original(self, *arguments, **keywords)

    return method


# ---- noising ------------------------------------------------------------------------------------------------------------------


def _add_noise(original, options):
    @_replacing(original)
    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        try:
            in_float32 = (options or self._fastgen_options).float32_coefficients
            return noised("add_noise", self, original_samples, noise, timesteps, in_float32)
        except NotCovered as why:
            fall_through("add_noise", why)
            return original(self, original_samples, noise, timesteps)

    return add_noise


def _get_velocity(original, options):
    @_replacing(original)
    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        try:
            in_float32 = (options or self._fastgen_options).float32_coefficients
            return noised("get_velocity", self, sample, noise, timesteps, in_float32)
        except NotCovered as why:
            fall_through("get_velocity", why)
            return original(self, sample, noise, timesteps)

    return get_velocity


# ---- methods that change a scheduler ------------------------------------------------------------------------------------------


def _set_timesteps(original, options):
    @functools.wraps(original)
    def set_timesteps(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        remembered(self)  # Look at the scheduler now, since a compiled step cannot.

    return set_timesteps


def _register_to_config(original, options):
    @functools.wraps(original)
    def register_to_config(self, **keywords):
        original(self, **keywords)
        if "_fastgen" in self.__dict__:  # else this is the constructor, and there is nothing to look at yet
            remembered(self)

    return register_to_config


_NOISING = {"add_noise": _add_noise, "get_velocity": _get_velocity}
FAST_METHODS: dict[type, dict[str, Callable]] = {
    DDPMScheduler: {**_NOISING, "step": functools.partial(_ddpm_step, DDPMSchedulerOutput)},
    DDPMParallelScheduler: {
        **_NOISING,
        "step": functools.partial(_ddpm_step, DDPMParallelSchedulerOutput),
        "batch_step_no_noise": _batch_step_no_noise,
    },
    DDIMScheduler: {**_NOISING, "step": _ddim_step},
}
# Methods that do what diffusers' own do, whatever that is, and then look at the scheduler
LOOKING_METHODS: dict[str, Callable] = {"set_timesteps": _set_timesteps, "register_to_config": _register_to_config}
