"""What can be known of the built libraries without a GPU."""

import os
import pty
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgen
from fastgen._core import declared

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build/ninja"
CUDA_LIBRARY = Path(fastgen.__file__).parent / "_fastgen_cuda.so"


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("op", declared.STEMS)
def test_kernel_objects_share_no_symbol(op, isa):
    """A weak symbol (an inline function, a template) in two of them would run AVX-512 code on whatever machine."""
    path = OBJECTS / f"{op}_{isa}.o"
    if not path.exists():
        pytest.skip(f"no {path.name} here: the library was not built in this tree")
    lines = subprocess.run(["nm", "--defined-only", "--extern-only", path], capture_output=True, text=True, check=True).stdout
    entries = re.findall(r"FG_CPU_KERNEL\((\w+),", (ROOT / f"csrc/{op}/{op}_cpu.cpp").read_text())
    assert op in entries
    assert sorted(line.split()[1:] for line in lines.splitlines()) == sorted(["T", f"fastgen_{entry}_{isa}"] for entry in entries)


def test_cuda_library_resolves_every_symbol():
    """Loaded beside a CPU-only torch through the link-time stub of libtorch_cuda.so; no kernel is launched."""
    stub = OBJECTS / "libtorch_cuda.so"
    if not (CUDA_LIBRARY.exists() and stub.exists()) or torch.version.cuda is not None:
        pytest.skip("needs the CUDA library built in this tree and a CPU-only torch")
    ops = [name for name, op in declared.OPS.items() if op.cuda]
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


def program(path, text=""):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


# each line begins as the user has ninja begin it, where they do
NINJA = """at=${NINJA_STATUS-[%f/%t] }; [ "$at" = "[%f/%t] " ] && at="[1/3] "
for word; do [ "$word" = -n ] && echo "${at}C++ isa" && echo "${at}CUDA randn" && echo "${at}link it"; done; exit 0"""
NVCC = """for word; do
  [ "$word" = --dryrun ] && echo "#$ TOP=TOOLKIT" >&2
  [ "$word" = --list-gpu-code ] && for code in 75 80 86 90 100; do echo sm_$code; done
done; exit 0"""


def build(tmp_path, without=(), usual_cuda="/nowhere", ninja=NINJA, python=(), **environment):
    """`setup.py build_ext` as far as it gets before compiling: ninja and the compilers are programs that do nothing, the only
    ones on the PATH."""
    for name, text in {"ninja": ninja, "g++": "", "gcc": "", "nm": ""}.items():
        if name not in without:
            program(tmp_path / name, text)
    setup = (ROOT / "setup.py").read_text()
    assert '"/usr/local/cuda"' in setup
    (tmp_path / "setup.py").write_text(setup.replace('"/usr/local/cuda"', repr(str(usual_cuda))))
    own = ("CUDA_HOME", "FASTGEN_CUDA", "TORCH_CUDA_ARCH_LIST", "FASTGEN_CUDA_ARCHS", "CXX", "_PYPROJECT_HOOKS_BUILD_BACKEND")
    for path in ("csrc/declarations.py", "fastgen/_core/declared.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text((ROOT / path).read_text())
    clean = {key: value for key, value in os.environ.items() if key not in own} | {"PATH": str(tmp_path)}
    command = [sys.executable, *python, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path / "lib")]
    return subprocess.run(command, cwd=tmp_path, env=clean | environment, capture_output=True, text=True)


def nvcc(tmp_path, where="cuda"):
    """A toolkit for the architectures 7.5 … 10.0, in a folder of its own."""
    program(tmp_path / where / "bin/nvcc", NVCC.replace("TOOLKIT", str(tmp_path / where)))
    return tmp_path / where


def smi(tmp_path, *capabilities, text=None):
    program(tmp_path / "nvidia-smi", text or "\n".join(f"echo {capability}" for capability in capabilities))


def built_for(tmp_path):
    """The architectures in the file for ninja, "90" for machine code and "compute_90" for PTX."""
    return re.findall(
        r",code=(?:sm_)?(\w+)", (tmp_path / "build/ninja/build.ninja").read_text().split("rule nvcc")[1].split("\n")[1]
    )


def words(run):
    return [line.removeprefix("fastgen: ") for line in run.stderr.splitlines() if line.startswith("fastgen: ")]


RUN_SETUP = "import runpy, sys; sys.path.insert(0, '.'); sys.argv.pop(0); runpy.run_path('setup.py', run_name='__main__')"
NO_TORCH = (
    f"import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'torch' else f(n, *a); {RUN_SETUP}"
)
needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def assert_refused(run, expected):
    """In one sentence, without a traceback."""
    assert run.returncode == 1 and len(run.stderr.splitlines()) == 1, run.stderr
    assert run.stderr.startswith("fastgen: ") and expected in run.stderr


