"""The benchmarks run, at a tiny size, and compare equal work: peers compute the same and move the declared bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
    for mode in ("noise", "seed"):
        for output in ("out", "fresh"):
            yield peers.q_sample(SHAPE, dtype, mode, output)
            yield peers.ddpm_step(SHAPE, dtype, mode, output)
    for output in ("out", "fresh"):
        yield peers.ddim_step(SHAPE, dtype, output)
    yield peers.q_posterior(SHAPE, dtype)
    yield peers.randn(SHAPE, dtype)
    yield peers.diffusion_loss(SHAPE, dtype)
    for mode in ("forward", "backward"):
        yield peers.bce_with_logits(SHAPE, dtype, mode)
        yield peers.gan_loss(SHAPE, dtype, mode)


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
        names = case.peers[1:]  # all but torch.add
        calls = peers.prepare(case, names, tiny=True)
        # they share an out=, so each result is copied before the next peer writes
        results = {name: [x.detach().clone() for x in tensors(calls[name][0]())] for name in names}
        ours = results.pop("fastgen")
        for name, theirs in results.items():
            assert [x.shape for x in ours] == [x.shape for x in theirs], f"{case}, {name}"
            largest = max(range(len(ours)), key=lambda i: ours[i].numel())
            # losses are not rounded to half precision
            dtypes = (dtype, torch.float32) if ours[largest].dim() == 0 else (dtype,)
            assert theirs[largest].dtype == dtype and ours[largest].dtype in dtypes, f"{case}, {name}"
            for x, y in zip(ours, theirs, strict=True):
                difference = (x.float() - y.float()).abs()
                # from a seed: other numbers, drawn alike
                close = difference <= tolerance * (1 + y.float().abs()) if "seed" not in case.mode else y.isfinite()
                assert x.isfinite().all() and close.all(), f"{case}, {name}: {difference.max()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_declared_bytes_are_those_of_the_tensors(peers, dtype):
    """Large floating tensors among the arguments, fresh results, and for the backward its second reading."""
    for case in all_cases(peers, dtype):
        (arguments,) = peers.sets(case)
        read = sum(x.nbytes for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point())
        results = [x for x in tensors(peers.prepare(case, ("fastgen",))["fastgen"][0]()) if x.shape == case.shape]
        fresh = sum(x.nbytes for x in results if not any(x is argument for argument in arguments))
        twice = read if case.mode == "backward" else 0
        assert case.bytes == read + twice + fresh, str(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limit_moves_the_declared_bytes(peers, dtype):
    for case in all_cases(peers, dtype):
        (call,) = peers.prepare(case, ("torch.add",))["torch.add"]
        moved = sum(x.nbytes for x in call.args) + call().nbytes
        assert call.func is torch.add and 0 <= case.bytes - moved < 3 * dtype.itemsize, str(case)


def test_buffers_are_colder_than_the_cache(peers):
    common = sys.modules["benchmarks.common"]
    for megabytes in (1, 4, 12, 64, 1024):
        size = megabytes * common.MI
        assert (common.copies(size) - 1) * size >= 2 * common.cache_bytes()
    assert common.copies(common.MI - 1) == 1


def test_pytest_benchmarks(tmp_path):
    end_to_end = "--ignore=benchmarks/bench_end_to_end.py"  # has a test of its own
    arguments = (end_to_end, "--benchmark-only", "--tiny", "-q", f"--benchmark-json={tmp_path / 'b.json'}")
    output = run("-m", "pytest", "benchmarks", *arguments)
    assert "bytes that must be moved, per second" in output
    benchmarks = json.loads((tmp_path / "b.json").read_text())["benchmarks"]
    (imported,) = [benchmark for benchmark in benchmarks if benchmark["group"] == "import"]
    assert imported["extra_info"]["torch s"] > 0 and 0 < imported["extra_info"]["fastgen's share"] < 1
    assert "then import fastgen" in output
    benchmarks.remove(imported)
    groups = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        groups.setdefault(benchmark["group"], set()).add(info["peer"])
        assert info["bytes"] > 0 and info["GB/s"] > 0 and info["share of torch.add"] > 0
        assert info["backend"] == fastgen.backend() and info["torch"] == torch.__version__
        assert {"op", "mode", "output", "size", "dtype", "fastgen", "commit", "dirty", "cpu"} <= info.keys()
    limit_and_ours = {"torch.add", "fastgen"}
    for group, found in groups.items():
        if group.startswith("diffusers"):
            assert found == limit_and_ours | {"diffusers"}
        else:
            assert found == limit_and_ours | {"eager"} | (set() if "-t_" in group else {"torch.compile"})
    ops = {benchmark["extra_info"]["op"] for benchmark in benchmarks}
    losses = {"bce_with_logits", "gan_loss", "diffusion_loss"}
    drop_ins = {"diffusers DDPMScheduler.step", "diffusers DDIMScheduler.step", "diffusers add_noise"}
    assert ops == {"q_sample", "ddpm_step", "ddim_step", "q_posterior", "randn"} | losses | drop_ins


def test_side_by_side(tmp_path):
    output = run("-m", "benchmarks.side_by_side", "--tiny", "--json", str(tmp_path / "s.json"))
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["environment"]["backend"] == fastgen.backend()
    assert len(result["rows"]) == 23 + 2 * 5 and len(result["flatness"]) == 12
    for row in result["rows"]:
        assert "fastgen" in row["peers"] and "torch.add" in row["peers"]
        assert all(peer["ns_per_element"]["median"] > 0 for peer in row["peers"].values())
    assert "ddpm_step(seed=, out=)" in output and "q_sample(noise=), t tensor" in output and "max ÷ min" in output
