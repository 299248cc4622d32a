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

from .._core import checks, torch_noise
from .._core import rng as _rng
from .._core.tables import Coefficients, plain_tensors, step_columns
from .._ops.randn import randn
from ._patch import NotCovered, Patch, fall_through, full_name
from ._source import fingerprint, mark_replacement, replaced_by


class Code(NamedTuple):
    versions: str  # whose code it is; with which of them the tests have run, the documentation of `patch` says
    how: dict  # what a replacement has to know of it; "forwards": it wraps the network by _wrap_model and calls super()'s


def code(versions, **how) -> Code:
    return Code(versions, how)


class Method(NamedTuple):
    known: dict[str, Code]  # by their fingerprints
    # Of the original, rng and the code's `how`: the replacement, whose arguments are self, `how` of each of `fuses`, and the others
    # of the original. None where there is only something to know.
    make: Callable | None = None
    fuses: tuple[str, ...] = ()  # the methods that the original calls on the way, whose formulas the replacement has
    calls: tuple[str, ...] = ()  # those that the replacement calls too, or where it can be that the original does not run


def patched(owner, methods, rng) -> Patch:
    """Of those of `methods` (name → `Method`) that `owner`, a class or an instance, has with code that is known, down to what it
    calls on the way. Functions of its module that they call are looked at here, and not again while the patch is in force."""
    replacements, skipped = [], {}
    for name in methods:
        _known(_class(owner), name, methods, anew=True)
    for name, method in methods.items():
        if method.make is None:
            continue
        why = _difference(owner, name, methods)
        if why:
            skipped[full_name(_class(owner), name)] = why
        else:
            replacements.append((owner, name, functools.partial(_replacement, owner, name, methods, rng)))
    return Patch(replacements, f"methods of {_class(owner).__name__}", skipped)


def _class(owner):
    return owner if isinstance(owner, type) else type(owner)


def _difference(owner, name, methods):
    """Why `owner.name` may not be replaced, or None."""
    for other in (name, *methods[name].fuses):
        why = _why_unknown(owner, other, methods)
        if why:
            return f"{'its code' if other == name else f'the code of {other}'} is {why}"
    return None


def _why_unknown(owner, name, methods):
    if not isinstance(owner, type):
        own = getattr(owner, "__dict__", {}).get(name)
        written = getattr(own, "__func__", own)  # a pickle brings a patched method back as the class's own, bound
        if own is not None and replaced_by(own) is None and written is not getattr(type(owner), name, None):
            return "the object's own"
    return _known(_class(owner), name, methods)[1]


def how(self, name, methods) -> dict:
    """What there is to know of the code of a method of `self`; NotCovered where that is not known."""
    why = _why_unknown(self, name, methods)
    if why:
        raise NotCovered(f"the code of {name} is {why}")
    return _known(type(self), name, methods)[0]


def knows(self, name, methods) -> bool:
    return not _why_unknown(self, name, methods)


# class → (methods, name) → the functions that are found for it, and what _known returns
_found: weakref.WeakKeyDictionary[type, dict] = weakref.WeakKeyDictionary()


def _known(kind, name, methods, anew=False):
    """(how, None) of the method `name` of a class, or (None, why its code is not known); kept while it is the same function, unless
    it is to be looked at `anew`."""
    kept = _found.get(kind)
    if kept is None:
        kept = _found.setdefault(kind, {})
    found = kept.get((id(methods), name))
    if found is not None and not anew:
        function, forwarded, result = found
        if function() is getattr(kind, name, None) and all(vars(c).get(name) is f() for c, f in forwarded):
            return result
    seen, known, result = [], {}, (None, "missing")
    for place in (c for c in kind.__mro__ if name in vars(c)):
        seen.append((place, _reference(vars(place)[name])))
        digits = fingerprint(vars(place)[name])
        if digits not in methods[name].known:
            result = None, "not known" if digits else "without a source to compare"
            break
        known = {**methods[name].known[digits].how, **known}
        if "forwards" not in methods[name].known[digits].how:
            result = known, None
            break
    kept[id(methods), name] = _reference(getattr(kind, name, None)), seen[1:], result
    return result


def _reference(function):
    """Weak, since a function may hold its class, as a value of `_found` may not."""
    return weakref.ref(function) if isinstance(function, types.FunctionType) else lambda: function


def parameters(function):
    """The names of a function's or method's arguments but for self: "x, t"."""
    return ", ".join(name for name in inspect.signature(function).parameters if name != "self")


class _Verdict:
    """Of the methods `names` of an object, (name → how), each time it is asked for; NotCovered where the code of one is not known.
    What is asked of one class again and again costs 1 to 2 µs."""

    def __init__(self, names, methods):
        self.names, self.methods = names, methods
        self.functions = operator.attrgetter(*names) if len(names) > 1 else lambda kind: [getattr(kind, name) for name in names]
        # weakly a class, its functions, `how` of each, and what those that forward lead to
        self.last = lambda: None, None, None, ()

    def of(self, instance):
        kind, own = type(instance), getattr(instance, "__dict__", {})
        last, functions, known, forwarded = self.last
        same = last() is kind and self.functions(kind) == functions
        if same and all(vars(c).get(name) is f() for c, name, f in forwarded):
            for name in self.names:
                if name in own and replaced_by(own[name]) is None:
                    break
            else:
                return known
        known = {name: how(instance, name, self.methods) for name in self.names}
        forwarded = [(c, n, f) for n in self.names for c, f in _found[kind][id(self.methods), n][1]]
        self.last = weakref.ref(kind), self.functions(kind), known, forwarded
        return known


