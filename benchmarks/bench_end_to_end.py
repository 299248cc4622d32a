"""Steps per second and peak memory of whole programs, with fastgen and without: `end_to_end`'s works."""

import functools
import math
import statistics

import pytest

from . import common, replay

for needed in ("sklearn", "tqdm", "PIL"):  # by the examples
    pytest.importorskip(needed)
from . import end_to_end  # noqa: E402

CLOCK = replay.Replay()


def pytest_generate_tests(metafunc):
    works = end_to_end.works(metafunc.config.option.tiny, common.device(metafunc.config.option.bench_device))
    metafunc.parametrize(("what", "peer"), [(work.what, peer) for work in works for peer in work.peers])


@functools.cache
def measured(what, tiny, device):
    """(work, seconds of a step by peer, threads, peak memory by peer), or what was raised: once, for the tests of all its peers."""
    work = end_to_end.find(what, tiny, device)
    try:
        return work, *end_to_end.measured(work, tiny), end_to_end.peak_bytes(work, tiny)
    except Exception as error:
        return error


@pytest.mark.benchmark(timer=CLOCK.read)
def test_end_to_end(benchmark, pytestconfig, note, in_time, what, peer):
    in_time(what)
    found = measured(what, pytestconfig.option.tiny, common.device(pytestconfig.option.bench_device))
    if isinstance(found, Exception):
        raise found
    work, samples, threads, peaks = found
    benchmark.group = what
    CLOCK.play(benchmark, samples[peer])
    rate, peak = 1 / statistics.fmean(samples[peer]), peaks[peer]  # all steps ÷ all time
    ratio = common.quartiles([theirs / ours for theirs, ours in zip(samples[peer], samples["fastgen"], strict=True)])
    benchmark.extra_info.update(
        common.environment(work.device) | {"threads": threads},
        kind="end_to_end",
        what=what,
        op=what,
        mode="",
        passes=work.passes,
        output="",
        layout="contiguous",
        dtype="float32",
        shape=list(work.shape),
        elements=math.prod(work.shape),
        call=work.call,
        peer=peer,
        limit=None,
        bytes=None,
        ratio={key: ratio[key] for key in ("median", "q1", "q3")},
        target=None,
        met="",
        unit=work.unit,
        rate=rate,
        peak_bytes=peak,
        **{"steps timed": work.steps, "GB/s": None, "share of limit": None},
    )
    memory = "" if peak is None else f", at most {peak / common.MI:.1f} MiB more than before"
    times = f"{1 / statistics.fmean(samples['fastgen']) / rate:.3g} ({ratio['q1']:.3g} … {ratio['q3']:.3g})"
    compared = "" if peer == "fastgen" else f", fastgen {times} times as fast"
    note(f"{what}, {peer}: {rate:.4g} {work.unit}{memory}{compared}")
