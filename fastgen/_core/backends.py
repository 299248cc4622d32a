"""Which implementation runs: the compiled libraries ("cpp"), Triton ("triton") or plain PyTorch ("eager")."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import importlib.util
import os
import re
import shlex
import shutil
import struct
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

BACKENDS = ("cpp", "triton", "eager")
# Triton's interpreter runs on the CPU too, but only an explicit choice takes it
_ORDER = {"cpu": ("cpp", "eager"), "cuda": BACKENDS, "xpu": ("triton", "eager")}
_OLDEST_TORCH = (2, 10)  # TORCH_TARGET_VERSION of setup.py: older ones lack symbols of the stable ABI
_HERE = Path(__file__).resolve().parents[1]  # of the compiled libraries

# Per thread and per asyncio task; None means the automatic order. Dynamo cannot read a ContextVar, so a traced program sees
# `_traced_choice` instead: the last choice made by any thread, guarded on, hence a change recompiles.
_choice: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastgen_backend", default=None)
_traced_choice: str | None = None


def _truncated(path: Path) -> bool:
    """Whether an ELF file ends before what it says is to be mapped. The loader would not notice, and die of SIGBUS."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:5] != b"\x7fELF\x02":
            return False  # the loader finds words for that
        (table,), (entry_size, entries) = struct.unpack_from("<Q", header, 32), struct.unpack_from("<HH", header, 54)
        file.seek(table)
        segments = file.read(entry_size * entries)
    if len(segments) < entry_size * entries:
        return True
    offsets = range(0, len(segments), entry_size)
    return any(sum(struct.unpack_from("<Q16xQ", segments, offset + 8)) > size for offset in offsets)


def torch_version() -> tuple[int, ...]:
    """(major, minor); of a version that says nothing, one that is newer than any."""
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return tuple(map(int, version.groups())) if version else (sys.maxsize,)


def _load(library: str, registered: str, dispatch_key: str) -> str:
    """Loads `library` unless its ops exist already; returns "" or the reason why it cannot be used."""
    if torch_version() < _OLDEST_TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, _OLDEST_TORCH))}, which {library} needs"
    # A second copy of a library that has registered its ops would abort the process.
    with contextlib.suppress(RuntimeError):
        if torch._C._dispatch_has_kernel_for_dispatch_key(registered, dispatch_key):
            return ""
    path = _HERE / library
    if not path.exists():
        return f"{library} is missing: it was not built, or has been removed"
    try:
        if _truncated(path):
            return f"{library} could not be loaded: the file is cut short"
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{library} could not be loaded: {error.__cause__ or error}"  # torch wraps the loader's words in its own
    return ""


def _version(number: int) -> str:
    """CUDA's way to number its versions: 13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver_problem(runtime: int, driver: int) -> str:
    """ "" where the driver serves the CUDA runtime, else the reason why not. 0 stands for no driver."""
    if driver == 0:
        return "no NVIDIA driver was found"
    # a driver serves every runtime of its own major version or an older one (the toolkit's "minor version compatibility")
    if driver // 1000 < runtime // 1000:
        needed = _version(runtime // 1000 * 1000)
        return f"the NVIDIA driver is too old: it serves CUDA {_version(driver)}, and _fastgen_cuda.so needs {needed} or newer"
    return ""


def _load_cuda() -> tuple[str, str]:
    """Why the CUDA library cannot be used, or "", and what there is to say about it. CUDA is not initialised by any of this."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA", ""
    # Not cuda.is_available(): it initialises the driver, after which no forked child can use CUDA. This one asks NVML if it can.
    if torch.cuda.device_count() == 0:
        return "torch finds no CUDA device", ""
    if reason := _load("_fastgen_cuda.so", "fastgen::q_sample", "CUDA"):
        return reason, ""
    try:
        library = ctypes.CDLL(str(_HERE / "_fastgen_cuda.so"), mode=os.RTLD_NOLOAD)  # the one just loaded, never a second copy
    except OSError:
        return "", "loaded, from another copy of fastgen"
    if not hasattr(library, "fastgen_cuda_archs"):
        return "_fastgen_cuda.so is of another version of fastgen", ""
    library.fastgen_cuda_archs.restype = ctypes.c_char_p
    global _ARCHS
    archs, runtime = library.fastgen_cuda_archs().decode(), library.fastgen_cuda_runtime_version()
    _ARCHS = archs
    return _driver_problem(runtime, library.fastgen_cuda_driver_version()), f"loaded, CUDA {_version(runtime)} for {archs}"


