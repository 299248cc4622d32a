"""diffusers' DiagonalGaussianDistribution on fastgen, the posterior that an AutoencoderKL's `encode` returns: `sample` and `kl` in
one launch each, and nothing computed before it is asked for.

Two ways to have it:

    from fastgen.drop_in.diffusers.vae import DiagonalGaussianDistribution      # a subclass of diffusers' own, for new code
    fastgen.drop_in.diffusers.vae.patch()                       # what diffusers' autoencoders return; or `with patch():`

The numbers are diffusers' to rounding: the same `generator` (or list of them) gives the same noise, log σ² is clamped to −30 … 20,
and results have the same dtypes. Each is computed in float32 (float64 for float64) and rounded once, where diffusers rounds half
precision after every operation; and the divergence keeps the digits that its terms cancel where the posterior is nearly the prior.
The halves of `parameters` are read where they are. `logvar`, `std` and `var`, which diffusers computes for every distribution, are
computed when they are first read.

- `rng="fused"`, a keyword of the class and of `patch`: noise is made in the kernel, from a seed that is drawn from `generator`
  (one for each sample from a list of them), so no noise tensor exists. Other numbers than diffusers', of the same distribution.

`mode` and `nll` are diffusers' own code, and so is what is not covered: a deterministic distribution, a divergence of parameters
that are not (B, 2C, H, W), or from a distribution that is not of this class, and one whose mean, logvar, std or var has been set.
That is said at level DEBUG of the logger "fastgen.drop_in". A compiled program (torch.compile) has diffusers' own code where
`patch` is in force, which Inductor fuses, and fastgen's kernels where the class of this module is used.

The class is patched only where the tests have run its code, which `_known_code.py` tells by fingerprints: of another release of
diffusers, `patch` leaves it alone and says so (`Patch.skipped`, and a line of level INFO), and the class of this module is
diffusers' own but for its name, which it says in a line of level WARNING when the first distribution is made.
"""

from __future__ import annotations

import functools

import torch
from diffusers.models.autoencoders import vae

from ..._ops.gaussian_kl import gaussian_kl
from ..._ops.reparameterize import reparameterize
from .._patch import Patch, check_rng, fall_through, full_name, logger
from .._source import mark_replacement
from ._covered import why_untested
from ._noise import noise_source

__all__ = ["DiagonalGaussianDistribution", "patch"]

_OWN = vae.DiagonalGaussianDistribution  # diffusers' own
_CLAMP = -30.0, 20.0
_METHODS = ("__init__", "sample", "kl")  # what is replaced
_IMAGE = 4  # the dimensions of what diffusers adds up over: all but the first of (B, C, H, W)


def _why_untested() -> str:
    return "; ".join(filter(None, (why_untested(_OWN, name) for name in _METHODS)))


