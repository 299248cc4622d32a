"""What fastgen changes in a whole program: the examples' trainings and sampling chains, with it and without.

A `Work` is one of them. Its peers share the network, the data and all else of the example; what differs is the part outside the
network: fastgen's, plain PyTorch as a user writes it ("eager"), or diffusers'. `measured` times them in turns, `peak_bytes` asks a
process of its own for each, which is `python -m benchmarks.end_to_end WHAT PEER DEVICE`.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F

import fastgen

from . import common, peers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))  # where they find each other, as scripts do
try:
    import common as example
    import demo
    import robot_policy
    import train_ddpm
    import train_gan
finally:
    sys.path.remove(str(ROOT / "examples"))

CHAIN = 1000  # steps of the whole chain
SEED = 0


@dataclass(frozen=True)
class Work:
    what: str
    unit: str
    call: str  # fastgen's part of it
    shape: tuple[int, ...]  # of the tensors outside the network
    steps: int  # in one sample of time
    make: Callable  # (peer, steps) → a function of nothing that does so many steps
    device: str
    passes: str = peers.BACKWARD
    peers: tuple[str, ...] = ("fastgen", "eager")
    threads: int | None = None  # on the CPU; None: one or all, whatever is faster
    memory: bool = True  # whether it holds more than some kilobytes


# ---- DDPM ------------------------------------------------------------------------------------------------------------


def ddpm_settings(tiny):
    return train_ddpm.Settings(batch_size=4, base_channels=8) if tiny else train_ddpm.Settings()


def plain_loss(schedule, device):
    """Of `train_ddpm.set_up`, with the noise as a tensor."""
    by_hand, timesteps = demo.HandWritten(schedule, device), schedule.timestep_tensor(device)

    def loss(model, x0, t, step):
        noise = torch.randn_like(x0)
        return F.mse_loss(model(by_hand.q_sample(x0, t, noise), timesteps[t]), noise)

    return loss


def ddpm_training(peer, settings, device="cpu"):
    """step → {name: loss}."""
    schedule = fastgen.Schedule.linear(settings.timesteps)
    loss = None if peer == "fastgen" else plain_loss(schedule, device)
    return train_ddpm.set_up(settings, digits(), schedule, device, loss)[1]


@torch.no_grad()
def plain_chain(model, schedule, by_hand, samples, device):
    """`train_ddpm.sample` by hand."""
    x = torch.randn(samples, *example.IMAGE_SHAPE, device=device)
    index = torch.arange(len(schedule), device=device).unsqueeze(1).repeat(1, samples)
    timesteps = schedule.timestep_tensor(device).unsqueeze(1).repeat(1, samples)
    for t, timestep in zip(index.flip(0).unbind(), timesteps.flip(0).unbind(), strict=True):
        x = by_hand.ddpm_step(x, model(x, timestep), t)
    return x


def ddpm_sampling(peer, settings, steps, device="cpu"):
    """A chain of `steps` steps, each what a step of the whole chain is: the schedule of 1000 is respaced to so many."""
    whole = fastgen.Schedule.linear(CHAIN)
    parts, _ = train_ddpm.set_up(settings, digits(), whole, device)
    model, schedule = parts["average"], whole.respace(steps)
    if peer == "fastgen":
        seeds = example.sample_seeds(SEED, settings.batch_size, device)
        return lambda: train_ddpm.sample(model, schedule, seeds)
    by_hand = demo.HandWritten(schedule, device)
    return lambda: plain_chain(model, schedule, by_hand, settings.batch_size, device)


# ---- GAN -------------------------------------------------------------------------------------------------------------


def gan_settings(tiny):
    return train_gan.Settings(batch_size=4, base_channels=8) if tiny else train_gan.Settings()


def plain_generator_loss(fake):
    return F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))


def gan_training(peer, settings, device="cpu"):
    """step → {name: loss}."""
    if peer == "fastgen":
        return train_gan.set_up(settings, digits(), device)[1]
    plain = peers.eager_gan_loss, plain_generator_loss
    return train_gan.set_up(settings, digits(), device, losses=plain, randn=lambda shape, n: torch.randn(shape, device=device))[1]


# ---- a robot's policy ------------------------------------------------------------------------------------------------

POLICIES = {"fastgen": "fastgen.Sampler", "eager": "plain PyTorch", "diffusers": "diffusers DDPMScheduler"}


def robot_chain(peer, steps, device):
    device = torch.device(device)
    with example.initialised_from(SEED):
        policy = robot_policy.Policy().to(device).eval()
    chain = robot_policy.chains(policy, steps, device)[POLICIES[peer]]
    observation = torch.zeros(1, robot_policy.OBSERVATION, device=device)
    return torch.no_grad()(lambda: chain(observation))


# ---- all of them -----------------------------------------------------------------------------------------------------


@functools.cache
def digits():
    return example.load_digits()[0]


def repeated(step, steps):
    """() → `steps` calls of step(0), step(1), …, going on where the last ones ended."""
    turn = count()

    def run():
        for _ in range(steps):
            step(next(turn))

    return run


def works(tiny: bool = False, device: str = "cpu") -> list[Work]:
    ddpm, gan = ddpm_settings(tiny), gan_settings(tiny)
    diffusers = ("diffusers",) if importlib.util.find_spec("diffusers") else ()
    images = (ddpm.batch_size, *example.IMAGE_SHAPE)
    return [
        Work(
            "DDPM training",
            unit="steps/s",
            call="q_sample(seed=), diffusion_loss(seed=)",
            shape=images,
            steps=2 if tiny else 5,
            make=lambda peer, steps: repeated(ddpm_training(peer, ddpm, device), steps),
            device=device,
        ),
        Work(
            f"DDPM sampling, {CHAIN} steps",
            unit="steps/s",
            call="sample(sample_seeds=, clip=)",
            shape=images,
            steps=3 if tiny else 20,
            make=lambda peer, steps: ddpm_sampling(peer, ddpm, steps, device),
            device=device,
            passes=peers.FORWARD,
        ),
        Work(
            "GAN training",
            unit="iterations/s",
            call="randn(seed=), discriminator_loss(), generator_loss()",
            shape=(gan.batch_size, 1),
            steps=2 if tiny else 20,
            make=lambda peer, steps: repeated(gan_training(peer, gan, device), steps),
            device=device,
        ),
        Work(
            "robot policy, 100 steps",
            unit="steps/s",
            call="Sampler(clip=)",
            shape=robot_policy.SHAPE,
            steps=3 if tiny else 100,
            make=lambda peer, steps: robot_chain(peer, steps, device),
            device=device,
            passes=peers.FORWARD,
            peers=("fastgen", "eager", *diffusers),
            threads=1,
            memory=False,
        ),
    ]


def find(what: str, tiny: bool = False, device: str = "cpu") -> Work:
    """ValueError where there is none of this name."""
    found = {work.what: work for work in works(tiny, device)}
    if what not in found:
        raise ValueError(f"what: expected one of {sorted(found)}, got {what!r}")
    return found[what]


# ---- time ------------------------------------------------------------------------------------------------------------


@contextmanager
def threads_for(work, tiny):
    """Inside, PyTorch's number of threads is the work's; yields it."""
    before = torch.get_num_threads()
    torch.set_num_threads(work.threads or (1 if tiny else before))
    try:
        if work.threads is None and work.device == "cpu" and not tiny:
            demo.use_faster_thread_count(work.make("eager", 1), before, rounds=2)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def measured(work: Work, tiny: bool = False, seconds: float = 6.0) -> tuple[dict[str, list[float]], int]:
    """({peer: seconds of one step, a figure per round}, threads)."""
    with threads_for(work, tiny) as threads:
        runs = {peer: [work.make(peer, work.steps)] for peer in work.peers}
        samples = common.in_turns(runs, seconds, tiny, work.device, by_host=True, least=7)
    return {peer: [second / work.steps for second in found] for peer, found in samples.items()}, threads


# ---- memory ----------------------------------------------------------------------------------------------------------


def resident(name: str) -> int:
    """Bytes of this process: "VmRSS", what is in memory, or "VmHWM", the most there was. Not getrusage's ru_maxrss, which in a new
    process begins with what its parent held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def peak_of(run: Callable, device: str = "cpu") -> int | None:
    """The most bytes that `run()` holds in addition to what is held before; on a GPU, those of its tensors. None where the system
    does not tell."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = resident("VmRSS")
    except OSError:
        return None
    run()
    return resident("VmHWM") - before


def peak_bytes(work: Work, tiny: bool = False) -> dict[str, int | None]:
    """{peer: `peak_of` a few steps and of what they need to begin, networks and optimizers too}, each in a new process with one
    thread; None where the work has no memory to speak of.

    RuntimeError with what a process said, where it fails.
    """
    if not work.memory:
        return dict.fromkeys(work.peers)
    command = [sys.executable, "-m", "benchmarks.end_to_end", *(["--tiny"] if tiny else []), work.what]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # at the same time: memory does not mind company
    running = {peer: subprocess.Popen([*command, peer, work.device], **options) for peer in work.peers}
    found = {}
    try:
        for peer, process in running.items():
            output, errors = process.communicate(timeout=120)
            if process.returncode:
                raise RuntimeError(f"peak memory of {work.what}, {peer}: {errors}")
            found[peer] = json.loads(output)
    finally:
        for process in running.values():
            process.kill()
    return found


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description="The peak memory of a work, in bytes.")
    parser.add_argument("what", choices=[work.what for work in works()])
    parser.add_argument("peer", choices=["fastgen", "eager", "diffusers"])
    parser.add_argument("device", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="a small network and batch")
    options = parser.parse_args()
    work = find(options.what, options.tiny, options.device)
    torch.set_num_threads(1)
    find(options.what, True, options.device).make(options.peer, 1)()  # loads code, 160 MB of it, and starts CUDA
    print(json.dumps(peak_of(lambda: work.make(options.peer, 3)(), options.device)))


if __name__ == "__main__":
    main()
