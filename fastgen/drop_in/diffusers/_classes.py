"""The two ways to have fastgen's methods: subclasses of diffusers' schedulers, and a patch of diffusers' own classes."""

from __future__ import annotations

import functools
import inspect
from typing import TypeVar, cast

from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_ddpm_parallel
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .._patch import Patch, check_rng, full_name, logger
from ._covered import why_untested
from ._methods import FAST_METHODS, LOOKING_METHODS, Options, diffusers_own
from ._remembered import remembered

_PUBLIC = __spec__.parent  # the package, where the classes are to be found
Scheduler = TypeVar("Scheduler", bound=SchedulerMixin)


def _checked_options(rng, float32_coefficients):
    check_rng(rng, "torch-cuda")
    if not isinstance(float32_coefficients, bool):
        raise TypeError(f"float32_coefficients: expected a bool, got {type(float32_coefficients).__name__}")
    return Options(rng, float32_coefficients)


def subclass_of(base: type[Scheduler]) -> type[Scheduler]:
    """A scheduler class of diffusers on fastgen. Its methods whose code the tests have not run stay diffusers' own."""
    untested = {name: why for name in FAST_METHODS[base] if (why := why_untested(base, name))}
    methods = {name: make(getattr(base, name), None) for name, make in {**LOOKING_METHODS, **FAST_METHODS[base]}.items()}
    methods |= {name: diffusers_own(why, getattr(base, name)) for name, why in untested.items()}
    doc = f"""diffusers' {base.__name__}, its `step`, `add_noise` and `get_velocity` on fastgen. See the module for what differs.

    rng: "exact", the noise that diffusers would draw, "fused", noise made in the kernel, or "torch-cuda", the noise that diffusers
        would draw on a CUDA GPU, of a `fastgen.TorchCudaGenerator`.
    float32_coefficients: of `add_noise` and `get_velocity` for half-precision samples.

    Neither is part of the configuration. The other arguments are those of diffusers:
    """
    members = {"__init__": _constructor(base, untested), "__module__": _PUBLIC, "__doc__": doc + (base.__doc__ or "")}
    return cast("type[Scheduler]", type(base.__name__, (base,), {**members, **methods}))


def _constructor(base, untested):
    """`__init__` of a subclass, which warns of the methods `untested`, name → why, when it is called first. Configurations know
    neither `rng` nor `float32_coefficients`, so that each library reads the other's files."""
    to_warn_of = list(untested.items())

    def __init__(self, *arguments, rng: str = "exact", float32_coefficients: bool = False, **keywords) -> None:
        self._fastgen_options = _checked_options(rng, float32_coefficients)
        warnings = to_warn_of[:]
        to_warn_of.clear()  # Two threads at a time may both warn.
        for name, why in warnings:
            logger.warning("%s.%s.%s is diffusers' own: %s", _PUBLIC, base.__name__, name, why)
        base.__init__(self, *arguments, **keywords)
        # A pipeline that is saved looks here, at the instance, for the module from which it will be loaded: diffusers'.
        self.__module__ = base.__module__
        remembered(self)

    parameters = [*inspect.signature(base.__init__).parameters.values()]
    for name, default in Options._field_defaults.items():
        kind, annotation = inspect.Parameter.KEYWORD_ONLY, type(default)
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))
    __init__.__signature__ = inspect.Signature(parameters)  # what from_config and from_pretrained accept
    return __init__


DDPMScheduler = subclass_of(scheduling_ddpm.DDPMScheduler)
DDPMParallelScheduler = subclass_of(scheduling_ddpm_parallel.DDPMParallelScheduler)
DDIMScheduler = subclass_of(scheduling_ddim.DDIMScheduler)


def patch(*, rng: str = "exact", float32_coefficients: bool = False) -> Patch:
    """Puts diffusers' own DDPMScheduler, DDPMParallelScheduler and DDIMScheduler on fastgen, existing instances included, until
    `unpatch()` of what is returned, or the end of a `with` block over it.

    rng: "exact", "fused" or "torch-cuda"; float32_coefficients: see the module. Raises ValueError and TypeError for others.

    A method whose code the tests have not run keeps it: see the module, and `Patch.skipped`. The code is looked at once, by this
    call: a function that a method calls, and that is replaced while the patch is in force, is noticed by the next `patch` only.
    When a replaced method of a scheduler is noticed, the module says.
    """
    options = _checked_options(rng, float32_coefficients)
    covered, skipped = [], {}
    for base, methods in FAST_METHODS.items():
        for name, make in methods.items():
            if why := why_untested(base, name):
                skipped[full_name(base, name)] = why
            else:
                covered.append((base, name, functools.partial(_made_with, options, make)))
    patched = Patch(covered, "methods of diffusers' schedulers", skipped)
    try:
        for base in FAST_METHODS:
            for name, make in LOOKING_METHODS.items():
                patched._replace(base, name, functools.partial(_made_with, options, make))
    except BaseException:
        patched.unpatch()
        raise
    return patched


def _made_with(options, make, original):
    return make(original, options)
