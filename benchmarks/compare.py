"""The kernels of another revision beside those of this tree, in one run:

    python -m benchmarks.compare BASE [--only TEXT] [--seconds S] [--json FILE] [--tiny]        (make bench-compare BASE=rev)
    python -m benchmarks.compare --base-tree DIR …

BASE gets a git worktree in build/compare, where its libraries are built; this tree's are taken as they are. Each side is a process
that lives through the run, with its own `fastgen` but the cases of this tree's benchmarks; there are several such pairs. In every
round both sides of a pair run a sample of the case, in an order drawn anew. A ratio is the median over the rounds of (base's time ÷
the new one's). The interval holds with 95% the mean (of logarithms) of what each pair has for a ratio; where it lies on one side of
1 the table says "faster" or "SLOWER".
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import fastgen

from . import common, peers
from .common import quartiles

ROOT = Path(__file__).resolve().parents[1]
TREES = ROOT / "build/compare"
# Calls before a sample that are not timed. The other side's threads go on spinning for 8 to 11 ms after its last call (libgomp, 2
# cores), and its data are in the cache.
SETTLE = 0.015
# Two processes with the same code differed by up to 6% in calls on 16 elements, each the same way through its whole life (where its
# memory lies, probably). Hence several of each side, and a verdict from how the pairs differ: rounds are no evidence against that.
PAIRS = 5
# Student's t for 95%, by the number of pairs; 2 + 2.6 / pairs is 0.01 to 0.05 more for others
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
SAMPLE = 0.005  # about what a sample takes, unless one call takes longer


# ---- one side --------------------------------------------------------------------------------------------------------


def modules() -> list[str]:
    """The benchmarks' modules that have cases."""
    paths = sorted(Path(__file__).parent.glob("bench_*.py"))
    return [path.stem for path in paths if re.search(r"^def cases\(", path.read_text(), re.MULTILINE)]


class Side:
    """What a worker does; every answer is a value for JSON."""

    def about(self):
        return {"fastgen": str(Path(fastgen.__file__).parent), "version": fastgen.__version__, "backend": fastgen.backend()}

    def names(self, module, tiny, device):
        """Of the module's cases."""
        grid = peers.Grid(tiny, device)
        found = importlib.import_module(f"{__package__}.{module}").cases(grid)
        # what a kernel gains shows at these sizes; larger ones take gigabytes in every process
        wanted = [case for case in found if case.elements <= peers.LONGEST and not case.threads and case.fits]
        self.tiny, self.cases = tiny, {str(case): case for case in wanted}
        return list(self.cases)

    def prepare(self, name):
        """The seconds of one call."""
        self.release()  # what is left of a case that failed
        torch.manual_seed(0)
        case = self.cases[name]
        self.how = case.device, case.overhead  # by the host's clock where a call is all overhead
        self.calls, self.turn = peers.prepare(case, ["fastgen"], self.tiny)["fastgen"], 0
        return common.warmed(self.calls, *self.how)

    def release(self):
        self.calls = []
        peers.sets.cache_clear()
        gc.collect()

    def sample(self, times):
        """The mean seconds of `times` calls."""
        end = time.perf_counter() + (0 if self.tiny else SETTLE)
        self.run(1)
        while time.perf_counter() < end:
            self.run(1)
        return self.run(times)

    def run(self, times):
        self.turn += times
        return common.seconds(self.calls, self.turn, times, *self.how)


def work():
    """A worker: lines of JSON [method of Side, its arguments] come in, {"value"} or {"error"} goes out."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever is printed here is no answer
    gc.disable()
    side = Side()
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            answer = {"value": getattr(side, method)(*arguments)}
        except (Exception, pytest.skip.Exception) as error:  # the parent goes on to the next case
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


# ---- both sides ------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """What the user can put right; shown as one line."""


class Refused(Exception):
    """A side cannot do what it was asked for."""


# What a worker begins with: fastgen from its own tree, then this tree's benchmarks. setuptools' finder of editable installs would
# look in the installed tree for every module that this fastgen lacks.
BEGIN = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") != "_EditableFinder"]
sys.path.insert(0, {tree!r})
import fastgen
sys.path.insert(0, {root!r})
from benchmarks import compare
compare.work()
"""


