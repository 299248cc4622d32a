"""torch's own noise of the CPU, made in the kernels: what `torch.randn(..., generator=generator)` gives, bit for bit, and the state
in which it leaves the generator.

torch.randn took half of a step with torch's numbers, or more. The kernels of csrc/common/cpu_torch_noise.h make these numbers of
the generator's state where they are needed, of a million in half of its time on one thread and with torch's threads sharing the
work; the noise is never stored. That holds for contiguous elements of float32, float16 or bfloat16. What is
of float64 or in another order of memory torch makes by other rules, and goes on doing so.

The arithmetic is that of the running torch and not of a document, so torch is asked: before the first draw of a dtype, the kernels'
numbers for a few seeds are compared with torch.randn's. Where they differ, as with ATEN_CPU_CAPABILITY=default and for half
precision in torch before 2.12, torch.randn is called as ever; `fastgen.backend_info()` says so.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from typing import Any, NamedTuple

import torch

from . import dispatch
from .tables import plain_tensors

LEAST = 16  # elements, below which torch goes by other rules
BLOCK = 16
STATE_BYTES = 5056
NOISE_DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}  # `DType` of csrc/common/elementwise.h
# From how many elements on the kernels make the noise, in an op and to fill a tensor: below, to have the state and to give it back
# takes longer than they save. First alone, then in a program with other threads, where the state is looked at twice and made twice.
# A step of diffusers takes 55 µs and with torch.randn 71 for 112 elements, beside a thread 99 and 71, and 130 and 134 for 8192;
# torch_randn 69 and 51 for 4096, 95 and 140 for 16384, beside a thread 146 and 139 (AMD EPYC, Zen 1).
IN_AN_OP = LEAST, 8192
TO_FILL = 8192, 16384

_default = torch.default_generator
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class Source(NamedTuple):
    """A generator, or a tuple of one for each sample, and what is drawn from each of them."""

    generators: torch.Generator | tuple[torch.Generator, ...]
    words: int
    dtype: int
    fused: bool
    alone: bool  # whether the program has no other threads

    def run(self, op, *operands, check=None, **outputs) -> Any:
        """Calls the op, one whose first arguments are `states, noise_dtype, fused`, and puts the generators forward. check() raises
        what is wrong with the operands, in better words than the op: it is called where the op has refused them, and before
        generators go forward that the op has not had yet."""
        try:
            return self._run(op, operands, check, outputs)
        except (RuntimeError, TypeError):
            if check is not None:
                check()
            raise

    def _run(self, op, operands, check, outputs):
        # torch draws with the generator's mutex locked, which cannot be had from outside. Without other threads none is needed: the
        # kernel makes the states after the draw in the same pass.
        if self.alone:
            states = self._states()
            result = op(states, self.dtype, self.fused, *operands, **outputs)
            self._set(states)
            return result
        if check is not None:
            check()
        before, after = self._reserved()
        try:
            return op(before.clone(), self.dtype, self.fused, *operands, **outputs)
        except BaseException:
            with _reserving:  # nothing was drawn, so the words are given back, if they are still the last ones taken
                if torch.equal(self._states(), after):
                    self._set(before)
            raise

    def fill(self, out) -> None:
        self.run(lambda states, dtype, fused: dispatch.DIRECT["torch_randn"](out, states, fused))

    def _reserved(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The states before and after the draw. The generators have gone forward already, so that no other draw of a kernel takes
        the same words. A draw of torch by another thread from the same generator is noticed, and this one starts where that ended,
        unless it falls into the microsecond between the last look and the new state: then both have the same words."""
        with _reserving:
            while True:
                before = self._states()
                after = before.clone()
                dispatch.DIRECT["torch_skip"](after, self.words)
                if torch.equal(self._states(), before):
                    self._set(after)
                    return before, after

    def _states(self) -> torch.Tensor:
        if isinstance(self.generators, tuple):
            return torch.stack([generator.get_state() for generator in self.generators])
        return self.generators.get_state()

    def _set(self, states) -> None:
        if isinstance(self.generators, tuple):
            for generator, state in zip(self.generators, states.unbind(), strict=True):
                generator.set_state(state.clone())  # torch reads it from the beginning of its storage
        else:
            self.generators.set_state(states)


_reserving = threading.Lock()


def _renew_lock():
    global _reserving
    _reserving = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # the thread that held it is not there


