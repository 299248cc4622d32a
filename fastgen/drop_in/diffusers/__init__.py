"""diffusers' DDPMScheduler, DDPMParallelScheduler and DDIMScheduler on fastgen: `step`, `add_noise`, `get_velocity` in one launch.

Two ways to have them:

    from fastgen.drop_in.diffusers import DDPMScheduler      # a subclass of diffusers' own, for new code
    fastgen.drop_in.diffusers.patch()                        # diffusers' own classes, for code as it is; or `with patch():`

By default the numbers are diffusers' to rounding: its float32 cumulative products and order of operations decide the coefficients,
the same `generator` (or list of them) gives the same noise, none is drawn at timestep 0, results have the same dtypes. Each result
is computed in float32 (float64 for float64) and rounded once, where diffusers rounds half precision after every operation.

Beyond diffusers:

- `rng="fused"`, a keyword of the classes and of `patch`: noise is made in the kernel, from a seed that is drawn from `generator`
  (one for each sample from a list of them), so no noise tensor exists. Other numbers than diffusers', of the same distribution.
- `step(..., seed=)`: an int, or int64 tensor of 1 or B elements, one seed per sample. The noise is then
  `fastgen.randn(sample.shape, seed=seed, offset=timestep)`, whatever `rng` is.
- `step` takes a tensor of B timesteps, one per sample, and samples of any shape (B, ...).
- No timestep is read back from a GPU. Of a 0-dimensional one that is an element of `scheduler.timesteps` the value is known all the
  same; of another one it is not, so with it noise is drawn at timestep 0 too (and not used), and a timestep that the scheduler
  does not visit makes its sample NaN.
- `step` compiles with `torch.compile(fullgraph=True)`, after `set_timesteps`, but without `generator=`, which torch cannot trace.
  No timestep's value is known then, but whether an int is 0. It makes a program for each `eta`, and sees a changed `alphas_cumprod`
  only after another `set_timesteps`.
- `float32_coefficients=True`: `add_noise` and `get_velocity` of half-precision samples use float32 coefficients. diffusers rounds ᾱ
  to the samples' dtype first; in bfloat16, 1 − ᾱ is then 0 for the default first 10 timesteps: no noise is added.

What is not covered (variance type "learned", where the network's output is the variance itself and the kernel takes its logarithm;
an infinite coefficient, a subclass with another variance, other shapes, gradients through dynamic thresholding) runs diffusers' own
code and says so at level DEBUG of the logger "fastgen.drop_in". In those cases `seed=` raises ValueError. `add_noise` and
`get_velocity` are covered where only the reverse step is not.

Nor is a method covered whose code, or that of the methods which it calls, the tests have not run: another release of diffusers may
compute something else. `_known_code.py` names the releases that they have run, and what each method's code was. Anything else
keeps diffusers' own code: `patch` leaves it alone and says so (`Patch.skipped`, and a line of level INFO), and the subclasses call
it, which they say in a line of level WARNING when the first scheduler of a class is made; so results never change in silence. The
code is looked at by `patch()` and when this module is imported, not at a step.

A scheduler is looked at again when one of its attributes has been replaced, or a tensor among them changed in place (so the value
of a timestep that is an element of `scheduler.timesteps` is known without reading it); but not after writing through `.data` or
`.numpy()`, or to a tensor made in inference mode, nor when a method of its class has been replaced: then
call `set_timesteps` again.

Known to differ: half-precision results stay so where a timestep of shape (1,), or `batch_step_no_noise`, makes diffusers' float32;
where an element of the sample or of the model's output is infinite or NaN, or overflows on the way, the result may be another of
NaN, infinite and clipped, since diffusers' formulas read and cancel other terms.
"""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from collections import OrderedDict
from operator import itemgetter
from typing import NamedTuple

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm_parallel import DDPMParallelSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch.autograd import forward_ad

from ..._core import checks
from ..._core.backends import _choice
from ..._core.dispatch import dispatch_modes, functorch_is_active
from ..._core.rng import random_seed, scratch
from ..._core.tables import DDPM_STEP_COLUMNS, Coefficients, Table, constant, plain_tensors, step_columns
from ..._ops.ddpm_step import dynamic_bound, plain_rows, plain_step, step_with
from ..._ops.q_sample import noised_with
from ...schedule import PREDICTIONS
from .._patch import NotCovered, Patch, check_rng, fall_through, full_name, logger
from .._source import fingerprint, mark_replacement
from . import _known_code

