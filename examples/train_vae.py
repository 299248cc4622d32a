"""Trains a variational autoencoder on binarised 8×8 handwritten digits: Kingma & Welling 2014.

    python train_vae.py --steps 6000 --out runs/vae

Prints the evidence lower bound of the held-out digits with its two parts, and the importance-weighted bound of Burda et al. 2016,
which comes closer to log p(x). As in `train_ddpm.py`, an interrupted training goes on exactly where it was, and everything random
is a function of --seed and the step.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import common
import torch

import fastgen

PIXELS = math.prod(common.IMAGE_SHAPE)
CLAMP = (-30.0, 20.0)  # of log σ², as in diffusers


@dataclass(frozen=True)
class Settings:
    """What the weights depend on, besides the number of steps; a checkpoint is only ever resumed with the same settings."""

    seed: int = 0
    batch_size: int = 64
    latent_dim: int = 8
    hidden: int = 128
    learning_rate: float = 1e-3
    ema_decay: float = 0.995


class Autoencoder(torch.nn.Module):
    """Both networks: a perceptron to the mean and log-variance of q(z | x), and one from z to the logits of the pixels."""

    def __init__(self, latent_dim: int, hidden: int):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = _perceptron(PIXELS, hidden, 2 * latent_dim)
        self.decoder = _perceptron(latent_dim, hidden, PIXELS)

    def posterior(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.encoder(2 * x.flatten(1) - 1).chunk(2, 1)  # no copy is made of the halves

    def decoded(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(z).unflatten(1, common.IMAGE_SHAPE)


def _perceptron(inputs: int, hidden: int, outputs: int) -> torch.nn.Sequential:
    layers = torch.nn.Linear(inputs, hidden), torch.nn.SiLU(), torch.nn.Linear(hidden, hidden), torch.nn.SiLU()
    return torch.nn.Sequential(*layers, torch.nn.Linear(hidden, outputs))


@dataclass
class Trained:
    """The outcome of `train`."""

    model: Autoencoder  # the averaged weights, in eval mode
    steps: int  # in all, earlier runs included
    losses: list[dict[str, float]]  # of this run's steps: "loss" = "reconstruction" + "kl", nats per digit


def binarised(images: torch.Tensor) -> torch.Tensor:
    """Images in [−1, 1] as bits, 0.0 and 1.0."""
    return (images > 0).float()


def train(settings: Settings, bits: torch.Tensor, *, device="cpu", **loop) -> Trained:
    """Maximises the evidence lower bound, E_q log p(x | z) − KL(q(z | x) ‖ N(0, I)), with one z for each x.

    bits: (N, 1, 8, 8) of 0 and 1. loop: steps and the other arguments of `common.training_loop`.
    """
    bits = bits.to(device)
    with common.initialised_from(settings.seed):
        model = Autoencoder(settings.latent_dim, settings.hidden).to(device)
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    noise_seed = common.derived_seed(settings.seed, "noise")

    def train_step(step):
        generator = common.batch_generator(settings.seed, step)
        x = bits[torch.randint(len(bits), (settings.batch_size,), generator=generator).to(device)]
        z, kl = fastgen.reparameterize(*model.posterior(x), seed=noise_seed, offset=step, clamp=CLAMP, return_kl=True)
        reconstruction = fastgen.bce_with_logits(model.decoded(z), x, reduction="sum") / len(x)
        kl = kl.mean()
        loss = reconstruction + kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        common.update_average(average, model, step, settings.ema_decay)
        return {"loss": loss, "reconstruction": reconstruction, "kl": kl}

    parts = {"model": model, "optimizer": optimizer, "average": average}
    done, losses = common.training_loop(parts, {"example": "vae", **asdict(settings)}, train_step, **loop)
    return Trained(average, done, losses)


class Evaluation(NamedTuple):
    """Of each digit, (B,), in nats."""

    reconstruction: torch.Tensor  # E_q −log p(x | z)
    kl: torch.Tensor
    importance_weighted: torch.Tensor  # a lower bound of log p(x), never below the evidence lower bound on average

    @property
    def bound(self) -> torch.Tensor:
        return -self.reconstruction - self.kl


@torch.no_grad()
def evaluate(model: Autoencoder, bits: torch.Tensor, seed: int, draws: int = 200, progress: bool = False) -> Evaluation:
    """From `draws` samples z_k of q(z | x) for each digit: the means, and log of the mean of p(x, z_k)/q(z_k | x)."""
    mean, log_variance = model.posterior(bits)
    kl = fastgen.gaussian_kl(mean, log_variance, clamp=CLAMP)
    log_variance = log_variance.clamp(*CLAMP)
    losses, weights = [], []
    for k in common.progress_bar(range(draws), desc="evaluating", disable=not progress):
        noise = fastgen.randn(mean.shape, seed=seed, offset=k, device=mean.device)
        z = fastgen.reparameterize(mean, log_variance, noise=noise)
        loss = fastgen.bce_with_logits(model.decoded(z), bits, reduction="none").flatten(1).sum(1)
        # log p(z) − log q(z | x): the constants are the same in both
        ratio = 0.5 * (noise.square() - z.square() + log_variance).sum(1)
        losses.append(loss)
        weights.append(ratio - loss)
    importance_weighted = torch.stack(weights).double().logsumexp(0) - math.log(draws)
    return Evaluation(torch.stack(losses).mean(0), kl, importance_weighted.float())


@torch.no_grad()
def sample(model: Autoencoder, seeds: torch.Tensor) -> torch.Tensor:
    """The probability of each pixel for z ~ N(0, I), one seed per sample: int64 (n,) on the model's device → (n, 1, 8, 8)."""
    return torch.sigmoid(model.decoded(fastgen.randn((len(seeds), model.latent_dim), seed=seeds, device=seeds.device)))


