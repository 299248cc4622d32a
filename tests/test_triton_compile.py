"""What Inductor makes of the Triton backend's ops for a GPU: compiled, by Triton as well, but not run. It needs no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def made():
    """What compile_for_gpu.py prints, by case."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    for name in ("TRITON_INTERPRET", "FASTGEN_BACKEND"):
        environment.pop(name, None)
    command = [sys.executable, str(HERE / "compile_for_gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr
    assert "assuming every input is mutated" not in done.stderr  # torch could not compile the kernel
    return json.loads(done.stdout)


CASES = ("tensors", "batches", "timesteps", "seeds", "far seeds", "ones", "far", "given noise", "channels last")


@pytest.mark.parametrize("case", CASES)
def test_inductor_sees_the_kernel(made, case):
    """No op of fastgen's is left in a graph, and what Inductor writes of the kernel compiles to machine code."""
    for graph, kernels in zip(made[case]["graphs"], made[case]["kernels"], strict=True):
        assert "triton_kernel_wrapper_mutation" in graph
        assert not any("fastgen" in call for call in graph)
        (kernel,) = kernels
        assert kernel["name"] == "q_sample_kernel"
        assert ".visible .entry q_sample_kernel(" in kernel["ptx"]


def test_torch_finds_the_kernels_of_each_op(made):
    """Its caches take the kernels' source for a part of the key only if it does."""
    assert made["found"] and all(made["found"].values()), made["found"]


@pytest.mark.parametrize("case, most", [("batches", 1), ("timesteps", 2), ("seeds", 2), ("far seeds", 4)])
def test_number_of_programs(made, case, most):
    """One for a first number and one for any other; of far seeds, those above int32 and those below have theirs."""
    assert made[case]["made"][-1] <= most


def test_dynamic_batch_is_in_the_grid(made):
    ((launch,),) = made["batches"]["launches"]
    *_, grid, _, _, _ = launch.split(", ")
    assert "s" in grid


@pytest.mark.parametrize("case", ["tensors", "timesteps", "seeds"])
def test_arguments_that_are_not_used_cost_nothing(made, case):
    """One sin(x) is written for the kernel, though it takes pointers that it does not read."""
    for fused in made[case]["fused"]:
        before, after = fused
        assert before.count("buf") == 1


def test_far_seeds_are_read_as_64_bits(made):
    for kernels, fused in zip(made["far seeds"]["kernels"][1:], made["far seeds"]["fused"][1:], strict=True):
        signature = kernels[0]["signature"]
        assert signature["seed"] == "i64" or "'SEEDS': 1" in kernels[0]["constants"]
        assert not any("s11" in launch for launch in fused)  # nor does a kernel of Inductor's take it, as 32 bits
    assert made["far"]["kernels"][0][0]["signature"]["offset"] == "i64"


def test_ones_become_constants(made):
    """So the kernel has to take constants for numbers."""
    constants = made["ones"]["kernels"][0][0]["constants"]
    assert all(f"'{name}': 1" in constants for name in ("index", "seed", "offset", "batch", "channels", "blocks"))


def test_gradients(made):
    """The backward is the same kernel."""
    forward, backward = made["gradient"]["kernels"]
    assert [kernel["name"] for kernel in forward + backward] == ["q_sample_kernel"] * 2
    assert "'NOISE': 0" in backward[0]["constants"]