_ARCHS = ""  # what the CUDA library was compiled for
_UNAVAILABLE, _LOADED = {"cpu": _load("_fastgen_cpu.so", "fastgen::q_sample", "CPU")}, {}
HAS_OPS = not _UNAVAILABLE["cpu"]
if HAS_OPS:
    _LOADED["cpu"] = f"loaded, {torch.ops.fastgen.cpu_capability()}"
    _UNAVAILABLE["cuda"], _LOADED["cuda"] = _load_cuda()
else:
    _UNAVAILABLE["cuda"] = f"they need the library for the CPU, which defines the ops ({_UNAVAILABLE['cpu']})"


def _triton_problem(device_type: str) -> str:
    """ "" where Triton can run on `device_type`, else the reason. Triton itself is not imported, nor a device initialised."""
    if device_type not in ("cpu", "cuda", "xpu"):
        return f"Triton has no kernels for {device_type}"
    if "triton" not in sys.modules and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device_type == "cpu":
        if kernels := sys.modules.get("fastgen.triton.common.op"):  # Triton looked when the kernels were defined
            return "" if kernels.INTERPRETED else "Triton's interpreter was not on when the kernels were imported"
        interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y", "t")
        return "" if interpreted else "on the CPU Triton has an interpreter only, which TRITON_INTERPRET=1 turns on"
    count = torch.cuda.device_count() if device_type == "cuda" else torch.xpu.device_count()
    return _compiler_problem("CC", "gcc", "clang") if count else f"torch finds no {device_type.upper()} device"


