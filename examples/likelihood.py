"""Trains a DDPM that learns its variance on 8×8 handwritten digits, and says how many bits it needs for digits it has not seen.

    python likelihood.py --steps 2000 --out runs/likelihood

The training is that of train_ddpm.py with the hybrid loss of Nichol & Dhariwal 2021, and resumes like it. Then, of the held-out
digits: the variational bound in bits per dimension with its three parts; what Ho et al. 2020 call rate and distortion; a plot of
the terms at each timestep and of the distortion against the rate; and of a few digits an estimate of the likelihood itself, from
forward trajectories, beside their bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import common
import torch
import train_ddpm

import fastgen
from fastgen.models import UNet

# Of the chain that is sampled from and judged. Without the clip x0, which has 1/√ᾱ times the error of ε, is far off at the first
# steps from x_T: they had three fifths of all bits after 300 steps of training.
VARIANCE, CLIP = "learned_range", 1.0


@dataclass(frozen=True)
class Settings(train_ddpm.Settings):
    timesteps: int = 200
    vlb_weight: float = 0.001


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Images in [−1, 1] as the data that everything here takes: bytes, a quarter of the memory, which stand for the 256 values that
    the decoder knows. Digits have 17 of them, so no more than log2 17 = 4.09 bits are needed by a model that knows nothing else."""
    return fastgen.to_uint8(images)


def train(settings: Settings, x0: torch.Tensor, *, device="cpu", **loop) -> train_ddpm.Trained:
    """Minimises L_simple + λ·L_vlb, of which the second trains the variance alone (Nichol & Dhariwal 2021, section 3.1).

    x0: uint8 (N, 1, 8, 8), made by `pixels`. loop: steps and the other arguments of `common.training_loop`.
    """
    schedule = fastgen.Schedule.cosine(settings.timesteps)
    network_timesteps, seed = schedule.timestep_tensor(device), common.derived_seed(settings.seed, "noise")

    def hybrid(model, x0, t, step):
        x_t = fastgen.q_sample(x0, t, schedule, seed=seed, offset=step)
        options = {"variance": VARIANCE, "vlb_weight": settings.vlb_weight}
        return fastgen.diffusion_loss(model(x_t, network_timesteps[t]), x0, t, schedule, seed=seed, offset=step, **options)

    parts, train_step = train_ddpm.set_up(settings, x0, schedule, device, hybrid, 2 * common.IMAGE_SHAPE[0])
    return train_ddpm.run("likelihood", settings, schedule, parts, train_step, **loop)


# ---- the bound ------------------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """Of B digits and T timesteps, in bits per dimension."""

    bound: fastgen.VariationalBound
    distortion: torch.Tensor  # (T,): the root of the mean of (x0 − x̂0(x_t))² over digits and pixels, in grey levels of 0 … 255

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """(B,) each; they add up to the bound."""
        terms = self.bound.terms
        return {"L_T": self.bound.prior, "L_1 … L_T−1": terms[:, 1:].sum(1), "L_0": terms[:, 0]}

    @property
    def rate(self) -> torch.Tensor:
        """(T,): the bits that are spent when x̂0(x_t) is known, L_T + Σ_{s>t} L_s. Algorithm 4 of Ho et al. 2020 sends x_t by
        them."""
        terms = self.bound.terms.mean(0)
        return self.bound.prior.mean() + terms.flip(0).cumsum(0).flip(0) - terms


def evaluate(model: UNet, x0: torch.Tensor, schedule: fastgen.Schedule, seeds: torch.Tensor, progress: bool = False) -> Evaluation:
    """The bound of x0, uint8 (B, 1, 8, 8), made by `pixels`, from one pass of the network over each timestep. model: in eval mode.
    seeds: int64 (B,)."""
    seen = WithDistortion(model, x0, schedule)
    bound = fastgen.variational_bound(seen, x0, schedule, seed=seeds, variance=VARIANCE, clip=CLIP, progress=progress)
    return Evaluation(bound, 127.5 * torch.cat(seen.squares).sqrt())


class WithDistortion:
    """The network, as `variational_bound` calls it: all samples at one timestep, then all at the next. It notes how far its x̂0 is
    from x0, beside the bound and at no further cost."""

    def __init__(self, model: UNet, x0: torch.Tensor, schedule: fastgen.Schedule):
        self.model, self.x0, self.squares = model, x0 / 127.5 - 1, []
        bars = torch.tensor(schedule.alphas_cumprod)
        self.signal, self.noise = (column.sqrt().to(self.x0).view(-1, 1, 1, 1) for column in (bars, 1 - bars))

    def __call__(self, x, t):
        m = self.model(x, t)
        epsilon, _ = m.chunk(2, 1)
        found = ((x - self.noise[t] * epsilon) / self.signal[t]).clamp(-CLIP, CLIP)
        self.squares.append((found.view(-1, *self.x0.shape) - self.x0).square().flatten(1).mean(1))
        return m


