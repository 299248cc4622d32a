"""What can be known of the built libraries without a GPU."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgen

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build/ninja"
CUDA_LIBRARY = Path(fastgen.__file__).parent / "_fastgen_cuda.so"
OPS = ("q_sample", "q_posterior", "ddpm_step", "randn", "bce_with_logits", "gan_loss", "diffusion_loss")


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("op", OPS)
def test_kernel_objects_share_no_symbol(op, isa):
    """A weak symbol (an inline function, a template) in two of them would run AVX-512 code on whatever machine."""
    path = OBJECTS / f"{op}_{isa}.o"
    if not path.exists():
        pytest.skip(f"no {path.name} here: the library was not built in this tree")
    lines = subprocess.run(["nm", "--defined-only", "--extern-only", path], capture_output=True, text=True, check=True).stdout
    assert [line.split()[1:] for line in lines.splitlines()] == [["T", f"fastgen_{op}_{isa}"]]


def test_cuda_library_resolves_every_symbol():
    """Loaded beside a CPU-only torch through the link-time stub of libtorch_cuda.so; no kernel is launched."""
    stub = OBJECTS / "libtorch_cuda.so"
    if not (CUDA_LIBRARY.exists() and stub.exists()) or torch.version.cuda is not None:
        pytest.skip("needs the CUDA library built in this tree and a CPU-only torch")
    ops = [*OPS[:1], "q_step", "q_sample_out", "q_step_out", *OPS[1:3], "ddim_step", "ddpm_step_x0", "ddim_step_x0"]
    ops += ["ddpm_step_out", "ddim_step_out", "ddpm_step_plain", *OPS[3:]]
    ops += [*(f"{op}_backward" for op in OPS[4:]), "diffusion_loss_backward_x0"]
    script = f"""
import ctypes, os
import fastgen, torch
ctypes.CDLL({str(stub)!r}, mode=os.RTLD_NOW | os.RTLD_GLOBAL)
ctypes.CDLL({str(CUDA_LIBRARY)!r}, mode=os.RTLD_NOW)
has = torch._C._dispatch_has_kernel_for_dispatch_key
print([op for op in {ops!r} if not has("fastgen::" + op, "CUDA")])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == "[]", run.stdout + run.stderr


def build(tmp_path, **environment):
    """`setup.py build_ext` as far as it gets before compiling: ninja is replaced by a program that succeeds."""
    (tmp_path / "ninja").write_text("#!/bin/sh\n")
    (tmp_path / "ninja").chmod(0o755)
    (tmp_path / "setup.py").symlink_to(ROOT / "setup.py")
    own = ("CUDA_HOME", "FASTGEN_CUDA", "TORCH_CUDA_ARCH_LIST", "FASTGEN_CUDA_ARCHS")
    clean = {key: value for key, value in os.environ.items() if key not in own}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path / "lib")]
    return subprocess.run(command, cwd=tmp_path, env=clean | environment, capture_output=True, text=True)


needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@needs_sources
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FASTGEN_CUDA": "yes"}, "FASTGEN_CUDA must be 0, 1 or unset, not 'yes'"),
        ({"FASTGEN_CUDA": "1"}, "FASTGEN_CUDA=1, but there is no nvcc"),
    ],
)
def test_build_refuses(tmp_path, environment, expected):
    run = build(tmp_path, PATH=str(tmp_path), **environment)
    assert run.returncode != 0 and expected in run.stderr


@needs_sources
@pytest.mark.parametrize(("choice", "expected"), [("", "no nvcc found"), ("0", "FASTGEN_CUDA=0")])
def test_cpu_only_build_says_so_in_one_line(tmp_path, choice, expected):
    run = build(tmp_path, PATH=str(tmp_path), FASTGEN_CUDA=choice)
    lines = [line for line in run.stderr.splitlines() if line.startswith("fastgen:")]
    assert run.returncode == 0, run.stderr
    assert len(lines) == 1 and "building the CPU library only" in lines[0] and expected in lines[0]


@needs_sources
@pytest.mark.parametrize(
    ("names", "archs"),
    [
        ("Ampere;Hopper", ["8.0", "8.6+PTX", "9.0+PTX"]),
        ("8.0 8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("Turing", ["7.5+PTX"]),
    ],
)
def test_architectures_by_torchs_names(monkeypatch, names, archs):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", names)
    monkeypatch.delenv("FASTGEN_CUDA_ARCHS", raising=False)
    assert runpy.run_path(str(ROOT / "setup.py"))["cuda_archs"]() == archs
