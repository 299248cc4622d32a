"""The CUDA kernels beside eager PyTorch, torch.compile and the device's own copy, in one run, against the targets:

    python -m benchmarks.gpu_bench [--seconds S] [--json FILE] [--tiny] [--device cuda]

Every row times its peers in turns. A sample is a run of calls between two events, each call on buffers that the cache does not
hold; its time per call is what a loop of such calls takes, which for small sizes is the host's share. Up to 10⁷ elements
the kernels are also timed alone, behind a read that fills the cache with something else ("kernel").

`--warm I/N` only compiles every Nth graph for torch.compile: several such processes at a time fill Inductor's cache on the disk.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import torch

import fastgen

from . import common, peers
from .side_by_side import label as call_of
from .side_by_side import quartiles, verdict

SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 64_000_000, 200_000_000)
SMALL_EVENT, EVENT = (4, 8, 8), (3, 64, 64)  # up to 10⁵ elements, and from 10⁶
LARGE = 60_000_000  # elements from which the bytes per second are judged
ALONE = 20_000_000  # elements up to which the kernel is timed alone too
PEERS = ("copy", "fastgen", "triton", "eager", "torch.compile")
TRITON = 1_000_000  # elements from which the Triton backend is timed too: it compiles a kernel for almost every row
SAMPLE = 2e-3  # seconds that one sample takes, about
ROUNDS = 11


# ---- what is measured ------------------------------------------------------------------------------------------------


def label(case) -> str:
    return call_of(case) if case.mode else f"{case.op}()"


def shape_of(elements: int) -> tuple[int, ...]:
    event = SMALL_EVENT if elements < 500_000 else EVENT
    return (max(round(elements / math.prod(event)), 1), *event)


def kinds():
    """(name of the maker, mode) of every op, the targets' first."""
    for make in (peers.ddpm_step, peers.q_sample):
        yield lambda shape, dtype, make=make: make(shape, dtype, "seed", "out")
    for mode in ("forward", "backward"):
        yield lambda shape, dtype, mode=mode: peers.bce_with_logits(shape, dtype, mode)
    yield peers.diffusion_loss
    yield lambda shape, dtype: peers.gan_loss(shape, dtype, "backward")
    for make in (peers.ddpm_step, peers.q_sample):
        yield lambda shape, dtype, make=make: make(shape, dtype, "noise", "out")
    yield peers.q_posterior
    yield peers.randn


def cases(device: str, tiny: bool = False):
    """Every case: first those whose bytes per second are judged, then one size in channels-last, then the rest."""
    sizes = sorted((1_000, 2_000) if tiny else SIZES, reverse=True)
    made = [replace(make(shape_of(size), dtype), device=device) for make in kinds() for dtype in common.DTYPES for size in sizes]
    judged = [case for case in made if targets(case).get("copy")]
    last = [
        # a new output: torch.compile takes no out= of this layout
        replace(make(shape_of(2_000 if tiny else 10_000_000), dtype, mode, "fresh"), device=device, channels_last=True)
        for make in (peers.ddpm_step, peers.q_sample)
        for mode in ("seed", "noise")
        for dtype in common.DTYPES
    ]
    return judged + last + [case for case in made if case not in judged]


def targets(case) -> dict[str, float]:
    """{peer: least (time of the peer ÷ time of fastgen)}."""
    half = case.dtype == torch.bfloat16
    if case.op in ("ddpm_step", "q_sample") and case.mode == "seed" and not case.channels_last:
        moved = {"copy": 0.85 if half else 0.90} if case.elements >= LARGE else {}
        return moved | {"torch.compile": 1.5 if half else 1.0, "eager": 5.0}
    if case.op in ("bce_with_logits", "gan_loss") and case.elements >= LARGE:
        return {"copy": 0.90}
    if case.op == "diffusion_loss":
        return {"eager": 5.0}
    return {}


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def graph_of(case) -> tuple:
    """What cases with the same compiled program have in common: up to 10⁵ elements all but the batch, else the shape."""
    dynamic = case.elements < 500_000 and case.op != "randn"
    return (case.op, case.mode, case.output, case.dtype, case.channels_last, case.shape[1:] if dynamic else case.shape)