@torch.no_grad()
def reconstructed(model: Autoencoder, bits: torch.Tensor) -> torch.Tensor:
    """Each digit and beside it what the mean of its posterior decodes to, (2n, 1, 8, 8)."""
    return torch.stack([bits, torch.sigmoid(model.decoded(model.posterior(bits)[0]))], 1).flatten(0, 1)


def main(arguments: list[str] | None = None) -> None:
    parser = common.arguments("Trains a VAE on 8x8 digits.", steps=6000, out="runs/vae", batch_size=Settings.batch_size)
    parser.add_argument("--latent-dim", type=common.positive, default=Settings.latent_dim, help="of z")
    parser.add_argument("--draws", type=common.positive, default=200, help="samples of q(z | x) per held-out digit")
    options = parser.parse_args(arguments)
    settings = Settings(seed=options.seed, batch_size=options.batch_size, latent_dim=options.latent_dim)
    images, _, held_out, _ = common.load_digits()
    with common.chosen_backend(options.backend, options.device):
        trained = train(settings, binarised(images), device=options.device, **common.loop_options(options))
        bits = binarised(held_out).to(options.device)
        found = evaluate(trained.model, bits, common.derived_seed(options.seed, "evaluation"), options.draws, progress=True)
        pictures = sample(trained.model, common.sample_seeds(options.seed, options.samples, options.device))
        pairs = reconstructed(trained.model, bits[: options.samples // 2 or 1])
    common.write_grid(2 * pictures - 1, options.out / "samples.png")
    common.write_grid(2 * pairs - 1, options.out / "reconstructions.png")
    print(f"{trained.steps} training steps; {options.samples} samples in {options.out / 'samples.png'}")
    print(f"evidence lower bound of {len(bits)} held-out digits: {found.bound.mean():.2f} nats per digit")
    print(f"  E_q log p(x | z) {-found.reconstruction.mean():.2f}, KL(q(z | x) ‖ p(z)) {found.kl.mean():.2f}")
    print(f"importance-weighted bound from {options.draws} draws each: {found.importance_weighted.mean():.2f}")


if __name__ == "__main__":
    common.run_main(main)
