"""What the examples share: the data, reproducible randomness, a resumable training loop, image grids, the command line."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import fastgen

IMAGE_SHAPE = (1, 8, 8)


# ---- data -----------------------------------------------------------------------------------------------------------------


def load_digits():
    """The 1797 handwritten digits of scikit-learn, in [−1, 1]: (train, train_labels, held_out, held_out_labels).

    Images are float32 (N, 1, 8, 8). The split, 80/20 and stratified by digit, is the same whatever the seed of the training.
    """
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    images = (digits.images[:, None] / 8.0 - 1.0).astype(np.float32)
    train, held_out, train_labels, held_out_labels = model_selection.train_test_split(
        images, digits.target, test_size=0.2, random_state=0, stratify=digits.target
    )
    return torch.from_numpy(train), train_labels, torch.from_numpy(held_out), held_out_labels


# ---- randomness: every number is a function of (seed, purpose, step) --------------------------------------------------------


def derived_seed(seed: int, purpose: str, step: int = 0) -> int:
    """A 62-bit seed for one purpose at one step; 62, so that per-sample seeds can count up from it without overflow."""
    digest = hashlib.blake2b(f"{seed} {purpose} {step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def sample_seeds(seed: int, count: int, device="cpu") -> torch.Tensor:
    """One seed per sample, int64 (count,): sample i is the same picture whatever the number of samples beside it."""
    return derived_seed(seed, "samples") + torch.arange(count, dtype=torch.int64, device=device)


def batch_generator(seed: int, step: int) -> torch.Generator:
    """The generator of step `step`'s batch indices and timesteps. It is made anew at each step, so no state has to be saved
    for an interrupted training to go on exactly, and on the CPU, so that the numbers are the same for every device."""
    return torch.Generator().manual_seed(derived_seed(seed, "batch", step))


@contextlib.contextmanager
def initialised_from(seed: int):
    """Inside, torch's default CPU generator is seeded for the initial weights; outside it stays what it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed, "weights"))
        yield


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, step: int, decay: float) -> None:
    """average ← d·average + (1 − d)·model with d = min(decay, (1 + step)/(10 + step)), for weights and buffers.

    The growing d lets the average forget the untrained weights it started from.
    """
    decay = min(decay, (1 + step) / (10 + step))
    for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if value.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


# ---- checkpoints and the training loop ------------------------------------------------------------------------------------


class UserError(Exception):
    """What the user can put right; `run_main` shows it as one line."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used, and what to do about it."""


def save_checkpoint(path: Path, content: dict) -> None:
    """Writes beside `path`, then renames: an interruption leaves the old checkpoint or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


RETRAIN = "use --fresh to train anew over it, or another --out"


def read_checkpoint(path: Path, advice: str = RETRAIN) -> dict:
    """What `save_checkpoint` wrote; CheckpointError if it is unreadable."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["settings"]  # noqa: B018
    except Exception as error:
        raise CheckpointError(f"{path} is no checkpoint that can be read ({error}); {advice}") from error
    return content


def load_checkpoint(path: Path, settings: dict) -> dict:
    """The checkpoint at `path`; CheckpointError if it is unreadable or was made with other settings."""
    content = read_checkpoint(path)
    made_with = content["settings"]
    names = sorted({*made_with, *settings})
    differences = [
        f"{name} = {made_with.get(name)!r} (now {settings.get(name)!r})"
        for name in names
        if made_with.get(name) != settings.get(name)
    ]
    if differences:
        raise CheckpointError(f"{path} was made with other settings: {', '.join(differences)}; {RETRAIN}")
    return content


class StopRequest:
    """`with StopRequest() as stop:` turns the first Ctrl-C (or SIGTERM) into `stop.requested`, for the loop to end after the
    step at hand, where the weights and the optimizer agree. The second Ctrl-C interrupts at once."""

    def __init__(self):
        self.requested = False

    def _handle(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self):
        # only the main thread may set handlers
        usable = threading.current_thread() is threading.main_thread()
        self._previous = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)} if usable else {}
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def progress_bar(iterable=None, **options):
    """tqdm; in a log file, where every update is another line, one update in ten seconds."""
    return tqdm(iterable, unit="step", mininterval=0.2 if sys.stderr.isatty() else 10.0, **options)


class Interrupted(Exception):
    """Training was stopped by a signal, after its checkpoint was saved."""


