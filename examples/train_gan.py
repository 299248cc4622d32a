"""Trains a GAN on 8×8 handwritten digits: the minibatch algorithm of Goodfellow et al. 2014.

    python train_gan.py --steps 3000 --k 1 --out runs/gan

As in `train_ddpm.py`, an interrupted training goes on exactly where it was, and everything random is a function of --seed
and the step.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import common
import torch

import fastgen
from fastgen.models import Discriminator, Generator


@dataclass(frozen=True)
class Settings:
    """What the weights depend on, besides the number of steps; a checkpoint is only ever resumed with the same settings."""

    seed: int = 0
    batch_size: int = 64
    k: int = 1  # discriminator steps per generator step
    latent_dim: int = 32
    base_channels: int = 64
    learning_rate: float = 5e-4
    ema_decay: float = 0.995


@dataclass
class Trained:
    """The outcome of `train`."""

    generator: Generator  # the averaged weights, in eval mode: what to sample from
    steps: int  # in all, earlier runs included
    losses: list[dict[str, float]]  # of this run's steps: "discriminator" and "generator"


def train(
    settings: Settings,
    images: torch.Tensor,
    *,
    steps: int,
    checkpoint: Path | None = None,
    fresh: bool = False,
    save_every: int = 500,
    device="cpu",
    progress: bool = True,
) -> Trained:
    """Algorithm 1 of Goodfellow et al. (2.1 in the lecture note), alternating k steps of the discriminator, on

        −log D(x) − log(1 − D(G(z)))

    with one of the generator, on −log D(G(z)): its "non-saturating" loss, with the same fixed point as log(1 − D(G(z))) but a
    gradient where D is sure.

    images: (N, 1, 8, 8) in [−1, 1]. The other arguments are those of `common.training_loop`.
    """
    parts, train_step = set_up(settings, images, device)
    done, losses = common.training_loop(
        parts,
        {"example": "gan", **asdict(settings)},
        train_step,
        steps=steps,
        checkpoint=checkpoint,
        fresh=fresh,
        save_every=save_every,
        progress=progress,
    )
    return Trained(parts["average"], done, losses)


FUSED_LOSSES = fastgen.discriminator_loss, fastgen.generator_loss


def set_up(settings: Settings, images: torch.Tensor, device="cpu", *, losses=FUSED_LOSSES, randn=None):
    """The `parts` and the `train_step` of `common.training_loop`.

    losses: functions of (real logits, fake logits) and of (fake logits). randn: (shape, n) → the n-th batch of normal numbers;
    fastgen's if None.
    """
    loss_of_discriminator, loss_of_generator = losses
    channels, size, _ = common.IMAGE_SHAPE
    images = images.to(device)
    with common.initialised_from(settings.seed):
        generator = Generator(settings.latent_dim, channels, settings.base_channels, size).to(device)
        discriminator = Discriminator(channels, settings.base_channels, size).to(device)
    average = copy.deepcopy(generator).eval()
    # β₁ = 0.5: Radford et al. found the usual 0.9 to oscillate
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=settings.learning_rate, betas=(0.5, 0.999))
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=settings.learning_rate, betas=(0.5, 0.999))
    latent_shape = (settings.batch_size, settings.latent_dim)
    latent_seed = common.derived_seed(settings.seed, "latent")
    if randn is None:
        randn = lambda shape, n: fastgen.randn(shape, seed=latent_seed, offset=n, device=device)  # noqa: E731

    def latent(step, part):
        # k + 1 latent batches per step, each with numbers of its own
        return randn(latent_shape, step * (settings.k + 1) + part)

    def train_step(step):
        batches = common.batch_generator(settings.seed, step)
        for part in range(settings.k):
            real = images[torch.randint(len(images), (settings.batch_size,), generator=batches).to(device)]
            with torch.no_grad():  # the generator is not updated here
                fake = generator(latent(step, part))
            discriminator_loss = loss_of_discriminator(discriminator(real), discriminator(fake))
            _descend(discriminator_loss, discriminator_optimizer)
        generator_loss = loss_of_generator(discriminator(generator(latent(step, settings.k))))
        _descend(generator_loss, generator_optimizer)
        common.update_average(average, generator, step, settings.ema_decay)
        return {"discriminator": discriminator_loss, "generator": generator_loss}

    parts = {
        "generator": generator,
        "discriminator": discriminator,
        "generator_optimizer": generator_optimizer,
        "discriminator_optimizer": discriminator_optimizer,
        "average": average,
    }
    return parts, train_step


def _descend(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    # the generator's loss also leaves gradients in the discriminator; zeroing here keeps them out of its next step
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def sample(generator: Generator, seeds: torch.Tensor) -> torch.Tensor:
    """G(z), z ~ N(0, I) from one seed per sample: seeds int64 (n,) on the generator's device → (n, 1, 8, 8)."""
    return generator(fastgen.randn((len(seeds), generator.latent_dim), seed=seeds, device=seeds.device))


def main(arguments: list[str] | None = None) -> None:
    parser = common.arguments("Trains a GAN on 8x8 digits.", steps=3000, out="runs/gan", batch_size=Settings.batch_size)
    parser.add_argument("--k", type=common.positive, default=Settings.k, help="discriminator steps per generator step")
    parser.add_argument("--base-channels", type=common.positive, default=Settings.base_channels, help="width of both networks")
    options = parser.parse_args(arguments)
    settings = Settings(seed=options.seed, batch_size=options.batch_size, k=options.k, base_channels=options.base_channels)
    with common.chosen_backend(options.backend, options.device):
        trained = train(settings, common.load_digits()[0], device=options.device, **common.loop_options(options))
        images = sample(trained.generator, common.sample_seeds(options.seed, options.samples, options.device))
    common.write_grid(images, options.out / "samples.png")
    print(f"{trained.steps} training steps; {options.samples} samples in {options.out / 'samples.png'}")


if __name__ == "__main__":
    common.run_main(main)
