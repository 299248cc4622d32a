"""What Inductor makes of the Triton backend's ops for a GPU: compiled, by Triton as well, but not run. It needs no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import assert_same, normal

import fastgen
from fastgen._core import backends, dispatch

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


def test_inductor_sees_the_kernels_of_every_op(made):
    """They were compiled to machine code, or there would be no names."""
    assert len(made["ops"]) >= 20
    for name, found in made["ops"].items():
        (graph,), (kernels,) = found["graphs"], found["kernels"]
        assert not any("fastgen" in call for call in graph), name
        op = "q_sample" if name == "q_step" else name.split()[0].replace("ddim", "ddpm").replace("backward_x0", "backward")
        expected = op.removesuffix("_with_logits_backward").removesuffix("_with_logits").removesuffix("_loss_backward")
        assert kernels and any(kernel.startswith(expected[:4]) for kernel in kernels), (name, kernels)


@pytest.mark.skipif(not backends.HAS_OPS, reason="the compiled library is absent")
@pytest.mark.parametrize("capability, op", [("9.0", "fastgen.q_sample.default"), ("7.0", "triton_kernel_wrapper_mutation")])
def test_the_gpus_capability_decides(made, capability, op):
    """While compiling as well: code for 8.0 and 9.0 serves no V100."""
    (graph,) = made["gpus"][capability]
    assert op in graph


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
    """Inductor would hand over one below int32 as an int32."""
    for (kernel,), fused in zip(
        made["far seeds"]["kernels"][1:] + made["far"]["kernels"], [*made["far seeds"]["fused"][1:], []], strict=True
    ):
        assert kernel["signature"]["seed"] == "i64"
        assert len(fused) in (0, 2)  # none of Inductor's own has to do with it
    assert made["far"]["kernels"][0][0]["signature"]["offset"] == "i64"


@pytest.mark.parametrize("seed", [-(2**31) - 1, -(2**40), -(2**63)])
@pytest.mark.skipif("triton" not in fastgen.available_backends("cpu"), reason="needs TRITON_INTERPRET=1")
def test_far_seeds_are_handed_over_as_their_complement(monkeypatch, schedule, seed):
    x = normal((3, 5), 0)
    with fastgen.use_backend("triton"):
        expected = fastgen.q_sample(x, 5, schedule, seed=seed)
        monkeypatch.setattr(dispatch, "traced", lambda: True)
        assert_same(fastgen.q_sample(x, 5, schedule, seed=seed), expected)


def test_ones_become_constants(made):
    """So the kernel has to take constants for numbers."""
    constants = made["ones"]["kernels"][0][0]["constants"]
    assert all(f"'{name}': 1" in constants for name in ("index", "seed", "offset", "batch", "channels", "blocks"))
