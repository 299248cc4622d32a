"""`pytest benchmarks --benchmark-only`: the `cases(grid)` of each module against every peer, one group per case."""

import os

import pytest

from . import common, peers

ROWS, NOTES = pytest.StashKey[list](), pytest.StashKey[list]()


def pytest_addoption(parser):
    tiny = os.environ.get("FASTGEN_BENCH_TINY", "") not in ("", "0")
    group = parser.getgroup("fastgen benchmarks")
    group.addoption("--tiny", action="store_true", default=tiny, help="run each benchmark once, on a few elements")
    group.addoption("--large", action="store_true", help="64 M elements too, where they fit into memory")


def pytest_configure(config):
    config.stash[ROWS], config.stash[NOTES] = [], []


def pytest_report_header(config):
    return common.header()


def pytest_generate_tests(metafunc):
    """Every case beside every peer; the modules say which cases there are."""
    if "case" in metafunc.fixturenames:
        tiny, large = metafunc.config.option.tiny, metafunc.config.option.large
        cases = metafunc.module.cases(common.grid(tiny, large))
        pairs = [pytest.param(case, peer, id=f"{case}-{peer}") for case in cases for peer in case.peers]
        metafunc.parametrize(("case", "peer"), pairs)


@pytest.fixture
def note(pytestconfig):
    """Says a line beside pytest-benchmark's table."""
    return pytestconfig.stash[NOTES].append


@pytest.fixture
def measure(benchmark, pytestconfig):
    """Runs one peer of a case under pytest-benchmark and notes what its time means."""

    def run(case, peer):
        tiny, rows = pytestconfig.option.tiny, pytestconfig.stash[ROWS]
        if not case.fits:
            pytest.skip(f"needs more than the {common.free_bytes() / 2**30:.1f} GiB of free memory")
        benchmark.group = str(case)
        calls = peers.prepare(case, [peer], tiny)[peer]
        _timed(benchmark, calls, tiny)
        if benchmark.stats is None:  # --benchmark-disable
            return
        median = benchmark.stats.stats.median
        limits = [row["median"] for row in rows if row["group"] == str(case) and row["peer"] == "torch.add"]
        limit = median if peer == "torch.add" else limits[0] if limits else None
        row = {
            "group": str(case),
            "op": case.op,
            "mode": case.mode,
            "output": case.output,
            "peer": peer,
            "size": case.elements,
            "dtype": common.DTYPES[case.dtype],
            "bytes": case.bytes,
            "GB/s": case.bytes / median / 1e9,
            "share of torch.add": None if limit is None else limit / median,
        }
        benchmark.extra_info.update(row, **common.environment())
        rows.append(row | {"median": median})

    return run


def _timed(benchmark, calls, tiny):
    """Warm-up, then about half a second: one call per round, rotating through the buffers, or many if it is short."""
    if tiny:
        benchmark.pedantic(calls[0], rounds=1, warmup_rounds=1)
        return
    estimate = common.warmed(calls)
    times = common.repeats(estimate)
    rounds = min(max(7, int(0.5 / (estimate * times))), 500)
    if len(calls) == 1:
        benchmark.pedantic(calls[0], rounds=rounds, iterations=times)
        return
    turns = (calls[turn % len(calls)] for turn in range(rounds))
    benchmark.pedantic(lambda call: call(), setup=lambda: ((next(turns),), {}), rounds=rounds)


def pytest_terminal_summary(terminalreporter, config):
    """What pytest-benchmark's table lacks: bytes per second, and the share of the limit."""
    for line in config.stash[NOTES]:
        terminalreporter.write_line(line)
    rows = config.stash[ROWS]
    if not rows:
        return
    cells, previous = [], None
    for row in rows:
        if previous not in (None, row["group"]):
            cells.append(())
        share = row["share of torch.add"]
        first = row["group"] if row["group"] != previous else ""
        previous = row["group"]
        numbers = f"{row['median'] * 1e6:.1f}", f"{row['GB/s']:.2f}", "" if share is None else f"{share:.2f}"
        cells.append((first, row["peer"], *numbers))
    terminalreporter.section("bytes that must be moved, per second")
    head = ("case", "peer", "median µs", "GB/s", "of torch.add")
    for line in common.table(head, cells, left=2):
        terminalreporter.write_line(line)