@needs_sources
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FASTGEN_CUDA": "yes"}, "FASTGEN_CUDA must be 0, 1 or unset, not 'yes'"),
        ({"FASTGEN_CUDA": "1"}, "FASTGEN_CUDA=1, but there is no nvcc on the PATH nor in /nowhere/bin"),
        ({"FASTGEN_CUDA": "1", "CUDA_HOME": "/else"}, "FASTGEN_CUDA=1, but there is no nvcc in CUDA_HOME's bin, /else/bin"),
        ({"CXX": "icpx -O1"}, "there is no C++ compiler: icpx -O1 was not found"),
        ({"without": ["g++"]}, "there is no C++ compiler: g++ was not found"),
        ({"python": ["-c", NO_TORCH]}, "torch >= 2.10 must be installed to build"),
        ({"ninja": "exit 1"}, "the build failed"),
    ],
)
def test_build_refuses(tmp_path, environment, expected):
    run = build(tmp_path, **environment)
    if "ninja" in environment:
        run.stderr = "\n".join(run.stderr.splitlines()[-1:])  # behind the line that says that there is no nvcc
    assert_refused(run, expected)


@needs_sources
def test_build_refuses_without_ninja(tmp_path):
    """Neither on the PATH nor where pip puts it."""
    nowhere = "p = s.get_path; s.get_path = lambda name, *scheme: '/nowhere' if name == 'scripts' else p(name, *scheme)"
    script = f"import sys, sysconfig as s; sys.executable = '/nowhere/python'; {nowhere}; {RUN_SETUP}"
    assert_refused(build(tmp_path, without=["ninja"], python=["-c", script]), "there is no ninja: `pip install ninja`")


@needs_sources
def test_ninja_of_the_user_is_found(tmp_path):
    """Where `pip install --user` puts it, which is on few PATHs."""
    program(tmp_path / "user/ninja", "echo found >&2")
    user = "p = s.get_path; s.get_path = lambda name, *scheme: 'user' if scheme == ('posix_user',) else p(name, *scheme)"
    user += " if name != 'scripts' else '/nowhere'"
    script = f"import sys, sysconfig as s; sys.executable = '/nowhere/python'; {user}; {RUN_SETUP}"
    run = build(tmp_path, without=["ninja"], python=["-c", script])
    assert run.returncode == 0 and "found" in run.stderr, run.stderr


@needs_sources
def test_cuda_needs_gcc_too(tmp_path):
    nvcc(tmp_path)
    run = build(tmp_path, without=["gcc"], CUDA_HOME=str(tmp_path / "cuda"))
    assert_refused(run, "gcc was not found")


@needs_sources
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "there is no nvcc on the PATH nor in /nowhere/bin"),
        ({"FASTGEN_CUDA": "0"}, "FASTGEN_CUDA=0"),
        ({"CUDA_HOME": "/else"}, "there is no nvcc in CUDA_HOME's bin, /else/bin"),
    ],
)
def test_cpu_only_build_says_so_in_one_line(tmp_path, environment, expected):
    run = build(tmp_path, ninja="exit 0", **environment)
    assert run.returncode == 0 and len(words(run)) == 1, run.stderr
    assert "building the CPU library only" in words(run)[0] and expected in words(run)[0]


@needs_sources
@pytest.mark.parametrize("where", ["usual place", "PATH", "CUDA_HOME"])
def test_where_nvcc_is_looked_for(tmp_path, where):
    home = nvcc(tmp_path)
    if where == "PATH":
        (tmp_path / "nvcc").symlink_to(home / "bin/nvcc")
    run = build(
        tmp_path, usual_cuda=home if where == "usual place" else "/nowhere", **({where: home} if where == "CUDA_HOME" else {})
    )
    assert run.returncode == 0, run.stderr
    assert f"command = {home}/bin/nvcc" in (tmp_path / "build/ninja/build.ninja").read_text()


# ---- for which GPUs -------------------------------------------------------------------------------------------------


@needs_sources
@pytest.mark.parametrize(
    ("gpus", "archs", "why"),
    [
        (["9.0"], ["90"], "for 9.0 (that of the GPU that nvidia-smi finds)"),
        (["9.0", "9.0", "8.6"], ["86", "90"], "for 8.6 9.0 (those of the GPUs that nvidia-smi finds)"),
        (["12.0"], ["100", "compute_100"], "12.0 is newer than this nvcc knows, so its driver compiles it from PTX"),
        (["10.3", "8.0"], ["80", "100", "compute_100"], "10.3 is newer than this nvcc knows"),
        (["7.0", "8.0"], ["80"], "7.0 is older than 7.5, the oldest served"),
    ],
)
def test_build_is_for_the_gpus_that_are_there(tmp_path, gpus, archs, why):
    smi(tmp_path, *gpus)
    run = build(tmp_path, usual_cuda=nvcc(tmp_path))
    assert run.returncode == 0 and built_for(tmp_path) == archs, run.stderr
    first, second = words(run)
    assert why in first and "1 C++ files, and 1 CUDA files" in first and "min on" in first
    assert "FASTGEN_CUDA_ARCHS=" in second and "FASTGEN_CUDA=0" in second


