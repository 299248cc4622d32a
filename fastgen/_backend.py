"""Which implementation runs: the compiled libraries ("cpp"), Triton ("triton") or plain PyTorch ("eager")."""

from __future__ import annotations

import contextlib
import contextvars
import os
from pathlib import Path

import torch

BACKENDS = ("cpp", "triton", "eager")
_HERE = Path(__file__).resolve().parent

# Per thread and per asyncio task; None means the automatic order. Dynamo cannot read a ContextVar, so a traced program sees
# `_traced_choice` instead: the last choice made by any thread, guarded on, hence a change recompiles.
_choice: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastgen_backend", default=None)
_traced_choice: str | None = None


def _load(library: str, registered: str, dispatch_key: str) -> str:
    """Loads `library` unless its ops exist already; returns "" or the reason why it cannot be used."""
    # A second copy of a library that has registered its ops would abort the process.
    with contextlib.suppress(RuntimeError):
        if torch._C._dispatch_has_kernel_for_dispatch_key(registered, dispatch_key):
            return ""
    path = _HERE / library
    if not path.exists():
        return f"{library} was not built"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{library} could not be loaded: {error}"
    return ""


def _load_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    # cuda.is_available() asks the driver through NVML or cuInit's count, and creates no context
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return _load("_fastgen_cuda.so", "fastgen::q_sample", "CUDA")


_UNAVAILABLE = {"cpu": _load("_fastgen_cpu.so", "fastgen::q_sample", "CPU")}
_UNAVAILABLE["cuda"] = _UNAVAILABLE["cpu"] or _load_cuda()
HAS_OPS = not _UNAVAILABLE["cpu"]
_AUTOMATIC = {device: "eager" if reason else "cpp" for device, reason in _UNAVAILABLE.items()}


def _why_not(name: str, device_type: str) -> str:
    """ "" where backend `name` can run on `device_type`, else the reason."""
    if name == "eager":
        return ""
    if name == "triton":
        return "the Triton kernels are not part of this version"
    return _UNAVAILABLE.get(device_type, f"there are no kernels for {device_type}")


def available_backends(device="cpu") -> tuple[str, ...]:
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


def backend(device="cpu") -> str:
    """The name of the backend that ops on `device` run on now: "cpp", "triton" or "eager".

    It is what `use_backend` or the environment variable FASTGEN_BACKEND chose, else the first available one of
    cpp → triton → eager for CUDA tensors and cpp → eager for CPU tensors. Raises RuntimeError where the choice is not
    available on `device`.
    """
    return select(torch.device(device).type)


@contextlib.contextmanager
def use_backend(name: str | None):
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
        if _why_not(name, "cpu") and _why_not(name, "cuda"):
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
        detail = reason or (f"loaded, {torch.ops.fastgen.cpu_capability()}" if device == "cpu" else "loaded")
        lines.append(f"{device}: backend {_AUTOMATIC[device]!r} by default; compiled kernels: {detail}")
    lines.append(f"triton: {_why_not('triton', 'cuda')}")
    return "\n".join(lines)


def _from_environment():
    """FASTGEN_BACKEND is checked where it is first needed, so that importing never fails; "" and "auto" choose nothing."""
    global _choice, _traced_choice
    name = os.environ.get("FASTGEN_BACKEND", "")
    if name not in ("", "auto"):
        _choice = contextvars.ContextVar("fastgen_backend", default=name)
        _traced_choice = name


_from_environment()
