"""Two revisions in one run: each side has its own fastgen, and what one of them lacks is said."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastgen

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("pytest_benchmark")


def compare(*arguments):
    command = [sys.executable, "-m", "benchmarks.compare", "--tiny", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_two_trees_are_paired_and_what_one_lacks_is_said(tmp_path):
    """The other tree is this one, without q_posterior and the drop-ins."""
    other = tmp_path / "fastgen"
    shutil.copytree(Path(fastgen.__file__).parent, other, ignore=shutil.ignore_patterns("drop_in", "__pycache__"))
    with open(other / "__init__.py", "a") as file:
        file.write("\ndel q_posterior\n")
    result = compare("--base-tree", tmp_path, "--only", "q_", "--json", tmp_path / "c.json")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "c.json").read_text())
    assert Path(found["base"]["fastgen"]) == other and Path(found["new"]["fastgen"]) == Path(fastgen.__file__).parent
    assert found["base"]["backend"] == found["new"]["backend"] == fastgen.backend()
    assert found["rows"] and all(row["case"].startswith("q_sample") for row in found["rows"])
    for row in found["rows"]:
        assert row["rounds"] == 2 and row["base"]["median"] > 0 and row["new"]["median"] > 0
        assert re.search(rf"^{re.escape(row['case'])} .* {row['ratio']['median']:.3f}$", result.stdout, re.MULTILINE)
    lacking = "AttributeError: module 'fastgen' has no attribute 'q_posterior'"
    posteriors = {name: why for name, why in found["left_out"].items() if name.startswith("q_posterior")}
    assert posteriors and set(posteriors.values()) == {f"base: {lacking}"} and f"base: {lacking}" in result.stdout
    assert "bench_drop_in" in found["left_out"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_an_unknown_revision_is_refused():
    result = compare("no-such-revision")
    assert result.returncode == 1
    assert result.stderr == "error: BASE: expected a revision of this repository, got 'no-such-revision'\n"


def test_a_tree_that_is_none_or_does_not_start_is_refused(tmp_path):
    result = compare("--base-tree", tmp_path)
    assert result.returncode == 1 and f"error: base: expected a tree with the package fastgen, got {tmp_path}" in result.stderr
    (tmp_path / "fastgen").mkdir()
    (tmp_path / "fastgen/__init__.py").write_text("raise SystemExit(3)\n")
    result = compare("--base-tree", tmp_path)
    assert result.returncode == 1 and "error: base: its process ended with status 3" in result.stderr


@pytest.mark.parametrize("arguments", [(), ("HEAD", "--base-tree", ".")])
def test_one_base_is_asked_for(arguments):
    result = compare(*arguments)
    assert result.returncode == 2 and "expected BASE or --base-tree, one of them" in result.stderr


class Sided:
    """A side whose calls take `seconds`."""

    def __init__(self, seconds):
        self.seconds, self.prepared, self.samples = seconds, 0, 0

    def prepare(self, name):
        self.prepared += 1
        return self.seconds

    def sample(self, times):
        assert self.prepared == 1
        self.samples += 1
        return self.seconds

    def release(self):
        self.prepared -= 1


@pytest.mark.parametrize(
    ("times", "ratio", "verdict"),
    [
        ([(3e-3, 1e-3)] * 3, 3.0, "faster"),
        ([(1e-3, 2e-3)] * 3, 0.5, "SLOWER"),
        ([(3e-3, 1e-3), (1e-3, 1e-3), (1e-3, 2e-3)], 1.0, ""),
        ([(1.03e-3, 1e-3), (1.01e-3, 1e-3), (1.06e-3, 1e-3)], 1.03, ""),
        ([(1.03e-3, 1e-3), (1.04e-3, 1e-3), (1.05e-3, 1e-3)], 1.04, "faster"),
    ],
    ids=["faster", "slower", "pairs that disagree", "too different to say", "alike enough"],
)
def test_the_ratio_is_that_of_all_pairs(monkeypatch, times, ratio, verdict):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import compare

    pairs = [(Sided(base), Sided(new)) for base, new in times]
    row = compare.compared(pairs, "a case", seconds=0.1, tiny=False)
    assert row["ratio"]["median"] == pytest.approx(ratio) and row["verdict"] == verdict
    assert row["ratio of each pair"] == pytest.approx([base / new for base, new in times])
    for base, new in pairs:
        assert base.samples == new.samples == row["rounds"] / 3 and base.prepared == new.prepared == 0
