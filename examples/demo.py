"""The demonstration in one command: trains a small DDPM on a CPU, writes digits it made, and prints what fastgen's kernels
cost and how good the digits are, each number beside what it should be compared with.

    python demo.py --out demo

The training takes at most --seconds; a second run reuses its checkpoint.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from pathlib import Path

import common
import numpy as np
import torch
import train_ddpm

import fastgen
from fastgen.models import UNet

TIMING_SHAPES = ((64, 1, 8, 8), (64, 3, 32, 32), (8, 3, 256, 256))


# ---- speed ----------------------------------------------------------------------------------------------------------------


class HandWritten:
    """The same two steps as one writes them in PyTorch: coefficient tables gathered at t, `randn_like`, arithmetic.

    The common optimisations are in: the tables are float32 and on the device, no timestep is read back, no gradient is recorded.
    """

    def __init__(self, schedule: fastgen.Schedule, device="cpu"):
        alphas_cumprod, variance = schedule.alphas_cumprod, schedule.posterior_variance
        previous = schedule.alphas_cumprod_prev
        columns = {
            "root": np.sqrt(alphas_cumprod),
            "noise": np.sqrt(1 - alphas_cumprod),
            "x0_from_x": np.sqrt(1 / alphas_cumprod),
            "x0_from_epsilon": np.sqrt(1 / alphas_cumprod - 1),
            "mean_from_x0": schedule.betas * np.sqrt(previous) / (1 - alphas_cumprod),
            "mean_from_x": (1 - previous) * np.sqrt(schedule.alphas) / (1 - alphas_cumprod),
            "sigma": np.sqrt(variance),  # 0 at t = 0, so that no mask is needed
        }
        self.tables = {name: torch.tensor(column, dtype=torch.float32, device=device) for name, column in columns.items()}

    def _at(self, name, t):
        return self.tables[name].gather(0, t).reshape(-1, 1, 1, 1)

    def q_sample(self, x0, t, noise=None):
        noise = torch.randn_like(x0) if noise is None else noise
        return self._at("root", t) * x0 + self._at("noise", t) * noise

    def ddpm_step(self, x, epsilon, t):
        x0 = (self._at("x0_from_x", t) * x - self._at("x0_from_epsilon", t) * epsilon).clamp(-1.0, 1.0)
        mean = self._at("mean_from_x0", t) * x0 + self._at("mean_from_x", t) * x
        return mean + self._at("sigma", t) * torch.randn_like(x)


def interleaved_times(functions: dict, *, rounds: int = 15, seconds: float = 0.02) -> dict[str, list[float]]:
    """name → seconds per call, one figure per round. The functions take turns in every round, so that whatever else the
    machine does meets all of them; one figure is the mean over about `seconds` of calls."""
    calls = {}
    for name, function in functions.items():
        function()  # the first call fills caches
        start = time.perf_counter()
        function()
        calls[name] = max(1, round(seconds / (time.perf_counter() - start)))
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            times[name].append((time.perf_counter() - start) / calls[name])
    return times


@torch.no_grad()
def speed_table(shapes=TIMING_SHAPES, *, rounds: int = 15) -> list[tuple[str, ...]]:
    """One row per op and shape: the time of the handwritten step, of fastgen's, and their ratio."""
    schedule = fastgen.Schedule.linear(1000)
    by_hand = HandWritten(schedule)
    rows = [("op", "shape", "PyTorch by hand", f"fastgen ({fastgen.backend()})", "ratio")]
    for shape in shapes:
        x, epsilon = torch.rand(shape) * 2 - 1, torch.randn(shape)
        t = torch.randint(1, len(schedule), shape[:1])
        pairs = {
            "ddpm_step": (
                lambda x=x, e=epsilon, t=t: by_hand.ddpm_step(x, e, t),
                lambda x=x, e=epsilon, t=t: fastgen.ddpm_step(x, e, t, schedule, clip=1.0, seed=0),
            ),
            "q_sample": (
                lambda x=x, t=t: by_hand.q_sample(x, t),
                lambda x=x, t=t: fastgen.q_sample(x, t, schedule, seed=0),
            ),
        }
        for op, (hand, fused) in pairs.items():
            times = interleaved_times({"hand": hand, "fused": fused}, rounds=rounds)
            ratio = statistics.median(a / b for a, b in zip(times["hand"], times["fused"], strict=True))
            rows.append((op, str(shape), _median_and_spread(times["hand"]), _median_and_spread(times["fused"]), f"{ratio:.2f}×"))
    return rows