def _replacement(owner, name, methods, rng, original):
    function, method = getattr(original, "__func__", original), methods[name]
    fused = method.make(function, rng, _known(_class(owner), name, methods)[0])
    names = set(inspect.signature(function).parameters) - {"self"}
    open_ended = "args" in names  # as of SpacedDiffusion's methods that only forward
    verdict = _Verdict(method.fuses, methods)

    @functools.wraps(function)
    def replacement(self, *arguments, **keywords):
        if torch.compiler.is_compiling() or not (open_ended or len(arguments) <= len(names) and keywords.keys() <= names):
            return function(self, *arguments, **keywords)  # or its error about arguments that it has not
        try:
            return fused(self, verdict.of(self), *arguments, **keywords)
        except NotCovered as reason:
            fall_through(f"{type(self).__name__}.{name}", str(reason))
        return function(self, *arguments, **keywords)

    mark_replacement(replacement, function)  # which _source.fingerprint takes for it
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
    return x.detach().to("cpu", torch.float64).numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float64)


def columns(*arrays):
    return np.stack(arrays, axis=1)


def noising_of(owner):
    """Of q_sample; both libraries name the attributes alike, here and below."""
    return coefficients(owner, ("q_sample",), ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"), columns)


def posterior_of(owner):
    """Of the posterior's mean, variance and log-variance."""
    names = "posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance", "posterior_log_variance_clipped"
    return coefficients(owner, ("q_posterior",), names, columns)


def ddim_columns(p, q, recip, recipm1, alpha, previous, eta, rederived=True):
    """The columns of a DDIM step from ᾱ = `alpha` to ᾱ = `previous`:

        y = √previous·x0 + √(1 − previous − σ²)·ε + σ·z,   ε = (recip·x − x0)/recipm1, or what the network says if not `rederived`

    Both libraries compute 1 − ᾱ and the like in float32, where the cancellation costs up to 1e-5 of a step; here they are
    rounded once. Where `previous` is 1, y is x0.
    """
    sigma = eta * np.sqrt((1 - previous) / (1 - alpha)) * np.sqrt(1 - alpha / previous)
    scale, share = np.sqrt(previous), np.sqrt(1 - previous - sigma**2)
    if not rederived:
        return step_columns(p, q, scale, 0.0, sigma, y_from_m=share)
    return step_columns(p, q, scale - share / recipm1, share / recipm1 * recip, sigma)


def bound_columns(scale, sigma, p, q, u, low, slope, intercept, learned, target):
    """The columns of the bound's terms, `VLB_TERMS_COLUMNS`: x_t = scale·x0 + sigma·ε, x0 = p·x_t + q·m, u the posterior mean's
    share of x0, `low` the log of the posterior's variance, slope·v + intercept that of the network's; and of the squared error of
    `target`, "noise" or "x0"."""
    zero, excess = 0 * low, intercept - low
    constant, precision = (zero, np.exp(-low)) if learned else (0.5 * (excess + np.expm1(-excess)), np.exp(-intercept))
    decoder = zero.copy()
    decoder[0] = 1.0
    terms = scale, sigma, p, q, u, low, slope + zero, intercept + zero, constant, precision, decoder
    return columns(*terms, zero + float(target == "x0"), zero + float(target == "noise"), zero + 1.0)


def prior_columns(alphas_cumprod):
    """Of the prior's, KL(q(x_T | x0) ‖ N(0, I)): x0 is to be given for m and x_t too, with t = 0."""
    last = alphas_cumprod[-1:]
    zero = 0 * last
    constant = 0.5 * (-last - np.log1p(-last))
    return columns(*(zero,) * 4, np.sqrt(last), *(zero,) * 3, constant, zero + 1.0, *(zero,) * 4)


def error_columns(p, q):
    """Of ½·(x0 − p·x_t − q·m)², whether a variance is learned or not."""
    zero = 0 * p
    return columns(zero, zero, p, q, zero + 1.0, *(zero,) * 4, zero + 1.0, *(zero,) * 4)


# ---- checks ---------------------------------------------------------------------------------------------------------------

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def check(name, x):
    """A tensor that the kernels take; a subclass may have ideas of its own."""
    if type(x) not in _PLAIN or x.dtype not in checks.FLOATING or x.layout is not torch.strided or x.is_meta or x.dim() == 0:
        raise NotCovered(f"{name} is no dense tensor of floating dtype and shape (B, ...)")


def check_like(name, x, other):
    check(name, x)
    if x.shape != other.shape or x.device != other.device:
        raise NotCovered(f"{name} has another shape or device than the data")


def noise_of_loss(x0, noise, rng):
    """What `q_sample` and then the loss take noise from: what is given; else torch's, or fused a seed; on the CPU, where noise
    costs more than memory, what they would make of that seed, once."""
    if noise is not None:
        check_like("noise", noise, x0)
        if noise.dtype != x0.dtype:
            raise NotCovered("noise has another dtype than x_start")
        return {"noise": noise}
    if rng != "fused":
        return {"noise": torch_noise.randn_like(x0)}
    seed = _rng.drawn_seed(x0.device)
    return {"noise": randn(x0.shape, seed=seed, dtype=x0.dtype)} if x0.is_cpu else {"seed": seed}


def check_constant(x0, noise):
    """With a detached mean the kernels give them no gradient, or another than the libraries."""
    if torch.is_grad_enabled() and (x0.requires_grad or (noise is not None and noise.requires_grad)):
        raise NotCovered("gradients to the data or the noise")


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
