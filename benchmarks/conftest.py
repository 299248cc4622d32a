"""`pytest benchmarks --benchmark-only`: the `cases(grid)` of each module, every peer of a case timed in turns with the others.

On a GPU with CUDA where there is one, else on the CPU. One entry of pytest-benchmark for each case and peer; its `extra_info` says
what was called, which bytes it must move, how fast it did, and how the peers of the same rounds compare.
"""

import statistics
from pathlib import Path

import pytest
import torch

from . import common, pace, peers
from .replay import Replay
from .targets import targets, verdict


def pytest_addoption(parser):
    group = parser.getgroup("fastgen benchmarks")
    group.addoption("--tiny", action="store_true", help="run each benchmark twice, on a few elements")
    group.addoption("--minutes", type=float, default=9.0, help="for everything: what does not fit gets fewer rounds, or none")
    group.addoption("--bench-device", default=None, choices=("cpu", "cuda"), help="default: cuda where torch finds it")


class Turns:
    """Measures a case when its first peer is asked for, and shares the time that is left among the things that are."""

    def __init__(self, config):
        self.tiny, self.pace = config.option.tiny, pace.Pace(60 * config.option.minutes)
        self.asked = {}  # {thing: its peers that are among the tests to be run}, as the modules have them
        self.rows, self.notes = [], []
        self.case, self.samples, self.errors = None, {}, {}
        self.left_out = {}  # {thing: why}

    def plan(self, items):
        """Returns the items breadth first; the peers of a case stay together."""
        self.asked = {}
        for item in items:
            self.asked.setdefault(_thing(item), []).append(getattr(item, "callspec", _NONE).params.get("peer"))
        ranks = pace.ranks(self.asked)
        items = sorted(items, key=lambda item: (ranks[_thing(item)], isinstance(_thing(item), str)))
        self.pace.waiting = {thing: self.asked[thing] for thing in map(_thing, items)}
        return items

    def in_time(self, thing):
        """Whether it may begin; what may not is left out."""
        if not self.tiny and self.pace.late():
            self.left_out[thing] = NO_TIME
            return False
        self.pace.begin(thing)
        return True

    def measure(self, case):
        """Times those of the case's peers that are among the tests to be run: `samples` are their seconds in each round."""
        if case is self.case:
            return
        self.case, self.samples, self.errors = case, {}, {}
        if not case.fits:
            self.left_out[case] = f"needs more than the {common.free_bytes(case.device) / 2**30:.1f} GiB of free memory"
            self.pace.waiting.pop(case, None)
        if case in self.left_out or not self.in_time(case):
            return
        names = self.asked[case]
        peers.sets.cache_clear()
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(case.threads or threads)
            prepared = {}
            for name in names:
                try:
                    prepared[name] = peers.prepare(case, [name], self.tiny)[name]
                    begun = pace.clock()
                    prepared[name][0]()
                    if name == "torch.compile":
                        self.pace.compiled(pace.clock() - begun)
                except Exception as error:  # one peer's, which its own test reports
                    prepared.pop(name, None)
                    self.errors[name] = error
            between = peers.between(case)
            if prepared:
                how = self.tiny, case.device, case.overhead, between, pace.LEAST
                self.samples = common.in_turns(prepared, self.pace.rounds, *how)
        except Exception as error:  # of all of them
            self.errors |= dict.fromkeys(names, error)
        finally:
            torch.set_num_threads(threads)
            peers.sets.cache_clear()


class _NONE:
    params = {}


def _thing(item):
    """What is timed at one go with the item: a case, a whole program's name, or for want of both the test's."""
    params = getattr(item, "callspec", _NONE).params
    return params.get("case") or params.get("what") or item.name.removeprefix("test_")


HERE = Path(__file__).parent
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


@pytest.hookimpl(trylast=True)  # -k has left its own
def pytest_collection_modifyitems(config, items):
    """Breadth first, see `pace`; tests of other folders stay where they are."""
    places = [place for place, item in enumerate(items) if HERE in item.path.parents]
    for place, item in zip(places, config.stash[TURNS].plan([items[place] for place in places]), strict=True):
        items[place] = item


@pytest.fixture
def note(pytestconfig):
    """Says a line beside pytest-benchmark's table."""
    return pytestconfig.stash[TURNS].notes.append


@pytest.fixture
def in_time(pytestconfig):
    """Skips what is asked for, once, when no time is left for it."""
    turns, begun = pytestconfig.stash[TURNS], pytestconfig.stash.setdefault(BEGUN, set())

    def check(name):
        if name not in begun and not turns.in_time(name):
            pytest.skip(NO_TIME)
        begun.add(name)

    return check


@pytest.fixture
def measure(benchmark, request):
    """One peer of a case under pytest-benchmark, measured in turns with the others."""
    turns = request.config.stash[TURNS]

    def run(case, peer):
        turns.measure(case)
        if peer in turns.errors:
            raise turns.errors[peer]
        if case in turns.left_out:
            pytest.skip(turns.left_out[case])
        benchmark.group = str(case)
        samples = turns.samples[peer]
        _clock.play(benchmark, samples)
        row = described(case, peer, turns.samples, turns.tiny)
        benchmark.extra_info.update(row, **common.environment(case.device) | {"threads": case.threads or torch.get_num_threads()})
        turns.rows.append(row | {"case": case, "group": str(case), "median": common.quartiles(samples)["median"]})

    return run


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["left_out"] = {str(thing): why for thing, why in config.stash[TURNS].left_out.items()}


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


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    """What pytest-benchmark's table lacks: bytes per second, the share of the limit, and how the peers of a round compare; at the
    end, what was left out."""
    turns = config.stash[TURNS]
    for line in turns.notes:
        terminalreporter.write_line(line)
    if turns.rows:
        terminalreporter.section("bytes that must be moved, per second")
        for line in compared(turns.rows, list(turns.asked)):
            terminalreporter.write_line(line)
    late = [thing for thing in turns.asked if turns.left_out.get(thing) == NO_TIME]
    if late:
        terminalreporter.section("left out")
        for line in pace.closing(late, turns.asked, turns.pace.minutes({thing: turns.asked[thing] for thing in late})):
            terminalreporter.write_line(line)


def compared(rows, order):
    """A table of the rows, the cases in this order."""
    cells, previous = [], None
    for row in sorted(rows, key=lambda row: order.index(row["case"])):
        if previous not in (None, row["group"]):
            cells.append(())
        first = row["group"] if row["group"] != previous else ""
        previous = row["group"]
        share, ratio = row["share of limit"], row["ratio"]
        numbers = f"{row['median'] * 1e6:.1f}", f"{row['GB/s']:.2f}", "" if share is None else f"{share:.2f}"
        told = "" if ratio is None else f"{ratio['median']:.3g}", {"NO": "missed", "noisy": "noisy"}.get(row["met"], "")
        cells.append((first, row["peer"], *numbers, *told))
    return common.table(("case", "peer", "median µs", "GB/s", "of limit", "÷ fastgen", "target"), cells, left=2)
