"""What the benchmarks share: sizes, buffers colder than the cache, timing in turns, the machine, text tables."""

from __future__ import annotations

import functools
import gc
import math
import os
import random
import statistics
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

import fastgen

MI = 2**20
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
MOST_COPIES = 128
# Of the last-level cache: a guest with two cores was told of its host's 480 MiB, which others share, and setting up buffers for
# twice that took most of the time of a case.
MOST_CACHE = 64 * MI


# ---- buffers ---------------------------------------------------------------------------------------------------------


@functools.cache
def cache_bytes(device: str = "cpu") -> int:
    """The size of the last-level cache; 32 MiB where the system does not say."""
    if device == "cuda":
        return getattr(torch.cuda.get_device_properties("cuda"), "L2_cache_size", 0) or 32 * MI
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 * MI)


def copies(set_bytes: int, device: str = "cpu") -> int:
    """How many sets of buffers a benchmark rotates through.

    From 1 MiB on, so many that twice the last-level cache, or `MOST_CACHE` of it, goes by before a set comes round again; a
    smaller set is meant to be in the cache. On a GPU no more than `MOST_COPIES`, which leaves a call of some 10⁴ elements in the
    cache; what such a call costs is its launch, and `gpu_bench` times it with the cache emptied besides.
    """
    cache = min(cache_bytes(device), MOST_CACHE)
    count = 1 if set_bytes < (MI if device == "cpu" else 1) else 1 + math.ceil(2 * cache / set_bytes)
    return count if device == "cpu" else min(count, MOST_COPIES)


def rotation(make, device: str = "cpu", one: bool = False) -> list[tuple]:
    """`copies` results of `make`, or one, each a tuple of tensors and other arguments, made on `device`."""
    with torch.device(device):
        first = make()
        set_bytes = sum(x.nbytes for x in first if isinstance(x, torch.Tensor))
        return [first] + [make() for _ in range(0 if one else copies(set_bytes, device) - 1)]