class Worker:
    """`Side` in a process of its own, with the `fastgen` of `tree`."""

    def __init__(self, name: str, tree: Path):
        code = BEGIN.format(tree=str(tree), root=str(ROOT))
        if not (tree / "fastgen/__init__.py").exists():  # else another fastgen would be found
            raise UserError(f"{name}: expected a tree with the package fastgen, got {tree}")
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.communicate()

    def __getattr__(self, method):
        return lambda *arguments: self._ask(method, arguments)

    def _ask(self, method, arguments):
        try:
            print(json.dumps([method, arguments]), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UserError(f"{self.name}: its process ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(f"{self.name}: {answer['error']}")
        return answer["value"]


def interval(ratios: list[float]) -> tuple[float, float] | None:
    """In which the true ratio lies with 95%, as the pairs of processes have it; None of one pair."""
    if len(ratios) < 2:
        return None
    logs = [math.log(ratio) for ratio in ratios]
    middle = statistics.fmean(logs)
    half = STUDENT.get(len(logs), 2.0 + 2.6 / len(logs)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle - half), math.exp(middle + half)


def verdict(interval: tuple[float, float] | None) -> str:
    """What an interval of base ÷ new says of the new one: "faster", "SLOWER", or "" where it holds 1."""
    low, high = interval or (0, 2)
    return "faster" if low > 1 else "SLOWER" if high < 1 else ""


def in_turns(pair: tuple[Worker, Worker], name: str, seconds: float, tiny: bool, order: random.Random) -> list[list[float]]:
    """[samples of base, samples of the new one] of about so many seconds in all. Refused where a side lacks the case."""
    estimates = [side.prepare(name) for side in pair]
    times = 1 if tiny else max(1, round(SAMPLE / min(estimates)))
    total = sum(max(SETTLE, estimate) + estimate * times for estimate in estimates)
    samples = [[], []]
    for _ in range(2 if tiny else min(max(5, int(seconds / total)), 500)):
        for side in order.sample((0, 1), 2):
            samples[side].append(pair[side].sample(times))
    for side in pair:
        side.release()
    return samples


def compared(pairs: list[tuple[Worker, Worker]], name: str, seconds: float, tiny: bool) -> dict:
    """One row: the times of both sides and their ratio, over all pairs. Refused where a side lacks the case."""
    order, base, new, medians = random.Random(0), [], [], []
    for pair in pairs:
        old, fresh = in_turns(pair, name, seconds / len(pairs), tiny, order)
        base, new = base + old, new + fresh
        medians.append(statistics.median(b / n for b, n in zip(old, fresh, strict=True)))
    found = interval(medians)
    return {
        "case": name,
        "rounds": len(base),
        "base": quartiles(base),
        "new": quartiles(new),
        "ratio": quartiles([b / n for b, n in zip(base, new, strict=True)]),
        "ratio of each pair": medians,
        "interval": found,
        "verdict": "" if tiny else verdict(found),
    }


def all_compared(pairs, only: str, seconds: float, tiny: bool, device: str) -> tuple[list[dict], dict[str, str]]:
    """(rows, {case or module: why it was not compared})."""
    rows, left_out = [], {}
    for module in modules():
        try:
            names = [side.names(module, tiny, device) for pair in pairs for side in reversed(pair)][0]
        except Refused as why:
            left_out[module] = str(why)
            continue
        for name in names:
            if only in name:
                print(name, file=sys.stderr)  # progress
                try:
                    rows.append(compared(pairs, name, seconds, tiny))
                except Refused as why:
                    left_out[name] = str(why)
    return rows, left_out


# ---- the other tree --------------------------------------------------------------------------------------------------


def built(revision: str) -> Path:
    """A worktree of the revision with its libraries; UserError where it is none, or cannot be built."""
    if common._git("rev-parse", "--git-dir") is None:
        raise UserError(f"BASE: expected git and a repository at {ROOT}, found none; or give --base-tree")
    commit = common._git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if commit is None:
        raise UserError(f"BASE: expected a revision of this repository, got {revision!r}")
    tree = TREES / commit[:12]
    if not (tree / "setup.py").exists():
        # --force: one that was deleted may still be registered
        command = ["git", "-C", str(ROOT), "worktree", "add", "--force", "--quiet", "--detach", str(tree), commit]
        if subprocess.run(command).returncode:
            raise UserError(f"BASE: git could not check out {revision} in {tree}")
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("FASTGEN_CUDA", "0")
    elif "TORCH_CUDA_ARCH_LIST" not in environment:
        environment.setdefault("FASTGEN_CUDA_ARCHS", "{}.{}".format(*torch.cuda.get_device_capability()))
    print(f"building {revision} in {tree}: some minutes, if it is the first time", file=sys.stderr)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    build = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if build.returncode:
        raise UserError(f"BASE: {revision} could not be built in {tree}:\n{build.stdout[-4000:]}")
    return tree


# ---- text ------------------------------------------------------------------------------------------------------------


def describe(about: dict) -> str:
    return f"fastgen {about['version']} of {about['fastgen']}, backend {about['backend']}"


def lines(rows: list[dict], left_out: dict[str, str]) -> list[str]:
    head = ("case", "base µs", "q1", "q3", "new µs", "q1", "q3", "base ÷ new", "from", "to", "")
    cells = []
    for row in rows:
        times = [f"{1e6 * row[side][key]:.4g}" for side in ("base", "new") for key in ("median", "q1", "q3")]
        bounds = [f"{bound:.3f}" for bound in row["interval"]] if row["interval"] else ["", ""]
        cells.append((row["case"], *times, f"{row['ratio']['median']:.3f}", *bounds, row["verdict"]))
    return [*common.table(head, cells), *(f"not compared: {name}: {why}" for name, why in left_out.items())]


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="The kernels of two revisions in one run.")
    parser.add_argument("base", nargs="?", metavar="BASE", help="the revision to compare this tree with")
    parser.add_argument("--base-tree", type=Path, metavar="DIR", help="instead, a tree whose libraries are built")
    parser.add_argument("--only", default="", metavar="TEXT", help='cases whose name has it: "ddpm_step-seed"')
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each case, without its set-up (default 2)")
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"processes of each side (default {PAIRS})")
    parser.add_argument("--bench-device", choices=("cpu", "cuda"), help="default: cuda where torch finds it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--tiny", action="store_true", help="a few elements and two rounds: shows that everything runs")
    options = parser.parse_args()
    if (options.base is None) == (options.base_tree is None):
        parser.error("expected BASE or --base-tree, one of them")
    if options.pairs < 1:
        parser.error(f"--pairs: expected 1 or more, got {options.pairs}")
    device = common.device(options.bench_device)
    try:
        tree = built(options.base) if options.base_tree is None else options.base_tree.resolve()
        with ExitStack() as stack:
            sides = ("base", tree), ("new", ROOT)
            pairs = [
                tuple(stack.enter_context(Worker(*side)) for side in sides) for _ in range(1 if options.tiny else options.pairs)
            ]
            result = {"environment": common.environment(device), "tiny": options.tiny} | {
                side.name: side.about() for side in pairs[0]
            }
            print(*common.header(device), *(f"{name:8} {describe(result[name])}" for name, _ in sides), "", sep="\n", flush=True)
            rows, left_out = all_compared(pairs, options.only, options.seconds, options.tiny, device)
    except UserError as error:
        sys.exit(f"error: {error}")
    if not rows and not left_out:
        parser.error(f"--only: expected part of a case's name, such as 'ddpm_step-seed', got {options.only!r}")
    print(*lines(rows, left_out), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(result | {"rows": rows, "left_out": left_out}, indent=1) + "\n")
    if not rows:
        sys.exit(1)


if __name__ == "__main__":
    main()
