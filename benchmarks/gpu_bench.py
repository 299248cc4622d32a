"""The CUDA kernels beside eager PyTorch, torch.compile and the device's own copy, in one run, against the targets, with no package
but torch: what `make gpu` times on a machine that has no more.

    python -m benchmarks.gpu_bench [--seconds S] [--json FILE] [--tiny] [--device cuda]

Every row times its peers in turns. A sample is a run of calls between two events, each call on buffers that the cache does not
hold; its time per call is what a loop of such calls takes, which for small sizes is the host's share. Up to 10⁷ elements
the kernels are also timed alone, behind a read that fills the cache with something else ("kernel").

`--warm I/N` only compiles every Nth graph for torch.compile: several such processes at a time fill Inductor's cache on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch

import fastgen

from . import common, peers
from .common import quartiles
from .peers import shape_of, size_name
from .targets import targets, verdict

SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 64_000_000, 200_000_000)
ALONE = 20_000_000  # elements up to which the kernel is timed alone too
PEERS = ("limit", "fastgen", "fastgen triton", "eager", "torch.compile")
TRITON = 1_000_000  # elements from which the Triton backend is timed too: it compiles a kernel for almost every row
ROUNDS = 11


# ---- what is measured ------------------------------------------------------------------------------------------------


def kinds():
    """(name of the maker, mode) of every op, the targets' first."""
    for make in (peers.ddpm_step, peers.q_sample):
        yield lambda shape, dtype, make=make: make(shape, dtype, "seed", "out")
    for passes in (peers.FORWARD, peers.BACKWARD):
        yield lambda shape, dtype, passes=passes: peers.bce_with_logits(shape, dtype, passes)
    yield peers.diffusion_loss
    yield lambda shape, dtype: peers.gan_loss(shape, dtype, peers.BACKWARD)
    for make in (peers.ddpm_step, peers.q_sample):
        yield lambda shape, dtype, make=make: make(shape, dtype, "noise", "out")
    yield peers.q_posterior
    yield peers.randn


def cases(device: str, tiny: bool = False):
    """Every case: first those whose bytes per second are judged, then one size in channels-last, then the rest."""
    sizes = sorted((1_000, 2_000) if tiny else SIZES, reverse=True)
    made = [replace(make(shape_of(size), dtype), device=device) for make in kinds() for dtype in common.DTYPES for size in sizes]
    judged = [case for case in made if "limit" in targets(replace(case, device="cuda"))]
    last = [
        # a new output: torch.compile takes no out= of this layout
        replace(make(shape_of(2_000 if tiny else 10_000_000), dtype, mode, "fresh"), device=device, channels_last=True)
        for make in (peers.ddpm_step, peers.q_sample)
        for mode in ("seed", "noise")
        for dtype in common.DTYPES
    ]
    return judged + last + [case for case in made if case not in judged]


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def graphs(device, tiny=False):
    """One case for each program."""
    first: dict = {}
    for case in cases(device, tiny):
        first.setdefault(peers.graph_of(case), case)
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
            case.bind(peers.compiled(case, [arguments]), *arguments)()
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


def alone(calls, device: str, scratch, rounds: int = 15) -> float:
    """Seconds of one call on the device alone, its median: queued behind a read of `scratch`, which takes longer than the host
    needs to queue it and leaves nothing else in the cache."""
    if device == "cpu":
        return statistics.median(common.seconds(calls, turn, 1, device) for turn in range(rounds))
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


def measured(case, names, scratch, tiny: bool) -> dict:
    """One row: every peer's time per call, rate, and ratio to fastgen; a peer that fails is noted and left out."""
    peers.sets.cache_clear()
    row = {"what": case.call, "dtype": common.DTYPES[case.dtype], "channels_last": case.channels_last}
    row |= {"shape": case.shape, "elements": case.elements, "bytes": case.bytes, "peers": {}, "errors": {}}
    if not case.fits:
        return row | {"skipped": f"needs more than the {common.free_bytes(case.device) / 2**30:.1f} GiB of free memory"}
    named = {}
    for name in names:
        if name == "fastgen triton" and (case.elements < TRITON or "triton" not in fastgen.available_backends(case.device)):
            continue
        try:
            named[name] = peers.prepare(case, [name], tiny)[name]
            named[name][0]()
        except Exception as error:
            named.pop(name, None)
            row["errors"][name] = f"{type(error).__name__}: {error}".strip()[:2000]
    if "fastgen" not in named:
        return row
    samples = common.in_turns(named, 0.0, tiny, case.device, least=ROUNDS)
    row["peers"] = compared(case, samples, tiny)
    for name, peer in row["peers"].items():
        peer["kernel_seconds"] = alone(named[name], case.device, scratch, 3 if tiny else 15) if case.elements < ALONE else None
    return row


