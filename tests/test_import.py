"""`import fastgen` works whatever is missing, old or broken, and `backend_info` says in words what that is. No GPU is needed."""

import inspect
import os
import shutil
import struct
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

import fastgen

PACKAGE = Path(fastgen.__file__).parent
CPU, CUDA = "_fastgen_cpu.so", "_fastgen_cuda.so"
STUB = PACKAGE.parent / "build/ninja/libtorch_cuda.so"
needs_cpu_library = pytest.mark.skipif(not (PACKAGE / CPU).exists(), reason="the CPU library was not built")
needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
needs_cuda_library = pytest.mark.skipif(
    not ((PACKAGE / CUDA).exists() and STUB.exists()) or torch.version.cuda is not None or shutil.which("gcc") is None,
    reason="needs the CUDA library built in this tree, a CPU-only torch and gcc",
)


def shared_library(path, source, *flags):
    path.parent.mkdir(exist_ok=True)
    subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", path, *flags], input=source, text=True, check=True)


def test_type_checkers_are_told_to_read_the_annotations():
    assert (PACKAGE / "py.typed").exists()


def annotated(value):
    """What there is to annotate of a public function or class: the class's own methods and properties, without those of Python's
    protocols but the making and the calling."""
    if not inspect.isclass(value):
        return [value]
    own = [x for name, x in vars(value).items() if not name.startswith("_") or name in ("__init__", "__call__")]
    own = [x.__func__ if isinstance(x, (classmethod, staticmethod)) else x.fget if isinstance(x, property) else x for x in own]
    return [x for x in own if inspect.isfunction(x)]


@pytest.mark.parametrize("name", fastgen.__all__)
def test_the_public_is_annotated(name):
    """Every parameter and every result, in words that resolve."""
    for function in annotated(getattr(fastgen, name)):
        expected = set(inspect.signature(function).parameters) - {"self", "cls"}
        expected |= set() if function.__name__ == "__init__" else {"return"}
        assert expected - set(typing.get_type_hints(function)) == set(), function.__qualname__


# ---- files ----------------------------------------------------------------------------------------------------------