def _compiler_problem(variable: str, *names: str) -> str:
    """ "" where a module for Python can be compiled while the program runs, which is how Triton launches a kernel and how
    torch.compile calls what it has compiled; else what is missing. It is the environment's `variable`, or one of `names`."""
    asked = os.environ.get(variable, "").strip()
    if asked and variable == "CXX":  # which may be "ccache g++", where Triton takes CC for the name of a file
        asked = shlex.split(asked)[0]
    if not any(map(shutil.which, [asked] if asked else names)):
        return f"the compiler {asked or ' or '.join(names)} was not found"
    # Debian's own scheme names a folder for what pip installs, which has no headers
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    folder = sysconfig.get_path("include", scheme)
    others = (os.environ.get(name, "") for name in ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"))
    if any((Path(place) / "Python.h").exists() for place in [folder, *os.pathsep.join(others).split(os.pathsep)] if place):
        return ""
    return f"{folder}/Python.h is missing, which a package like python3-dev has"


def _why_not(name: str, device_type: str) -> str:
    """ "" where backend `name` can run on `device_type`, else the reason."""
    if name == "eager":
        return ""
    if name == "triton":
        return _triton_problem(device_type)
    return _UNAVAILABLE.get(device_type, f"there are no kernels for {device_type}")


# A traced program takes the answer as a constant, as it takes a table (tables._constant_table): dynamo refuses to trace
# torch.cuda.device_count, so with fullgraph=True a choice of "triton" could not be compiled for a GPU.
_why_not._dynamo_marked_constant = True

_AUTOMATIC = {device: next(name for name in order if not _why_not(name, device)) for device, order in _ORDER.items()}


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """The backends that can run on `device`, in the automatic order."""
    device_type = torch.device(device).type
    return tuple(name for name in BACKENDS if not _why_not(name, device_type))


def _require(name: str, device_type: str, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    reason = _why_not(name, device_type)
    if reason:
        have = ", ".join(map(repr, available_backends(device_type)))
        raise RuntimeError(f"{argument}: backend {name!r} is not available on {device_type} ({reason}); available: {have}")
    return name


def select(device_type: str) -> str:
    """The backend that an op on `device_type` runs on now."""
    name = _traced_choice if torch.compiler.is_compiling() else _choice.get()
    if name is None:
        return _AUTOMATIC.get(device_type, "eager")
    return _require(name, device_type, "backend")


def select_for(device: torch.device) -> str:
    """The same for a tensor's device, whose compute capability may be one that the CUDA library was not compiled for."""
    name = select(device.type)
    if name != "cpp" or device.type != "cuda" or not (problem := _capability_problem(device)):
        return name
    if (_traced_choice if torch.compiler.is_compiling() else _choice.get()) == "cpp":
        have = ", ".join(map(repr, available_backends("cuda")[1:]))
        raise RuntimeError(f"backend: backend 'cpp' is not available on {device} ({problem}); available: {have}")
    return available_backends("cuda")[1]


def _capability_problem(device: torch.device) -> str:
    """ "" where the CUDA library has code for the device, else the reason why not."""
    return _asked_capability(device)


_capability_problem._dynamo_marked_constant = True


@functools.cache
def _asked_capability(device: torch.device) -> str:
    # not at import: this initialises CUDA
    capability = torch.cuda.get_device_capability(device)
    if _ARCHS and not serves(_ARCHS, capability):
        return f"its compute capability is {capability[0]}.{capability[1]}, and _fastgen_cuda.so was compiled for {_ARCHS}"
    return ""


# Compute capabilities of Tegra systems on a chip, as far as they share a major version with other GPUs: Orin and, up to CUDA 12.9,
# Thor, which is 11.0 since.
_TEGRA = {(7, 2), (8, 7), (10, 1)}


def serves(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code for `archs` ("8.0 9.0+PTX") runs on a GPU of this compute capability.

    CUDA C++ Programming Guide 13.0, 6.1.2 "Binary Compatibility" and 6.1.3 "PTX Compatibility": machine code for X.y runs on X.z
    with z ≥ y, but not so on Tegra, nor between Tegra and other GPUs; hence code for 8.6 runs on 8.9 but not on 8.7, code for 10.0
    on 10.3 and code for 12.0 on 12.1. The driver compiles PTX for X.y for whatever is not older. Code for "9.0a" runs on 9.0
    alone, code for "10.0f" on its family, 10.0 and 10.3; of both this is true of their PTX too.
    """
    for major, minor, suffix, ptx in re.findall(r"(\d+)\.?(\d)([a-z]?)(\+PTX)?", archs):
        arch = int(major), int(minor)
        newer = capability > arch and suffix != "a"
        same_kind = capability[0] == arch[0] and not _TEGRA & {arch, capability}
        if capability == arch or (newer and (same_kind or (ptx and not suffix))):
            return True
    return False


def backend(device: torch.device | str = "cpu") -> str:
    """The name of the backend that ops on `device` run on now: "cpp", "triton" or "eager".

    It is what `use_backend` or the environment variable FASTGEN_BACKEND chose, else the first available one of
    cpp → triton → eager for CUDA tensors and cpp → eager for CPU tensors. Raises RuntimeError where the choice is not
    available on `device`.
    """
    return select(torch.device(device).type)


@contextlib.contextmanager
def use_backend(name: Literal["cpp", "triton", "eager", "auto"] | None) -> Iterator[None]:
    """`with fastgen.use_backend("eager"):` runs the ops inside on that backend; None or "auto" is the automatic order.

    It applies to the calling thread (or asyncio task); a program under `torch.compile` sees the last choice of any thread.
    Raises ValueError for an unknown name, RuntimeError for one that is available on no device; an op on a device that the
    backend cannot serve raises too. Nothing falls back in silence.
    """
    global _traced_choice
    if name == "auto":
        name = None
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"name: expected one of {', '.join(map(repr, BACKENDS))} or 'auto', got {name!r}")
        if all(_why_not(name, device) for device in _ORDER):
            _require(name, "cpu", "name")
    previous_traced = _traced_choice
    token = _choice.set(name)
    _traced_choice = name
    try:
        yield
    finally:
        _choice.reset(token)
        _traced_choice = previous_traced


def backend_info() -> str:
    """What is loaded, what is not and why, in words: one line for each library."""
    lines = [f"fastgen on torch {torch.__version__}"]
    for device, reason in _UNAVAILABLE.items():
        lines.append(f"{device}: backend {_AUTOMATIC[device]!r} by default; compiled kernels: {reason or _LOADED[device]}")
    for device in ("cuda", "xpu", "cpu"):
        lines.append(f"triton on {device}: {_why_not('triton', device) or 'available'}")
    lines.append(f"torch's noise on the CPU: {_torch_noise()}")
    lines.append(f"torch.compile: {_compiler_problem('CXX', 'g++') or 'available'}")
    return "\n".join(lines)


def _torch_noise():
    from . import torch_noise  # which imports this module

    return torch_noise.describe()


def _from_environment():
    """FASTGEN_BACKEND is checked where it is first needed, so that importing never fails; "" and "auto" choose nothing."""
    global _choice, _traced_choice
    name = os.environ.get("FASTGEN_BACKEND", "")
    if name not in ("", "auto"):
        _choice = contextvars.ContextVar("fastgen_backend", default=name)
        _traced_choice = name


_from_environment()