def compared(case, samples, tiny: bool) -> dict:
    """{peer: its times, its rate, and its ratio to fastgen}."""
    found, wanted, ours = {}, {} if tiny else targets(case), quartiles(samples["fastgen"])
    for name in sorted(samples, key="fastgen".__ne__):
        times = quartiles(samples[name])
        ratio = quartiles([peer / mine for peer, mine in zip(samples[name], samples["fastgen"], strict=True)])
        target = wanted.get(name)
        found[name] = {
            "seconds": times,
            "bytes_per_second": case.bytes / times["median"],
            "ratio": ratio,
            "target": target,
            "met": verdict(target, ratio["median"], ours, times),
        }
    return found


# ---- what a call costs -----------------------------------------------------------------------------------------------


def overheads(device: str):
    """Calls whose work is nothing, timed by the host's clock over loops of them."""
    for make in (peers.bce_with_logits, peers.gan_loss):
        yield replace(make((64, 1), torch.float32, peers.BACKWARD), device=device, overhead=True)
    for case in peers.calls_of_16():
        yield replace(case, device=device)


def overhead_rows(device: str, tiny: bool):
    for case in overheads(device):
        peers.sets.cache_clear()
        calls = peers.prepare(case, ("limit", "fastgen", "eager"), tiny)
        samples = common.in_turns(calls, 0.0, tiny, device, by_host=True, least=15)
        row = {"what": case.call, "elements": case.elements, "dtype": common.DTYPES[case.dtype], "peers": {}}
        yield row | {"peers": compared(case, samples, tiny)}


# ---- text ------------------------------------------------------------------------------------------------------------


def ratio_lines(rows, peer: str, title: str) -> list[str]:
    """A table of one ratio: a line for each op and dtype, a column for each size. Missed targets have a "!"."""
    rows = [row for row in rows if peer in row["peers"] and (peer == "limit" or not row["channels_last"])]
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
    text = ratio_lines(rows, "limit", "share of the device's copy speed")
    text += ["", *ratio_lines(rows, "torch.compile", "torch.compile ÷ fastgen")]
    text += ["", *ratio_lines(rows, "eager", "eager ÷ fastgen")]
    first = [row for row in result["overheads"] if "backward" in row["what"] or "t tensor" in row["what"]]
    text += ["", *overhead_lines(first[:4])]
    copies = [row for row in rows if "limit" in row["peers"]]
    if copies:
        best = max(copies, key=lambda row: row["peers"]["limit"]["bytes_per_second"])
        speed = best["peers"]["limit"]["bytes_per_second"] / 1e9
        text.append(f"the device copies {speed:.0f} GB/s (read and written), at {best['bytes'] / 2**20:.0f} MiB moved")
    slower = [(row["peers"]["fastgen triton"]["ratio"]["median"], row) for row in rows if "fastgen triton" in row["peers"]]
    if slower:
        ratio, row = max(slower, key=lambda pair: pair[0])
        middle = sorted(pair[0] for pair in slower)[len(slower) // 2]
        worst = f"{row['what']}, {size_name(row['elements'])} {row['dtype']}"
        text.append(f"fastgen triton ÷ fastgen: {middle:.3g} in the middle of {len(slower)} rows, {ratio:.3g} at most ({worst})")
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


def run(device: str, seconds: float, tiny: bool, write) -> dict:
    """Everything, as far as the time goes; `write(result)` after every row."""
    start = time.monotonic()
    result = {"environment": common.environment(device), "tiny": tiny, "rows": [], "overheads": [], "warm": None}
    if not tiny:
        result["warm"] = warm_all(device, 0.3 * seconds, tiny)
    result["overheads"].extend(overhead_rows(device, tiny))
    write(result)
    scratch = torch.ones(2**20 if tiny else 2**27, device=device)  # 512 MiB
    common.seconds([scratch.sum], 0, 10, device)
    for case in cases(device, tiny):
        left = seconds - (time.monotonic() - start)
        if left < 3:
            row = {"what": case.call, "dtype": common.DTYPES[case.dtype], "channels_last": case.channels_last}
            row |= {"elements": case.elements, "peers": {}, "errors": {}, "skipped": "no time was left"}
        else:
            row = measured(case, PEERS, scratch, tiny)
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

    result = run(options.device, options.seconds, options.tiny, write)
    print(*lines(result), sep="\n")
    if any("fastgen" in row["errors"] for row in result["rows"]):
        parser.exit(1, "gpu_bench: fastgen itself failed, see the errors\n")


if __name__ == "__main__":
    main()
