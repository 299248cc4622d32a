"""torch's random numbers on a CUDA GPU: which launch makes them, and `TorchCudaGenerator`, where the next one begins.

torch fills a tensor of n elements by a launch of

    T = 256·min(⌈n/256⌉, multiprocessors·⌊threads_per_multiprocessor/256⌋)

threads, each of which makes 4 numbers (2 of float64) by one call of Philox, in as many turns as it takes; csrc/randn/randn.h says
which number is whose. So from the second argument of the minimum on, the numbers depend on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import checks, rng

BLOCK = 256  # threads

# How many multiprocessors a GPU has, and how many threads each runs at a time: `multi_processor_count` and
# `max_threads_per_multi_processor` of torch.cuda.get_device_properties. Of NVIDIA's architecture whitepapers and data sheets. A
# part of a GPU (MIG) has fewer.
CARDS = {
    "V100": (80, 2048),
    "T4": (40, 1024),
    "RTX 2080 Ti": (68, 1024),
    "A100": (108, 2048),
    "A10": (72, 1536),
    "A40": (84, 1536),
    "RTX A4000": (48, 1536),
    "RTX A6000": (84, 1536),
    "RTX 3060": (28, 1536),
    "RTX 3070": (46, 1536),
    "RTX 3080": (68, 1536),
    "RTX 3090": (82, 1536),
    "L4": (58, 1536),
    "L40": (142, 1536),
    "L40S": (142, 1536),
    "RTX 4070": (46, 1536),
    "RTX 4080": (76, 1536),
    "RTX 4090": (128, 1536),
    "RTX 4090 D": (114, 1536),
    "H100": (132, 2048),
    "H100 PCIe": (114, 2048),
    "H20": (78, 2048),
    "H200": (132, 2048),
    "B200": (148, 2048),
    "RTX 5090": (170, 1536),
}


def numbers_of_thread(dtype: torch.dtype) -> int:
    return 2 if dtype is torch.float64 else 4


def threads_of(device_like, multiprocessors, threads_per_multiprocessor, device: torch.device | None = None) -> int:
    """How many threads of torch's launches the GPU runs at a time: of its name, of the two numbers, or of the GPU `device`."""
    numbers = {"multiprocessors": multiprocessors, "threads_per_multiprocessor": threads_per_multiprocessor}
    given = [name for name, value in numbers.items() if value is not None]
    if device_like is not None:
        if given:
            raise ValueError(f"device_like, {given[0]}: expected at most one, got both")
        if not isinstance(device_like, str):
            raise TypeError(f"device_like: expected the name of a GPU, got {type(device_like).__name__}")
        if device_like not in CARDS:
            raise ValueError(
                f"device_like: expected one of {', '.join(map(repr, CARDS))}, got {device_like!r}; of another GPU, pass "
                "multiprocessors= and threads_per_multiprocessor="
            )
        return _threads(*CARDS[device_like])
    if len(given) == 1:
        (missing,) = numbers.keys() - set(given)
        raise ValueError(f"{missing}: expected an int beside {given[0]}, got None")
    if given:
        return _threads(*[_positive(name, value) for name, value in numbers.items()])
    if device is None or device.type != "cuda":
        where = "" if device is None else f" for numbers on {device}"
        raise ValueError(
            f"device_like: expected the name of the GPU whose numbers these are{where}, such as 'A100', or multiprocessors= and "
            "threads_per_multiprocessor=, got none"
        )
    properties = torch.cuda.get_device_properties(device)
    return _threads(properties.multi_processor_count, properties.max_threads_per_multi_processor)


def _positive(name, value):
    value = checks.integer(name, value)
    least = BLOCK if name == "threads_per_multiprocessor" else 1
    if not least <= value < 2**16:
        raise ValueError(f"{name}: expected an int within {least} … {2**16 - 1}, got {value}")
    return value