ALL = ["75", "80", "86", "89", "90", "100", "120", "compute_120"]


@needs_sources
@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "there is no nvidia-smi"),
        ("echo NVIDIA-SMI has failed because it could not communicate >&2; exit 9", "names no GPU (NVIDIA-SMI has failed"),
        ("exit 0", "names no GPU (exit status 0)"),
        ("echo '[N/A]'", "names no GPU ([N/A])"),
        ("while :; do :; done", "gave no answer within 1 s"),
    ],
)
def test_build_is_for_all_where_no_gpu_is_known(tmp_path, monkeypatch, text, why):
    if text:
        smi(tmp_path, text=text)
    script = (
        "import pathlib; p = pathlib.Path('setup.py'); p.write_text(p.read_text().replace('SMI_SECONDS = 10', 'SMI_SECONDS = 1')); "
    )
    run = build(tmp_path, usual_cuda=nvcc(tmp_path), python=["-c", script + RUN_SETUP])
    assert run.returncode == 0 and built_for(tmp_path) == ALL, run.stderr
    assert "(all of them, since " in words(run)[0] and why in words(run)[0]


@needs_sources
def test_gpus_that_are_all_too_old_need_no_cuda_library(tmp_path):
    """Unless it is asked for."""
    smi(tmp_path, "7.0", "6.1")
    run = build(tmp_path, usual_cuda=nvcc(tmp_path))
    assert run.returncode == 0 and "rule nvcc" not in (tmp_path / "build/ninja/build.ninja").read_text()
    assert "CPU library only: no GPU here would run" in words(run)[0] and "7.0 is older than 7.5" in words(run)[0]
    run = build(tmp_path, usual_cuda=nvcc(tmp_path), FASTGEN_CUDA="1")
    assert run.returncode == 0 and built_for(tmp_path) == ALL and "since FASTGEN_CUDA=1" in words(run)[0]


@needs_sources
@pytest.mark.parametrize(
    ("variable", "value", "archs"), [("FASTGEN_CUDA_ARCHS", "all", ALL), ("TORCH_CUDA_ARCH_LIST", "8.0", ["80"])]
)
def test_who_chooses_architectures_gets_them(tmp_path, variable, value, archs):
    """The GPUs that are there do not count, so `make wheel`, which asks for all, serves them all."""
    smi(tmp_path, "9.0")
    run = build(tmp_path, usual_cuda=nvcc(tmp_path), **{variable: value})
    assert run.returncode == 0 and built_for(tmp_path) == archs, run.stderr
    assert f"(as {variable} says)" in words(run)[0]


@needs_sources
def test_a_wheel_is_for_all():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r'FASTGEN_CUDA_ARCHS="\$\$\{FASTGEN_CUDA_ARCHS:-.*all\}\}" \$\(PIP\) wheel', makefile)


@needs_sources
@pytest.mark.parametrize("status", ["", "%p ", "[%f/%t %es] "])
def test_the_users_ninja_status_hides_no_plan(tmp_path, status):
    run = build(tmp_path, NINJA_STATUS=status, FASTGEN_CUDA="0")
    assert run.returncode == 0 and "compiling 1 C++ files" in run.stderr


@needs_sources
def test_nothing_to_do_is_not_announced(tmp_path):
    run = build(tmp_path, usual_cuda=nvcc(tmp_path), ninja="echo 'ninja: no work to do.'")
    assert run.returncode == 0 and words(run) == []


@needs_sources
def test_under_pip_the_terminal_is_told(tmp_path):
    """pip keeps a build's output to itself; a pseudo-terminal sees what the build says, and without one the output has it."""
    hook = {"_PYPROJECT_HOOKS_BUILD_BACKEND": "setuptools.build_meta", "FASTGEN_CUDA": "0"}
    assert "building the CPU library only" in build(tmp_path, **hook, python=["-c", f"import os; os.setsid(); {RUN_SETUP}"]).stderr
    leader, follower = pty.openpty()
    name = os.ttyname(follower)
    take = (
        f"import os; os.setsid(); os.open({name!r}, os.O_RDWR); {RUN_SETUP}"  # the first terminal that a session opens is its own
    )
    run = build(tmp_path, **hook, python=["-c", take])
    os.close(follower)
    seen = os.read(leader, 10_000).decode()
    os.close(leader)
    assert run.returncode == 0 and words(run) == []
    assert seen.startswith("\r\nfastgen: building the CPU library only (FASTGEN_CUDA=0)\r\n") and "compiling 1 C++ files" in seen


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
    assert runpy.run_path(str(ROOT / "setup.py"))["cuda_archs"]()[0] == archs
