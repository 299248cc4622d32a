"""`pytest benchmarks --benchmark-only`: the `cases(grid)` of each module, every peer of a case timed in turns with the others.

On a GPU with CUDA where there is one, else on the CPU. One entry of pytest-benchmark for each case and peer; its `extra_info` says
what was called, which bytes it must move, how fast it did, and how the peers of the same rounds compare.
"""

import statistics
import time

import pytest
import torch

from . import common, peers
from .replay import Replay
from .targets import targets, verdict

LONGEST_TURN = 3.0  # seconds that the rounds of a case take at most, without its set-up


def pytest_addoption(parser):
    group = parser.getgroup("fastgen benchmarks")
    group.addoption("--tiny", action="store_true", help="run each benchmark twice, on a few elements")
    group.addoption("--minutes", type=float, default=9.0, help="for everything: what does not fit gets fewer rounds, or none")
    group.addoption("--bench-device", default=None, choices=("cpu", "cuda"), help="default: cuda where torch finds it")


class Turns:
    """Measures a case when its first peer is asked for, and shares the time that is left among the cases that are."""

    def __init__(self, config):
        self.tiny, self.end = config.option.tiny, time.monotonic() + 60 * config.option.minutes
        self.rows, self.notes = [], []
        self.case, self.samples, self.errors = None, {}, {}
        self.left_out = {}  # {case: why}

    def late(self):
        return not self.tiny and time.monotonic() > self.end

    def measure(self, case, items):
        """Times those of the case's peers that are among the tests to be run: `samples` are their seconds in each round."""
        if case is self.case:
            return
        wanted = [item.callspec.params for item in items if "case" in getattr(item, "callspec", _NONE).params]
        names = [each["peer"] for each in wanted if each["case"] is case]
        at = next(index for index, each in enumerate(wanted) if each["case"] is case)
        left = len({id(each["case"]) for each in wanted[at:]})
        self.case, self.samples, self.errors = case, {}, {}
        remaining = self.end - time.monotonic()
        if self.late():
            self.left_out[str(case)] = NO_TIME
        elif not case.fits:
            self.left_out[str(case)] = f"needs more than the {common.free_bytes(case.device) / 2**30:.1f} GiB of free memory"
        if str(case) in self.left_out:
            return
        peers.sets.cache_clear()
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(case.threads or threads)
            prepared = {}
            for name in names:
                try:
                    prepared[name] = peers.prepare(case, [name], self.tiny)[name]
                    prepared[name][0]()
                except Exception as error:  # one peer's, which its own test reports
                    prepared.pop(name, None)
                    self.errors[name] = error
            seconds = min(LONGEST_TURN, 0.5 * remaining / left)
            between = peers.between(case)
            if prepared:
                self.samples = common.in_turns(prepared, seconds, self.tiny, case.device, case.overhead, between)
        except Exception as error:  # of all of them
            self.errors |= dict.fromkeys(names, error)
        finally:
            torch.set_num_threads(threads)
            peers.sets.cache_clear()


class _NONE:
    params = {}


TURNS, BEGUN = pytest.StashKey[Turns](), pytest.StashKey[set]()
NO_TIME = "no time was left: see --minutes"
_clock = Replay()


def pytest_configure(config):
    config.stash[TURNS] = Turns(config)


def pytest_report_header(config):
    return common.header(common.device(config.option.bench_device))


def pytest_generate_tests(metafunc):
    """Every case beside every peer; the modules say which cases there are."""
    if "case" in metafunc.fixturenames:
        config = metafunc.config
        cases = metafunc.module.cases(peers.Grid(config.option.tiny, common.device(config.option.bench_device)))
        timed = pytest.mark.benchmark(timer=_clock.read)
        pairs = [pytest.param(case, peer, id=f"{case}-{peer}", marks=timed) for case in cases for peer in case.peers]
        metafunc.parametrize(("case", "peer"), pairs)