def training_loop(
    parts: dict,
    settings: dict,
    train_step,
    *,
    steps: int,
    seconds: float | None = None,
    checkpoint: Path | None = None,
    fresh: bool = False,
    save_every: int = 500,
    progress: bool = True,
) -> tuple[int, list[dict[str, float]]]:
    """Calls `train_step(step)` for step = 0 … `steps` − 1, going on where `checkpoint` left off.

    Args:
        parts: name → whatever has state_dict and load_state_dict; together they are the whole state of the training.
        settings: what the weights depend on besides; a checkpoint made with others is refused.
        train_step: step → {name: loss tensor}.
        steps: in all, those of earlier runs included.
        seconds: stop once this much training time has been spent, that of earlier runs included; None for no limit.
        checkpoint: file to resume from and to save to, every `save_every` steps and at the end; None for neither.
        fresh: ignore an existing checkpoint.
        progress: show a progress bar.

    Returns (steps done in all, this call's losses). Raises CheckpointError, or Interrupted once it has saved.
    """
    step, spent = 0, 0.0
    if checkpoint is not None and checkpoint.exists() and not fresh:
        content = load_checkpoint(checkpoint, settings)
        for name, part in parts.items():
            part.load_state_dict(content["parts"][name])
        step, spent = content["step"], content["seconds"]
        print(f"{checkpoint}: going on after step {step}")
        if step > steps:
            print(f"{checkpoint} has more steps than the {steps} asked for; they are kept")

    def save():
        if checkpoint is not None:
            states = {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(checkpoint, {"settings": settings, "parts": states, "step": step, "seconds": spent})

    history, saved = [], step
    done = step >= steps or (seconds is not None and spent >= seconds)
    if not done:
        with StopRequest() as stop, progress_bar(total=steps, initial=step, desc="training", disable=not progress) as bar:
            while not done and not stop.requested:
                start = time.perf_counter()
                losses = train_step(step)
                history.append({name: loss.detach() for name, loss in losses.items()})
                step += 1
                if step % 50 == 0:  # reading a loss waits for the device
                    bar.set_postfix({name: f"{loss.item():.4f}" for name, loss in history[-1].items()}, refresh=False)
                bar.update()
                spent += time.perf_counter() - start
                done = step >= steps or (seconds is not None and spent >= seconds)
                if step % save_every == 0:
                    save()
                    saved = step
            if saved != step:
                save()
    if not done:
        where = f"saved to {checkpoint}; the same command goes on from there" if checkpoint is not None else "nothing saved"
        raise Interrupted(f"stopped after step {step} of {steps}: {where}")
    return step, [{name: loss.item() for name, loss in losses.items()} for losses in history]


# ---- images ---------------------------------------------------------------------------------------------------------------


def write_grid(images: torch.Tensor, path: Path, *, columns: int | None = None, scale: int = 4) -> None:
    """Writes images (N, 1 or 3, H, W) in [−1, 1] as one PNG, row by row, each pixel `scale` pixels wide."""
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    values = fastgen.to_uint8(images).cpu()
    values = values.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1).numpy()
    gap = scale
    cell_height, cell_width = height * scale + gap, width * scale + gap
    canvas = np.full((rows * cell_height + gap, columns * cell_width + gap, channels), 64, dtype=np.uint8)
    for index, image in enumerate(values):
        top, left = gap + index // columns * cell_height, gap + index % columns * cell_width
        canvas[top : top + height * scale, left : left + width * scale] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas).save(path)


# ---- command line ---------------------------------------------------------------------------------------------------------


def arguments(description: str, *, steps: int, out: str, batch_size: int = 64) -> argparse.ArgumentParser:
    """The options that every example has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=positive, default=steps, help="training steps in all, earlier runs included")
    parser.add_argument("--batch-size", type=positive, default=batch_size, help="images per step")
    parser.add_argument("--seed", type=int, default=0, help="decides the initial weights, the batches and all noise")
    parser.add_argument("--device", default="cpu", help="where to run: cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--backend",
        choices=("eager", "cpp", "triton", "auto"),
        help="fastgen's backend; if not given, that of FASTGEN_BACKEND or the fastest one",
    )
    parser.add_argument("--samples", type=positive, default=64, help="images in the grid")
    parser.add_argument("--out", type=Path, default=Path(out), help="directory of the checkpoint and the grid")
    parser.add_argument("--fresh", action="store_true", help="ignore an existing checkpoint")
    parser.add_argument("--save-every", type=positive, default=500, help="steps between checkpoints")
    return parser


def loop_options(options: argparse.Namespace) -> dict:
    """What `training_loop` is told by the options that every example has."""
    return {
        "steps": options.steps,
        "checkpoint": options.out / "checkpoint.pt",
        "fresh": options.fresh,
        "save_every": options.save_every,
    }


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an int ≥ 1, got {value}")
    return value


@contextlib.contextmanager
def chosen_backend(name: str | None, device):
    """`fastgen.use_backend(name)`, where one is named; UserError now, and not at the first op, if `device` lacks it."""
    with contextlib.ExitStack() as stack:
        try:
            if name is not None:
                stack.enter_context(fastgen.use_backend(name))
            chosen = fastgen.backend(device)
        except RuntimeError as error:
            raise UserError(error) from error
        print(f"fastgen backend: {chosen} on {device}")
        yield


def run_main(main) -> None:
    """Calls `main()`; an interruption or an error that the user can put right becomes one line instead of a traceback."""
    try:
        main()
    except Interrupted as stopped:
        print(stopped)
        sys.exit(130)
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint is as it was")
        sys.exit(130)
    except UserError as error:
        sys.exit(f"error: {error}")