BREAKAGES = {
    "empty": (lambda elf: b"", "file too short"),
    "the header only": (lambda elf: elf[:64], "cut short"),
    "half": (lambda elf: elf[: len(elf) // 2], "cut short"),  # without the check, this one kills the process
    "text": (lambda elf: b"<!DOCTYPE html>" * 1000, "invalid ELF header"),
    "another processor's": (lambda elf: elf[:18] + struct.pack("<H", 183) + elf[20:], "cannot open shared object file"),
    "32 bits": (lambda elf: elf[:4] + b"\1" + elf[5:], "wrong ELF class"),
}


@needs_cpu_library
@pytest.mark.parametrize(("damage", "reason"), BREAKAGES.values(), ids=BREAKAGES)
def test_broken_library(tmp_path, monkeypatch, damage, reason):
    (tmp_path / CPU).write_bytes(damage((PACKAGE / CPU).read_bytes()))
    monkeypatch.setattr(fastgen._core.backends, "_HERE", tmp_path)
    said = fastgen._core.backends._load(CPU, "fastgen::nothing", "CPU")
    assert said.startswith(f"{CPU} could not be loaded: ") and reason in said


@needs_compiler
def test_unresolved_symbol(tmp_path, monkeypatch):
    shared_library(tmp_path / CPU, "void nowhere(void); void here(void) { nowhere(); }")
    monkeypatch.setattr(fastgen._core.backends, "_HERE", tmp_path)
    assert "undefined symbol: nowhere" in fastgen._core.backends._load(CPU, "fastgen::nothing", "CPU")


def test_missing_library(tmp_path, monkeypatch):
    monkeypatch.setattr(fastgen._core.backends, "_HERE", tmp_path)
    assert (
        fastgen._core.backends._load(CPU, "fastgen::nothing", "CPU") == f"{CPU} is missing: it was not built, or has been removed"
    )


# ---- the whole import -----------------------------------------------------------------------------------------------

USE = """
import contextlib, fastgen
print(fastgen.backend_info())
x, schedule = torch.ones(2, 3, requires_grad=True), fastgen.Schedule.linear(10)
y = fastgen.ddpm_step(fastgen.q_sample(x, 5, schedule, seed=1), x, 5, schedule, seed=1)
fastgen.bce_with_logits(y, fastgen.randn((2, 3), seed=1).sigmoid()).backward()
fastgen.q_posterior(x, y, torch.tensor([0, 9]), schedule)
for device in ("cpu", "cuda"):
    print(device, fastgen.backend(device), fastgen.available_backends(device))
    try:
        with fastgen.use_backend("cpp"):
            fastgen.backend(device)
    except RuntimeError as error:
        print("refused:", error)
"""


def import_copy(tmp_path, before="", without=(), environment=None):
    """What a copy of the package prints when it is imported and used in an interpreter of its own, after `before`."""
    shutil.copytree(PACKAGE, tmp_path / "fastgen", ignore=shutil.ignore_patterns("__pycache__", *without))
    path = os.pathsep.join([str(tmp_path), *(entry for entry in sys.path if entry)])
    environment = {**os.environ, "PYTHONPATH": path, "FASTGEN_BACKEND": "", **(environment or {})}
    command = [sys.executable, "-c", f"import torch\n{before}\n{USE}"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stdout + run.stderr
    return run.stdout


def test_without_libraries(tmp_path):
    said = import_copy(tmp_path, without=["*.so"])
    assert f"cpu: backend 'eager' by default; compiled kernels: {CPU} is missing" in said
    assert "cuda: backend 'eager' by default; compiled kernels: they need the library for the CPU" in said
    assert "cpu eager ('eager',)" in said
    assert f"refused: name: backend 'cpp' is not available on cpu ({CPU} is missing" in said


@pytest.mark.parametrize("version", ["2.9.1+cu128", "1.13.0"])
def test_old_torch(tmp_path, version):
    """By the version alone: an older torch might load the libraries and fail at the first call."""
    said = import_copy(tmp_path, f"torch.__version__ = {version!r}")
    assert f"cpu: backend 'eager' by default; compiled kernels: torch {version} is older than 2.10, which {CPU} needs" in said
    assert "cuda eager ('eager',)" in said


# A torch that was built with CUDA and finds a device, as far as fastgen can see. `is_available` is none, lest it be asked: it would
# initialise the driver.
CUDA_TORCH = """
import ctypes, os, torch.cuda
torch.version.cuda = "13.0"
torch.cuda.device_count = lambda: {devices}
torch.cuda.is_available = None
ctypes.CDLL({stub!r}, mode=os.RTLD_GLOBAL)
"""


def cuda_driver(tmp_path, version):
    source = f"int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}"
    shared_library(tmp_path / "driver/libcuda.so.1", source, "-Wl,-soname,libcuda.so.1")
    return {"LD_LIBRARY_PATH": str(tmp_path / "driver")}


def import_with_cuda(tmp_path, driver=None, devices=1, before="", **keywords):
    """The same beside a driver that serves this CUDA version, and can do nothing else: not even be initialised."""
    environment = {} if driver is None else cuda_driver(tmp_path, driver)
    return import_copy(tmp_path, CUDA_TORCH.format(stub=str(STUB), devices=devices) + before, environment=environment, **keywords)


@needs_cuda_library
@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (12080, "the NVIDIA driver is too old: it serves CUDA 12.8, and _fastgen_cuda.so needs 13.0 or newer"),
        (0, "no NVIDIA driver was found"),
    ],
)
def test_driver_too_old_for_the_static_runtime(tmp_path, driver, reason):
    said = import_with_cuda(tmp_path, driver)
    assert f"cuda: backend 'triton' by default; compiled kernels: {reason}\n" in said
    assert "cpu: backend 'cpp' by default" in said and "cuda triton ('triton', 'eager')" in said
    assert f"refused: backend: backend 'cpp' is not available on cuda ({reason}); available: 'triton', 'eager'" in said


@needs_cuda_library
def test_driver_new_enough(tmp_path):
    said = import_with_cuda(tmp_path, 13000)
    assert "cuda: backend 'cpp' by default; compiled kernels: loaded, CUDA 13.0 for " in said
    assert "cuda cpp ('cpp', 'triton', 'eager')" in said and "refused" not in said


@needs_cuda_library
def test_cuda_library_missing(tmp_path):
    said = import_with_cuda(tmp_path, 13000, without=[CUDA])
    assert f"cuda: backend 'triton' by default; compiled kernels: {CUDA} is missing" in said and "cpu: backend 'cpp'" in said


@needs_cuda_library
def test_triton_missing_too(tmp_path):
    hidden = "import importlib.util as u; found = u.find_spec; u.find_spec = lambda n, *a: None if n == 'triton' else found(n, *a)"
    said = import_with_cuda(tmp_path, 13000, without=[CUDA], before=hidden)
    assert "cuda: backend 'eager' by default" in said and "triton on cuda: Triton is not installed" in said


@needs_cuda_library
def test_no_device(tmp_path):
    said = import_with_cuda(tmp_path, devices=0)
    assert "cuda: backend 'eager' by default; compiled kernels: torch finds no CUDA device" in said


@pytest.mark.parametrize(
    ("runtime", "driver", "works"), [(13000, 13000, True), (13010, 13000, True), (12080, 13020, True), (13000, 12090, False)]
)
def test_a_driver_serves_its_major_version_and_older_ones(runtime, driver, works):
    assert (fastgen._core.backends._driver_problem(runtime, driver) == "") == works


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        ("8.0 9.0", (8, 0), True),
        ("8.0 9.0", (8, 9), True),  # machine code serves the later ones of its major version
        ("8.6", (8, 0), False),
        ("8.0 9.0", (7, 5), False),
        ("8.0 9.0", (10, 0), False),
        ("8.0 9.0+PTX", (12, 0), True),
        ("80 90+PTX", (10, 3), True),
        ("9.0a", (9, 0), True),
        ("9.0a", (9, 1), False),
        ("9.0a+PTX", (10, 0), False),  # nor does its PTX
        ("8.0 8.6", (8, 7), False),  # Jetson Orin
        ("8.0+PTX 8.6", (8, 7), True),
        ("8.7", (8, 7), True),
        ("8.7", (8, 9), False),
        ("10.0", (10, 3), True),
        ("10.3", (10, 0), False),
        ("10.0", (11, 0), False),
        ("10.0", (10, 1), False),  # Thor up to CUDA 12.9
        ("12.0", (12, 1), True),
        ("10.0f", (10, 3), True),  # its family
        ("10.0f+PTX", (12, 0), False),
        ("10.0 12.0+PTX", (9, 0), False),
    ],
)
def test_which_gpus_the_library_serves(archs, capability, expected):
    assert fastgen._core.backends.serves(archs, capability) is expected


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_what_there_is_can_be_asked_in_a_traced_program(device):
    """As every op asks there when a backend was chosen: torch's counts of devices, which dynamo does not trace, are constants."""
    asked = torch.compile(lambda x: (x + 1, fastgen.available_backends(device))[1], backend="eager", fullgraph=True)
    assert asked(torch.zeros(3)) == fastgen.available_backends(device)


