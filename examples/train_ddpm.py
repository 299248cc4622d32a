"""Trains a DDPM on 8×8 handwritten digits and samples from it: Algorithms 1 and 2 of Ho et al. 2020.

    python train_ddpm.py --steps 2000 --out runs/ddpm

An interrupted training (Ctrl-C, a reboot) goes on where it was when the same command runs again, and ends with the weights
of an uninterrupted one: everything random is a function of --seed and the step. Sampling draws the same noise on every
backend, so the same seed and weights give the same samples to rounding; so does training anew with another backend, as far
as training does not amplify the rounding.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import common
import torch

import fastgen
from fastgen.models import UNet
from fastgen.schedule import Variance


@dataclass(frozen=True)
class Settings:
    """What the weights depend on, besides the number of steps; a checkpoint is only ever resumed with the same settings."""

    seed: int = 0
    batch_size: int = 64
    timesteps: int = 1000
    base_channels: int = 32
    blocks: int = 1
    learning_rate: float = 2e-3
    ema_decay: float = 0.995


@dataclass
class Trained:
    """The outcome of `train`."""

    model: UNet  # the averaged weights, in eval mode: what to sample from
    schedule: fastgen.Schedule
    steps: int  # in all, earlier runs included
    losses: list[float]  # of this run's steps


def train(
    settings: Settings,
    images: torch.Tensor,
    *,
    steps: int,
    seconds: float | None = None,
    checkpoint: Path | None = None,
    fresh: bool = False,
    save_every: int = 500,
    device="cpu",
    progress: bool = True,
) -> Trained:
    """Algorithm 1 (4.1 in the lecture note): minimises ‖ε − ε_θ(√ᾱ_t·x0 + √(1−ᾱ_t)·ε, t)‖² over x0, t and ε.

    images: (N, 1, 8, 8) in [−1, 1]. The other arguments are those of `common.training_loop`.
    """
    schedule = fastgen.Schedule.linear(settings.timesteps)
    return run(
        "ddpm",
        settings,
        schedule,
        *set_up(settings, images, schedule, device),
        steps=steps,
        seconds=seconds,
        checkpoint=checkpoint,
        fresh=fresh,
        save_every=save_every,
        progress=progress,
    )


def run(example: str, settings: Settings, schedule: fastgen.Schedule, parts: dict, train_step, **loop) -> Trained:
    """Trains what `set_up` has made. loop: the other arguments of `common.training_loop`."""
    done, history = common.training_loop(parts, {"example": example, **asdict(settings)}, train_step, **loop)
    return Trained(parts["average"], schedule, done, [losses["loss"] for losses in history])


def set_up(
    settings: Settings,
    images: torch.Tensor,
    schedule: fastgen.Schedule,
    device="cpu",
    loss=None,
    out_channels: int | None = None,
):
    """The `parts` and the `train_step` of `common.training_loop`.

    loss: (model, x0, t, step) → the mean of (ε − ε_θ(x_t, t))², each step with an ε of its own; fastgen's if None.
    out_channels: of the network, for another loss; those of the images if None.
    """
    images = images.to(device)
    with common.initialised_from(settings.seed):
        model = _network(settings, out_channels).to(device)
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    noise_seed = common.derived_seed(settings.seed, "noise")
    network_timesteps = schedule.timestep_tensor(device)

    def fused(model, x0, t, step):
        # ε is a function of seed and offset: the loss makes it again, and it never exists as a tensor
        x_t = fastgen.q_sample(x0, t, schedule, seed=noise_seed, offset=step)
        return fastgen.diffusion_loss(model(x_t, network_timesteps[t]), x0, t, schedule, seed=noise_seed, offset=step)

    loss_of = fused if loss is None else loss

    def train_step(step):
        generator = common.batch_generator(settings.seed, step)
        batch = torch.randint(len(images), (settings.batch_size,), generator=generator)
        t = torch.randint(len(schedule), (settings.batch_size,), generator=generator).to(device)
        loss = loss_of(model, images[batch.to(device)], t, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        common.update_average(average, model, step, settings.ema_decay)
        return {"loss": loss}

    return {"model": model, "optimizer": optimizer, "average": average}, train_step


def sample(
    model: UNet,
    schedule: fastgen.Schedule,
    seeds: torch.Tensor,
    *,
    clip: float | None = 1.0,
    variance: Variance | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Algorithm 2 (4.2 in the lecture note): x_T ~ N(0, I), then x_{t−1} ~ p_θ(x_{t−1} | x_t) for t = T−1 … 0.

    model: in eval mode. schedule: the one of the training or a respacing of it. seeds: int64 (n,), one per sample. Returns
    (n, 1, 8, 8).
    """
    with common.progress_bar(total=len(schedule), desc="sampling", disable=not progress) as bar:
        return fastgen.sample(
            model,
            (len(seeds), *common.IMAGE_SHAPE),
            schedule,
            clip=clip,
            variance=variance,
            sample_seeds=seeds,
            callback=lambda step, t, x: bar.update(),
        )


def load(checkpoint: Path, device="cpu") -> tuple[UNet, fastgen.Schedule]:
    """The averaged weights that `train` saved, in eval mode, and their schedule. Raises common.CheckpointError."""
    advice = "train_ddpm.py makes one"
    content = common.read_checkpoint(checkpoint, advice)
    made_with = dict(content["settings"])
    if made_with.pop("example", None) != "ddpm":
        raise common.CheckpointError(f"{checkpoint} is another example's checkpoint; {advice}")
    settings = Settings(**made_with)
    model = _network(settings)
    model.load_state_dict(content["parts"]["average"])
    return model.to(device).eval(), fastgen.Schedule.linear(settings.timesteps)


def _network(settings: Settings, out_channels: int | None = None) -> UNet:
    channels, size, _ = common.IMAGE_SHAPE
    return UNet(channels, out_channels, base_channels=settings.base_channels, blocks=settings.blocks, image_size=size)


def main(arguments: list[str] | None = None) -> None:
    parser = common.arguments("Trains a DDPM on 8x8 digits.", steps=3000, out="runs/ddpm", batch_size=Settings.batch_size)
    parser.add_argument("--timesteps", type=common.positive, default=Settings.timesteps, help="T of the linear noise schedule")
    parser.add_argument("--sampling-steps", type=common.positive, help="respace the schedule to so many steps for sampling")
    parser.add_argument("--base-channels", type=common.positive, default=Settings.base_channels, help="width of the U-Net")
    options = parser.parse_args(arguments)
    settings = Settings(
        seed=options.seed,
        batch_size=options.batch_size,
        timesteps=options.timesteps,
        base_channels=options.base_channels,
    )
    with common.chosen_backend(options.backend, options.device):
        trained = train(settings, common.load_digits()[0], device=options.device, **common.loop_options(options))
        schedule = trained.schedule
        if options.sampling_steps is not None:
            schedule = schedule.respace(options.sampling_steps)
        seeds = common.sample_seeds(options.seed, options.samples, options.device)
        images = sample(trained.model, schedule, seeds, progress=True)
    common.write_grid(images, options.out / "samples.png")
    print(f"{trained.steps} training steps; {options.samples} samples in {options.out / 'samples.png'}")


if __name__ == "__main__":
    common.run_main(main)