__all__ = ["DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "patch"]


class Options(NamedTuple):
    rng: str = "exact"
    float32_coefficients: bool = False


def _checked_options(rng, float32_coefficients) -> Options:
    check_rng(rng)
    if not isinstance(float32_coefficients, bool):
        raise TypeError(f"float32_coefficients: expected a bool, got {type(float32_coefficients).__name__}")
    return Options(rng, float32_coefficients)


# ---- what a scheduler's configuration comes to --------------------------------------------------------------------------------

FAMILIES = (diffusers.DDPMScheduler, diffusers.DDPMParallelScheduler, diffusers.DDIMScheduler)
METHODS = ("_get_variance", "previous_timestep", "_threshold_sample")  # which the tables speak for, unless a scheduler has its own
OWN = {base: {name: getattr(base, name, None) for name in METHODS} for base in FAMILIES}  # diffusers' methods, as imported
INTEGERS = (torch.int64, torch.int32)
DTYPES = {dtype: str(dtype).removeprefix("torch.") for dtype in checks.FLOATING}  # dynamo guards on keys by their text
_compiling = torch.compiler.is_compiling  # found once, as in dispatch.py
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_backend_choice = _choice.get
Tensor = torch.Tensor


def _unknown(base, name) -> str:
    """Why the drop-in may not stand for a method of `base`, a class of diffusers: its code, or that of one that it calls, is none
    that the tests have run. "" where it may. All ten methods take 48 ms of one core the first time, with the import of diffusers,
    and 0.5 ms after."""
    names = [x for x in (name, *METHODS) if hasattr(base, x)] if "step" in name else [name]
    strange = [x for x in names if fingerprint(getattr(base, x)) not in _known_code.KNOWN.get(full_name(base, x), ())]
    if not strange:
        return ""
    named = f"{base.__name__}'s {' and '.join(strange)}"
    return f"the tests have not run the code of {named} in diffusers {diffusers.__version__}"


class State:
    """What the values in a scheduler's configuration and timesteps come to. Schedulers that are alike share one, so that a program
    compiled for it serves all of them, and `set_timesteps` with the same number again."""

    def __init__(self, family, config, alphas_cumprod, values):
        self.steps, self.custom_timesteps, self.variance_type, self.final_alpha, self.host_timesteps = values[:5]
        self.noising_problem, self.problem = values[5:]
        self.alphas_cumprod = alphas_cumprod  # on the CPU
        self.end = 0 if self.noising_problem else alphas_cumprod.numel()  # timesteps 0 … end-1 have coefficients
        self.total = config.num_train_timesteps
        self.prediction, self.thresholding = config.prediction_type, config.thresholding
        self.quantile, self.most = config.dynamic_thresholding_ratio, config.sample_max_value
        bounded = config.clip_sample and not config.thresholding and config.clip_sample_range != math.inf
        self.clip = float(config.clip_sample_range) if bounded and not self.problem else None
        self.learned = self.variance_type == "learned_range"
        self.plain = not (self.problem or self.thresholding or self.learned or self.prediction == "sample")
        self.coefficients = {}
        _BY_ID[id(self)] = self

    def get(self, key):
        """(Coefficients, for each timestep whether it has a row without NaN or infinity, or None: see `_constant_known`)."""
        if _compiling():
            key = tuple(map(constant, key))
            return Traced(id(self), key), _constant_known(id(self), key)
        found = self.coefficients.get(key)
        return self.made(key) if found is None else found

    def made(self, key):
        found = self.coefficients.get(key)
        if found is not None:
            return found
        with plain_tensors(), torch.no_grad():
            rows = _ROWS[key[0]](self, *key[1:])
        coefficients = Coefficients("q_sample" if rows.shape[1] == 2 else "ddpm_step", rows)
        known = np.isfinite(rows[:, : DDPM_STEP_COLUMNS.index("S")]).all(axis=1).tolist()
        if len(self.coefficients) >= MOST_TABLES:
            self.coefficients.clear()
        return self.coefficients.setdefault(key, (coefficients, known))


MOST_TABLES = 64  # of one state; a DDIM chain with another eta at every step would fill the memory
_states: OrderedDict[tuple, State] = OrderedDict()  # by value, the last ones used
MOST_STATES = 64


class Traced(Coefficients):
    """`Coefficients` in a program that is compiled: a state and a key. Dynamo looks into a dict once, and would not find in
    `state.coefficients` what the program's second step has put there."""

    def __init__(self, identity, key):
        self.identity, self.key = identity, key

    def table(self, device, dtype):
        return _constant_table(self.identity, self.key, device, dtype)


# Dynamo makes id(state) a constant and guards it; see _core/tables.py.
_BY_ID: weakref.WeakValueDictionary[int, State] = weakref.WeakValueDictionary()


def _constant_table(identity: int, key: tuple, device: torch.device, dtype: torch.dtype) -> Table:
    return _BY_ID[identity].made(key)[0].table(device, dtype)


def _constant_known(identity: int, key: tuple) -> list[bool] | None:
    """None where no row is infinite: to look up an int timestep in the list makes it a constant of the program, and a program for
    each timestep is more than dynamo allows. One that the scheduler does not visit then gives NaN."""
    coefficients, known = _BY_ID[identity].made(key)
    return known if np.isinf(coefficients.rows).any() else None


_constant_table._dynamo_marked_constant = _constant_known._dynamo_marked_constant = True


# What decides a scheduler's coefficients, where it has them: plain values, and tensors
VALUES = ("_internal_dict", "num_inference_steps", "custom_timesteps", "variance_type")


class Seen:
    """What a scheduler consisted of when its state was last looked up; kept on it."""

    def __init__(self, scheduler):
        own = scheduler.__dict__
        self.config, self.alphas_cumprod, self.timesteps = (own[x] for x in ("_internal_dict", "alphas_cumprod", "timesteps"))
        self.final, self.one = own.get("final_alpha_cumprod"), own.get("one")
        self.read = itemgetter(*(name for name in VALUES if name in own))
        self.values = self.read(own)
        noising_problem = _tensor_problem(own, "alphas_cumprod")
        problem = noising_problem or _step_problem(scheduler)
        tensors = [x for x in (self.timesteps, self.alphas_cumprod, self.final, self.one) if isinstance(x, torch.Tensor)]
        self.watched = [(x, x._version) for x in tensors if not x.is_inference()]  # those of inference mode have no version
        self.graded = getattr(self.alphas_cumprod, "requires_grad", None)  # set in place, it leaves the version as it was
        final, timesteps, alphas_cumprod = None, (), self.alphas_cumprod
        if not noising_problem:
            alphas_cumprod = alphas_cumprod.detach().cpu().clone()
        if not problem:
            final = float(self.one if self.final is None else self.final)
            timesteps = tuple(self.timesteps.tolist())
        values = (*map(own.get, VALUES[1:]), final, timesteps, noising_problem, problem)
        # the configuration by its text: lists in it (trained_betas) cannot be hashed
        key = type(scheduler), repr(sorted(self.config.items(), key=lambda item: item[0])), _bytes(alphas_cumprod), values
        state = _states.pop(key, None) or State(type(scheduler), self.config, alphas_cumprod, values)
        _states[key] = self.state = state
        while len(_states) > MOST_STATES:
            _states.popitem(last=False)
        # see `_quick_step`; places: timesteps by where they lie
        self.quick, self.places = {}, {}
        noticed = timesteps and not self.timesteps.is_inference()  # where their values change
        if noticed and self.timesteps.is_cpu and self.timesteps.dtype in INTEGERS and self.timesteps.dim() == 1:
            size, begin = self.timesteps.stride(0) * self.timesteps.itemsize, self.timesteps.data_ptr()
            self.places = {begin + place * size: t for place, t in enumerate(timesteps)}

    def __deepcopy__(self, memo):
        return self  # of other objects than the copy's, so that the copy looks again

    def __reduce__(self):
        return dict, ()  # what is unpickled may be where there is no fastgen

    def is_of(self, own) -> bool:
        """Whether nothing has changed since, `own` being the scheduler's __dict__. Tensors count by identity and version."""
        for x, version in self.watched:
            if x._version != version:
                return False
        try:
            return (
                own["timesteps"] is self.timesteps
                and own["alphas_cumprod"] is self.alphas_cumprod
                and own.get("final_alpha_cumprod") is self.final
                and own.get("one") is self.one
                and self.read(own) == self.values
                and not ("_get_variance" in own or "previous_timestep" in own or "_threshold_sample" in own)
                and (self.graded is None or self.alphas_cumprod.requires_grad is self.graded)
            )
        except KeyError:
            return False

    def keep_quick(self, key, coefficients, known, x, m):
        """For `_quick_step`: that a step with `key` of the like of x and m has gone well."""
        if not (x.is_cpu and m.is_cpu):  # the rows are kept for the CPU's tensors, and a GPU's steps gain nothing
            return
        rows, kind = plain_rows(coefficients, x, m), (key, x.dtype, m.dtype, _backend_choice())
        if rows is None or kind in self.quick:
            return
        if len(self.quick) >= MOST_TABLES:
            self.quick.clear()
        still = 0 if key == DDPM else -1 if key[1] else len(known)  # up to which timestep nothing is drawn
        self.quick[kind] = rows, {t: t > still for t, visited in enumerate(known) if visited}, self.state.clip

    def host_timestep(self, timestep):
        """The timestep as an int where that can be known without waiting for a GPU, else None."""
        if isinstance(timestep, torch.Tensor):
            if timestep.dim() > 1:
                raise NotCovered(f"a timestep of shape {tuple(timestep.shape)}")
            if timestep.numel() != 1 or timestep.dtype not in INTEGERS or _compiling():
                return None
            if timestep.is_cpu:
                return timestep.item()
            at = place(timestep, self.timesteps)
            return None if at is None else self.state.host_timesteps[at]
        return int(timestep) if isinstance(timestep, (int, np.integer)) and not isinstance(timestep, bool) else None


def _bytes(x):
    return x.numpy().tobytes() if isinstance(x, torch.Tensor) and x.device.type == "cpu" and not x.requires_grad else id(x)


def place(timestep, timesteps) -> int | None:
    """Which element of `timesteps` a tensor of one element is a view of, as iterating and indexing give them."""
    storage = timesteps.untyped_storage().data_ptr()
    if timestep.dtype != timesteps.dtype or timestep.untyped_storage().data_ptr() != storage or timesteps.stride() != (1,):
        return None
    at = timestep.storage_offset() - timesteps.storage_offset()
    return at if 0 <= at < timesteps.numel() else None


def _tensor_problem(own, name) -> str:
    """Why the values of `own[name]` cannot be had; "" where they can."""
    x = own[name]
    usable = isinstance(x, torch.Tensor) and not x.is_meta and not x.requires_grad
    return "" if usable else f"{name} is no tensor, or has no values, or requires grad"


def _step_problem(scheduler) -> str:
    """Why diffusers' own code has to make the reverse steps; "" where it has not."""
    config, kind, own = scheduler._internal_dict, type(scheduler), scheduler.__dict__
    family = next(base for base in kind.__mro__ if base in FAMILIES)
    for method in METHODS:
        if method in own or getattr(kind, method, None) is not OWN[family][method]:
            return f"{kind.__name__} has a {method} of its own"
    if problem := _tensor_problem(own, "timesteps"):
        return problem
    if config.prediction_type not in PREDICTIONS:
        return f"prediction_type is {config.prediction_type!r}"
    if config.clip_sample and not config.thresholding and not config.clip_sample_range > 0:
        return f"clip_sample_range is {config.clip_sample_range!r}"
    if family is not diffusers.DDIMScheduler:
        if config.variance_type not in ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"):
            return f"variance_type is {config.variance_type!r}"
        if config.variance_type != scheduler.variance_type:
            return (
                f"variance_type is {config.variance_type!r} in the configuration and {scheduler.variance_type!r} on the scheduler"
            )
    return ""


def _seen(scheduler) -> Seen:
    own = scheduler.__dict__
    seen = own.get("_fastgen")
    if _compiling():
        if not isinstance(seen, Seen):
            raise NotCovered("nothing is known of the scheduler while compiling: call set_timesteps first")
        return seen
    if type(seen) is not Seen or not seen.is_of(own):
        seen = own["_fastgen"] = Seen(scheduler)
    return seen


# ---- coefficients: the operations of diffusers, in its order, in float32, for all timesteps at once ---------------------------


def _ddpm_rows(state, strided=False):
    """`strided`: those of `batch_step_no_noise`, with the timestep before it a stride away and no noise."""
    alpha = state.alphas_cumprod
    total = len(alpha)
    before, visited = np.arange(total) - 1, np.ones(total, bool)
    if strided:
        before = np.arange(total) - state.total // (state.steps or state.total)
    elif state.custom_timesteps or state.steps:
        visited[:] = False
        timesteps = state.host_timesteps
        for t, previous in reversed([*zip(timesteps, [*timesteps[1:], -1], strict=True)]):  # of repeated ones the first counts
            if 0 <= t < total:
                before[t], visited[t] = previous, previous < total
    alpha_before = _before(alpha, before, 1.0 if strided else state.final_alpha)
    beta, beta_before = 1 - alpha, 1 - alpha_before
    current_alpha = alpha / alpha_before
    current_beta = 1 - current_alpha
    u = alpha_before**0.5 * current_beta / beta
    v = current_alpha**0.5 * beta_before / beta
    small = torch.clamp(beta_before / beta * current_beta, min=1e-20)
    kind = "none" if strided else state.variance_type
    slope = intercept = zero = torch.zeros((), device="cpu")
    if kind == "fixed_small":
        sigma = small**0.5
    elif kind == "fixed_small_log":
        sigma = torch.exp(0.5 * torch.log(small))
    elif kind == "fixed_large":
        sigma = current_beta**0.5
    elif kind == "fixed_large_log":
        sigma = torch.log(current_beta) ** 0.5  # NaN, as in diffusers
    elif kind == "learned_range":
        sigma = torch.ones_like(alpha)
        least, most = torch.log(small).double(), torch.log(current_beta).double()
        slope, intercept = 0.25 * (most - least), 0.25 * (most + least)
    else:
        sigma = zero
    rows = step_columns(*(column.double().numpy() for column in (*_x0_columns(state), u, v, sigma, slope, intercept)))
    rows[~visited] = np.nan
    rows[0, DDPM_STEP_COLUMNS.index("S")] = 0.0
    return rows


def _before(alpha, before, final):
    """ᾱ of the timesteps `before`, and `final` below 0."""
    return torch.where(torch.from_numpy(before >= 0), alpha[torch.from_numpy(before.clip(0, len(alpha) - 1))], final)


def _ddim_rows(state, eta, from_clipped):
    """`from_clipped`: epsilon is read off the clipped x0, which is use_clipped_model_output."""
    alpha = state.alphas_cumprod
    alpha_before = _before(alpha, np.arange(len(alpha)) - state.total // state.steps, state.final_alpha)
    beta = 1 - alpha
    variance = (1 - alpha_before) / beta * (1 - alpha / alpha_before)
    sigma = eta * variance**0.5
    direction = ((1 - alpha_before - sigma**2) ** 0.5).double()
    u, root, noise = (alpha_before**0.5).double(), (alpha**0.5).double(), (beta**0.5).double()
    # direction · epsilon, with epsilon from x0, from the network, or from both, as V·x_t + W·m
    v = w = zero = torch.zeros((), device="cpu")
    if from_clipped:
        u, v = u - direction * root / noise, direction / noise
    elif state.prediction == "epsilon":
        w = direction
    elif state.prediction == "sample":
        v, w = direction / noise, -direction * root / noise
    else:
        v, w = direction * noise, direction * root
    return step_columns(*(column.double().numpy() for column in (*_x0_columns(state), u, v, sigma, zero, zero, w)))


def _x0_columns(state):
    alpha = state.alphas_cumprod
    root, noise = (alpha**0.5).double(), ((1 - alpha) ** 0.5).double()
    if state.prediction == "epsilon":
        return 1 / root, -noise / root
    if state.prediction == "sample":
        return torch.zeros_like(root), torch.ones_like(root)
    return root, -noise


def _x0_rows(state, *key):
    """Of the step `key`, x0 alone, before anything is clipped."""
    rows = state.made(key)[0].rows.copy()
    column = DDPM_STEP_COLUMNS.index
    rows[:, [column("A"), column("B")]] = rows[:, [column("P"), column("Q")]]
    rows[:, column("S")] = 0.0
    return rows


def _add_noise_rows(state, dtype):
    alpha = state.alphas_cumprod.to(getattr(torch, dtype))
    return np.stack([(alpha**0.5).double().numpy(), ((1 - alpha) ** 0.5).double().numpy()], axis=1)


def _velocity_rows(state, dtype):
    of_x0, of_noise = _add_noise_rows(state, dtype).T
    return np.stack([-of_noise, of_x0], axis=1)


_ROWS = {
    "ddpm": _ddpm_rows,
    "ddim": _ddim_rows,
    "x0": _x0_rows,
    "add_noise": _add_noise_rows,
    "get_velocity": _velocity_rows,
}


DDPM, STRIDED = ("ddpm",), ("ddpm", True)  # keys of `State.get`


# ---- one step -----------------------------------------------------------------------------------------------------------------


def _reverse_step(seen, key, model_output, timestep, sample, draw):
    """(previous sample, x0); draw(t, m) gives the arguments of `step_with` that say where the noise comes from. Raises NotCovered
    before anything is drawn."""
    state = seen.state
    m, learned = _model_output(state, model_output, sample)
    coefficients, known = state.get(key)
    t = _row(seen, timestep, sample, known)
    if state.thresholding and torch.is_grad_enabled() and (sample.requires_grad or m.requires_grad):
        raise NotCovered("gradients go through the quantile of dynamic thresholding")
    noise = draw(t, m)
    threshold = None
    if state.thresholding:
        raw = m if state.prediction == "sample" else step_with(state.get(("x0", *key))[0], sample, m, t, **NO_NOISE)
        threshold = dynamic_bound(raw, state.quantile, 1.0, state.most)
    if state.prediction == "sample" and state.clip is None and threshold is None:
        return step_with(coefficients, sample, model_output, t, learned=learned, **noise), m
    y, x0 = step_with(
        *(coefficients, sample, model_output, t), learned=learned, clip=state.clip, threshold=threshold, return_x0=True, **noise
    )
    if state.plain and key != STRIDED and not _compiling():
        seen.keep_quick(key, coefficients, known, sample, model_output)
    return y, x0.to(m.dtype) if state.prediction == "sample" else x0


def _quick_step(scheduler, options, key, m, timestep, x, generator, kind, return_dict):
    """The result of a step that is like one before it in all that can be seen at once; None of any other, before anything is drawn.
    DDIM's step of (1, 16, 7) takes 8 µs with it and 14 without, 5 of them the op and the output; hence what is written out here of
    other functions."""
    own = scheduler.__dict__
    seen = own.get("_fastgen")
    if type(seen) is not Seen or not (type(m) is type(x) is Tensor) or not seen.is_of(own):
        return None
    quick = seen.quick.get((key, x.dtype, m.dtype, _backend_choice()))
    if quick is None or not x.is_cpu or x.requires_grad or m.requires_grad:
        return None
    if dispatch_modes() or forward_ad._current_level >= 0 or functorch_is_active():
        return None
    rows, drawing, clip = quick
    noise = seed = None
    t = timestep
    try:
        if type(t) is not int:
            if type(t) is not Tensor or t.dim():
                return None
            t = seen.places.get(t.data_ptr())  # 0.1 µs, where dtype, device and value take 0.3
            if t is None:
                if timestep.dtype not in INTEGERS or not timestep.is_cpu:
                    return None
                t = timestep.item()
        draws = drawing.get(t)  # None at a timestep that has no row
        if draws is None:
            return None
        if draws:
            if not (x.dim() and x.layout is m.layout is torch.strided and m.is_cpu and m.shape == x.shape and _on_cpu(generator)):
                return None
            options = options or own["_fastgen_options"]
            if generator is None and options.rng == "fused":
                draw, drawn = scratch.bits
                draw()
                seed = drawn()
            else:
                source = _source(options, generator, None, m)
                noise, seed = source.get("noise"), source.get("seed")
        y, x0 = plain_step(x, m, rows, t, noise, seed, clip)
    except RuntimeError:  # shapes, layouts or devices that do not go together: the long way finds words, or diffusers a result
        return None
    return _made(kind, y, x0) if return_dict else (y, x0)


def _on_cpu(generator):
    return generator is None or (type(generator) is torch.Generator and generator.device.type == "cpu")


def _model_output(state, model_output, sample):
    """The part of the network's output that predicts, and whether another part is about the variance."""
    if state.problem:
        raise NotCovered(state.problem)
    _same_kind("model_output", model_output, sample)
    if model_output.shape == sample.shape:
        if state.learned:
            raise NotCovered("the model's output has no part for the learned variance")
        return model_output, False
    shape = sample.shape
    if state.learned and model_output.shape == (*shape[:1], 2 * shape[1], *shape[2:]):
        return model_output[:, : shape[1]], True
    raise NotCovered(f"shapes {tuple(model_output.shape)} and {tuple(shape)}")


def _same_kind(name, y, x):
    plain = type(y) is type(x) is torch.Tensor and x.is_cpu and y.is_cpu and x.layout is y.layout is torch.strided
    if plain and x.dtype is y.dtype in checks.FLOATING and x.dim() and not (x.is_nested or y.is_nested):
        return  # as nearly all are
    if not isinstance(y, torch.Tensor) or not isinstance(x, torch.Tensor):
        raise NotCovered(f"{name} of type {type(y).__name__} for a sample of type {type(x).__name__}")
    if x.is_nested or y.is_nested:
        raise NotCovered("nested tensors")
    if x.dim() == 0:
        raise NotCovered("a sample without dimensions")
    if y.dtype not in checks.FLOATING or x.dtype not in checks.FLOATING:
        raise NotCovered(f"dtypes {y.dtype} and {x.dtype}")
    if y.device != x.device:
        raise NotCovered(f"devices {y.device} and {x.device}")
    if y.layout is not torch.strided or x.layout is not torch.strided:
        raise NotCovered(f"layouts {y.layout} and {x.layout}")


def _row(seen, timestep, sample, known):
    """An int, or an int64 tensor with one of the timesteps for each sample."""
    t = seen.host_timestep(timestep)
    if t is not None:
        if not 0 <= t < seen.state.end or (known is not None and not known[t]):
            raise NotCovered(f"timestep {t} is not one that the scheduler visits, or its coefficients are not finite")
        return t
    t = _timesteps(timestep, sample)
    if t.is_cpu and not _compiling() and not all(0 <= i < len(known) and known[i] for i in t.tolist()):
        raise NotCovered("among the timesteps is one that the scheduler does not visit, or whose coefficients are not finite")
    return t


def _timesteps(timesteps, sample):
    if not isinstance(timesteps, torch.Tensor) or timesteps.dtype not in INTEGERS:
        raise NotCovered(f"a timestep of type {getattr(timesteps, 'dtype', type(timesteps).__name__)}")
    batch = sample.shape[0]
    if timesteps.numel() not in (1, batch):
        raise NotCovered(f"{timesteps.numel()} timesteps for {batch} samples")
    t = timesteps.to(sample.device, torch.int64).reshape(-1)
    return t.expand(batch) if t.numel() != batch else t


def _source(options, generator, seed, m):
    """Where noise of the shape of m comes from, as arguments of `step_with`."""
    if seed is not None:
        return {"seed": seed}
    if options.rng == "fused":
        return {"seed": _drawn_seed(generator, m.shape[0])}
    if generator is None:  # as randn_tensor does, but for generator=, with which dynamo takes no shape of symbols
        return {"noise": torch.randn(m.shape, device=m.device, dtype=m.dtype)}
    return {"noise": randn_tensor(m.shape, generator=generator, device=m.device, dtype=m.dtype)}


def _drawn_seed(generator, batch):
    if isinstance(generator, (list, tuple)):
        if len(generator) == 1:
            return _drawn_seed(generator[0], batch)
        if len(generator) != batch:
            raise ValueError(f"generator: expected one, or a list of {batch}, one for each sample, got a list of {len(generator)}")
        return torch.cat([_random_bits(one) for one in generator])
    if generator is None and _compiling():
        return None  # the op draws it, in the graph
    if generator is None or generator.device.type == "cpu":
        return random_seed(generator)
    return _random_bits(generator)


def _random_bits(generator):
    return torch.empty(1, dtype=torch.int64, device=generator.device).random_(generator=generator)


def _output(kind, previous, x0):
    return kind(prev_sample=previous, pred_original_sample=x0) if _compiling() else _made(kind, previous, x0)


def _made(kind, previous, x0):
    """kind(prev_sample=previous, pred_original_sample=x0), in an eighth of the time: 0.5 µs of 8 for a small step instead of 4."""
    made = new(kind)
    put(made, "prev_sample", previous)
    put(made, "pred_original_sample", x0)
    own = made.__dict__
    own["prev_sample"], own["pred_original_sample"] = previous, x0
    return made


new, put = OrderedDict.__new__, OrderedDict.__setitem__


def _one_source(generator, seed):
    if generator is not None and seed is not None:
        raise ValueError("generator, seed: expected at most one, got both")


NO_NOISE = {"seed": 0}  # at a step whose coefficient of the noise is 0: nothing is drawn, neither noise nor a seed


# ---- the methods --------------------------------------------------------------------------------------------------------------


def _replacing(original, extra=""):
    """A decorator: the function takes the name and the documentation of diffusers' own, but shows its own signature."""

    def decorate(function):
        function.__signature__ = inspect.signature(function)
        functools.update_wrapper(function, original)
        mark_replacement(function, original)
        function.__doc__ = (original.__doc__ or "") + extra
        return function

    return decorate


_SEED_DOC = """
            seed (`int` or int64 `torch.Tensor` of 1 or B elements, *optional*):
                fastgen's: the noise is `fastgen.randn(sample.shape, seed=seed, offset=timestep)`, made in the kernel.
        """


def _original(what, why, seed):
    """Before diffusers' own code runs."""
    if seed is not None:
        raise ValueError(f"seed: expected None where fastgen does not cover the step ({why}), got {seed!r}")
    fall_through(what, why)


def _ddpm_step(output, original, options):
    @_replacing(original, _SEED_DOC)
    def step(self, model_output, timestep, sample, generator=None, return_dict=True, *, seed=None):
        def draw(t, m):
            if t == 0 if type(t) is int else t.is_cpu and not _compiling() and not t.any():
                return NO_NOISE if seed is None else {"seed": seed}
            return _source(options or self._fastgen_options, generator, seed, m)

        if seed is None and not _is_dynamo_compiling():
            quick = _quick_step(self, options, DDPM, model_output, timestep, sample, generator, output, return_dict)
            if quick is not None:
                return quick
        try:
            _one_source(generator, seed)
            previous, x0 = _reverse_step(_seen(self), DDPM, model_output, timestep, sample, draw)
        except NotCovered as why:
            _original(f"{type(self).__name__}.step", why, seed)
            return original(self, model_output, timestep, sample, generator=generator, return_dict=return_dict)
        return _output(output, previous, x0) if return_dict else (previous, x0)

    return step


def _ddim_step(original, options):
    @_replacing(original, _SEED_DOC)
    def step(
        self,
        model_output,
        timestep,
        sample,
        eta=0.0,
        use_clipped_model_output=False,
        generator=None,
        variance_noise=None,
        return_dict=True,
        *,
        seed=None,
    ):
        def draw(t, m):
            if eta == 0:
                return NO_NOISE if seed is None else {"seed": seed}
            if variance_noise is None:
                return _source(options or self._fastgen_options, generator, seed, m)
            return {"noise": variance_noise}

        if seed is None and variance_noise is None and type(eta) is float and not _is_dynamo_compiling():
            key = "ddim", eta, bool(use_clipped_model_output)
            quick = _quick_step(self, options, key, model_output, timestep, sample, generator, DDIMSchedulerOutput, return_dict)
            if quick is not None:
                return quick
        try:
            _one_source(generator, seed)
            if self.num_inference_steps is None:
                raise NotCovered("set_timesteps has not been called")
            if not isinstance(eta, (int, float)) or not 0 <= eta <= 1:
                raise NotCovered(f"eta is {eta!r}")
            if eta > 0 and variance_noise is not None:
                _same_kind("variance_noise", variance_noise, sample)
                if variance_noise.shape != sample.shape or variance_noise.dtype not in (sample.dtype, model_output.dtype):
                    raise NotCovered(f"variance_noise of {variance_noise.dtype} and shape {tuple(variance_noise.shape)}")
                if generator is not None or seed is not None:
                    raise NotCovered("variance_noise beside a generator or a seed")
            key = "ddim", float(eta), bool(use_clipped_model_output)
            previous, x0 = _reverse_step(_seen(self), key, model_output, timestep, sample, draw)
        except NotCovered as why:
            _original("DDIMScheduler.step", why, seed)
            return original(
                *(self, model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict)
            )
        return _output(DDIMSchedulerOutput, previous, x0) if return_dict else (previous, x0)

    return step


def _batch_step_no_noise(original, options):
    @_replacing(original)
    def batch_step_no_noise(self, model_output, timesteps, sample):
        try:
            return _reverse_step(_seen(self), STRIDED, model_output, timesteps, sample, lambda t, m: NO_NOISE)[0]
        except NotCovered as why:
            fall_through("DDPMParallelScheduler.batch_step_no_noise", why)
            return original(self, model_output, timesteps, sample)

    return batch_step_no_noise


def _add_noise(original, options):
    @_replacing(original)
    def add_noise(self, original_samples, noise, timesteps):
        try:
            return _noised("add_noise", options or self._fastgen_options, self, original_samples, noise, timesteps)
        except NotCovered as why:
            fall_through("add_noise", why)
            return original(self, original_samples, noise, timesteps)

    return add_noise


def _get_velocity(original, options):
    @_replacing(original)
    def get_velocity(self, sample, noise, timesteps):
        try:
            return _noised("get_velocity", options or self._fastgen_options, self, sample, noise, timesteps)
        except NotCovered as why:
            fall_through("get_velocity", why)
            return original(self, sample, noise, timesteps)

    return get_velocity


def _noised(name, options, scheduler, x, noise, timesteps):
    _same_kind("noise", noise, x)
    if noise.shape != x.shape or noise.dtype != x.dtype:
        raise NotCovered(f"shapes {tuple(x.shape)} and {tuple(noise.shape)}, dtypes {x.dtype} and {noise.dtype}")
    state = _seen(scheduler).state
    if state.noising_problem:
        raise NotCovered(state.noising_problem)
    key = name, "float32" if options.float32_coefficients and x.dtype.itemsize == 2 else DTYPES[x.dtype]
    coefficients, _ = state.get(key)
    try:
        return noised_with(coefficients, x, _timesteps(timesteps, x), noise=noise)
    except ValueError as error:  # a timestep below 0, which counts from the end in diffusers, or beyond
        raise NotCovered(error) from None


def _set_timesteps(original, options):
    @functools.wraps(original)
    def set_timesteps(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        _seen(self)  # now, since a compiled step cannot

    return set_timesteps


def _register_to_config(original, options):
    @functools.wraps(original)
    def register_to_config(self, **keywords):
        original(self, **keywords)
        if "_fastgen" in self.__dict__:  # else this is the constructor, and there is nothing to look at yet
            _seen(self)

    return register_to_config


def _kept(why, original):
    """diffusers' own method, in a subclass whose others may be fastgen's."""

    @functools.wraps(original)
    def kept(self, *arguments, seed=None, **keywords):
        _original(full_name(type(self), original.__name__), why, seed)
        return original(self, *arguments, **keywords)

    return kept


# ---- the classes --------------------------------------------------------------------------------------------------------------

_NOISING = {"add_noise": _add_noise, "get_velocity": _get_velocity}
_METHODS = {
    diffusers.DDPMScheduler: {**_NOISING, "step": functools.partial(_ddpm_step, DDPMSchedulerOutput)},
    diffusers.DDPMParallelScheduler: {
        **_NOISING,
        "step": functools.partial(_ddpm_step, DDPMParallelSchedulerOutput),
        "batch_step_no_noise": _batch_step_no_noise,
    },
    diffusers.DDIMScheduler: {**_NOISING, "step": _ddim_step},
}
# which do what diffusers' own do, whatever that is, and then look at the scheduler
_LOOKING = {"set_timesteps": _set_timesteps, "register_to_config": _register_to_config}


def _fast(base):
    """A subclass of a scheduler class of diffusers. Configurations neither know `rng` nor `float32_coefficients`, so that each
    library reads the other's files."""

    unknown = {name: why for name in _METHODS[base] if (why := _unknown(base, name))}
    unsaid = list(unknown.items())

    def __init__(self, *arguments, rng="exact", float32_coefficients=False, **keywords):
        self._fastgen_options = _checked_options(rng, float32_coefficients)
        said = unsaid[:]
        del unsaid[:]  # two threads at a time may say it twice
        for name, why in said:
            logger.warning("fastgen.drop_in.diffusers.%s.%s is diffusers' own: %s", base.__name__, name, why)
        base.__init__(self, *arguments, **keywords)
        self.__module__ = base.__module__  # of the instance, where a pipeline that is saved looks: diffusers will load it
        _seen(self)

    parameters = [*inspect.signature(base.__init__).parameters.values()]
    for name, default in Options._field_defaults.items():
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
    __init__.__signature__ = inspect.Signature(parameters)  # what from_config and from_pretrained accept
    methods = {name: make(getattr(base, name), None) for name, make in {**_LOOKING, **_METHODS[base]}.items()}
    methods |= {name: _kept(why, getattr(base, name)) for name, why in unknown.items()}
    doc = f"""diffusers' {base.__name__}, its `step`, `add_noise` and `get_velocity` on fastgen. See the module for what differs.

    rng: "exact", the noise that diffusers would draw, or "fused", noise made in the kernel.
    float32_coefficients: of `add_noise` and `get_velocity` for half-precision samples.

    Neither is part of the configuration. The other arguments are those of diffusers:
    """
    return type(
        base.__name__, (base,), {"__init__": __init__, "__module__": __name__, "__doc__": doc + (base.__doc__ or ""), **methods}
    )


DDPMScheduler = _fast(diffusers.DDPMScheduler)
DDPMParallelScheduler = _fast(diffusers.DDPMParallelScheduler)
DDIMScheduler = _fast(diffusers.DDIMScheduler)


def patch(*, rng: str = "exact", float32_coefficients: bool = False) -> Patch:
    """Puts diffusers' own DDPMScheduler, DDPMParallelScheduler and DDIMScheduler on fastgen, existing instances included, until
    `unpatch()` of what is returned, or the end of a `with` block over it.

    rng: "exact" or "fused"; float32_coefficients: see the module. Raises ValueError and TypeError for others.

    A method whose code the tests have not run keeps it: see the module, and `Patch.skipped`.
    """
    options = _checked_options(rng, float32_coefficients)

    def replacement(make):
        return lambda original: make(original, options)

    replacements, skipped = [], {}
    for base, methods in _METHODS.items():
        for name, make in methods.items():
            if why := _unknown(base, name):
                skipped[full_name(base, name)] = why
            else:
                replacements.append((base, name, replacement(make)))
    patched = Patch(replacements, "methods of diffusers' schedulers", skipped)
    try:
        for base in _METHODS:
            for name, make in _LOOKING.items():
                patched._replace(base, name, replacement(make))
    except BaseException:
        patched.unpatch()
        raise
    return patched
