"""Replacing functions of a running program by fastgen's, and putting them back, whatever else has been put in their place since."""

from __future__ import annotations

import logging
import threading

import torch

from .._core import checks

logger = logging.getLogger("fastgen.drop_in")

_lock = threading.Lock()
# (owner, name) → the owner, what its own namespace held, what is replaced, and the replacements in force, the last of which is seen
_replaced: dict[tuple[int, str], tuple[object, object, object, list]] = {}
_ABSENT = object()


class Patch:
    """Replacements in force from its creation to `unpatch()`, or to the end of a `with` block over it. Until then an object that is
    patched, and all that it holds, stays alive.

    - `covered`: the names of what runs on fastgen, a tuple of strings: ("GaussianDiffusion.q_sample", …)
    - `skipped`: what keeps its own code and why, a dict of strings: {"GaussianDiffusion.p_sample": "its code is not known …"}

    Both say what was done at the patch's creation, as does a line of level INFO of the logger "fastgen.drop_in". A method that is
    covered may still run the original for arguments that its kernel does not take, which a line of level DEBUG says.
    """

    def __init__(self, replacements, what, skipped=None):
        """replacements: (owner, name, make) each; make(original) gives what `owner.name` becomes, `original` being what it was
        before any patch. what: "methods of GaussianDiffusion", what they and those of `skipped` (name → why) are together."""
        self._active, covered = [], []
        try:
            for owner, name, make in replacements:
                self._replace(owner, name, make)
                covered.append(full_name(owner, name))
        except BaseException:
            self.unpatch()
            raise
        self.covered, self.skipped, self._what = tuple(covered), dict(skipped or {}), what
        logger.info("%s", self)

    def __repr__(self):
        reasons = "; ".join(f"{name.rpartition('.')[2]}: {why}" for name, why in self.skipped.items())
        of = f"{len(self.covered)} of {len(self.covered) + len(self.skipped)} {self._what}"
        return f"{of} run on fastgen" + (f"; not {reasons}" if reasons else "")

    def _replace(self, owner, name, make):
        with _lock:
            key = id(owner), name
            if key not in _replaced:
                _replaced[key] = owner, vars(owner).get(name, _ABSENT), getattr(owner, name), []
            original, stack = _replaced[key][2:]
            replacement = make(original)
            stack.append((self, replacement))
            setattr(owner, name, replacement)
            self._active.append(key)

    def unpatch(self) -> None:
        """Puts back what was there; a second call does nothing."""
        with _lock:
            while self._active:
                key = self._active.pop()
                owner, own, _, stack = _replaced[key]
                stack[:] = [entry for entry in stack if entry[0] is not self]
                if stack:
                    setattr(owner, key[1], stack[-1][1])
                    continue
                del _replaced[key]
                if own is not _ABSENT:
                    setattr(owner, key[1], own)
                elif key[1] in vars(owner):  # else someone has deleted it meanwhile
                    delattr(owner, key[1])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.unpatch()


def full_name(owner, name: str) -> str:
    """ "GaussianDiffusion.q_sample" for an attribute of a class, an instance of it, or a module."""
    return f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"


class NotCovered(Exception):
    """Why the original has to run. Raised before the network is called and before anything is drawn."""


def check_rng(rng, *others: str) -> None:
    """The noise of the library itself, the same numbers in the same order; or noise made in the kernels; or what else there is."""
    checks.option("rng", rng, ("exact", "fused", *others))


def fall_through(what: str, why: str | NotCovered) -> None:
    """Says that the original runs, in a line of level DEBUG of the logger "fastgen.drop_in"; but not while compiling, where nothing
    can be logged."""
    if not torch.compiler.is_compiling():
        logger.debug("%s: not fastgen but the original runs: %s", what, why)
