"""Every check of an argument, for every backend: TypeError for a wrong type or dtype, ValueError for the rest.

Each message names the argument, what was expected and what came. The fast path of a check is a comparison; the words are
put together only where it fails.
"""

from __future__ import annotations

import math
import operator

import torch

from ..schedule import Schedule, _number
from .tables import fake_mode, making_graph

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# Where torch's own function raises another class, ours is both: code that catches torch's error catches this one too.
class NotATensor(TypeError, AttributeError):
    pass


class Unsupported(TypeError, NotImplementedError):  # torch raises NotImplementedError or its base, RuntimeError
    pass


class Mismatched(ValueError, RuntimeError):
    pass


def values_are_hidden() -> bool:
    """Whether a tracer is at work, whose tensors have no values and no addresses to look at: torch.compile, make_fx, a fake mode.
    A mode that only looks on, such as a counter of operations, hides nothing."""
    return torch.compiler.is_compiling() or (
        torch._C._len_torch_dispatch_stack() > 0 and (making_graph() or fake_mode() is not None)
    )


def any_tensor(name: str, x) -> None:
    if not isinstance(x, torch.Tensor):
        raise NotATensor(f"{name}: expected a tensor, got {type(x).__name__}")


def tensor(name: str, x, or_bytes: bool = False) -> None:
    """A strided tensor of a supported floating dtype, or of bytes where data may be those."""
    any_tensor(name, x)
    if x.dtype not in FLOATING and not (or_bytes and x.dtype is torch.uint8):
        expected = "float16, bfloat16, float32, float64 or uint8" if or_bytes else "float16, bfloat16, float32 or float64"
        raise Unsupported(f"{name}: expected dtype {expected}, got {_dtype(x.dtype)}")
    if x.layout is not torch.strided or x.is_nested:
        got = "a nested one" if x.is_nested else f"layout {x.layout}"
        raise Unsupported(f"{name}: expected a dense (strided) tensor, got {got}")


def batched(name: str, x, or_bytes: bool = False) -> None:
    """A floating tensor of shape (B, *event), or one of bytes where data may be those."""
    tensor(name, x, or_bytes)
    if x.dim() == 0:
        raise ValueError(f"{name}: expected shape (B, ...), got a tensor without dimensions")


def like(name: str, y, x_name: str, x) -> None:
    """A floating tensor with the shape and device of `x`."""
    tensor(name, y)
    if y.device != x.device:
        raise Mismatched(f"{name}: expected a tensor on {x.device} like {x_name}, got one on {y.device}")
    same_shape(name, y, x_name, x)


def same_shape(name: str, y, x_name: str, x) -> None:
    if not y.is_nested and not x.is_nested and y.shape != x.shape:
        raise ValueError(f"{name}: expected shape {tuple(x.shape)} like {x_name}, got {tuple(y.shape)}")


def exactly_like(name: str, y, x_name: str, x) -> None:
    """A floating tensor with the shape, device and dtype of `x`."""
    like(name, y, x_name, x)
    if y.dtype != x.dtype:
        raise TypeError(f"{name}: expected dtype {_dtype(x.dtype)} like {x_name}, got {_dtype(y.dtype)}")