def plot(evaluation: Evaluation, path: Path) -> None:
    """The term at each t, which is the figure of Nichol & Dhariwal 2021; the distortion on the way back from x_T, and against the
    rate, which are those of Ho et al. 2020."""
    from matplotlib.figure import Figure

    terms, distortion = evaluation.bound.terms.mean(0).cpu(), evaluation.distortion.cpu()
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(terms)
    left.set(yscale="log", xlabel="t", ylabel="L_t, bits per dimension")
    middle.plot(distortion.flip(0))
    middle.set(xlabel="reverse steps, T − t", ylabel="distortion, RMSE of 255")
    right.plot(evaluation.rate.cpu(), distortion)
    right.set(xlabel="rate, bits per dimension", ylabel="distortion, RMSE of 255")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


# ---- what is printed ------------------------------------------------------------------------------------------------------


def print_bound(evaluation: Evaluation) -> None:
    total = evaluation.bound.total
    error = total.std().item() / math.sqrt(len(total))
    print(f"variational bound of {len(total)} held-out digits: {total.mean():.3f} ± {error:.3f} bits per dimension")
    for name, part in evaluation.parts.items():
        print(f"  {name:12} {part.mean():8.4f}")
    decoder = evaluation.parts["L_0"].mean()
    print(f"rate {total.mean() - decoder:.3f}, distortion {decoder:.3f} bits per dimension, ", end="")
    print(f"a root-mean-square error of {evaluation.distortion[0]:.2f} grey levels of 255")


def print_estimate(found: fastgen.LogLikelihood, bound: torch.Tensor, trajectories: int) -> None:
    """found: of the digits whose bounds, in bits per dimension, these are."""
    bits = 1.0 / (math.prod(common.IMAGE_SHAPE) * math.log(2.0))
    print(f"−log p of {len(bound)} of them, from {trajectories} trajectories each, in bits per dimension:")
    print(f"  {'estimate':>9} {'error':>7} {'ess':>6} {'bound':>7}")
    for estimate, error, ess, upper in zip(*found, bound, strict=True):
        print(f"  {-bits * estimate:9.3f} {bits * error:7.3f} {ess:6.1f} {upper:7.3f}")


def main(arguments: list[str] | None = None) -> None:
    parser = common.arguments(
        "Trains a DDPM with a learned variance on 8x8 digits, and bounds and estimates the likelihood of others.",
        steps=3000,
        out="runs/likelihood",
        batch_size=Settings.batch_size,
    )
    parser.add_argument("--timesteps", type=common.positive, default=Settings.timesteps, help="T of the cosine noise schedule")
    parser.add_argument("--base-channels", type=common.positive, default=Settings.base_channels, help="width of the U-Net")
    parser.add_argument("--held-out", type=common.positive, default=360, help="digits in the bound, of 360")
    parser.add_argument("--digits", type=common.positive, default=4, help="digits whose likelihood is estimated")
    parser.add_argument("--trajectories", type=common.positive, default=64, help="forward trajectories for each of these")
    options = parser.parse_args(arguments)
    settings = Settings(
        seed=options.seed,
        batch_size=options.batch_size,
        timesteps=options.timesteps,
        base_channels=options.base_channels,
    )
    train_images, _, held_out, _ = common.load_digits()
    with common.chosen_backend(options.backend, options.device):
        trained = train(settings, pixels(train_images), device=options.device, **common.loop_options(options))
        model, schedule = trained.model, trained.schedule
        x0 = pixels(held_out[: options.held_out]).to(options.device)
        seeds = common.derived_seed(options.seed, "evaluation") + torch.arange(len(x0), device=options.device)
        evaluation = evaluate(model, x0, schedule, seeds, progress=True)
        few = x0[: options.digits]
        found = fastgen.log_likelihood(
            model,
            few,
            schedule,
            trajectories=options.trajectories,
            seed=seeds[: len(few)],
            variance=VARIANCE,
            clip=CLIP,
            decoder="discretized",
            progress=True,
        )
        images = train_ddpm.sample(
            model,
            schedule,
            common.sample_seeds(options.seed, options.samples, options.device),
            clip=CLIP,
            variance=VARIANCE,
            progress=True,
        )
    print(f"{trained.steps} training steps")
    print_bound(evaluation)
    print_estimate(found, evaluation.bound.total[: len(few)], options.trajectories)
    plot(evaluation, options.out / "terms.png")
    common.write_grid(images, options.out / "samples.png")
    print(f"terms and rate–distortion in {options.out / 'terms.png'}, {options.samples} samples in {options.out / 'samples.png'}")


if __name__ == "__main__":
    common.run_main(main)