@pytest.mark.parametrize("traced", [False, True])
def test_a_gpu_that_the_library_was_not_compiled_for(monkeypatch, traced):
    """The automatic order goes on to the next backend; an explicit choice is refused with the reason. Under torch.compile too."""
    backend, device = fastgen._core.backends, torch.device("cuda", 7)
    monkeypatch.setattr(backend, "_ARCHS", "8.0 9.0")
    if traced:
        select = torch.compile(lambda x: (x + 1, backend.select_for(device))[1], backend="eager", fullgraph=True)
    else:
        select = lambda x: backend.select_for(device)  # noqa: E731
    monkeypatch.setitem(backend._UNAVAILABLE, "cuda", "")
    monkeypatch.setitem(backend._AUTOMATIC, "cuda", "cpp")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    backend._asked_capability.cache_clear()
    torch._dynamo.reset()
    try:
        assert select(torch.zeros(3)) == "eager"
        with fastgen.use_backend("cpp"), pytest.raises(Exception, match="its compute capability is 7.0.*compiled for 8.0 9.0"):
            select(torch.zeros(3))
    finally:
        backend._asked_capability.cache_clear()
        torch._dynamo.reset()


# ---- what an import leaves alone ------------------------------------------------------------------------------------

HEAVY = {"triton", "matplotlib", "sklearn", "scipy", "sympy", "PIL", "tqdm", "diffusers", "torch._dynamo", "torch._inductor"}
WATCH = """
import sys, torch
def refuse(*arguments):
    raise AssertionError("CUDA is being initialised")
torch.cuda._lazy_init = torch.cuda.init = refuse
torch._C._cuda_init = refuse
torchs_own = set(sys.modules)
"""


def modules_after(use, tmp_path, environment=None, before=""):
    """Those of HEAVY that an import of fastgen and this use of it bring, in an interpreter that can initialise no CUDA."""
    path = os.pathsep.join([str(PACKAGE.parent), *(entry for entry in sys.path if entry)])
    environment = {**os.environ, "PYTHONPATH": path, "FASTGEN_BACKEND": "", "TRITON_INTERPRET": "", **(environment or {})}
    end = f"print(*sorted({HEAVY!r} & set(sys.modules) - torchs_own))\nassert not torch.cuda.is_initialized()"
    command = [sys.executable, "-c", "\n".join([WATCH, before, "import fastgen", use, end])]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.split()


BACKENDS_USED = """
fastgen.backend_info(), fastgen.available_backends("cpu")
for name in set(fastgen.available_backends("cpu")) & {"cpp", "eager"}:
    with fastgen.use_backend(name):
        x, schedule = torch.ones(2, 3, requires_grad=True), fastgen.Schedule.linear(10)
        y = fastgen.ddpm_step(fastgen.q_sample(x, 5, schedule, seed=1), x, 5, schedule, seed=1)
        fastgen.bce_with_logits(y, fastgen.randn((2, 3), seed=1).sigmoid()).backward()
        fastgen.sample(lambda x, t: x, (2, 3), schedule, seed=1)
"""


@pytest.mark.parametrize("use", ["", BACKENDS_USED], ids=["imported", "used"])
@pytest.mark.parametrize("interpret", ["", "1"])
def test_nothing_heavy_is_imported(tmp_path, use, interpret):
    """Nor where Triton's interpreter makes that backend available: only its use imports Triton."""
    assert modules_after(use, tmp_path, {"TRITON_INTERPRET": interpret}) == []


@needs_cuda_library
@pytest.mark.parametrize("use", ["", BACKENDS_USED], ids=["imported", "used"])
def test_cuda_is_not_initialised_where_there_is_a_device(tmp_path, use):
    assert modules_after(use, tmp_path, cuda_driver(tmp_path, 13000), CUDA_TORCH.format(stub=str(STUB), devices=1)) == []
