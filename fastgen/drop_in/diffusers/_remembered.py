"""What is remembered of a scheduler, in its attribute `_fastgen`: what it consisted of, and the `Settings` that this came to."""

from __future__ import annotations

from operator import itemgetter

import numpy as np
import torch

from .._patch import NotCovered
from ._covered import step_problem, tensor_problem
from ._settings import Values, shared_settings

INTEGERS = (torch.int64, torch.int32)  # the dtypes of timesteps

# The attributes that decide a scheduler's numbers, if it has them, and are no tensors; its configuration is the first
_VALUES = ("_internal_dict", "num_inference_steps", "custom_timesteps", "variance_type")
_compiling = torch.compiler.is_compiling


def remembered(scheduler) -> Remembered:
    """What is remembered of a scheduler, looked at again if it has changed."""
    attributes = scheduler.__dict__
    found = attributes.get("_fastgen")
    if _compiling():
        if not isinstance(found, Remembered):
            raise NotCovered("nothing is known of the scheduler while compiling: call set_timesteps first")
        return found
    if type(found) is not Remembered or not found.is_of(attributes):
        found = attributes["_fastgen"] = Remembered(scheduler)
    return found


class Remembered:
    """A scheduler's attributes as they were when it was looked at, and what follows from them."""

    def __init__(self, scheduler):
        attributes = scheduler.__dict__
        config, self.alphas_cumprod, self.timesteps = (attributes[x] for x in ("_internal_dict", "alphas_cumprod", "timesteps"))
        self.final, self.one = attributes.get("final_alpha_cumprod"), attributes.get("one")  # DDIM has the former, DDPM the latter
        self.read_values = itemgetter(*(name for name in _VALUES if name in attributes))
        self.values = self.read_values(attributes)
        self.versions = self._versions()
        self.requires_grad = getattr(self.alphas_cumprod, "requires_grad", None)  # setting it in place leaves the version as it was
        self.settings = self._settings(scheduler, config)
        # What steps made like one that has gone well: see `_short_way.keep`, which fills it
        self.short_ways = {}
        self.timestep_at = self._timestep_at()

    def _versions(self):
        """(tensor, version) of each; tensors made in inference mode have no version, and are left out."""
        tensors = [x for x in (self.timesteps, self.alphas_cumprod, self.final, self.one) if isinstance(x, torch.Tensor)]
        return [(x, x._version) for x in tensors if not x.is_inference()]

    def _settings(self, scheduler, config):
        attributes, alphas_cumprod, final, timesteps = scheduler.__dict__, self.alphas_cumprod, None, ()
        noising_problem = tensor_problem(attributes, "alphas_cumprod")
        problem = noising_problem or step_problem(scheduler)
        if not noising_problem:
            alphas_cumprod = alphas_cumprod.detach().cpu().clone()
        if not problem:
            final = float(self.one if self.final is None else self.final)
            timesteps = tuple(self.timesteps.tolist())
        steps, custom, variance = map(attributes.get, _VALUES[1:])
        values = Values(steps, custom, variance, final, timesteps, noising_problem, problem)
        return shared_settings(type(scheduler), config, alphas_cumprod, values)

    def _timestep_at(self):
        """{address of an element of `scheduler.timesteps`: its value}, for the short way. It is empty on a GPU, and for a tensor
        made in inference mode, of which no version tells that it has changed."""
        values, timesteps = self.settings.timesteps, self.timesteps
        if not values or timesteps.is_inference() or not timesteps.is_cpu:
            return {}
        if timesteps.dtype not in INTEGERS or timesteps.dim() != 1:
            return {}
        size, begin = timesteps.stride(0) * timesteps.itemsize, timesteps.data_ptr()
        return {begin + position * size: t for position, t in enumerate(values)}

    def __deepcopy__(self, memo):
        return self  # The copy of a scheduler has copies of the tensors, so `is_of` says no there, and it is looked at by itself.

    def __reduce__(self):
        return dict, ()  # A pickle holds an empty dict in its place, so that it can be read where there is no fastgen.

    def is_of(self, attributes) -> bool:
        """Whether nothing has changed since, `attributes` being the scheduler's __dict__. Tensors are compared by identity and
        version."""
        for x, version in self.versions:
            if x._version != version:
                return False
        try:
            return (
                attributes["timesteps"] is self.timesteps
                and attributes["alphas_cumprod"] is self.alphas_cumprod
                and attributes.get("final_alpha_cumprod") is self.final
                and attributes.get("one") is self.one
                and self.read_values(attributes) == self.values
                # `REPLACED_BY_TABLES`, written out, since a loop takes longer
                and not ("_get_variance" in attributes or "previous_timestep" in attributes or "_threshold_sample" in attributes)
                and (self.requires_grad is None or self.alphas_cumprod.requires_grad is self.requires_grad)
            )
        except KeyError:
            return False

    def host_timestep(self, timestep) -> int | None:
        """The timestep as an int where that can be known without waiting for a GPU, else None."""
        if isinstance(timestep, torch.Tensor):
            if timestep.dim() > 1:
                raise NotCovered(f"a timestep of shape {tuple(timestep.shape)}")
            if timestep.numel() != 1 or timestep.dtype not in INTEGERS or _compiling():
                return None
            if timestep.is_cpu:
                return timestep.item()  # pyright: ignore[reportReturnType]  # of `INTEGERS`
            position = position_in(self.timesteps, timestep)
            return None if position is None else self.settings.timesteps[position]
        return int(timestep) if isinstance(timestep, (int, np.integer)) and not isinstance(timestep, bool) else None


def position_in(timesteps, timestep) -> int | None:
    """Which element of `timesteps` a tensor of one element is a view of, as iterating and indexing give them; None of others."""
    storage = timesteps.untyped_storage().data_ptr()
    if timestep.dtype != timesteps.dtype or timestep.untyped_storage().data_ptr() != storage or timesteps.stride() != (1,):
        return None
    position = timestep.storage_offset() - timesteps.storage_offset()
    return position if 0 <= position < timesteps.numel() else None
