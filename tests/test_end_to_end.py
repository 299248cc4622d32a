"""The end-to-end benchmarks: an entry for every peer, and peers that differ in nothing but whose code makes the numbers."""

import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch

import fastgen

ROOT = Path(__file__).resolve().parents[1]
for _needed in ("pytest_benchmark", "sklearn", "tqdm", "PIL"):
    pytest.importorskip(_needed)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def end_to_end(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import end_to_end

    return end_to_end


def curve(train_step):
    return torch.stack([torch.stack([*train_step(step).values()]) for step in range(5)]).detach()


def test_every_peer_has_an_entry(tmp_path):
    # pytest-benchmark measures nothing beside xdist, which this is not
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_end_to_end.py", "--benchmark-only", "--tiny", "-q"]
    command += ["--bench-device=cpu", f"--benchmark-json={tmp_path / 'b.json'}", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    groups = {}
    for entry in json.loads((tmp_path / "b.json").read_text())["benchmarks"]:
        info = entry["extra_info"]
        groups.setdefault(entry["group"], set()).add(info["peer"])
        assert info["kind"] == "end_to_end" and info["what"] == entry["group"] and info["steps timed"] > 0
        # pytest-benchmark's statistics are those of the samples that were measured in turns
        assert info["rate"] == pytest.approx(1 / entry["stats"]["mean"]) and entry["stats"]["rounds"] == 2
        assert info["ratio"]["q1"] <= info["ratio"]["median"] <= info["ratio"]["q3"]
        assert (info["ratio"]["q1"] == info["ratio"]["q3"] == 1.0) == (info["peer"] == "fastgen")
        assert info["peak_bytes"] is None if entry["group"].startswith("robot") else info["peak_bytes"] >= 0
    robot = groups.pop("robot policy, 100 steps")
    assert robot - {"diffusers"} == {"fastgen", "eager"}
    names = {"DDPM training", "DDPM sampling, 1000 steps", "GAN training"}
    assert groups == {name: {"fastgen", "eager"} for name in names}


def test_ddpm_training_is_the_same_with_fastgen_and_without(end_to_end, monkeypatch):
    settings, turn = end_to_end.ddpm_settings(tiny=True), count()
    seed = end_to_end.example.derived_seed(settings.seed, "noise")
    ours = curve(end_to_end.ddpm_training("fastgen", settings))
    monkeypatch.setattr(torch, "randn_like", lambda x: fastgen.randn(x.shape, seed=seed, offset=next(turn)))
    theirs = curve(end_to_end.ddpm_training("eager", settings))
    assert next(turn) == 5 and ours.std() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_gan_training_is_the_same_with_fastgen_and_without(end_to_end, monkeypatch):
    settings, turn = end_to_end.gan_settings(tiny=True), count()
    seed = end_to_end.example.derived_seed(settings.seed, "latent")
    ours = curve(end_to_end.gan_training("fastgen", settings))
    step = end_to_end.gan_training("eager", settings)
    monkeypatch.setattr(torch, "randn", lambda shape, device: fastgen.randn(shape, seed=seed, offset=next(turn)))
    theirs = curve(step)
    assert next(turn) == 10 and ours.std() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_sampling_is_the_same_with_fastgen_and_without(end_to_end, monkeypatch):
    settings, steps = end_to_end.ddpm_settings(tiny=True), 5
    ours = end_to_end.ddpm_sampling("fastgen", settings, steps)()
    seeds = end_to_end.example.sample_seeds(end_to_end.SEED, settings.batch_size)
    offsets = iter(range(steps, -1, -1))

    def noise(*shape, device=None):
        return fastgen.randn((settings.batch_size, 1, 8, 8), seed=seeds, offset=next(offsets))

    chain = end_to_end.ddpm_sampling("eager", settings, steps)
    for name in ("randn", "randn_like"):
        monkeypatch.setattr(torch, name, noise)
    theirs = chain()
    assert next(offsets, None) is None and ours.std() > 0.1
    # x0 is the difference of two terms that are up to 159 times as large as it is
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


PEAK = """
import torch
from benchmarks import end_to_end

mib = 2**20
torch.ones(128 * mib, dtype=torch.uint8)  # an earlier peak, which is none of the work's
held = torch.ones(64 * mib, dtype=torch.uint8)
print(end_to_end.peak_of(lambda: [torch.ones(64 * mib, dtype=torch.uint8).numel() for _ in range(3)]))
"""


def test_peak_of_counts_what_is_held_at_once_and_no_more():
    """In a new process, as it is used: an old one has freed memory to use again."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    result = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    if result.stdout.strip() == "None":
        pytest.skip("the system does not tell the peak memory of a process")
    assert 60 * 2**20 < int(result.stdout) < 80 * 2**20


def test_a_replay_needs_samples(end_to_end):
    from benchmarks.replay import Replay

    with pytest.raises(ValueError, match="samples: expected at least one, got none"):
        Replay().play(None, [])


def test_an_unknown_work_is_named(end_to_end):
    with pytest.raises(ValueError, match="what: expected one of .*'GAN training'.*, got 'nothing'"):
        end_to_end.find("nothing")
