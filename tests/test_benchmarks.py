"""The benchmarks run, at a tiny size, and compare equal work: peers compute the same and move the declared bytes."""

import ast
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastgen

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (4, 3, 5, 7)
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 0.05}  # tolerances: eager rounds after every operation

pytest.importorskip("pytest_benchmark")


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import peers

    yield peers
    peers.sets.cache_clear()


def all_cases(peers, dtype):
    def at(make, *arguments):
        return make(SHAPE, dtype, *arguments)

    for mode in ("noise", "seed"):
        for output in ("out", "fresh"):
            yield at(peers.q_sample, mode, output)
            yield at(peers.ddpm_step, mode, output)
        yield peers.backward(at(peers.q_sample, mode, "fresh"), 1, 2)
        yield peers.backward(at(peers.ddpm_step, mode, "fresh"), 2, 3)
    for output in ("out", "fresh"):
        yield at(peers.ddim_step, output)
    yield peers.backward(at(peers.ddim_step, "fresh"), 2, 3)
    yield at(peers.q_posterior)
    yield peers.backward(at(peers.q_posterior), 2, 3)
    yield at(peers.randn)
    yield at(peers.torch_randn)
    yield at(peers.ddpm_step, "generator", "out")
    yield at(peers.randn_torch_cuda)
    yield at(peers.diffusion_loss)
    yield at(peers.vlb_terms)
    yield at(peers.step_log_prob)
    yield at(peers.ddpm_step_log_prob)
    yield at(peers.step_log_weight)
    for mode in ("noise", "seed"):
        yield at(peers.reparameterize, mode)
    yield at(peers.posterior)
    yield at(peers.gaussian_kl)
    yield at(peers.to_uint8)
    yield at(peers.q_sample_bytes)
    for passes in (peers.FORWARD, peers.BACKWARD):
        yield at(peers.bce_with_logits, passes)
        yield at(peers.gan_loss, passes)


def tensors(result):
    return result if isinstance(result, tuple) else (result,)


