"""How fast a kernel's main path can be on a GPU, predicted from its machine code: no measurement of a kernel.

A multiprocessor issues so many instructions a cycle, its units take so many of each class, and memory moves so many bytes a second;
what takes longest binds. Memory is as fast as a copy where enough bytes are on their way at a time: as many as it moves until an
answer comes (Little's law). The rates are those of NVIDIA's programming guide ("Arithmetic Instructions"), for 32 lanes each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .machine_code import Kernel

LATENCY = 600e-9  # assumed, from a load to its answer under way
NEEDED = {"float32": 0.90, "half": 0.85}  # of copy speed, for kernels whose narrowest operand is that, on an H100


@dataclass(frozen=True)
class Gpu:
    name: str
    multiprocessors: int
    hertz: float  # boost
    copy: float  # bytes per second, read and written: some nine tenths of the data sheet's bandwidth
    fp32: int  # lanes a cycle and multiprocessor

    def lanes(self, kind: str) -> int:
        """How many lanes a cycle a multiprocessor takes of this class of instructions (`sass.CLASSES`); 0: no limit but issuing."""
        rates = {"special": 16, "conversion": 16, "integer": 64, "exchange": 32, "load": 32, "store": 32}
        return {**rates, "fp32": self.fp32, "fp16": self.fp32}.get(kind, 0)


GPUS = {  # by the machine code that runs on it
    "80": Gpu("A100", 108, 1.41e9, 0.9 * 2.039e12, 64),
    "90": Gpu("H100", 132, 1.98e9, 3.0e12, 128),
    "100": Gpu("B200", 148, 1.96e9, 0.9 * 8.0e12, 128),
}
ISSUED = 128  # lanes of all instructions together: four schedulers, a warp each


@dataclass(frozen=True)
class Bound:
    """Picoseconds for each element, by memory and by the multiprocessors."""

    copy: float  # of a copy of the same bytes
    memory: float  # with no more bytes on their way than the kernel has
    units: dict[str, float]  # by "issue" and by classes of instructions

    @property
    def binds(self) -> str:
        unit = max(self.units, key=lambda name: self.units[name])
        return unit if self.units[unit] > self.memory else "memory"

    @property
    def share(self) -> float:
        """Of copy speed."""
        return self.copy / max(self.memory, *self.units.values())


def bytes_of(kernel: Kernel) -> float:
    """What the main path moves for each element, by accesses of 128 bits and more; others are of rows, which lie in the cache."""
    return sum(_moved(kernel, kind) for kind in ("load", "store"))


def _moved(kernel: Kernel, kind: str) -> float:
    each = kernel.main.per_element if kernel.main else {}
    widths = [int(key.split()[1]) for key in each if key.startswith(f"{kind} ")]
    return sum(each[f"{kind} {bits}"] * bits / 8 for bits in widths if bits >= 128)


def predicted(kernel: Kernel) -> Bound | None:
    """None where there is no main path, or the GPU is not among `GPUS`."""
    gpu = GPUS.get(kernel.arch)
    if gpu is None or kernel.main is None or not kernel.main.per_element or not (moved := bytes_of(kernel)):
        return None
    cycle = 1e12 / (gpu.multiprocessors * gpu.hertz)  # picoseconds, of one lane a cycle on each multiprocessor
    copy_time = 1e12 * moved / gpu.copy
    units = {"issue": kernel.main.per_element["instructions"] * cycle / ISSUED}
    for kind, count in kernel.main.per_element.items():
        if lanes := gpu.lanes(kind):
            units[kind] = count * cycle / lanes
    needed = gpu.copy / gpu.multiprocessors * LATENCY  # bytes on their way
    read = _moved(kernel, "load")
    on_the_way = kernel.bytes_in_flight * moved / read if read else needed  # who reads nothing waits for nothing
    return Bound(copy_time, copy_time * max(1.0, needed / on_the_way if on_the_way else 1.0), units)