def two_channels(name: str, y, x_name: str, x) -> None:
    """A floating tensor with twice the channels (dimension 1) of `x`, else its shape, on its device."""
    tensor(name, y)
    if x.dim() < 2:
        raise ValueError(f"{x_name}: expected shape (B, C, ...) for a learned variance, got {tuple(x.shape)}")
    if y.device != x.device:
        raise ValueError(f"{name}: expected a tensor on {x.device} like {x_name}, got one on {y.device}")
    expected = (x.shape[0], 2 * x.shape[1], *x.shape[2:])
    if tuple(y.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, twice the channels of {x_name}, got {tuple(y.shape)}")


def result_dtype(x, y) -> torch.dtype:
    """The promoted dtype of two floating tensors; of one, where the other has bytes."""
    return x.dtype if x.dtype == y.dtype else torch.promote_types(x.dtype, y.dtype)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic on `dtype` is done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def schedule(value) -> None:
    if not isinstance(value, Schedule):
        raise TypeError(f"schedule: expected a fastgen.Schedule, got {type(value).__name__}")


def timestep(t, x, end: int, note: str, begin: int = 0):
    """(tensor, 0) for a tensor of shape (B,) within begin … end-1, (None, int) for an int. `begin` is 1 where a step that adds no
    noise will not do.

    The values of a tensor are looked at on the CPU only: on a GPU that would synchronise, and a traced one has none.
    """
    if isinstance(t, torch.Tensor):
        if t.dtype != torch.int64:
            raise TypeError(f"t: expected an int or an int64 tensor, got dtype {_dtype(t.dtype)}")
        if t.dim() != 1 or t.shape[0] != x.shape[0]:
            raise ValueError(f"t: expected shape ({x.shape[0]},), one timestep per sample, got {tuple(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"t: expected a tensor on {x.device} like the data, got one on {t.device}")
        if t.device.type == "cpu" and t.numel() and not values_are_hidden():
            low, high = (int(bound) for bound in torch.aminmax(unwrapped(t)))
            if low < begin or high >= end:
                got = low if low < begin else high
                raise ValueError(f"t: expected timesteps within {begin} … {end - 1}, got {got}{_note(got, begin, note)}")
        return t, 0
    t = integer("t", t, "an int or an int64 tensor of shape (B,)")
    if not begin <= t < end:
        raise ValueError(f"t: expected a timestep within {begin} … {end - 1}, got {t}{_note(t, begin, note)}")
    return None, t


def _note(t, begin, note):
    return "; the step to x_0 adds no noise, so that it has no density" if 0 <= t < begin else note


def unwrapped(x):
    """The tensor inside the wrappers of torch.func, to look at its values: under vmap, those of all samples."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]  # torch's stub of _C lacks it
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


def integer(name: str, value, expected: str = "an int") -> int:
    if type(value) is int:
        return value
    if isinstance(value, (bool, torch.Tensor)):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}") from None


def shape(value) -> tuple[int, ...]:
    """(B, *event), a sequence of sizes ≥ 0."""
    try:
        sizes = tuple(integer("shape", size, "ints") for size in value)
    except TypeError:
        raise TypeError(f"shape: expected a sequence of ints, got {value!r}") from None
    if not sizes or min(sizes) < 0:
        raise ValueError(f"shape: expected (B, ...) with sizes ≥ 0, got {sizes}")
    return sizes


def floating_dtype(dtype) -> torch.dtype:
    if dtype not in FLOATING:
        raise TypeError(f"dtype: expected float16, bfloat16, float32 or float64, got {dtype}")
    return dtype


def device(value) -> torch.device:
    """With its index, "cuda:<current>" for "cuda", as tensors have it; likewise on Intel's GPUs. None is torch's default."""
    if value is None and torch.compiler.is_compiling():
        return torch.empty(0).device  # dynamo knows no torch.get_default_device
    try:
        found = torch.get_default_device() if value is None else torch.device(value)
    except TypeError:
        raise TypeError(f"device: expected a torch.device or its name, got {type(value).__name__}") from None
    except RuntimeError:
        raise ValueError(f"device: expected a device that torch knows, got {value!r}") from None
    if found.type in ("cuda", "xpu") and found.index is None:
        try:
            return torch.device(found.type, getattr(torch, found.type).current_device())
        except (AssertionError, RuntimeError) as error:  # AssertionError of a torch that was built without it
            raise ValueError(f"device: expected one that torch finds here, got {value!r}: {error}") from error
    return found


def option(name: str, value, allowed: tuple) -> None:
    if not isinstance(value, tuple(map(type, allowed))) or value not in allowed:  # an array would be compared with each
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def number(name: str, value, *, low: float, strict: bool = False) -> float:
    """A finite real number ≥ low (> low where strict), of whatever library."""
    found = _number(name, value)
    if not (low < found < math.inf if strict else low <= found < math.inf):
        bound = "" if low == -math.inf else f" {'>' if strict else '≥'} {low:g}"
        raise ValueError(f"{name}: expected a finite number{bound}, got {value!r}")
    return found


def interval(name: str, value) -> tuple[float, float]:
    """A pair of numbers, the lower one first, either of which may be infinite; both are where the value is None."""
    if value is None:
        return -math.inf, math.inf
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: expected a pair of numbers or None, got {value!r}")
    low, high = _number(name, value[0]), _number(name, value[1])
    if not low <= high:
        raise ValueError(f"{name}: expected a pair of numbers, the lower one first, got {value!r}")
    return low, high


def boolean(name: str, value) -> bool:
    if value is not True and value is not False:
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def function(name: str, value) -> None:
    if not callable(value):
        raise TypeError(f"{name}: expected a callable, got {type(value).__name__}")


def output(out, shape, dtype, device, inputs: dict) -> None:
    """`out` fits the result, and overlaps no input except by being exactly it."""
    tensor("out", out, or_bytes=dtype is torch.uint8)
    if out.dtype != dtype:
        raise TypeError(f"out: expected dtype {_dtype(dtype)}, got {_dtype(out.dtype)}")
    if out.device != device:
        raise ValueError(f"out: expected a tensor on {device}, got one on {out.device}")
    if out.shape != shape:
        raise ValueError(f"out: expected shape {tuple(shape)}, got {tuple(out.shape)}")
    if torch.is_grad_enabled():
        ungraded_output(out, *inputs.values())
    if values_are_hidden():
        return  # addresses are unknown while tracing; functionalisation copies where tensors overlap
    first, last = _span(out)
    repeated = out.numel() and any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True))
    if repeated or last - first < out.numel() * out.itemsize:
        raise ValueError("out: expected every element to have its own memory, got an expanded or overlapping view")
    for name, x in inputs.items():
        if x is None or x is out:
            continue
        x_first, x_last = _span(x)
        if x_last <= first or last <= x_first:
            continue
        same = x_first == first and x.shape == out.shape and x.stride() == out.stride() and x.dtype == out.dtype
        if not same:
            raise ValueError(f"out: expected memory apart from {name}, or {name} itself, got an overlapping view of it")


def ungraded_output(out, *inputs) -> None:
    """Where gradients are enabled: neither `out` nor an input requires one."""
    if any(isinstance(x, torch.Tensor) and x.requires_grad for x in (out, *inputs)):
        raise ValueError("out: expected no tensor that requires grad, since out= cannot record a gradient; use torch.no_grad()")


def _span(x) -> tuple[int, int]:
    """The first and one-past-last byte address that `x` touches."""
    first, count = x.data_ptr(), x.numel()
    if count and not x.is_contiguous():
        count = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return first, first + count * x.itemsize


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