def _median_and_spread(times: list[float]) -> str:
    low, middle, high = (1e6 * q for q in np.quantile(times, (0.25, 0.5, 0.75)))
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


# ---- quality --------------------------------------------------------------------------------------------------------------


class DigitJudge:
    """A digit classifier (one hidden layer, scikit-learn, fixed seed) trained on the training digits only. It gives the
    features of the Fréchet distance and the confidence in a digit."""

    def __init__(self, images: torch.Tensor, labels: np.ndarray):
        from sklearn.neural_network import MLPClassifier

        self.classifier = MLPClassifier((32,), max_iter=200, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has not converged to the last digit does not matter here
            self.classifier.fit(_flat(images), labels)

    def features(self, images: torch.Tensor) -> np.ndarray:
        """(N, 32) activations of the hidden layer."""
        return np.maximum(_flat(images) @ self.classifier.coefs_[0] + self.classifier.intercepts_[0], 0.0)

    def accuracy(self, images: torch.Tensor, labels: np.ndarray) -> float:
        return self.classifier.score(_flat(images), labels)

    def share_of_confident(self, images: torch.Tensor, threshold: float = 0.9) -> float:
        return float((self.classifier.predict_proba(_flat(images)).max(axis=1) > threshold).mean())

    def distance(self, images: torch.Tensor, others: torch.Tensor) -> float:
        return frechet_distance(self.features(images), self.features(others))


def _flat(images: torch.Tensor) -> np.ndarray:
    return images.cpu().flatten(1).double().numpy()


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """‖m_x − m_y‖² + tr(C_x + C_y − 2·(C_x·C_y)^½) of samples (N, D) and (M, D): the squared 2-Wasserstein distance between
    the Gaussians with their means and covariances. Source: Heusel et al. 2017 (FID), there on Inception features."""
    covariance_x, covariance_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(covariance_x)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    # C_x·C_y has the eigenvalues of the symmetric √C_x·C_y·√C_x
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariance_y @ root), 0.0)).sum()
    shift = x.mean(axis=0) - y.mean(axis=0)
    return float(shift @ shift + np.trace(covariance_x) + np.trace(covariance_y) - 2.0 * cross)


def nearest_distance(images: torch.Tensor, train: torch.Tensor) -> float:
    """The median over images of the root mean square pixel difference to the nearest training digit."""
    distances = torch.cdist(images.cpu().flatten(1), train.flatten(1)).min(dim=1).values
    return float(distances.median()) / train[0].numel() ** 0.5


def quality_table(generated: torch.Tensor, train, train_labels, held_out, held_out_labels) -> tuple[list, float]:
    """(rows, the judge's accuracy on held-out digits). Every set has as many images as the held-out set has: the distance has
    a bias that depends on their number."""
    judge = DigitJudge(train, train_labels)
    count = len(held_out)
    # Standard normal pixels clamped to the range of images: where sampling starts, and what an untrained network returns
    noise = fastgen.randn(held_out.shape, seed=common.derived_seed(0, "ceiling")).clamp(-1.0, 1.0)
    subset = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:count]]
    # a training digit is at distance 0 from itself, so for its row it is the last column that has no meaning
    sets = {
        "training digits (the floor)": (subset, False),
        "held-out digits": (held_out, True),
        "generated": (generated, True),
        "noise (the ceiling)": (noise, True),
    }
    rows = [("images", "number", "Fréchet distance", "confident", "to nearest")]
    for name, (images, compare) in sets.items():
        distance = "0 (itself)" if images is held_out else f"{judge.distance(images, held_out):.2f}"
        nearest = f"{nearest_distance(images, train):.3f}" if compare else "–"
        rows.append((name, str(len(images)), distance, f"{100 * judge.share_of_confident(images):.1f}%", nearest))
    return rows, judge.accuracy(held_out, held_out_labels)


# ---- threads --------------------------------------------------------------------------------------------------------------


def use_faster_thread_count(work, most: int, *, rounds: int = 3) -> int:
    """Sets and returns PyTorch's number of threads: `most`, or 1 where `work()` is faster so.

    Threads wait for each other by spinning, so they only help on cores of their own. Two threads on two cores did 13 training
    steps per second against 8.4 of one thread while the machine was idle, and 0.5 against 4 while others used it.
    """
    spent = {count: 0.0 for count in sorted({1, most})}
    for index in range(rounds + 1):
        for count in spent:
            torch.set_num_threads(count)
            start = time.perf_counter()
            work()
            if index > 0:  # the first call sets up
                spent[count] += time.perf_counter() - start
    fastest = min(spent, key=spent.get)
    torch.set_num_threads(fastest)
    return fastest