class DiagonalGaussianDistribution(_OWN):
    """diffusers' DiagonalGaussianDistribution, its `sample` and `kl` on fastgen. See the module for what differs.

    rng: "exact", the noise that diffusers would draw, or "fused", noise made in the kernel.
    """

    _rng = "exact"
    _warning = _why_untested()

    def __init__(self, parameters: torch.Tensor, deterministic: bool = False, *, rng: str = "exact") -> None:
        check_rng(rng)
        if type(self)._warning:
            _warn_once()
            super().__init__(parameters, deterministic)
            return
        self._rng = rng
        self._begin(parameters, deterministic)

    def _begin(self, parameters, deterministic):
        self.parameters, self.deterministic = parameters, deterministic
        self.mean, log_variance = torch.chunk(parameters, 2, dim=1)
        self._halves, self._computed = (self.mean, log_variance), {}

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> torch.Tensor:
        if why := self._problem():
            fall_through("DiagonalGaussianDistribution.sample", why)
            return super().sample(generator)  # pyright: ignore[reportArgumentType]  # a list as well, as randn_tensor takes it
        mean, log_variance = self._halves
        return reparameterize(mean, log_variance, clamp=_CLAMP, **noise_source(self._rng, generator, None, mean))

    def kl(self, other: vae.DiagonalGaussianDistribution | None = None) -> torch.Tensor:
        if why := self._problem() or self._problem_of_kl(other):
            fall_through("DiagonalGaussianDistribution.kl", why)
            return super().kl(other)  # pyright: ignore[reportArgumentType]  # whose default is None
        others = other._halves if isinstance(other, DiagonalGaussianDistribution) else ()
        return gaussian_kl(*self._halves, *others, clamp=_CLAMP).to(self.mean.dtype)

    def _problem(self) -> str:
        """Why diffusers' own code has to run; "" where it need not."""
        if self.deterministic:
            return "the distribution is deterministic"
        if "_halves" not in self.__dict__:
            return type(self)._warning
        if self.mean is not self._halves[0] or self._computed.get("set"):
            return "one of its parameters has been set"
        return ""

    def _problem_of_kl(self, other) -> str:
        mean = self.mean
        if mean.dim() != _IMAGE:
            return f"its parameters have {mean.dim()} dimensions"
        if other is None:
            return ""
        if not isinstance(other, DiagonalGaussianDistribution):
            return "the other is of another class"
        if other.mean.shape != mean.shape or other.mean.dtype != mean.dtype or other.mean.device != mean.device:
            return "the other has another shape, dtype or device"
        return other._problem()

    def _once(self, name, compute):
        """An attribute that diffusers computes for every distribution."""
        if name not in self._computed:
            self._computed[name] = compute()
        return self._computed[name]

    def _set(self, name, value):
        # by diffusers' own __init__; or by a user, and then the others stay what they were
        if "_halves" in self.__dict__:
            self._computed |= {"std": self.std, "var": self.var}
        self.__dict__.setdefault("_computed", {})[name] = value
        self._computed["set"] = True

    def _std(self):
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    def _var(self):
        return self.std if self.deterministic else torch.exp(self.logvar)

    logvar = property(
        lambda self: self._once("logvar", lambda: torch.clamp(self._halves[1], *_CLAMP)),
        lambda self, value: self._set("logvar", value),
    )
    std = property(lambda self: self._once("std", self._std), lambda self, value: self._set("std", value))
    var = property(lambda self: self._once("var", self._var), lambda self, value: self._set("var", value))


class _Fused(DiagonalGaussianDistribution):
    """What `patch(rng="fused")` makes of diffusers' distributions."""

    _rng = "fused"


_to_warn = [True]


def _warn_once():
    if _to_warn:
        _to_warn.clear()
        why = DiagonalGaussianDistribution._warning
        logger.warning("%s.DiagonalGaussianDistribution is diffusers' own: %s", __name__, why)


def patch(*, rng: str = "exact") -> Patch:
    """Puts the distributions that diffusers' autoencoders make on fastgen, until `unpatch()` of what is returned, or the end of a
    `with` block over it. One that has been made meanwhile stays so; those that there were stay diffusers' own, and so do those of
    subclasses.

    rng: "exact" or "fused", see the module. Raises ValueError for others.
    """
    check_rng(rng)
    made = DiagonalGaussianDistribution if rng == "exact" else _Fused
    why, name = _why_untested(), full_name(_OWN, "__init__")
    replacements = [] if why else [(_OWN, "__init__", functools.partial(_making, made))]
    return Patch(replacements, "constructors of diffusers' distributions", {name: why} if why else {})


def _making(made, original):
    """An `__init__` of diffusers' class that makes the object one of `made`."""

    @functools.wraps(original)
    def __init__(self, parameters, deterministic=False):
        if type(self) is not _OWN or torch.compiler.is_compiling():  # which knows no change of an object's class
            original(self, parameters, deterministic)
            return
        self.__class__ = made
        made._begin(self, parameters, deterministic)

    mark_replacement(__init__, original)
    return __init__
