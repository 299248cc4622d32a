"""The drop-ins' peers: what a step of diffusers' schedulers costs outside the network, theirs and ours on the same tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch

from .peers import Case

SHAPES = ((1, 16, 7), (64, 3, 32, 32), (8, 3, 256, 256))  # a robot's actions, small images, large ones
STEPS = 100
TIMESTEP = 40  # of those; where noise is added


@dataclass(frozen=True)
class DropIn(Case):
    @property
    def peers(self):
        return "limit", "fastgen", "diffusers"

    @property
    def call(self):
        return f"{self.op} ({self.mode} noise)" if self.mode else f"{self.op} (no noise)"


def network(m, t, x):
    """What a chain's network leaves behind: its output in the cache, and all threads awake."""
    return partial(torch.mul, m.clone(), 1.0, out=m)


@cache
def schedulers(name, rng):
    """(ours, theirs), as a pipeline sets them up."""
    import diffusers

    import fastgen.drop_in.diffusers as fast

    made = getattr(fast, name)(rng=rng), getattr(diffusers, name)()
    for scheduler in made:
        scheduler.set_timesteps(STEPS)
    return made


def step(name, mode, shape, dtype=torch.float32, **options):
    """`scheduler.step(m, t, x)`, t as iterating over `scheduler.timesteps` gives it: x_t and m are read, x_{t−1} and x0 written,
    and in mode "exact" noise is written and read; mode "" is without noise."""
    ours, theirs = schedulers(name, mode or "exact")

    def inputs():
        t = [*ours.timesteps][TIMESTEP]  # on the CPU, where both keep them unless told
        return torch.randn(shape, dtype=dtype), t, torch.randn(shape, dtype=dtype)

    def call(scheduler):
        return lambda m, t, x: scheduler.step(m, t, x, **options)

    return DropIn(
        *(f"diffusers {name}.step", mode, "fresh", shape, dtype, 6 if mode == "exact" else 4),
        *(inputs, partial(partial, call(ours)), call(theirs)),
        overhead=shape[0] == 1,
        network=network,
    )


def add_noise(shape, dtype=torch.float32):
    """x0 and the noise are read, x_t written."""
    ours, theirs = schedulers("DDPMScheduler", "exact")

    def inputs():
        return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), torch.linspace(0, 999, shape[0]).long()

    label = "diffusers add_noise"
    return DropIn(
        label, "given", "fresh", shape, dtype, 3, inputs, partial(partial, ours.add_noise), theirs.add_noise, overhead=shape[0] == 1
    )


def cases(shapes=SHAPES):
    for shape in shapes:
        for mode in ("fused", "exact"):
            yield step("DDPMScheduler", mode, shape)
            yield step("DDIMScheduler", mode, shape, eta=1.0)
        yield step("DDIMScheduler", "", shape)
        yield add_noise(shape)
