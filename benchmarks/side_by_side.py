"""The targets of the CPU kernels, each measured beside its peers in one process:

    python -m benchmarks.side_by_side [--only TEXT] [--seconds S] [--json FILE] [--tiny]

Every row times all its peers in turns (`common.in_turns`), so that a busy machine slows all of them. Its ratio is the
median over the rounds of (time of the peer ÷ time of fastgen in the same round): how many times faster fastgen is.
Beside torch.add, which moves as many bytes as the op must, that is fastgen's share of torch.add's bytes per second.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch

from . import common, drop_in, peers

SEEDED = {"eager": 8.0, "torch.compile": 8.0}
MOVED = {"torch.add": 0.85}
LOSS = {"eager": 3.0}
TRAINING = {"eager": 5.0}
GAN = {"eager": 4.0}
CALL = {"torch.add": 0.25}  # at most four times its time
DROP_IN = {(1, 16, 7): 10.0, (64, 3, 32, 32): 10.0, (8, 3, 256, 256): 5.0}  # with rng="fused"; with diffusers' noise, no slower
PASSES = {"forward": "forward", "backward": "forward + backward"}
FLATNESS = 1.25
NOISY = 1.5  # times the best sample: a median above that is the machine's more than the code's, and judges no target


# ---- what is measured ------------------------------------------------------------------------------------------------


def rows(tiny):
    """(case, {peer: least ratio}) of every row of the table."""
    sizes = [common.TINY] if tiny else [common.images(size) for size in (1, 4, 16)]
    for mode, targets in (("seed", SEEDED), ("noise", MOVED)):
        for make in (peers.ddpm_step, peers.q_sample):
            for output in ("out", "fresh"):
                for shape in sizes:
                    yield make(shape, torch.float32, mode, output), targets
    for mode in ("forward", "backward"):
        for shape in sizes:
            yield peers.bce_with_logits(shape, torch.float32, mode), LOSS
    for shape in sizes:
        yield peers.diffusion_loss(shape, torch.float32), TRAINING
    for shape in [(64, 1), *sizes]:
        for mode, targets in (("forward", {}), ("backward", GAN)):
            yield peers.gan_loss(shape, torch.float32, mode), targets
    for case in peers.calls_of_16():
        yield case, CALL
    if importlib.util.find_spec("diffusers"):
        for case in drop_in.cases([(1, 2, 4), common.TINY] if tiny else drop_in.SHAPES):
            yield case, {"diffusers": DROP_IN.get(case.shape, 1.0) if case.mode == "fused" else 1.0}


def families(tiny):
    """The cases that must take the same time per element at every size, by increasing size."""
    sizes = [common.TINY] * 2 if tiny else [common.images(size) for size in (1, 4, 16, 64)]
    for mode in ("seed", "noise"):
        for make in (peers.ddpm_step, peers.q_sample):
            for output in ("out", "fresh"):
                yield [make(shape, torch.float32, mode, output) for shape in sizes]
    for mode in ("forward", "backward"):
        for make in (peers.bce_with_logits, peers.gan_loss):
            yield [make(shape, torch.float32, mode) for shape in sizes]


# ---- measuring -------------------------------------------------------------------------------------------------------


def quartiles(samples):
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"best": min(samples), "median": middle, "q1": low, "q3": high}


def verdict(target, met, *times):
    """Whether a target is met: "yes", "NO", or "noisy" where one of `times` does not allow to say."""
    if target is None:
        return ""
    if any(time["median"] > NOISY * time["best"] for time in times):
        return "noisy"
    return "yes" if met else "NO"


def measured(case, targets, seconds, tiny):
    """One row of the table: every peer's time per element, rate, and ratio to fastgen."""
    samples = common.in_turns(peers.prepare(case, case.peers, tiny), seconds, tiny)
    row = {"what": label(case), "dtype": common.DTYPES[case.dtype]}
    row |= {"elements": case.elements, "bytes": case.bytes, "overhead": case.overhead, "peers": {}}
    times = {name: quartiles([1e9 * second / case.elements for second in samples[name]]) for name in samples}
    for name in sorted(samples, key="fastgen".__ne__):  # ours first
        ratio = quartiles([peer / ours for peer, ours in zip(samples[name], samples["fastgen"], strict=True)])
        target = None if tiny else targets.get(name)
        row["peers"][name] = {
            "rounds": len(samples[name]),
            "ns_per_element": times[name],
            "bytes_per_second": case.bytes / statistics.median(samples[name]),
            "ratio": ratio,
            "target": target,
            "met": verdict(target, target and ratio["median"] >= target, times["fastgen"], times[name]),
        }
    return row


def run_all(calls):
    for call in calls:
        call()