def free_bytes(device: str = "cpu") -> int:
    """The memory that can be used without swapping, or what a control group (a container) leaves of it."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 2**10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit, used, counts = (Path("/sys/fs/cgroup", f"memory.{name}").read_text() for name in ("max", "current", "stat"))
        cache = next(int(line.split()[1]) for line in counts.splitlines() if line.startswith("inactive_file "))
        return min(free, int(limit) - int(used) + cache)  # files' pages count as used until something else needs them
    except (OSError, ValueError, StopIteration):  # no group of our own, or "max"
        return free


def device(asked: str | None = None) -> str:
    """Where benchmarks run unless something else is asked for: "cuda" where torch finds it, else "cpu"."""
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


# ---- timing ----------------------------------------------------------------------------------------------------------

# Seconds; shorter calls are timed in runs that last so long. It is the same for all peers: the first call after a neighbour's finds
# other data and code in the cache, and one peer timed by first calls beside another timed by runs took 1.5 to 2 times too long
# (100,000 elements, eager beside fastgen, when runs began at 50 µs).
SHORT = 1e-3
UNTIMED = 0.02  # seconds up to which a call is made once more before each sample, which is not timed
CUDA_SAMPLE = 2e-3  # seconds that a sample takes on a GPU, about


def seconds(calls, first: int, times: int, device: str = "cpu", by_host: bool = False, between=None) -> float:
    """Seconds per call of `times` calls in a row, those of `calls` in turn from number `first` on. On a GPU by its own clock, the
    host having a start; or by the host's, which is what a loop of short calls takes (`by_host`). On the CPU `between()` runs before
    each of them and is not counted."""
    run = [calls[turn % len(calls)] for turn in range(first, first + times)]
    if between is not None and device == "cpu":
        return math.fsum(map(functools.partial(_second_after, between), run)) / times
    if device == "cpu" or by_host:
        synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
        synchronize()
        start = time.perf_counter()
        for call in run:
            call()
        synchronize()
        return (time.perf_counter() - start) / times
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(100_000)  # clock cycles, some 50 µs
    start.record()
    for call in run:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def _second_after(between, call):
    between()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def warmed(calls, device: str = "cpu", by_host: bool = False) -> float:
    """Calls everything once (compilation, page faults), then a few more times, what is slow once; returns the shortest time."""
    for call in calls:
        call()
    shortest = math.inf
    for turn in range(6):
        shortest = min(shortest, seconds(calls, turn, 1, device, by_host))
        if shortest > UNTIMED:
            break
    return shortest


def repeats(estimate: float, device: str = "cpu") -> int:
    """How many calls make one sample: as many as last a millisecond, at least one."""
    if device == "cuda":
        return min(max(math.ceil(CUDA_SAMPLE / max(estimate, 1e-7)), 3), 500)
    return max(math.ceil(SHORT / max(estimate, 1e-7)), 1)


def in_turns(
    peers: dict, budget, tiny: bool = False, device: str = "cpu", by_host: bool = False, between=None, least: int = 5
) -> dict:
    """Times peers side by side: {name: [seconds of one call, …]}, one sample of every peer in each round.

    peers: {name: calls to rotate through}. Every round times every peer once, so that a noisy machine hurts all alike
    and the samples of a round can be compared as pairs; the order within a round is drawn anew, so that nobody always
    runs in the cache and the heap that the same neighbour left. The rounds last about `budget` seconds in all (or what it
    returns when all is warm and it is given the seconds of one round), and are at least `least` and at most 60; 2 if tiny.
    """
    estimates = {name: warmed(calls, device, by_host) for name, calls in peers.items()}
    times = {name: 1 if tiny else repeats(estimate, device) for name, estimate in estimates.items()}
    if between is not None and not tiny:
        times = {name: max(10, many) for name, many in times.items()}
    first = {name: 1 if estimate < UNTIMED else 0 for name, estimate in estimates.items()}
    if callable(budget):
        budget = budget(sum(estimates[name] * (times[name] + first[name]) for name in peers))
    least, most = (2, 2) if tiny else (least, 60)
    samples, turn, order = {name: [] for name in peers}, 0, random.Random(0)
    collecting = gc.isenabled()
    gc.disable()
    end = time.perf_counter() + budget
    try:
        for done in range(most):
            if done >= least and time.perf_counter() > end:
                break
            for name in order.sample(list(peers), len(peers)):
                if first[name]:
                    seconds(peers[name], turn, 1, device, by_host, between)
                turn += first[name]
                samples[name].append(seconds(peers[name], turn, times[name], device, by_host, between))
                turn += times[name]
    finally:
        if collecting:
            gc.enable()
    return samples


def quartiles(samples) -> dict:
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"best": min(samples), "median": middle, "q1": low, "q3": high}


# ---- machine and versions --------------------------------------------------------------------------------------------


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(device: str = "cpu") -> dict:
    """What a number depends on, apart from the code timed; looked at once, so that the load is that before the first was."""
    return _environment(device)


@functools.cache
def _environment(device):
    status = _git("status", "--porcelain")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cache_bytes": cache_bytes(device),
        "torch": torch.__version__,
        "fastgen": fastgen.__version__,
        **{package: _version(package) for package in ("triton", "diffusers", "numpy")},
        "backend": fastgen.backend(device),
        "capability": torch.ops.fastgen.cpu_capability() if fastgen.backend() == "cpp" else "none",
        "commit": _git("rev-parse", "--short=12", "--verify", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def header(device: str = "cpu") -> list[str]:
    e = environment(device)
    cache = f"last-level cache {e['cache_bytes'] / MI:.0f} MiB"
    tree = ", tree with changes" if e["dirty"] else ""
    lines = [f"device   {e['device']}"] * (device != "cpu") + [
        f"cpu      {e['cpu']}, {e['cores']} cores, {e['threads']} threads, {cache}",
        f"versions torch {e['torch']}, fastgen {e['fastgen']} (commit {e['commit'] or 'none'}{tree})",
        f"fastgen  backend {e['backend']}, instruction set {e['capability']}",
    ]
    if (e["load"] or 0) > 0.5:
        lines.append(f"busy     {e['load']:.1f} other processes ran when this began: read the ratios, not the times")
    return lines


# ---- text ------------------------------------------------------------------------------------------------------------


def table(head: tuple[str, ...], rows: list[tuple[str, ...]], left: int = 1) -> list[str]:
    """Lines of an aligned table: the first `left` columns to the left, the rest to the right; an empty row is a gap."""
    widths = [max(map(len, column)) for column in zip(head, *filter(None, rows), strict=True)]
    lines = []
    for row in (head, tuple("-" * width for width in widths), *rows):
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=bool(row)))]
        lines.append("  ".join(cells).rstrip())
    return lines
