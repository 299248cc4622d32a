"""A plugin of pytest: the Triton backend on the CPU's tensors, each kernel compiled by Triton for a GPU and its PTX run by the
machine of tests/ptx. device_on_ptx.py --triton loads it, before fastgen, in place of Triton's interpreter."""

import collections
import ctypes
import os
import types

import ptx_machine
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastgen._core import backends

ARCH = int(os.environ["FASTGEN_PTX_ARCH"])
NUMBERS = {
    **{f"{sign}{bits}": getattr(ctypes, f"c_{'u' * (sign == 'u')}int{bits}") for sign in "iu" for bits in (8, 16, 32, 64)},
    **{"i1": ctypes.c_int8, "u1": ctypes.c_uint8, "fp32": ctypes.c_float, "fp64": ctypes.c_double},
}
LAUNCHED = collections.Counter()  # by name
_modules = {}  # by Triton's hash
_run = JITFunction.run
_problem = backends._triton_problem


class Driver(types.SimpleNamespace):
    """As much of one as compiling for a GPU asks for."""

    target = GPUTarget("cuda", ARCH, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def run(self, *arguments, grid, warmup, **options):
    """JITFunction.run, which compiles the kernel and launches it."""
    compiled = _run(self, *arguments, grid=grid, warmup=True, **options)
    if warmup:
        return compiled
    if compiled.hash not in _modules:
        _modules[compiled.hash] = ptx_machine.Module(compiled.asm["ptx"])
    named = {**dict(zip(self.arg_names, arguments, strict=False)), **options}
    values = [each for name, kind in compiled.src.signature.items() for each in passed(named[name], kind)]
    values += [ctypes.c_uint64(0)] * 2  # where Triton would have memory for itself and for a profiler
    metadata = compiled.metadata
    grid = tuple(grid(named) if callable(grid) else grid)
    _modules[compiled.hash].launch(metadata.name, grid, 32 * metadata.num_warps, values, metadata.shared)
    LAUNCHED[metadata.name] += 1
    return compiled


def passed(value, kind):
    if isinstance(kind, tuple):
        return [each for v, k in zip(value, kind, strict=True) for each in passed(v, k)]
    if kind == "constexpr":
        return []
    return [ctypes.c_uint64(value.data_ptr()) if kind[0] == "*" else NUMBERS[kind](value)]


driver.set_active(Driver())
JITFunction.run = run
backends._triton_problem = lambda device_type: "" if device_type == "cpu" else _problem(device_type)

from fastgen.triton.common import direct  # noqa: E402  # of a package that asks for the driver

direct.observed = lambda: True  # so that each launch comes here
assert not torch.cuda.is_available()


def pytest_terminal_summary(terminalreporter):
    if LAUNCHED:
        terminalreporter.write_line(f"{len(_modules)} kernels of Triton, {LAUNCHED.total()} launches on the PTX machine")