def compiled(case, arguments, backend="inductor"):
    """The eager peer compiled; `arguments` are those it will be called with first."""
    if len(graph_of(case)[-1]) < len(case.shape):
        for x in arguments:
            if isinstance(x, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(x, 0)
    key = (*graph_of(case), backend)
    if key not in _programs:
        _programs.clear()
        torch.compiler.reset()
        # dynamic=None: static but for what is marked
        _programs[key] = torch.compile(case.eager, fullgraph=True, backend=backend)
    return _programs[key]


_programs: dict = {}


def graphs(device, tiny=False):
    """One case for each program."""
    first: dict = {}
    for case in cases(device, tiny):
        first.setdefault(graph_of(case), case)
    return list(first.values())


def warm(device: str, index: int, count: int, tiny: bool) -> int:
    """Compiles every `count`th program from `index` on, with one set of buffers; returns how many it could."""
    done = 0
    for case in graphs(device, tiny)[index::count]:
        try:
            with torch.device(device):
                arguments = case.inputs()
            if case.channels_last:
                arguments = tuple(map(peers._channels_last, arguments))
            case.bind(compiled(case, arguments), *arguments)()
            done += 1
        except Exception:  # the run itself will meet it again, and note it
            traceback.print_exc()
        arguments = None
    return done


def warm_all(device: str, seconds: float, tiny: bool) -> dict:
    """`warm` in as many processes as there are cores for; Inductor's cache on the disk keeps the programs."""
    room = common.free_bytes(device) / (1 if tiny else 8 * 2**30)  # the largest case and its process, each
    processes = max(1, min(12, (os.cpu_count() or 1) - 2, int(room)))
    command = [sys.executable, "-m", "benchmarks.gpu_bench", "--device", device, *(["--tiny"] if tiny else [])]
    start, one_thread = time.monotonic(), os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    running = [
        subprocess.Popen([*command, "--warm", f"{index}/{processes}"], stdout=subprocess.DEVNULL, env=one_thread)
        for index in range(processes)
    ]
    for process in running:
        try:
            process.wait(max(seconds - (time.monotonic() - start), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return {
        "processes": processes,
        "seconds": time.monotonic() - start,
        "programs": len(graphs(device, tiny)),
        "exit_statuses": [process.returncode for process in running],
    }


# ---- timing ----------------------------------------------------------------------------------------------------------


def timed(calls, first: int, times: int, device: str, ahead: bool = False) -> float:
    """Seconds per call of `times` calls in a row, by the device's clock.

    ahead: let the host begin before the device does, so that the first call's way through Python is not counted.
    """
    if device == "cpu":
        start = time.perf_counter()
        for turn in range(first, first + times):
            calls[turn % len(calls)]()
        return (time.perf_counter() - start) / times
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if ahead:
        torch.cuda._sleep(100_000)  # clock cycles, some 50 µs
    start.record()
    for turn in range(first, first + times):
        calls[turn % len(calls)]()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def alone(calls, device: str, scratch, rounds: int = 15) -> float:
    """Seconds of one call on the device alone, its median: queued behind a read of `scratch`, which takes longer than the host
    needs to queue it and leaves nothing else in the cache."""
    if device == "cpu":
        return statistics.median(timed(calls, turn, 1, device) for turn in range(rounds))
    pairs = []
    for turn in range(rounds):
        scratch.sum()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        calls[turn % len(calls)]()
        end.record()
        pairs.append((start, end))
        torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in pairs)


def in_turns(named: dict, device: str, ahead: bool, tiny: bool) -> dict:
    """{name: [seconds per call, …]}, one sample of every peer in each round, the order drawn anew."""
    times = {}
    for name, calls in named.items():
        for call in calls[:2]:
            call()
        estimate = timed(calls, 0, 1 if tiny else 3, device)
        times[name] = 2 if tiny else min(max(math.ceil(SAMPLE / max(estimate, 1e-7)), 3), 500)
    samples, turn, order = {name: [] for name in named}, 0, random.Random(0)
    for _ in range(2 if tiny else ROUNDS):
        for name in order.sample(list(named), len(named)):
            samples[name].append(timed(named[name], turn, times[name], device, ahead))
            turn += times[name]
    return samples


def on_triton(call):
    with fastgen.use_backend("triton"):
        return call()


def measured(case, names, scratch, tiny: bool, backend: str = "inductor") -> dict:
    """One row: every peer's time per call, rate, and ratio to fastgen; a peer that fails is noted and left out."""
    peers.sets.cache_clear()
    row = {"what": label(case), "dtype": common.DTYPES[case.dtype], "channels_last": case.channels_last}
    row |= {"shape": case.shape, "elements": case.elements, "bytes": case.bytes, "peers": {}, "errors": {}}
    if not case.fits:
        return row | {"skipped": f"needs more than the {common.free_bytes(case.device) / 2**30:.1f} GiB of free memory"}
    named = {}
    for name in names:
        if name == "triton" and (case.elements < TRITON or name not in fastgen.available_backends(case.device)):
            continue
        try:
            if name == "triton":
                calls = [functools.partial(on_triton, call) for call in peers.prepare(case, ["fastgen"])["fastgen"]]
            elif name == "torch.compile":
                sets = peers.sets(case)
                program = [compiled(case, arguments, backend) for arguments in sets][0]
                calls = [case.bind(program, *arguments) for arguments in sets]
            else:
                calls = peers.prepare(case, [name])[name]
            calls[0]()
            named[name] = calls
        except Exception as error:
            row["errors"][name] = f"{type(error).__name__}: {error}".strip()[:2000]
    if "fastgen" not in named:
        return row
    samples = in_turns(named, case.device, case.elements >= 1_000_000, tiny)
    wanted = targets(case)
    for name in sorted(samples, key="fastgen".__ne__):
        times = quartiles(samples[name])
        ratio = quartiles([peer / ours for peer, ours in zip(samples[name], samples["fastgen"], strict=True)])
        target = None if tiny else wanted.get(name)
        row["peers"][name] = {
            "seconds": times,
            "kernel_seconds": alone(named[name], case.device, scratch, 3 if tiny else 15) if case.elements < ALONE else None,
            "bytes_per_second": case.bytes / times["median"],
            "ratio": ratio,
            "target": target,
            "met": verdict(target, target and ratio["median"] >= target, quartiles(samples["fastgen"]), times),
        }
    return row


# ---- what a call costs -----------------------------------------------------------------------------------------------


def overheads(device: str):
    """(what, {peer: call}, targets) of calls whose work is nothing; by the host's clock, over loops of calls."""
    for make, times in ((peers.bce_with_logits, 5.0), (peers.gan_loss, 4.0)):
        loss = replace(make((64, 1), torch.float32, "backward"), device=device)
        arguments = peers.sets(loss)[0]
        eager, ours = loss.bind(loss.eager, *arguments), loss.ours(*arguments)
        yield f"{loss.op} (64, 1) forward + backward", {"fastgen": ours, "eager": eager}, {"eager": times}
    with torch.device(device):
        sixteen, tiny_cases = torch.ones(1, 1, 4, 4), [replace(case, device=device) for case in peers.calls_of_16()]
    for case in tiny_cases:
        calls = {name: made[0] for name, made in peers.prepare(case, ("fastgen", "eager")).items()}
        yield f"{label(case)}, 16 elements", calls | {"torch.add": functools.partial(torch.add, sixteen, sixteen)}, {}


def by_the_loop(call, times: int, device: str) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in repeat(None, times):
        call()
    synchronize()
    return (time.perf_counter() - start) / times


def overhead_rows(device: str, tiny: bool):
    for what, calls, wanted in overheads(device):
        loops = 5 if tiny else 300
        for call in calls.values():
            by_the_loop(call, loops, device)
        samples = {name: [] for name in calls}
        for _ in range(2 if tiny else 15):
            for name, call in calls.items():
                samples[name].append(by_the_loop(call, loops, device))
        row = {"what": what, "peers": {}}
        for name in calls:
            times = quartiles(samples[name])
            ratio = quartiles([peer / ours for peer, ours in zip(samples[name], samples["fastgen"], strict=True)])
            target = None if tiny else wanted.get(name)
            met = verdict(target, target and ratio["median"] >= target, quartiles(samples["fastgen"]), times)
            row["peers"][name] = {"seconds": times, "ratio": ratio, "target": target, "met": met}
        yield row


# ---- text ------------------------------------------------------------------------------------------------------------


def size_name(elements: int) -> str:
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if elements >= 0.95 * unit:
            return f"{elements / unit:.0f}{name}"
    return str(elements)


def ratio_lines(rows, peer: str, title: str) -> list[str]:
    """A table of one ratio: a line for each op and dtype, a column for each size. Missed targets have a "!"."""
    rows = [row for row in rows if peer in row["peers"] and (peer == "copy" or not row["channels_last"])]
    if not rows:
        return [f"{title}: not measured"]
    # two shapes of about as many elements share a column
    columns = sorted({size_name(row["elements"]): row["elements"] for row in rows}.items(), key=lambda item: item[1])
    names = [name for name, _ in columns]
    lines: dict = {}
    for row in rows:
        what = row["what"] + (", channels-last" if row["channels_last"] else "")
        cell = row["peers"][peer]
        text = f"{cell['ratio']['median']:.3g}" + {"NO": "!", "noisy": "?"}.get(cell["met"], "")
        lines.setdefault((what, row["dtype"]), {})[size_name(row["elements"])] = text
    cells = [(*what, *(found.get(name, "") for name in names)) for what, found in lines.items()]
    return common.table((title, "dtype", *names), cells, left=2)


def overhead_lines(rows) -> list[str]:
    cells = []
    for row in rows:
        for name, peer in row["peers"].items():
            ratio = "" if name == "fastgen" else f"{peer['ratio']['median']:.3g}" + ("!" if peer["met"] == "NO" else "")
            cells.append((row["what"] if name == "fastgen" else "", name, f"{peer['seconds']['median'] * 1e6:.2f}", ratio))
    return common.table(("one call, by the host's clock", "peer", "µs", "÷ fastgen"), cells, left=2) if cells else []


def judged(result) -> list[tuple[str, str]]:
    """(verdict, words) of every target."""
    found = []
    for row in (*result["rows"], *result["overheads"]):
        for name, peer in row["peers"].items():
            if peer["target"] is not None:
                size = f", {size_name(row['elements'])} {row['dtype']}" if "elements" in row else ""
                words = f"{row['what']}{size}, {name} ÷ fastgen: {peer['ratio']['median']:.3g}, target {peer['target']:g}"
                found.append((peer["met"], words))
    return found


def lines(result, most: int = 12) -> list[str]:
    """The whole result in under 100 lines."""
    rows = result["rows"]
    text = ratio_lines(rows, "copy", "share of the device's copy speed")
    text += ["", *ratio_lines(rows, "torch.compile", "torch.compile ÷ fastgen")]
    text += ["", *ratio_lines(rows, "eager", "eager ÷ fastgen")]
    first = [row for row in result["overheads"] if "(64, 1)" in row["what"] or "t tensor" in row["what"]]
    text += ["", *overhead_lines(first[:4])]
    copies = [row for row in rows if "copy" in row["peers"]]
    if copies:
        best = max(copies, key=lambda row: row["peers"]["copy"]["bytes_per_second"])
        speed = best["peers"]["copy"]["bytes_per_second"] / 1e9
        text.append(f"the device copies {speed:.0f} GB/s (read and written), at {best['bytes'] / 2**20:.0f} MiB moved")
    slower = [(row["peers"]["triton"]["ratio"]["median"], row) for row in rows if "triton" in row["peers"]]
    if slower:
        ratio, row = max(slower, key=lambda pair: pair[0])
        middle = sorted(pair[0] for pair in slower)[len(slower) // 2]
        worst = f"{row['what']}, {size_name(row['elements'])} {row['dtype']}"
        text.append(f"triton ÷ fastgen: {middle:.3g} in the middle of {len(slower)} rows, {ratio:.3g} at most ({worst})")
    found = judged(result)
    missed = [f"  {met:5}  {words}" for met, words in found if met != "yes"]
    text.append(f"targets: {len(found) - len(missed)} of {len(found)} met" + (":" if missed else ""))
    text += missed[:most] + ([f"  … and {len(missed) - most} more"] if len(missed) > most else [])
    skipped = [row for row in rows if "skipped" in row]
    text += [f"skipped: {row['what']}, {size_name(row['elements'])} {row['dtype']}: {row['skipped']}" for row in skipped[:2]]
    text += [f"… and {len(skipped) - 2} more skipped"] * (len(skipped) > 2)
    failed = [(row, name, words) for row in rows for name, words in row["errors"].items()]
    for row, name, words in failed[:2]:
        text.append(f"error: {row['what']} {row['dtype']}, {name}: {words.splitlines()[0][:90]}")
    text += [f"… and {len(failed) - 2} more errors"] * (len(failed) > 2)
    return text


# ---- the run ---------------------------------------------------------------------------------------------------------


def environment(device: str) -> dict:
    found = common.environment() | {"device": device, "backend": fastgen.backend(device), "cache_bytes": common.cache_bytes(device)}
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
    return found


def run(device: str, seconds: float, tiny: bool, write, names=PEERS, backend: str = "inductor") -> dict:
    """Everything, as far as the time goes; `write(result)` after every row."""
    start = time.monotonic()
    result = {"environment": environment(device), "tiny": tiny, "rows": [], "overheads": [], "warm": None}
    if backend == "inductor" and "torch.compile" in names:
        result["warm"] = warm_all(device, 0.3 * seconds, tiny)
    result["overheads"].extend(overhead_rows(device, tiny))
    write(result)
    scratch = torch.ones(2**20 if tiny else 2**27, device=device)  # 512 MiB
    timed([scratch.sum], 0, 10, device)
    for case in cases(device, tiny):
        left = seconds - (time.monotonic() - start)
        if left < 3:
            row = {"what": label(case), "dtype": common.DTYPES[case.dtype], "channels_last": case.channels_last}
            row |= {"elements": case.elements, "peers": {}, "errors": {}, "skipped": "no time was left"}
        else:
            row = measured(case, names, scratch, tiny, backend)
        result["rows"].append(row)
        write(result)
    result["seconds"] = time.monotonic() - start
    write(result)
    return result


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_bench", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=240.0, help="for everything; what does not fit is left out (default 240)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, after every row")
    parser.add_argument("--tiny", action="store_true", help="a few elements: shows that everything runs")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu serves the tests")
    parser.add_argument("--warm", metavar="I/N", help="only compile every Nth program")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "gpu_bench: torch finds no CUDA device\n")
    if options.device == "cuda" and fastgen.backend("cuda") == "eager":
        parser.exit(2, f"gpu_bench: there are no kernels to time:\n{fastgen.backend_info()}\n")
    if options.warm:
        index, count = map(int, options.warm.split("/"))
        print(warm(options.device, index, count, options.tiny), "compiled")
        return

    def write(result):
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    backend = "eager" if options.tiny else "inductor"  # which takes seconds for each of some 90 programs
    result = run(options.device, options.seconds, options.tiny, write, backend=backend)
    print(*lines(result), sep="\n")
    if any("fastgen" in row["errors"] for row in result["rows"]):
        parser.exit(1, "gpu_bench: fastgen itself failed, see the errors\n")


if __name__ == "__main__":
    main()