def run(*arguments):
    # pytest-benchmark measures nothing beside xdist, which these are not
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items(), ids=str)
def test_peers_compute_the_same(peers, dtype, tolerance):
    cases = [*all_cases(peers, dtype), *(case for case in peers.calls_of_16() if case.dtype == dtype)]
    for case in cases:
        names = [*dict.fromkeys((*case.peers[1:], "torch.compile"))]  # all but the limit
        calls = peers.prepare(case, names, tiny=True)
        # they share an out=, so each result is copied before the next peer writes
        results = {name: [x.detach().clone() for x in tensors(calls[name][0]())] for name in names}
        ours = results.pop("fastgen")
        for name, theirs in results.items():
            assert [x.shape for x in ours] == [x.shape for x in theirs], f"{case}, {name}"
            largest = max(range(len(ours)), key=lambda i: ours[i].numel())
            # losses are not rounded to half precision
            expected = torch.uint8 if case.op == "to_uint8" else dtype
            dtypes = (dtype, torch.float32) if ours[largest].dim() == 0 else (expected,)
            assert theirs[largest].dtype == expected and ours[largest].dtype in dtypes, f"{case}, {name}"
            for x, y in zip(ours, theirs, strict=True):
                difference = (x.float() - y.float()).abs()
                # from a seed, or at another turn of a generator: other numbers, drawn alike
                drawn = "seed" in case.mode or case.mode == "generator"
                close = y.isfinite() if drawn else difference <= tolerance * (1 + y.float().abs())
                assert x.isfinite().all() and close.all(), f"{case}, {name}: {difference.max()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_declared_bytes_are_those_of_the_tensors(peers, dtype):
    """Large floating tensors among the arguments and fresh results, gradients included."""
    for case in all_cases(peers, dtype):
        (arguments,) = peers.sets(case)
        read = sum(x.nbytes for x in arguments if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.dtype == torch.uint8))
        results = [x for x in tensors(peers.prepare(case, ("fastgen",))["fastgen"][0]()) if x.numel() >= case.elements]
        fresh = sum(x.nbytes for x in results if not any(x is argument for argument in arguments))
        assert case.bytes == read + fresh, str(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limit_moves_the_declared_bytes(peers, dtype):
    for case in all_cases(peers, dtype):
        (call,) = peers.prepare(case, ("limit",))["limit"]
        (read,) = call.args
        assert call.func.__name__ == "copy_" and 0 <= case.bytes - 2 * read.nbytes < 2 * dtype.itemsize, str(case)
    for case in peers.calls_of_16():
        (call,) = peers.prepare(case, ("limit",))["limit"]
        assert call.func is torch.add and call.args[0].numel() == 16 and case.limit == "torch.add"


def test_grid(peers):
    """All sizes from 10³ to 10⁸, both dtypes, both layouts, and what each module makes of them has names of its own."""
    grid = peers.Grid()
    sizes = [math.prod(shape) for shape, dtype, _ in grid.contiguous if dtype == torch.float32]
    assert [round(math.log10(size), 1) for size in sizes] == [3, 4, 5, 6, 7, 8]
    assert {dtype for _, dtype, _ in grid.contiguous} == {dtype for _, dtype, _ in grid.channels_last} == set(DTYPES)
    modules = [importlib.import_module(f"benchmarks.{path.stem}") for path in sorted((ROOT / "benchmarks").glob("bench_*.py"))]
    cases = [case for module in modules if hasattr(module, "cases") for case in module.cases(grid)]
    assert len({str(case) for case in cases}) == len(cases) > 150
    ops = {
        "q_sample",
        "ddpm_step",
        "ddim_step",
        "q_posterior",
        "diffusion_loss",
        "vlb_terms",
        "step_log_prob",
        "reparameterize",
        "gaussian_kl",
        "bce_with_logits",
        "gan_loss",
    }
    assert {case.op for case in cases if case.passes == peers.BACKWARD} == ops
    compiled = {(case.op, case.mode, case.passes) for case in cases if "torch.compile" in case.peers}
    forward = {"randn", "torch_randn", "randn_torch_cuda", "to_uint8", "q_sample_bytes", "ddpm_step_log_prob", "step_log_weight"}
    assert {op for op, _, _ in compiled} == ops | forward
    assert all(case.peers[:2] == ("limit", "fastgen") for case in cases)


@pytest.fixture
def real(peers):
    """(cases of the real grid as the modules have them, module `pace`)."""
    modules = [importlib.import_module(f"benchmarks.{path.stem}") for path in sorted((ROOT / "benchmarks").glob("bench_*.py"))]
    grid = peers.Grid(device="cpu")
    cases = [case for module in modules if hasattr(module, "cases") for case in module.cases(grid)]
    return cases, importlib.import_module("benchmarks.pace")


def test_breadth_first(peers, real):
    """The first case of every op and mode comes before the second of any, and so on; the first is the plain one."""
    cases, pace = real
    ranks = pace.ranks(cases)
    assert ranks.keys() == set(cases)
    series = {}
    for case in cases:
        series.setdefault((case.op, case.mode), []).append(case)
    assert len(series) == 28
    for several in series.values():
        assert sorted(ranks[case] for case in several) == list(range(len(several)))
        several.sort(key=ranks.get)
        first, known = several[0], {peer for case in several for peer in case.peers}
        assert first.dtype == torch.float32 and not (first.channels_last or first.overhead or first.threads or first.detail)
        assert set(first.peers) == known and 0.5e6 < first.elements < 2e6, str(first)
        assert first.passes == peers.FORWARD or all(case.passes == peers.BACKWARD for case in several)
        backward = [case for case in several if case.passes != first.passes and not case.overhead]
        if backward:  # is the next to be seen
            assert several[1] == min(backward, key=ranks.get) and (several[1].shape, several[1].dtype) == (first.shape, first.dtype)
        # the dtypes and sizes of the plain call come before what combines a layout and a dtype
        plain = [case for case in several if case.passes == first.passes and not case.threads and not case.channels_last]
        odd = [case for case in several if case.channels_last and case.dtype != first.dtype]
        assert all(ranks[case] < ranks[other] for case in plain for other in odd if case.dtype == torch.float32 and not case.detail)
    assert pace.ranks(["import", cases[0], "GAN training"]) == {"import": 0, cases[0]: 0, "GAN training": 0}


def simulated(peers, pace, monkeypatch, cases, seconds, price, compiling):
    """({case: seconds of its rounds beyond the least}, the end, the minutes that the rest would need too): a run in which a call
    takes price[op, mode] per byte of it."""
    now, programs, found = [100.0], set(), {}
    common = sys.modules["benchmarks.common"]
    monkeypatch.setattr(pace, "clock", lambda: now[0])
    monkeypatch.setattr(common, "cache_bytes", lambda device="cpu": 16 * common.MI)  # on any machine the same simulation
    runner = pace.Pace(seconds)
    runner.waiting = {case: case.peers for case in sorted(cases, key=pace.ranks(cases).get)}
    for case in [*runner.waiting]:
        if runner.late():
            break
        runner.begin(case)
        if "torch.compile" in case.peers:
            took = 0.2 if peers.graph_of(case) in programs else compiling + (0 if programs else 12)  # the first is dear
            programs.add(peers.graph_of(case))
            now[0] += took
            runner.compiled(took)
        sets = 1 if peers.in_chain(case) else common.copies(case.bytes)
        call = price[case.op, case.mode] * case.bytes
        one = len(case.peers) * call * (2 if call < 0.02 else 1)
        now[0] += 0.2 + 2 * sets * len(case.peers) * call
        found[case] = max(runner.rounds(one) - pace.LEAST * one, 0.0)
        now[0] += found[case] + pace.LEAST * one
    return found, now[0] - 100.0, runner.minutes(runner.waiting)


@pytest.mark.parametrize("compiling", [0.2, 3.0], ids=["warm", "cold"])
def test_pace_reaches_everything_that_fits(peers, real, monkeypatch, compiling):
    """With a warm and a cold cache of torch.compile's, and calls whose speed is far from what is guessed at first."""
    cases, pace = real
    price = {(case.op, case.mode): (1 + len(case.op) % 4) * 0.25e-9 for case in cases}  # seconds per byte

    def run(seconds):
        return simulated(peers, pace, monkeypatch, cases, seconds, price, compiling)

    found, _, _ = run(1e4)
    assert len(found) == len(cases) and statistics.median(found.values()) > 0.8 * pace.LONGEST
    with monkeypatch.context() as patch:
        patch.setattr(pace, "LONGEST", 0.0)
        _, least, _ = run(1e4)  # nothing gets more than it needs
    found, end, _ = run(1.2 * least)
    assert len(found) == len(cases) and least < end <= 1.2 * least + pace.LONGEST
    found = [*run(1.6 * least)[0].values()]
    early, late = statistics.median(found[8:48]), statistics.median(found[-40:])
    assert len(found) == len(cases) and 1 / 3 < late / early < 3  # neither the first nor the last are short of rounds
    found, _, minutes = run(0.6 * least)
    ranks = pace.ranks(cases)
    left_out = ranks.keys() - found.keys()
    assert len(cases) / 4 < len(found) < len(cases)
    assert max(map(ranks.get, found)) <= min(map(ranks.get, left_out))
    found, _, _ = run(60 * minutes)
    assert len(found) == len(cases)


FAKE = """
import json
from benchmarks import common, end_to_end, pace, peers

now, log, programs = 0.0, [], set()
pace.clock = lambda: now


def passes(seconds):
    global now
    now += seconds


def prepare(case, names, tiny):
    log.append((str(case), *names))
    program = peers.graph_of(case) if "torch.compile" in names else None
    seconds = 0.1 if program is None or program in programs else 3.0
    programs.add(program)
    return {name: [lambda: passes(seconds)] for name in names}


def in_turns(prepared, budget, *how):
    passes(0.4)
    passes(max(budget(0.1), 0.5))
    return {name: [1.0, 2.0, 3.0, 4.0, 5.0] for name in prepared}


def whole(work, tiny):
    log.extend((work.what, peer) for peer in work.peers)
    passes(15.0)
    return {peer: [1.0, 2.0, 3.0, 4.0, 5.0] for peer in work.peers}, 2


peers.prepare, peers.between, common.in_turns = prepare, lambda case: None, in_turns
end_to_end.measured, end_to_end.peak_bytes = whole, lambda work, tiny: dict.fromkeys(work.peers)
common.free_bytes = lambda device="cpu": 2**40


def pytest_unconfigure(config):
    with open(LOG, "w") as file:
        json.dump(log, file)
"""


def test_time_runs_out_in_the_finest_detail(tmp_path, monkeypatch, peers, real):
    """All of the real grid with a clock that only the plugin moves: nine minutes are not enough for so many programs of three
    seconds each."""
    cases, pace = real
    pytest.importorskip("sklearn")
    (tmp_path / "fake_clock.py").write_text(f"LOG = {str(tmp_path / 'log.json')!r}\n{FAKE}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    options = ("--benchmark-only", "--bench-device=cpu", "-q", f"--benchmark-json={tmp_path / 'b.json'}")
    processes = (f"--ignore=benchmarks/bench_{name}.py" for name in ("import", "triton_host"))  # which know no fake clock
    some = ("--minutes=9", *processes, "-p", "fake_clock")
    output = run("-m", "pytest", "benchmarks", *options, *some)
    log, found = (json.loads((tmp_path / name).read_text()) for name in ("log.json", "b.json"))
    reached = [*dict.fromkeys(name for name, *_ in log)]
    ranks = {str(case): rank for case, rank in pace.ranks(cases).items()}
    order = [ranks.get(name, 0) for name in reached]
    works = importlib.import_module("benchmarks.end_to_end").works()
    assert order == sorted(order) and reached[28:32] == [work.what for work in works]
    left_out = [case for case in cases if str(case) not in reached]
    assert found["left_out"].keys() == set(map(str, left_out)) and 10 < len(left_out) < len(cases) / 2
    assert all(ranks[str(case)] >= order[-1] for case in left_out)  # the finest detail
    seen = {(case.op, case.mode, case.passes) for case in cases if str(case) in reached}
    assert seen == {(case.op, case.mode, case.passes) for case in cases}
    timed = {(entry["extra_info"]["op"], entry["extra_info"]["peer"]) for entry in found["benchmarks"]}
    programs = {(work.what, peer) for work in works for peer in work.peers}
    assert timed == programs | {(case.op, peer) for case in cases for peer in case.peers}
    # the last lines say which, and how to get them
    lines = output.splitlines()
    last = next(index for index, line in enumerate(lines) if line.startswith("No time was left for"))
    assert f"No time was left for {len(left_out)} of {len(cases) + 4} cases, the finest detail" in lines[last]
    minutes = int(lines[last].partition("--minutes ")[2].partition(";")[0])
    assert 9 < minutes < 30 and "-k " in lines[last]
    total = {op: sum(case.op == op for case in cases) for op in {case.op for case in left_out}}
    for op, count in total.items():
        (line,) = [line for line in lines[:last] if line.startswith(f"{op}  ") and " of " in line]
        assert f" {sum(case.op == op for case in left_out)} of {count} " in line
    for case in left_out:
        (line,) = [line for line in lines[:last] if line.startswith(f"{case.op}  ") and " of " in line]
        assert peers.size_name(case.elements) in line and (case.dtype == torch.float32 or "bfloat16" in line)


def test_buffers_are_colder_than_the_cache(peers):
    common = sys.modules["benchmarks.common"]
    for megabytes in (1, 4, 12, 64, 1024):
        size = megabytes * common.MI
        assert (common.copies(size) - 1) * size >= 2 * min(common.cache_bytes(), common.MOST_CACHE)
    assert common.copies(common.MI - 1) == 1


def test_pytest_benchmarks(tmp_path):
    end_to_end = "--ignore=benchmarks/bench_end_to_end.py"  # has a test of its own
    arguments = (end_to_end, "--benchmark-only", "--tiny", "--bench-device=cpu", "-q", f"--benchmark-json={tmp_path / 'b.json'}")
    output = run("-m", "pytest", "benchmarks", *arguments)
    assert "bytes that must be moved, per second" in output
    benchmarks = json.loads((tmp_path / "b.json").read_text())["benchmarks"]
    (imported,) = [benchmark for benchmark in benchmarks if benchmark["group"] == "import"]
    assert imported["extra_info"]["torch s"] > 0 and 0 < imported["extra_info"]["fastgen's share"] < 1
    assert "then import fastgen" in output
    timed = [benchmark for benchmark in benchmarks if benchmark["extra_info"]["kind"] in ("throughput", "overhead", "threads")]
    groups = {}
    for benchmark in timed:
        info, times = benchmark["extra_info"], benchmark["stats"]["data"]
        groups.setdefault(benchmark["group"], {})[info["peer"]] = benchmark
        assert info["GB/s"] == pytest.approx(info["bytes"] / benchmark["stats"]["median"] / 1e9) and len(times) == 2
        assert info["backend"] == fastgen.backend() and info["torch"] == torch.__version__ and info["device"] == "cpu"
        known = {"op", "mode", "passes", "output", "layout", "dtype", "shape", "elements", "call", "limit", "target", "met"}
        assert known | {"fastgen", "commit", "dirty", "cpu", "cores", "threads", "load"} <= info.keys()
    for group, found in groups.items():
        # peers of one round are pairs
        for name, benchmark in found.items():
            info, times = benchmark["extra_info"], benchmark["stats"]["data"]
            pairs = [theirs / ours for theirs, ours in zip(times, found["fastgen"]["stats"]["data"], strict=True)]
            assert info["ratio"]["median"] == pytest.approx(statistics.median(pairs)), (group, name)
            shares = [limit / mine for limit, mine in zip(found["limit"]["stats"]["data"], times, strict=True)]
            assert info["share of limit"] == pytest.approx(statistics.median(shares)), (group, name)
            assert info["ratios"].keys() == found.keys() - {name}
            assert name == "fastgen" or found["fastgen"]["extra_info"]["ratios"][name] == pytest.approx(info["ratio"]["median"])
        if group.startswith("diffusers"):
            assert found.keys() == {"limit", "fastgen", "diffusers"}
        elif "threads" in group:
            assert found.keys() == {"limit", "fastgen", "eager"} and found["limit"]["extra_info"]["threads"] >= 1
        else:
            info = found["limit"]["extra_info"]
            single, contiguous = info["dtype"] == "float32", info["layout"] == "contiguous"
            expected = {"limit", "fastgen", "eager"}
            if info["kind"] == "throughput" and single and contiguous:
                expected.add("fastgen eager")
            if info["kind"] == "throughput" and (single or (contiguous and info["passes"] == "forward")):
                expected.add("torch.compile")
            assert found.keys() == expected, group
    layouts = {(info["layout"], info["dtype"]) for info in (benchmark["extra_info"] for benchmark in timed)}
    assert len(layouts) == 4


def test_time_runs_out(tmp_path):
    """What no time is left for is skipped, and says so."""
    options = ("--benchmark-only", "--minutes", "0", "-rs", f"--benchmark-json={tmp_path / 'b.json'}")
    programs = [f"benchmarks/bench_{name}.py" for name in ("import", "triton_host")]
    output = run("-m", "pytest", "benchmarks/bench_overhead.py", *programs, *options)
    assert "no time was left" in output and "passed" not in output.splitlines()[-1]
    left_out = output.partition(" left out ")[2].splitlines()
    assert {"import", "triton_host"} <= {line.split()[0] for line in left_out if line.strip()}


def test_every_benchmark_asks_for_its_time():
    """By the fixture `measure` or `in_time`: else it runs when the time is over, and time is held back for it to the end."""
    found = {}
    for path in sorted((ROOT / "benchmarks").glob("bench_*.py")):
        tests = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        found |= {test.name: {each.arg for each in test.args.args} for test in tests if test.name.startswith("test_")}
    assert {"test_q_sample", "test_import", "test_triton_host"} <= found.keys()
    assert not [name for name, fixtures in found.items() if fixtures.isdisjoint({"measure", "in_time"})]


def test_targets(peers):
    targets = importlib.import_module("benchmarks.targets")
    still, wild = {"median": 1.0, "best": 0.9}, {"median": 2.0, "best": 0.9}
    assert [targets.verdict(*x) for x in ((None, 1.0, wild), (2.0, 2.0, still), (2.0, 1.9, still), (2.0, 5.0, still, wild))] == [
        *("", "yes", "NO", "noisy")
    ]
    step = peers.ddpm_step(peers.shape_of(10**6), torch.float32, "seed", "out")
    assert targets.targets(step) == {"eager": 8.0, "torch.compile": 8.0} and targets.targets(replace(step, threads=1)) == {}
    assert all(targets.targets(case) == {"limit": 0.25} for case in peers.calls_of_16())


def test_in_turns_times_every_peer_in_every_round():
    common = importlib.import_module("benchmarks.common")
    calls = {"a": [], "b": []}

    def call(name, k):
        calls[name].append(k)
        time.sleep(1e-4)

    named = {name: [partial(call, name, k) for k in range(3)] for name in calls}
    samples = common.in_turns(named, 0.0, least=4)
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4}
    assert all(second >= 1e-4 for times in samples.values() for second in times)
    assert all(set(made) == {0, 1, 2} for made in calls.values())  # every set of buffers has its turn
    # the budget may be said when all is warm
    asked = []
    samples = common.in_turns(named, lambda one: asked.append(one) or 0.0, least=3)
    assert {len(times) for times in samples.values()} == {3} and len(asked) == 1 and asked[0] >= 2 * common.SHORT


def test_rounds_end_with_the_budget(monkeypatch):
    """By the clock: what single calls let expect may be far too little."""
    common = importlib.import_module("benchmarks.common")
    now = [0.0]

    def seconds(*arguments):
        now[0] += 5.0
        return 0.1

    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(common, "seconds", seconds)
    (found,) = common.in_turns({"a": [lambda: None]}, 32.0, least=2).values()
    assert len(found) == 7  # of 60 that last 6 s as it seemed
    (found,) = common.in_turns({"a": [lambda: None]}, 1.0, least=2).values()
    assert len(found) == 2


def test_a_slow_call_is_warm_after_two():
    common = importlib.import_module("benchmarks.common")
    made = []
    assert common.warmed([lambda: made.append(time.sleep(1.5 * common.UNTIMED))]) > common.UNTIMED and len(made) == 2
