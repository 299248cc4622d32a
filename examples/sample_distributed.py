"""Samples on several processes: the images are those of one process, in order, whatever their number.

    torchrun --nproc-per-node 2 sample_distributed.py --samples 64 --out runs/distributed
    python sample_distributed.py --samples 64 --out runs/distributed

print the same SHA-256. Image i is a function of its own seed, so every process samples a slice of the seeds, and nothing has to
be agreed on but who has which. A network's library may add up in another order for another batch size, hence every batch
has the same: the last one is filled up with samples that are dropped.

The model is train_ddpm.py's, from its checkpoint; with --random, one with random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
from pathlib import Path

import common
import torch
import train_ddpm
from torch import distributed

import fastgen
from fastgen.models import UNet


def share(count: int, rank: int, world_size: int) -> slice:
    """The part of `count` samples that a process makes; the parts differ by one at most and are in the order of the ranks."""
    return slice(rank * count // world_size, (rank + 1) * count // world_size)


def sample(model: UNet, schedule: fastgen.Schedule, seeds: torch.Tensor, *, steps: int, batch_size: int) -> torch.Tensor:
    """One image (1, 8, 8) per seed, `batch_size` at a time: float32 (n, 1, 8, 8) on the CPU."""
    sampler = fastgen.Sampler(model, (batch_size, *common.IMAGE_SHAPE), schedule, steps=steps, clip=1.0)
    images = [torch.empty(0, *common.IMAGE_SHAPE)]
    for part in seeds.split(batch_size) if len(seeds) else ():
        filled = torch.cat([part, part[-1:].expand(batch_size - len(part))])
        images.append(sampler(sample_seeds=filled)[: len(part)].cpu())
    return torch.cat(images)


def digest(images: torch.Tensor) -> str:
    """SHA-256 of the images rounded to 1e-3."""
    thousandths = (images.double() * 1000).round().to(torch.int16)
    return hashlib.sha256(thousandths.numpy().tobytes()).hexdigest()


def random_model(seed: int, device) -> tuple[UNet, fastgen.Schedule]:
    """A small U-Net with random weights, also in the layers that start at zero, and a schedule."""
    with common.initialised_from(seed):
        model = UNet(common.IMAGE_SHAPE[0], base_channels=16, image_size=common.IMAGE_SHAPE[1])
        for weight in model.parameters():
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.05)
    return model.to(device).eval(), fastgen.Schedule.linear(1000)


@contextlib.contextmanager
def process_group(device: torch.device):
    """(rank, number of processes): those of torchrun, or (0, 1) without it."""
    if "RANK" not in os.environ:
        yield 0, 1
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield distributed.get_rank(), distributed.get_world_size()
    finally:
        distributed.destroy_process_group()


def own_device(name: str) -> torch.device:
    """`name`, and for "cuda" under torchrun the GPU of this process."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise common.UserError(f"--device: {name!r} is no device ({error})") from error
    if device.type != "cuda" or device.index is not None:
        return device
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.index >= torch.cuda.device_count():
        raise common.UserError(f"--device: {device} is not there, torch finds {torch.cuda.device_count()} CUDA devices")
    torch.cuda.set_device(device)
    return device


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Samples digits on several processes.")
    parser.add_argument("--samples", type=common.positive, default=64, help="images in all")
    parser.add_argument("--batch-size", type=common.positive, default=16, help="images that a process makes at a time")
    parser.add_argument("--sampling-steps", type=common.positive, default=50, help="steps of the respaced schedule")
    parser.add_argument("--seed", type=int, default=0, help="decides the images")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/ddpm/checkpoint.pt"), help="of train_ddpm.py")
    parser.add_argument("--random", action="store_true", help="random weights in place of a checkpoint's")
    parser.add_argument("--device", default="cpu", help="where to run: cpu, or cuda, of which each process takes its own")
    parser.add_argument("--backend", choices=("eager", "cpp", "triton", "auto"), help="fastgen's backend")
    parser.add_argument("--out", type=Path, default=Path("runs/distributed"), help="directory of the grid")
    options = parser.parse_args(arguments)
    device = own_device(options.device)
    if options.random:
        model, schedule = random_model(options.seed, device)
    elif options.checkpoint.exists():
        model, schedule = train_ddpm.load(options.checkpoint, device)
    else:
        raise common.UserError(f"{options.checkpoint} does not exist; train_ddpm.py makes one, or use --random")
    if options.sampling_steps > len(schedule):
        raise common.UserError(f"--sampling-steps: the schedule has {len(schedule)}, got {options.sampling_steps}")
    seeds = common.sample_seeds(options.seed, options.samples)
    with process_group(device) as (rank, world_size), common.chosen_backend(options.backend, device):
        mine = seeds[share(options.samples, rank, world_size)]
        images = sample(model, schedule, mine, steps=options.sampling_steps, batch_size=options.batch_size)
        if world_size > 1:
            shares = [None] * world_size if rank == 0 else None
            distributed.gather_object(images, shares)
            images = torch.cat(shares) if rank == 0 else images
        if rank == 0:
            common.write_grid(images, options.out / "samples.png")
            processes = "1 process" if world_size == 1 else f"{world_size} processes"
            print(f"{len(images)} samples of {processes} in {options.out / 'samples.png'}\nsha256 {digest(images)}")


if __name__ == "__main__":
    common.run_main(main)
