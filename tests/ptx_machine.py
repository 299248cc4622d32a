"""The PTX machine of tests/ptx from Python, where device_on_ptx.py has loaded it: settings, launches of kernels from a text, and
launches that wait."""

import contextlib
import ctypes
import os

import torch

LIBRARY = os.environ.get("FASTGEN_PTX_MACHINE")  # which has to be in LD_PRELOAD too
_library = ctypes.CDLL(LIBRARY) if LIBRARY else None
if _library:
    _library.fastgen_ptx_module.restype = ctypes.c_void_p
    _library.fastgen_device_fault.restype = ctypes.c_char_p


def _checked(error):
    if error:
        raise RuntimeError(_library.fastgen_device_fault(1).decode())


@contextlib.contextmanager
def settings(**values):
    """Within a `with` block: see `Settings` in tests/ptx/machine.h."""
    _checked(_library.fastgen_ptx_settings(" ".join(f"{name}={int(value)}" for name, value in values.items()).encode()))
    try:
        yield
    finally:
        _checked(_library.fastgen_ptx_settings(os.environ.get("FASTGEN_PTX", "").encode()))


class Module:
    """The kernels of a PTX text."""

    def __init__(self, text: str):
        self._module = ctypes.c_void_p(_library.fastgen_ptx_module(text.encode()))
        _checked(not self._module)

    def launch(self, name, grid, threads, arguments, shared=0):
        """arguments: tensors, and ctypes of numbers."""
        values = [ctypes.c_uint64(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        blocks = (ctypes.c_uint * 3)(*((*grid, 1, 1)[:3] if isinstance(grid, tuple) else (grid, 1, 1)))
        _checked(_library.fastgen_ptx_launch(self._module, name.encode(), blocks, threads, shared, pointers))


@contextlib.contextmanager
def launches_wait():
    """Within a `with` block no launch runs but by `run_waiting`, and no memory of a tensor is given back."""
    _library.fastgen_ptx_hold()
    try:
        yield
    finally:
        _library.fastgen_ptx_release()
        stream(0)


def stream(number):
    """What this thread launches goes to this stream."""
    _library.fastgen_ptx_stream(ctypes.c_size_t(number))


def run_waiting(times=1):
    """The streams side by side, the launches of each one after the other; all of it again, as the replay of a graph."""
    _checked(_library.fastgen_ptx_run(times))