# ---- the demonstration ----------------------------------------------------------------------------------------------------


def print_table(rows: list[tuple[str, ...]], text_columns: int = 1) -> None:
    """Aligned plain text; the first `text_columns` columns to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for index, row in enumerate(rows):
        cells = [
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip())
        if index == 0:
            print("  " + "  ".join("-" * width for width in widths))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="directory of digits.png and the checkpoint")
    parser.add_argument("--steps", type=common.positive, default=1200, help="training steps, if the time allows")
    parser.add_argument("--seconds", type=float, default=100.0, help="at most so much training")
    parser.add_argument("--sampling-steps", type=common.positive, default=50, help="of the 1000 steps, how many sampling visits")
    parser.add_argument("--samples", type=common.positive, default=360, help="digits to generate; 100 of them are drawn")
    parser.add_argument(
        "--base-channels", type=common.positive, default=train_ddpm.Settings.base_channels, help="width of the U-Net"
    )
    parser.add_argument("--timing-rounds", type=common.positive, default=15, help="repeats of every timing")
    parser.add_argument("--fresh", action="store_true", help="train anew, whatever checkpoint there is")
    options = parser.parse_args(arguments)
    start = time.perf_counter()

    print(fastgen.backend_info())
    settings = train_ddpm.Settings(base_channels=options.base_channels)
    default_threads = torch.get_num_threads()
    network = UNet(base_channels=settings.base_channels, image_size=common.IMAGE_SHAPE[1])
    x, t = torch.zeros(settings.batch_size, *common.IMAGE_SHAPE), torch.zeros(settings.batch_size, dtype=torch.int64)
    pass_of_network = lambda: network(x, t).sum().backward()  # noqa: E731
    threads = use_faster_thread_count(pass_of_network, default_threads)
    print(f"{os.cpu_count()} CPU cores; {threads} thread(s) for the network, the faster choice just now\n")
    train, train_labels, held_out, held_out_labels = common.load_digits()
    checkpoint = options.out / "checkpoint.pt"
    trained = train_ddpm.train(
        settings,
        train,
        steps=options.steps,
        seconds=options.seconds,
        checkpoint=checkpoint,
        fresh=options.fresh,
        save_every=200,
    )
    new = len(trained.losses)
    if new == 0:
        print(f"Nothing to train: reusing the network of {checkpoint}, {trained.steps} steps. --fresh trains it anew.")
    else:
        print(f"Trained {new} steps now, {trained.steps} in all; loss of the last 50: {statistics.mean(trained.losses[-50:]):.4f}.")
    if trained.steps < options.steps:
        print(f"The limit of {options.seconds:g} s came before {options.steps} steps: expect rougher digits.")

    use_faster_thread_count(pass_of_network, default_threads)
    schedule = trained.schedule.respace(options.sampling_steps)
    generated = train_ddpm.sample(trained.model, schedule, common.sample_seeds(0, options.samples), progress=True)
    picture = options.out / "digits.png"
    shown = generated[:100]
    common.write_grid(shown, picture, scale=6)
    print(f"Generated {options.samples} digits in {options.sampling_steps} steps; the first {len(shown)} are in {picture}.\n")

    print("Quality, in the features of a small classifier of digits:")
    rows, accuracy = quality_table(generated, train, train_labels, held_out, held_out_labels)
    print_table(rows)
    print(
        "  Fréchet distance: between these images and the held-out digits; lower is better, and at best the floor.\n"
        f"  confident: share that the classifier ({100 * accuracy:.1f}% right on held-out digits) gives some digit > 0.9.\n"
        "  to nearest: median RMS pixel difference to the nearest training digit, pixels being within −1 … 1; far below the\n"
        "  held-out digits' would mean that training digits were memorised.\n"
    )
    torch.set_num_threads(default_threads)
    print("Time of what surrounds the network, in µs: median [quartiles] of interleaved repeats; float32, one t per sample,")
    print(f"{default_threads} thread(s):")
    print_table(speed_table(rounds=options.timing_rounds), text_columns=2)
    print(
        "  ddpm_step: one sampling step without the network; q_sample: the noising of one training step.\n"
        "  ratio: time by hand / time of fastgen; above 1 fastgen is faster.\n"
    )
    print(f"{time.perf_counter() - start:.0f} s in all.")


if __name__ == "__main__":
    common.run_main(main)