def flatness(family, seconds, tiny):
    """The time per element at all sizes, measured in turns: fastgen's, and torch.add's for as many bytes.

    A sample is a run of calls over as many elements as the largest size has, each on buffers colder than the cache. Single
    calls would measure what the call before has left: one of 64 M elements evicts code and page tables, and a torch.add of
    1 M right after it took 0.31 ns per element, among its like 0.19 (AMD EPYC, 2 cores).
    """
    cases = [case for case in family if case.fits]
    calls, elements = {}, {}
    for index, case in enumerate(cases):
        for name, rotated in peers.prepare(case, ("torch.add", "fastgen"), tiny).items():
            many = max(round(cases[-1].elements / case.elements), 1)
            calls[name, index] = [partial(run_all, list(islice(cycle(rotated), many)))]
            elements[index] = many * case.elements
    samples = common.in_turns(calls, seconds, tiny)
    row = {"what": label(cases[0]), "peers": {}}
    row["elements"] = [case.elements for case in cases]
    row["left_out"] = [case.elements for case in family if not case.fits]
    for name in ("fastgen", "torch.add"):
        times = [quartiles([1e9 * s / elements[i] for s in samples[name, i]]) for i in elements]
        medians = [time["median"] for time in times]
        row["peers"][name] = {"ns_per_element": times, "spread": max(medians) / min(medians)}
    row["target"] = None if tiny else FLATNESS
    ours = row["peers"]["fastgen"]
    row["met"] = verdict(row["target"], ours["spread"] <= FLATNESS, *ours["ns_per_element"])
    return row


# ---- text ------------------------------------------------------------------------------------------------------------


def label(case):
    """As the call is written: ddpm_step(seed=, out=)."""
    if case.op == "diffusion_loss":
        return "q_sample + diffusion_loss + backward"
    if case.mode in PASSES:
        return f"{case.op} {PASSES[case.mode]}"
    if case.op.startswith("diffusers"):
        return f"{case.op} ({case.mode} noise) {tuple(case.shape)}"
    mode, _, timestep = case.mode.partition("-")
    timestep = {"": "", "t_int": ", t int", "t_tensor": ", t tensor"}[timestep]
    return f"{case.op}({mode}={', out=' if case.output == 'out' else ''}){timestep}"


def ratio_table(rows, overhead=False):
    unit, rate = ("ns/call", "") if overhead else ("ns/elem", "GB/s")
    head = ("what", "elements", "peer", unit, "q1", "q3", "best", rate, "peer ÷ fastgen", "target", "met")
    cells = []
    for row in rows:
        if row["overhead"] != overhead:
            continue
        first = [row["what"], common.size_name(row["elements"])]
        for name, peer in row["peers"].items():
            scale, digits = (row["elements"], 0) if overhead else (1, 3)
            times = [f"{peer['ns_per_element'][key] * scale:.{digits}f}" for key in ("median", "q1", "q3", "best")]
            rate = "" if overhead else f"{peer['bytes_per_second'] / 1e9:.2f}"
            ratio = "" if name == "fastgen" else f"{peer['ratio']['median']:.3g}"
            target = "" if peer["target"] is None else f"≥ {peer['target']:g}"
            cells.append((*first, name, *times, rate, ratio, target, peer["met"]))
            first = ["", ""]
        cells.append(())
    return common.table(head, cells, left=3)


def flatness_table(rows):
    sizes = max((row["elements"] for row in rows), key=len)
    head = ("ns/elem", "peer", *map(common.size_name, sizes), "max ÷ min", "target", "met")
    cells = []
    for row in rows:
        first = row["what"]
        for name, peer in row["peers"].items():
            times = [f"{time['median']:.3f}" for time in peer["ns_per_element"]]
            times += ["no memory"] * (len(sizes) - len(times))
            judged = (f"≤ {FLATNESS:g}", row["met"]) if name == "fastgen" and row["target"] else ("", "")
            cells.append((first, name, *times, f"{peer['spread']:.2f}", *judged))
            first = ""
        cells.append(())
    return common.table(head, cells, left=2)


def open_targets(rows, flat):
    """The targets that were not met, or not judged, one line each."""
    for row in rows:
        for name, peer in row["peers"].items():
            if peer["met"] in ("NO", "noisy"):
                ratio, size = peer["ratio"], common.size_name(row["elements"])
                spread = f"{ratio['median']:.3g} ({ratio['q1']:.3g} … {ratio['q3']:.3g})"
                yield f"{peer['met']:5}  {row['what']}, {size}, {name} ÷ fastgen: {spread}, target {peer['target']:g}"
    for row in flat:
        if row["met"] in ("NO", "noisy"):
            spread = row["peers"]["fastgen"]["spread"]
            yield f"{row['met']:5}  {row['what']}, time per element, max ÷ min: {spread:.2f}, target {row['target']:g}"


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.side_by_side", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help='rows whose name has it: "ddpm_step(seed="')
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each row, without its set-up (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--tiny", action="store_true", help="a few elements and two rounds: shows that everything runs")
    options = parser.parse_args()
    seconds, tiny = options.seconds, options.tiny
    print(*common.header(), "", sep="\n", flush=True)

    table, flat = [], []
    for case, targets in rows(tiny):
        if options.only in label(case):
            print(case, file=sys.stderr)  # progress
            table.append(measured(case, targets, seconds, tiny))
    for overhead in (False, True):
        if any(row["overhead"] == overhead for row in table):
            print(*ratio_table(table, overhead), sep="\n", flush=True)
    peers.sets.cache_clear()
    for family in families(tiny):
        if options.only in label(family[0]):
            print(family[0], "… all sizes", file=sys.stderr)
            flat.append(flatness(family, seconds, tiny))
    if not table and not flat:
        parser.error(f"--only: expected part of a row's name, such as 'q_sample(noise=, out=)', got {options.only!r}")
    if flat:
        print(*flatness_table(flat), sep="\n")
    verdicts = ["tiny: no target is judged"] if tiny else list(open_targets(table, flat)) or ["none"]
    print("targets missed, or too noisy to judge:", *verdicts, sep="\n  ")
    if options.json:
        result = {"environment": common.environment(), "tiny": tiny, "rows": table, "flatness": flat}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
