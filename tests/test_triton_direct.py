"""Direct launches (fastgen/triton/common/direct.py): the same as Triton's own dispatch would make. They need Triton, but no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def made():
    """What direct_launches.py prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    for name in ("TRITON_INTERPRET", "FASTGEN_BACKEND", "TRITON_DEBUG", "TRITON_INSTRUMENTATION_MODE"):
        environment.pop(name, None)
    command = [sys.executable, str(HERE / "direct_launches.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_launches_of_all_samples(made):
    """Kernel, grid, stream, addresses, numbers and results, on the first call and when it is repeated with other numbers."""
    differ = [(op, differs) for op, _, differs in made["samples"] if differs]
    assert not differ


def test_every_op_is_launched_directly(made):
    """But what needs a copy, or launches nothing."""
    launched = Counter(op for op, direct, _ in made["samples"] if direct)
    assert launched.keys() == {op for op, _, _ in made["samples"]} and len(launched) == 39
    assert sum(launched.values()) >= 200


def test_whoever_observes_launches_sees_them(made):
    """[whether the call was direct, how often the hook was called]"""
    assert made["observers"] == {
        "nobody": [False, True],  # the first call is kept
        "launch_enter_hook": [False, 1],
        "launch_exit_hook": [False, 1],
        "a single hook": [False, 1],
        "no hook": [True, 0],
        "pre-run hook": [False, 1],
        "debug": [False],
        "instrumentation": [False],
        "dispatch mode": [False],
        "nobody again": [True],
    }


def test_tensors_given_twice_are_two(made):
    assert made["aliases"] == [True, True]


def test_caches_of_triton_may_be_cleared(made):
    assert made["cleared"] == [True, True]


def test_another_current_device(made):
    assert made["other device"] == [True, [0]]


def test_threads(made):
    assert made["threads"]


def test_an_unknown_triton_is_left_to_its_own_dispatch(made):
    drivers = made["other drivers"]
    assert drivers["another"] is False and "hip" in drivers["amd"]
    for launcher, expected in (("OtherLauncher", "grid, *args"), ("UnreadableLauncher", "cannot be found out")):
        direct, problem = drivers[launcher]
        assert direct == [False, False] and expected in problem
        assert sum(problem in line for line in made["logged"]) == 1


def test_a_triton_that_lacks_a_name_is_left_to_its_own_dispatch(made):
    """It is said once, and calls are direct again where the name is there."""
    lacking = dict.fromkeys(("do_not_specialize", "signature.parameters", "knobs"), [False, False])
    assert made["missing"] == {**lacking, "all there": [False, True]}
    for name in ("do_not_specialize", "attribute 'parameters'", "launch_enter_hook"):
        assert sum(name in line for line in made["logged"]) == 1
