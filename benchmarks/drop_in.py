"""The drop-ins' peers: what a step of diffusers' schedulers costs outside the network, and training and judging with
guided-diffusion, theirs and ours on the same tensors."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache, partial

import torch

from .peers import BACKWARD, Case

SHAPES = ((1, 16, 7), (64, 3, 32, 32), (8, 3, 256, 256))  # a robot's actions, small images, large ones
STEPS = 100
TIMESTEP = 40  # of those; where noise is added
IMAGES = (64, 3, 32, 32), (8, 3, 256, 256)
TERMS = 10  # of a bound: one of them is the decoder's
GUIDED = "FASTGEN_GUIDED_DIFFUSION"  # in the environment: where the sources are, which no package index has


@dataclass(frozen=True)
class DropIn(Case):
    library: str = "diffusers"

    @property
    def peers(self):
        return "limit", "fastgen", self.library

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
    """`scheduler.step(m, t, x)`, t as iterating over `scheduler.timesteps` gives it: x_t and m are read, x_{t−1} and x0 written.
    In mode "exact" the kernel makes torch's noise; mode "" is without noise."""
    ours, theirs = schedulers(name, mode or "exact")

    def inputs():
        t = [*ours.timesteps][TIMESTEP]  # on the CPU, where both keep them unless told
        return torch.randn(shape, dtype=dtype), t, torch.randn(shape, dtype=dtype)

    def call(scheduler):
        return lambda m, t, x: scheduler.step(m, t, x, **options)

    return DropIn(
        *(f"diffusers {name}.step", mode, "fresh", shape, dtype, 4),
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


# ---- guided-diffusion -----------------------------------------------------------------------------------------------------


@cache
def diffusions(loss, rng, steps):
    """(ours, theirs), of improved-diffusion's schedule and a learned range of variances."""
    if (root := os.environ[GUIDED]) not in sys.path:
        sys.path.append(root)
    from guided_diffusion import gaussian_diffusion as theirs

    from fastgen.drop_in import gaussian_diffusion

    made = [
        theirs.GaussianDiffusion(
            betas=theirs.get_named_beta_schedule("cosine", steps),
            model_mean_type=theirs.ModelMeanType.EPSILON,
            model_var_type=theirs.ModelVarType.LEARNED_RANGE,
            loss_type=theirs.LossType[loss],
        )
        for _ in range(2)
    ]
    gaussian_diffusion.patch(made[0], rng=rng)
    return made


def _images(shape, steps):
    m = torch.randn(shape[0], 2 * shape[1], *shape[2:])
    return m, 2 * torch.rand(shape) - 1, torch.linspace(0, steps - 1, shape[0]).long()


def training_losses(loss, mode, shape):
    """And their gradient: x0, the noise and the network's output of twice the channels are read, x_t and as much as that output
    written, and in mode "exact" the noise. The network's output is there already."""
    ours, theirs = diffusions(loss, mode, 1000)

    def inputs():
        m, x0, t = _images(shape, 1000)
        return m.requires_grad_(), x0, t

    def call(diffusion, m, x0, t):
        return torch.autograd.grad(diffusion.training_losses(lambda x, t: m, x0, t)["loss"].mean(), m)

    return DropIn(
        *(f"guided-diffusion training_losses, {loss}", mode, "fresh", shape, torch.float32, 8 if mode == "exact" else 6),
        *(inputs, partial(partial, partial(call, ours)), partial(call, theirs)),
        passes=BACKWARD,
        library="guided-diffusion",
    )


def bound(mode, shape):
    """Of each term, x0 and the network's output of twice the channels are read and x_t is written."""
    ours, theirs = diffusions("RESCALED_KL", mode, TERMS)

    def call(diffusion, m, x0, t):
        return diffusion.calc_bpd_loop(lambda x, t: m, x0)["total_bpd"]

    return DropIn(
        *(f"guided-diffusion calc_bpd_loop, {TERMS} terms", mode, "fresh", shape, torch.float32),
        *(TERMS * 4, partial(_images, shape, TERMS)),
        *(partial(partial, partial(call, ours)), partial(call, theirs)),
        library="guided-diffusion",
    )


def guided_cases(shapes=IMAGES):
    for shape in shapes:
        for mode in ("fused", "exact"):
            for loss in ("RESCALED_MSE", "RESCALED_KL"):
                yield training_losses(loss, mode, shape)
            yield bound(mode, shape)
