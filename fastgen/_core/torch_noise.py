"""torch's own noise of the CPU, made in the kernels: what `torch.randn(..., generator=generator)` gives, bit for bit, and the state
in which it leaves the generator.

torch.randn took half of a step with torch's numbers, or more. The kernels of csrc/common/cpu_torch_noise.h make these numbers of
the generator's state where they are needed, in less than half of its time on one thread and with torch's threads sharing the work;
the noise is never stored. That holds for 16 contiguous elements or more of float32, float16 or bfloat16; shorter noise, that of
float64, and that in another order of memory torch makes by other rules, and here too.

The arithmetic is that of the running torch and not of a document, so torch is asked: before the first draw of a dtype, the kernels'
numbers for a few seeds are compared with torch.randn's. Where they differ, as with ATEN_CPU_CAPABILITY=default and for half
precision in torch before 2.12, torch.randn is called as ever; `fastgen.backend_info()` says so.
"""

from __future__ import annotations

import functools
import threading
from typing import Any, NamedTuple

import torch

from . import dispatch
from .tables import plain_tensors

LEAST = 16  # elements, below which torch goes by other rules
BLOCK = 16
STATE_BYTES = 5056
# From here on a kernel that only fills a tensor is faster than torch.randn, for the state has to be had and given back: at 512
# elements both take 5 µs, at 256 torch's 3 and the kernel's 4 (AMD EPYC, Zen 1).
LEAST_TO_FILL = 512
NOISE_DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}  # `DType` of csrc/common/elementwise.h

_default = torch.default_generator
_is_compiling = torch.compiler.is_compiling


class Source(NamedTuple):
    """Generators, one for all samples or one for each, and what is drawn from each of them."""

    generators: tuple[torch.Generator, ...]
    words: int
    dtype: int
    fused: bool

    def run(self, op, *operands, **outputs) -> Any:
        """Calls the op, one whose first arguments are `states, noise_dtype, fused`, and puts the generators forward."""
        return self._drawn(lambda states: op(states, self.dtype, self.fused, *operands, **outputs))

    def fill(self, out) -> None:
        self._drawn(lambda states: dispatch.DIRECT["torch_randn"](out, states, self.fused))

    def _drawn(self, call) -> Any:
        """call(states), which writes the states after the draw in their place.

        torch draws with the generator's mutex locked, which cannot be had from outside. So where there are other threads, the
        states after the draw are made first, and given to the generators at once, under a lock of this module's own: draws of
        fastgen never take the same words. A torch.randn of another thread from the same generator is noticed, and the draw starts
        from the state that it left, unless it falls into the microsecond between the last look and the new state: then both have
        the same words. Without other threads the kernel makes the states after the draw as well, in one pass.
        """
        if threading.active_count() == 1:
            states = self._states()
            result = call(states)
            self._set(states)
            return result
        with _reserving:
            while True:
                states = self._states()
                after = states.clone()
                dispatch.DIRECT["torch_skip"](after, self.words)
                if torch.equal(self._states(), states):
                    break
            self._set(after)
        return call(states)

    def _states(self) -> torch.Tensor:
        if len(self.generators) == 1:
            return self.generators[0].get_state().unsqueeze(0)
        return torch.stack([generator.get_state() for generator in self.generators])

    def _set(self, states) -> None:
        if len(self.generators) == 1:
            self.generators[0].set_state(states[0])
            return
        for generator, state in zip(self.generators, states.unbind(), strict=True):
            generator.set_state(state.clone())  # torch reads it from the beginning of its storage


_reserving = threading.Lock()


def source(generator, x, dtype, backend="cpp") -> Source | None:
    """Where a kernel makes what `torch.randn(x.shape, generator=generator, dtype=dtype)` would be, or for a list of generators that
    of x[i:i+1] for each sample. None where it cannot: torch.randn is to be called then.

    generator: a `torch.Generator`, None for torch's default one of the CPU, or a list of generators.
    """
    if _is_compiling() or dtype not in NOISE_DTYPES or backend != "cpp":
        return None
    if type(x) is not torch.Tensor or not x.is_cpu or x.dtype is torch.float64 or not x.is_contiguous():
        return None
    if dispatch.dispatch_modes() or dispatch.transformed():
        return None
    length = x.numel()
    if isinstance(generator, (list, tuple)):
        generators = tuple(generator)
        if len(generators) > 1:
            if len(generators) != len(x) or len({id(one) for one in generators}) != len(x):
                return None
            length //= len(x)
    else:
        generators = (_default if generator is None else generator,)
    if length < LEAST or not generators or not all(_of_the_cpu(one) for one in generators):
        return None
    fused = arithmetic(dtype)
    if fused is None:
        return None
    rest = length % BLOCK
    words = length - (0 if dtype is torch.float32 else rest) + (BLOCK if rest else 0)
    return Source(generators, words, NOISE_DTYPES[dtype], fused)


