"""Raises a reward of a diffusion model's samples by policy gradients: DDPO, Black et al. 2024.

    python train_ddpm.py --out runs/ddpm
    python reinforce.py --checkpoint runs/ddpm/checkpoint.pt --reward bright --out runs/reinforce

The chain of reverse steps is the policy, and a sample's reward, here how bright or how dark it is, what all of its steps have
earned. A round samples with the log-probability of each step beside it, in the same launch, and then climbs the gradient of
the clipped ratio of the new policy to the old one, as PPO does (Schulman et al. 2017, equation (7)). Log-probabilities are
means over the pixels, as in the paper's code: the ratio of sums leaves any bounds with the first update. The variance is
β_t, the larger of the two: the posterior's is nearly 0 at the last steps, at which no policy would then be near another.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import common
import sample_distributed
import torch
import train_ddpm

import fastgen

STEP: dict = {"variance": "beta", "clip": 1.0}
REWARDS: dict[str, Callable] = {
    "bright": lambda images: images.double().mean((1, 2, 3)) / 255,
    "dark": lambda images: 1 - images.double().mean((1, 2, 3)) / 255,
}


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    samples: int = 64  # of a round
    batch_size: int = 512  # steps of these samples' chains in one update
    epochs: int = 2  # how often a round's steps are gone through
    learning_rate: float = 1e-3
    ratio_clip: float = 0.1


def reinforce(
    model, schedule: fastgen.Schedule, reward: Callable, settings: Settings, rounds: int, device="cpu"
) -> Iterator[float]:
    """Changes the model's weights in place, and yields the mean reward of each round's samples, from before the first change on.

    model: predicts ε from (x, timesteps). schedule: the steps of the chain. reward: uint8 (n, 1, 8, 8) → (n,), any function.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    timesteps = schedule.timestep_tensor(device)
    for n in range(rounds):
        seeds = common.derived_seed(settings.seed, "chains", n) + torch.arange(settings.samples, device=device)
        images, steps = chain(model, schedule, seeds)
        rewards = reward(fastgen.to_uint8(images))
        yield rewards.mean().item()
        advantage = ((rewards - rewards.mean()) / (rewards.std() + 1e-6)).float().repeat(len(schedule) - 1)
        x_t, x_prev, t, old = (torch.cat(each) for each in zip(*steps, strict=True))
        generator = common.batch_generator(settings.seed, n)
        for _ in range(settings.epochs):
            for part in torch.randperm(len(t), generator=generator).to(device).split(settings.batch_size):
                m = model(x_t[part], timesteps[t[part]])
                log_prob = fastgen.step_log_prob(x_prev[part], x_t[part], m, t[part], schedule, **STEP, over="mean")
                ratio = torch.exp(log_prob - old[part])
                bounded = ratio.clamp(1 - settings.ratio_clip, 1 + settings.ratio_clip)
                loss = -torch.minimum(ratio * advantage[part], bounded * advantage[part]).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


@torch.no_grad()
def chain(model, schedule: fastgen.Schedule, seeds: torch.Tensor):
    """x_0 of each seed, and of each step but the last, which adds no noise, (x_t, x_{t−1}, t, log p(x_{t−1} | x_t))."""
    x, steps = fastgen.randn((len(seeds), *common.IMAGE_SHAPE), seed=seeds, offset=len(schedule), device=seeds.device), []
    timesteps = schedule.timestep_tensor(seeds.device)
    for t in range(len(schedule) - 1, 0, -1):
        m = model(x, timesteps[t].expand(len(x)))
        y, log_prob = fastgen.ddpm_step(x, m, t, schedule, **STEP, seed=seeds, return_log_prob=True, log_prob_over="mean")
        steps.append((x, y, torch.full_like(seeds, t), log_prob))
        x = y
    return fastgen.ddpm_step(x, model(x, timesteps[0].expand(len(x))), 0, schedule, **STEP, seed=seeds), steps


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Raises a reward by policy gradients.")
    parser.add_argument("--rounds", type=common.positive, default=30, help="of sampling and learning")
    parser.add_argument("--samples", type=common.positive, default=Settings.samples, help="of a round")
    parser.add_argument("--steps", type=common.positive, default=20, help="of the chain, a respacing of the model's schedule")
    parser.add_argument("--reward", choices=REWARDS, default="bright", help="what is raised")
    parser.add_argument("--seed", type=int, default=0, help="decides everything that is random")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/ddpm/checkpoint.pt"), help="of train_ddpm.py")
    parser.add_argument("--random", action="store_true", help="random weights in place of a checkpoint's")
    parser.add_argument("--device", default="cpu", help="where to run")
    parser.add_argument("--backend", choices=("eager", "cpp", "triton", "auto"), help="fastgen's backend")
    parser.add_argument("--out", type=Path, default=Path("runs/reinforce"), help="directory of the grids")
    options = parser.parse_args(arguments)
    if options.random:
        model, schedule = sample_distributed.random_model(options.seed, options.device)
    elif options.checkpoint.exists():
        model, schedule = train_ddpm.load(options.checkpoint, options.device)
    else:
        raise common.UserError(f"{options.checkpoint} does not exist; train_ddpm.py makes one, or use --random")
    if options.steps > len(schedule):
        raise common.UserError(f"--steps: the schedule has {len(schedule)}, got {options.steps}")
    schedule = schedule.respace(options.steps)
    settings = Settings(seed=options.seed, samples=options.samples)
    shown = common.sample_seeds(options.seed, 25, options.device)
    with common.chosen_backend(options.backend, options.device):
        common.write_grid(chain(model, schedule, shown)[0], options.out / "before.png")
        rewards = reinforce(model, schedule, REWARDS[options.reward], settings, options.rounds, options.device)
        for n, reward in enumerate(rewards):
            print(f"round {n}: reward {reward:.4f}", flush=True)
        common.write_grid(chain(model, schedule, shown)[0], options.out / "after.png")
    print(f"samples of the same seeds in {options.out / 'before.png'} and {options.out / 'after.png'}")


if __name__ == "__main__":
    common.run_main(main)