def _threads(multiprocessors, threads_per_multiprocessor):
    return multiprocessors * (threads_per_multiprocessor // BLOCK) * BLOCK


def launched(count, threads: int, dtype: torch.dtype):
    """(T, turns) of torch's launch for `count` elements, on a GPU that runs `threads` at a time."""
    launch = min((count + BLOCK - 1) // BLOCK * BLOCK, threads)
    of_turn = launch * numbers_of_thread(dtype)
    return launch, (count + of_turn - 1) // of_turn if count else 0


def check_offset(offset) -> int:
    offset = rng.check_offset(offset)
    if offset % 4:
        raise ValueError(f"offset: expected a multiple of 4, as torch.Generator.get_offset has them, got {offset}")
    return offset


def check_size(count, dtype: torch.dtype) -> None:
    """torch makes more numbers than this in several launches, of parts that depend on the shape."""
    most = 2**31 // dtype.itemsize
    if count > most:
        raise ValueError(
            f"shape: expected at most 2**31 bytes, {most} elements of {checks._dtype(dtype)}, beyond which torch splits a tensor "
            f"into several launches, got {count}"
        )


class TorchCudaGenerator:
    """The stream of `torch.Generator("cuda").manual_seed(seed)` on a given GPU, to be drawn from on any device.

        laptop = fastgen.TorchCudaGenerator(seed, device_like="H100")
        fastgen.randn(shape, generator=laptop)          # what the H100 gives: torch.randn(shape, generator=, device="cuda")
        fastgen.q_sample(x0, t, schedule, generator=laptop)      # and what comes next there

    Every function of fastgen takes it where it takes a `torch.Generator`, and draws what that would give on the GPU, to some 1e-6
    (see `randn`). Like a torch.Generator it moves on with each call, by

        offset += 4·⌈n / (T·k)⌉,   T = 256·min(⌈n/256⌉, multiprocessors·⌊threads_per_multiprocessor/256⌋)

    for a tensor of n elements, k = 4, or 2 of float64. Numbers that are drawn on the GPU by anything else than torch.randn (and
    randn_like, normal_) move its generator in another way: then take its offset over by `set_offset`.

    Args:
        seed: int within −2⁶³ … 2⁶⁴−1, as `manual_seed` takes it.
        device_like: name of the GPU, a key of `fastgen.TorchCudaGenerator.CARDS`.
        multiprocessors, threads_per_multiprocessor: of the GPU instead, `multi_processor_count` and
            `max_threads_per_multi_processor` of `torch.cuda.get_device_properties`.
        offset: where in the stream to begin, a multiple of 4.

    It can be pickled, with its position. While a CUDA graph is captured it refuses to draw, since the graph would give the same
    numbers at each replay. Under `torch.func.vmap` all calls that are mapped get the same numbers. Not thread-safe.

    Raises TypeError or ValueError naming the argument.
    """

    __module__ = "fastgen"  # what a pickle says, whatever module this becomes
    CARDS = CARDS

    def __init__(
        self,
        seed: int,
        *,
        device_like: str | None = None,
        multiprocessors: int | None = None,
        threads_per_multiprocessor: int | None = None,
        offset: int = 0,
    ) -> None:
        self._threads = threads_of(device_like, multiprocessors, threads_per_multiprocessor)
        self.manual_seed(seed).set_offset(offset)

    def manual_seed(self, seed: int) -> TorchCudaGenerator:
        """To the beginning of another stream; returns this generator."""
        self._seed, self._offset = rng.check_seed_int("seed", seed, "an int"), 0
        return self

    def initial_seed(self) -> int:
        return self._seed % 2**64

    def get_offset(self) -> int:
        """Where the next call begins: what `torch.Generator.get_offset` says on the GPU."""
        return self._offset

    def set_offset(self, offset: int) -> None:
        self._offset = check_offset(offset)

    def randn(
        self,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ) -> torch.Tensor:
        """`fastgen.randn(shape, generator=self, dtype=dtype, device=device)`."""
        from .._ops.randn import randn  # which imports this module

        return randn(shape, generator=self, dtype=dtype, device=device)

    def taken(self, count: int, dtype: torch.dtype, device: torch.device) -> int:
        """Where the numbers of a tensor of `count` elements begin, which are then taken."""
        if rng.capturing(device):
            raise RuntimeError(
                "generator: expected none during CUDA-graph capture, or a torch.Generator that is registered with the graph, got a "
                "TorchCudaGenerator, whose offset would be frozen into the graph"
            )
        begin = self._offset
        self._offset = begin + 4 * launched(count, self._threads, dtype)[1]
        return begin

    def __repr__(self) -> str:
        return f"TorchCudaGenerator(seed={self.initial_seed()}, offset={self._offset}, threads={self._threads})"