@pytest.fixture
def note(pytestconfig):
    """Says a line beside pytest-benchmark's table."""
    return pytestconfig.stash[TURNS].notes.append


@pytest.fixture
def in_time(pytestconfig):
    """Skips what is asked for, once, when no time is left for it."""
    turns, begun = pytestconfig.stash[TURNS], pytestconfig.stash.setdefault(BEGUN, set())

    def check(name):
        if name not in begun and turns.late():
            turns.left_out[name] = NO_TIME
            pytest.skip(NO_TIME)
        begun.add(name)

    return check


@pytest.fixture
def measure(benchmark, request):
    """One peer of a case under pytest-benchmark, measured in turns with the others."""
    turns = request.config.stash[TURNS]

    def run(case, peer):
        turns.measure(case, request.session.items)
        if peer in turns.errors:
            raise turns.errors[peer]
        if str(case) in turns.left_out:
            pytest.skip(turns.left_out[str(case)])
        benchmark.group = str(case)
        samples = turns.samples[peer]
        _clock.play(benchmark, samples)
        row = described(case, peer, turns.samples, turns.tiny)
        benchmark.extra_info.update(row, **common.environment(case.device) | {"threads": case.threads or torch.get_num_threads()})
        turns.rows.append(row | {"group": str(case), "median": common.quartiles(samples)["median"]})

    return run


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["left_out"] = config.stash[TURNS].left_out


def described(case, peer, samples, tiny):
    """What the samples of one peer mean, beside those of the others."""
    times = common.quartiles(samples[peer])
    ratio = share = None
    if "fastgen" in samples:
        ratio = common.quartiles([theirs / ours for theirs, ours in zip(samples[peer], samples["fastgen"], strict=True)])
    if "limit" in samples:
        share = common.quartiles([limit / mine for limit, mine in zip(samples["limit"], samples[peer], strict=True)])["median"]
    target = None if tiny or ratio is None else targets(case).get(peer)
    return {
        "kind": case.kind,
        "op": case.op,
        "mode": case.mode,
        "passes": case.passes,
        "output": case.output,
        "layout": "channels_last" if case.channels_last else "contiguous",
        "dtype": common.DTYPES[case.dtype],
        "shape": list(case.shape),
        "elements": case.elements,
        "call": case.call,
        "peer": peer,
        "limit": case.limit,
        "bytes": case.bytes,
        "GB/s": case.bytes / times["median"] / 1e9,
        "share of limit": share,
        "ratio": ratio and {key: ratio[key] for key in ("median", "q1", "q3")},
        "ratios": {  # of each peer's time to this one's
            other: statistics.median(theirs / mine for theirs, mine in zip(found, samples[peer], strict=True))
            for other, found in samples.items()
            if other != peer
        },
        "target": target,
        "met": verdict(target, ratio["median"], times, common.quartiles(samples["fastgen"])) if target else "",
    }


def pytest_terminal_summary(terminalreporter, config):
    """What pytest-benchmark's table lacks: bytes per second, the share of the limit, and how the peers of a round compare."""
    turns = config.stash[TURNS]
    for line in turns.notes:
        terminalreporter.write_line(line)
    if not turns.rows:
        return
    cells, previous = [], None
    for row in turns.rows:
        if previous not in (None, row["group"]):
            cells.append(())
        first = row["group"] if row["group"] != previous else ""
        previous = row["group"]
        share, ratio = row["share of limit"], row["ratio"]
        numbers = f"{row['median'] * 1e6:.1f}", f"{row['GB/s']:.2f}", "" if share is None else f"{share:.2f}"
        compared = "" if ratio is None else f"{ratio['median']:.3g}", {"NO": "missed", "noisy": "noisy"}.get(row["met"], "")
        cells.append((first, row["peer"], *numbers, *compared))
    terminalreporter.section("bytes that must be moved, per second")
    for line in common.table(("case", "peer", "median µs", "GB/s", "of limit", "÷ fastgen", "target"), cells, left=2):
        terminalreporter.write_line(line)