def source(generator, x, dtype, worthwhile=None) -> Source | None:
    """Where a compiled kernel makes what `torch.randn(x.shape, generator=generator, dtype=dtype)` would be, or for a list of
    generators that of x[i:i+1] for each sample. None where it cannot, or it is not worthwhile: torch.randn is to be called then.
    The caller knows that nothing is traced or transformed.

    generator: a `torch.Generator`, None for torch's default one of the CPU, or a list of generators.
    worthwhile: from how many elements on, `IN_AN_OP` if None.
    """
    code = NOISE_DTYPES.get(dtype)
    if code is None or type(x) is not torch.Tensor or not x.is_cpu or x.dtype is torch.float64:
        return None
    if x.layout is not torch.strided or not x.is_contiguous():
        return None
    length, (least, beside_others) = x.numel(), worthwhile or IN_AN_OP
    if length < least:
        return None
    alone = threading.active_count() == 1
    if not alone and length < beside_others:
        return None
    if generator is None:
        generator = _default
    elif type(generator) is not torch.Generator:
        if type(generator) is not list or len(generator) < 2 or len(generator) != len(x):
            return None
        if not all(type(one) is torch.Generator for one in generator) or len({id(one) for one in generator}) != len(x):
            return None
        generator, length = tuple(generator), length // len(x)
    if length < LEAST:
        return None
    if generator is not _default and not all(one.device.type == "cpu" for one in _each(generator)):
        return None
    fused = arithmetic(dtype)
    if fused is None:
        return None
    rest = length % BLOCK
    if rest:
        length += BLOCK if dtype is torch.float32 else BLOCK - rest
    return Source(generator, length, code, fused, alone)


def _each(generators):
    return generators if isinstance(generators, tuple) else (generators,)


def untouched() -> bool:
    """Whether nothing is traced or transformed, so that a kernel may be called without torch's knowing."""
    return not (_is_dynamo_compiling() or dispatch.dispatch_modes() or dispatch.transformed())


def randn(shape, generator, dtype, device) -> torch.Tensor:
    """torch.randn(shape, generator=generator, dtype=dtype, device=device); `device` is a torch.device."""
    # untouched first: a program that is traced must not come to depend on how large the noise is
    may_fill = untouched() and device.type == "cpu" and dtype in NOISE_DTYPES and dispatch.backend_for(device) == "cpp"
    if may_fill and math.prod(shape) >= TO_FILL[0]:
        out = torch.empty(shape, dtype=dtype, device=device)
        found = source(generator, out, dtype, TO_FILL)
        if found is not None:
            found.fill(out)
            return out
    if generator is None:  # not as None, with which dynamo takes no symbolic shape
        return torch.randn(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=generator, dtype=dtype, device=device)


def randn_like(x) -> torch.Tensor:
    """torch.randn_like(x)."""
    if untouched() and type(x) is torch.Tensor and x.is_cpu and x.layout is torch.strided and x.is_contiguous():
        return randn(x.shape, None, x.dtype, x.device)
    return torch.randn_like(x)


def like(x, *dtypes) -> dict[str, Any]:
    """What stands for `noise=torch.randn_like(x)` among the arguments of an op with a table in which some row takes noise, and a
    result of the dtype to which that of x and `dtypes` are promoted: torch's default generator where the op's kernel makes the
    noise, else the noise."""
    result = functools.reduce(torch.promote_types, dtypes, x.dtype)
    if result is x.dtype and untouched() and source(None, x, result) is not None:
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
        states = generator.get_state()
        expected = torch.randn(count, generator=generator, dtype=dtype, device="cpu")
        out = torch.empty(1, count, dtype=dtype, device="cpu")
        try:
            dispatch.DIRECT["torch_randn"](out, states, fused)
        except RuntimeError:  # a state of another layout
            return False
        bits = torch.int32 if dtype.itemsize == 4 else torch.int16
        if not torch.equal(out[0].view(bits), expected.view(bits)) or not torch.equal(states, generator.get_state()):
            return False
    return True


def describe() -> str:
    """For each dtype whether the kernels make torch's noise, in words."""
    made = [str(dtype).removeprefix("torch.") for dtype in NOISE_DTYPES if arithmetic(dtype) is not None]
    left = [str(dtype).removeprefix("torch.") for dtype in NOISE_DTYPES if arithmetic(dtype) is None]
    parts = [f"made in the kernels for {', '.join(made)}"] if made else []
    parts += [f"torch.randn's for {', '.join(left)}, which the kernels do not reproduce here"] if left else []
    return "; ".join(parts)
