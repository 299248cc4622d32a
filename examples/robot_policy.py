"""A robot's control loop: how long a diffusion policy takes for one action chunk, with and without fastgen.

    python robot_policy.py --rounds 200

The policy is a small MLP that predicts the noise of 16 actions of 7 joints from an observation (after Chi et al. 2023, "Diffusion
Policy"; random weights, since time does not depend on them), sampled by 100 DDPM steps with a batch of one: so small that what
surrounds the network takes much of the time. Beside `fastgen.Sampler` run the loop by hand in plain PyTorch, diffusers'
DDPMScheduler where it is installed, and the network alone; in turns, so that whatever else the machine does meets all of them.

"Outside the network" is a chain's time less the network's alone, and that includes what the two do to each other's caches: the
weights and a batch of one take all of a level-2 cache of 0.5 MB. On such a machine the network in a chain takes 10% longer than
alone, by its own clock, and the step three times as long as beside a network that does nothing. New tensors for each call cost the
network alone nothing, nor does an addition or 8 µs of waiting between its calls.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import common
import torch
from torch import nn

import fastgen

HORIZON, JOINTS, OBSERVATION = 16, 7, 20
SHAPE = (1, HORIZON, JOINTS)


class Policy(nn.Module):
    """ε_θ(actions, t, observation): actions (B, 16, 7), t int64 (B,), observation (B, 20) → (B, 16, 7)."""

    def __init__(self, width: int = 256, frequencies: int = 16):
        super().__init__()
        self.register_buffer("frequencies", torch.exp(-math.log(1e4) * torch.arange(frequencies) / frequencies))
        inputs = HORIZON * JOINTS + OBSERVATION + 2 * frequencies
        self.layers = nn.Sequential(
            nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, HORIZON * JOINTS)
        )

    def forward(self, actions, t, observation):
        angle = t[:, None] * self.frequencies
        features = torch.cat([actions.flatten(1), observation, angle.sin(), angle.cos()], dim=1)
        return self.layers(features).view_as(actions)


class ByHand:
    """Algorithm 2 of Ho et al. 2020 in plain PyTorch as it is often written, with its tables and timesteps on the device."""

    def __init__(self, schedule: fastgen.Schedule, device):
        def table(values):
            return torch.tensor(values, dtype=torch.float32, device=device)

        bar, previous, total = schedule.alphas_cumprod, schedule.alphas_cumprod_prev, 1 - schedule.alphas_cumprod
        self.root, self.inverse_root = table((1 / bar - 1) ** 0.5), table(bar**-0.5)
        self.from_x0, self.from_x = (
            table(previous**0.5 * schedule.betas / total),
            table(schedule.alphas**0.5 * (1 - previous) / total),
        )
        self.sigma = table(schedule.posterior_variance**0.5)
        self.timesteps = schedule.timestep_tensor(device)

    def __call__(self, policy, observation, noise=lambda t: torch.randn(SHAPE)):
        """noise: t → (1, 16, 7), T for the initial one."""
        x = noise(len(self.sigma)).to(observation.device)
        for t in reversed(range(len(self.sigma))):
            m = policy(x, self.timesteps[t].expand(1), observation)
            x0 = (self.inverse_root[t] * x - self.root[t] * m).clamp(-1, 1)
            x = self.from_x0[t] * x0 + self.from_x[t] * x
            if t > 0:
                x = x + self.sigma[t] * noise(t).to(x.device)
        return x


def diffusers_loop(steps: int, device):
    """The same by DDPMScheduler, or None where diffusers is not installed."""
    try:
        from diffusers import DDPMScheduler
    except ImportError:
        return None
    scheduler = DDPMScheduler(steps, beta_schedule="squaredcos_cap_v2", variance_type="fixed_small", clip_sample=True)
    scheduler.set_timesteps(steps, device=device)

    def loop(policy, observation):
        x = torch.randn(SHAPE, device=device)
        for t in scheduler.timesteps:
            x = scheduler.step(policy(x, t.expand(1), observation), t, x).prev_sample
        return x

    return loop


def chains(policy: Policy, steps: int, device) -> dict:
    """name → a function of the observation that makes one action chunk; the first one is the network's share of all others."""
    schedule = fastgen.Schedule.cosine(steps)
    timesteps = schedule.timestep_tensor(device).unsqueeze(1).unbind()
    sampler, by_hand, by_diffusers = fastgen.Sampler(policy, SHAPE, schedule, clip=1.0), ByHand(schedule, device), None
    by_diffusers = diffusers_loop(steps, device)

    def network_alone(observation):
        x = torch.zeros(SHAPE, device=device)
        for t in reversed(timesteps):
            m = policy(x, t, observation)
        return m

    found = {
        "the network alone": network_alone,
        "fastgen.Sampler": lambda observation: sampler(model_kwargs={"observation": observation}),
        "plain PyTorch": lambda observation: by_hand(policy, observation, lambda t: torch.randn(SHAPE, device=device)),
    }
    if by_diffusers is not None:
        found["diffusers DDPMScheduler"] = lambda observation: by_diffusers(policy, observation)
    return found


@torch.no_grad()
def measure(chains: dict, rounds: int, device) -> dict[str, float]:
    """Median seconds per chain; in each round every chain runs once, each round beginning with another one."""
    times = {name: [] for name in chains}
    names = list(chains)
    for round_ in range(-3, rounds):  # the first three are not counted: tables, caches, a CUDA graph
        observation = torch.randn(1, OBSERVATION).to(device)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            start = time.perf_counter()
            chains[name](observation)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_ >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Times a robot policy's 100-step chain.")
    parser.add_argument("--rounds", type=common.positive, default=100, help="chains of each kind")
    parser.add_argument("--steps", type=common.positive, default=100, help="DDPM steps of a chain")
    parser.add_argument("--threads", type=common.positive, default=1, help="of PyTorch; a network this small gains nothing by more")
    parser.add_argument("--device", default="cpu", help="where to run: cpu, cuda, …")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        raise common.UserError("--steps: a chain of one step has no noise to time; expected 2 or more")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    with common.initialised_from(0):
        policy = Policy().to(device).eval()
    with common.chosen_backend(None, device):
        medians = measure(chains(policy, options.steps, device), options.rounds, device)
    network = medians["the network alone"]
    print(
        f"{options.steps} steps, actions {SHAPE}, {options.threads} thread(s), torch {torch.__version__}, {options.rounds} rounds"
    )
    print(f"{'':26}{'chain':>10}{'rate':>10}{'outside the network':>22}{'per step':>12}")
    for name, seconds in medians.items():
        outside = seconds - network
        row = f"{name:26}{seconds * 1e3:7.2f} ms{1 / seconds:7.1f} Hz"
        print(row if name == "the network alone" else f"{row}{outside * 1e3:19.2f} ms{outside / options.steps * 1e6:9.1f} µs")


if __name__ == "__main__":
    common.run_main(main)
