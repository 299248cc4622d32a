"""What the two `GaussianDiffusion` adapters share: which methods may be replaced, coefficients kept with an object, checks."""

from __future__ import annotations

import functools
import inspect
import operator
import types
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from .. import _checks
from .._tables import Coefficients, plain_tensors, step_columns
from ._patch import NotCovered, Patch, fall_through, full_name


class Method(NamedTuple):
    make: Callable  # of the original and rng: the replacement, whose arguments are the original's
    signatures: tuple[str, ...]  # the names of those, with commas between, as its versions have them; others are another method's
    stands_for: tuple[str, ...] = ()  # the library's methods whose formulas it has fused: overridden ones, it has not


def patched(owner, methods, anchor, rng) -> Patch:
    """Of those of `methods` (name → `Method`) that `owner`, a class or an instance, has as the library wrote them: in the class
    that defines `anchor`, with the same parameters."""
    replacements, skipped = [], {}
    for name, method in methods.items():
        why = _difference(owner, name, methods, anchor)
        if why:
            skipped[full_name(_class(owner), name)] = why
        else:
            replacements.append((owner, name, functools.partial(_replacement, owner, name, method, anchor, rng)))
    return Patch(replacements, f"methods of {_class(owner).__name__}", skipped)


def _class(owner):
    return owner if isinstance(owner, type) else type(owner)


def _difference(owner, name, methods, anchor):
    """Why `owner.name` may not be replaced, or None."""
    if not hasattr(owner, name):
        return "there is none"
    if not written_by_the_library(owner, name, anchor):
        return "it is overridden"
    for other in (name, *methods[name].stands_for):
        if other in methods and parameters(getattr(owner, other)) not in methods[other].signatures:
            return f"the arguments of {other} are not {' or '.join(methods[other].signatures)}"
    return None


def written_by_the_library(owner, name, anchor):
    home = _home(getattr(owner, name, None))
    if home == _home(getattr(owner, anchor)):
        return True
    # guided-diffusion's SpacedDiffusion overrides p_mean_variance to wrap the network, by its _wrap_model, and for nothing else
    return name == "p_mean_variance" and hasattr(owner, "_wrap_model") and home == _home(owner._wrap_model)


def _home(function):
    """The class in whose body a function is written; a replacement, by functools.wraps, has its original's."""
    return getattr(function, "__module__", None), getattr(function, "__qualname__", "").rpartition(".")[0]


def parameters(function):
    """The names of a function's or method's arguments but for self: "x, t"."""
    return ", ".join(name for name in inspect.signature(function).parameters if name != "self")


def _replacement(owner, name, method, anchor, rng, original):
    function = getattr(original, "__func__", original)
    fused = method.make(function, rng)

    @functools.wraps(function)
    def replacement(self, *arguments, **keywords):
        if torch.compiler.is_compiling():
            return function(self, *arguments, **keywords)
        try:
            for other in method.stands_for:
                if not written_by_the_library(self, other, anchor):
                    raise NotCovered(f"{other} is overridden")
            return fused(self, *arguments, **keywords)
        except NotCovered as reason:
            fall_through(f"{type(self).__name__}.{name}", str(reason))
        return function(self, *arguments, **keywords)

    # a method, not a closure: copy.deepcopy binds a method to the copy, and pickle looks it up again by its name
    return replacement if isinstance(owner, type) else types.MethodType(replacement, owner)


# ---- coefficients ---------------------------------------------------------------------------------------------------------

# object → key → (the attributes that they were computed from, their versions, the coefficients)
_kept: weakref.WeakKeyDictionary[object, dict] = weakref.WeakKeyDictionary()


def coefficients(owner, key, names, rows, *arguments):
    """`Coefficients` of the op key[0] with rows(*arrays, *arguments), the arrays being the attributes `names` of `owner` in
    float64. Kept for `key`, as long as each attribute is the same object and, if a tensor, has not been written to."""
    sources = [getattr(owner, name) for name in names]
    try:
        versions = [x._version if isinstance(x, torch.Tensor) else None for x in sources]
    except RuntimeError:
        raise NotCovered("buffers made in inference mode, which do not tell when they are written to") from None
    kept = _kept.get(owner)
    if kept is None:
        kept = _kept.setdefault(owner, {})
    found = kept.get(key)
    if found is not None and found[1] == versions and all(map(operator.is_, found[0], sources)):
        return found[2]
    with plain_tensors():
        made = Coefficients(key[0], rows(*map(_array, sources), *arguments))
    kept[key] = sources, versions, made
    return made


def _array(x):
    """The values that the library multiplies by, which are float32 where it keeps NumPy arrays."""
    if isinstance(x, torch.Tensor):
        return x.detach().to("cpu", torch.float64).numpy()
    return np.asarray(x, np.float32).astype(np.float64)


def columns(*arrays):
    return np.stack(arrays, axis=1)


def noising_of(owner):
    """Of q_sample; both libraries name the attributes alike, here and below."""
    return coefficients(owner, ("q_sample",), ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"), columns)


def posterior_of(owner):
    """Of the posterior's mean, variance and log-variance."""
    names = "posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance", "posterior_log_variance_clipped"
    return coefficients(owner, ("q_posterior",), names, columns)


def ddim_columns(p, q, recip, recipm1, alpha, previous, eta, double=False):
    """The columns of a DDIM step from ᾱ = `alpha` to ᾱ = `previous`:

        y = √previous·x0 + √(1 − previous − σ²)·ε + σ·z,   ε = (recip·x − x0)/recipm1

    with the cancellation of 1 − ᾱ in float32, which both libraries have. Where `previous` is 1, y is x0.
    """
    alpha, previous = (x.astype(np.float64 if double else np.float32) for x in (alpha, previous))
    sigma = eta * np.sqrt((1 - previous) / (1 - alpha)) * np.sqrt(1 - alpha / previous)
    share = np.sqrt(1 - previous - sigma**2).astype(np.float64) / recipm1
    return step_columns(p, q, np.sqrt(previous).astype(np.float64) - share, share * recip, sigma.astype(np.float64))


# ---- checks ---------------------------------------------------------------------------------------------------------------

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def check(name, x):
    """A tensor that the kernels take; a subclass may have ideas of its own."""
    if type(x) not in _PLAIN or x.dtype not in _checks.FLOATING or x.layout is not torch.strided or x.is_meta or x.dim() == 0:
        raise NotCovered(f"{name} is no dense tensor of floating dtype and shape (B, ...)")


def check_like(name, x, other):
    check(name, x)
    if x.shape != other.shape or x.device != other.device:
        raise NotCovered(f"{name} has another shape or device than the data")


def check_t(t, x):
    if type(t) not in _PLAIN or t.dtype != torch.int64 or t.shape != x.shape[:1] or t.device != x.device:
        raise NotCovered("t is no int64 tensor of shape (B,) on the device of the data")


def check_eta(eta):
    if not isinstance(eta, (int, float)):
        raise NotCovered("eta is no number")


def widened(x, *dtypes):
    """`x` in the dtype that it has once it has met tensors of `dtypes`, the library's coefficients among them."""
    for dtype in dtypes:
        if dtype is not x.dtype:
            x = x.to(torch.promote_types(dtype, x.dtype))
    return x