def _of_the_cpu(generator):
    return type(generator) is torch.Generator and generator.device.type == "cpu"


def randn(shape, generator, dtype, device) -> torch.Tensor:
    """torch.randn(shape, generator=generator, dtype=dtype, device=device); `device` is a torch.device."""
    if device.type == "cpu" and not _is_compiling() and not dispatch.dispatch_modes() and not dispatch.transformed():
        out = torch.empty(shape, dtype=dtype, device=device)
        if out.dim() and out.numel() >= LEAST_TO_FILL and dispatch.backend_for(device) == "cpp":
            found = source(generator, out.reshape(1, -1), dtype)
            if found is not None:
                found.fill(out.view(1, -1))
                return out
    return torch.randn(shape, generator=generator, dtype=dtype, device=device)


def randn_like(x) -> torch.Tensor:
    """torch.randn_like(x)."""
    if type(x) is torch.Tensor and x.is_cpu and x.layout is torch.strided and x.is_contiguous():
        return randn(x.shape, None, x.dtype, x.device)
    return torch.randn_like(x)


def like(x, *dtypes) -> dict[str, Any]:
    """What stands for `noise=torch.randn_like(x)` among the arguments of an op whose result has the dtype to which that of x and
    `dtypes` are promoted: torch's default generator where the op's kernel makes the noise, else the noise."""
    result = functools.reduce(torch.promote_types, dtypes, x.dtype)
    if result is x.dtype and source(None, x, result) is not None:
        return {"generator": _default}
    return {"noise": randn_like(x)}


_arithmetic: dict[torch.dtype, bool | None] = {}


def arithmetic(dtype) -> bool | None:
    """Whether the running torch fuses multiplications and additions where it makes normals of this dtype; None where it makes them
    in a way of which the kernels know nothing."""
    if dtype not in _arithmetic:
        _arithmetic[dtype] = _found_arithmetic(dtype)
    return _arithmetic[dtype]


# (how many words are drawn before, numbers) of the comparisons: many; some from within a twist; no more than a block
_KNOWN_ANSWERS = ((0, 4103), (3, 2048), (623, 16))


def _found_arithmetic(dtype):
    if "torch_randn" not in dispatch.DIRECT:
        return None
    with plain_tensors():
        return next((fused for fused in (True, False) if _agrees(dtype, fused)), None)


def _agrees(dtype, fused):
    for seed, (skipped, count) in enumerate(_KNOWN_ANSWERS):
        generator = torch.Generator("cpu").manual_seed(seed)
        if skipped:
            torch.empty(skipped, dtype=torch.int32, device="cpu").random_(generator=generator)
        states = generator.get_state().unsqueeze(0)
        expected = torch.randn(count, generator=generator, dtype=dtype, device="cpu")
        out = torch.empty(1, count, dtype=dtype, device="cpu")
        try:
            dispatch.DIRECT["torch_randn"](out, states, fused)
        except RuntimeError:  # a state of another layout
            return False
        bits = torch.int32 if dtype.itemsize == 4 else torch.int16
        if not torch.equal(out[0].view(bits), expected.view(bits)) or not torch.equal(states[0], generator.get_state()):
            return False
    return True


def describe() -> str:
    """For each dtype whether the kernels make torch's noise, in words."""
    made = [str(dtype).removeprefix("torch.") for dtype in NOISE_DTYPES if arithmetic(dtype) is not None]
    left = [str(dtype).removeprefix("torch.") for dtype in NOISE_DTYPES if arithmetic(dtype) is None]
    parts = [f"made in the kernels for {', '.join(made)}"] if made else []
    parts += [f"torch.randn's for {', '.join(left)}, which the kernels do not reproduce here"] if left else []
    return "; ".join(parts)
