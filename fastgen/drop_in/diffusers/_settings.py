"""What a scheduler's configuration and timesteps come to, with its tables of coefficients. Schedulers that are alike share one."""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import torch

from ..._core.tables import DDPM_STEP_COLUMNS, Coefficients, Table, constant, plain_tensors
from ._coefficients import ROWS

MOST_TABLES = 64  # of one `Settings`: a DDIM chain with another eta at every step would fill the memory
MOST_SETTINGS = 64

_compiling = torch.compiler.is_compiling  # Looked up once, this saves 0.02 µs a call, as in _core/dispatch.py.


class Values(NamedTuple):
    """What the attributes of a scheduler say beside its configuration and ᾱ; all of it can be hashed."""

    num_inference_steps: int | None
    custom_timesteps: bool | None
    variance_type: str | None
    final_alpha: float | None  # ᾱ where the previous timestep is below 0
    timesteps: tuple[int, ...]
    noising_problem: str  # why diffusers' own code has to add noise; "" where it need not
    step_problem: str  # the same of its reverse steps


class Settings:
    """All that decides the numbers of a scheduler's steps. One serves all schedulers with the same values, so that a program
    compiled for one of them does too, and still after `set_timesteps` with the same number."""

    def __init__(self, config, alphas_cumprod, values):
        self.num_inference_steps, self.custom_timesteps, self.variance_type, self.final_alpha, self.timesteps = values[:5]
        self.noising_problem, self.step_problem = values[5:]
        self.alphas_cumprod = alphas_cumprod  # on the CPU
        self.end = 0 if self.noising_problem else alphas_cumprod.numel()  # timesteps 0 … end-1 have coefficients
        self.num_train_timesteps = config.num_train_timesteps
        self.prediction, self.thresholding = config.prediction_type, config.thresholding
        self.quantile, self.largest_bound = config.dynamic_thresholding_ratio, config.sample_max_value
        clipped = config.clip_sample and not config.thresholding and config.clip_sample_range != math.inf
        self.clip = float(config.clip_sample_range) if clipped and not self.step_problem else None
        self.learned = self.variance_type == "learned_range"
        # whether `plain_step` can make its steps, which knows no threshold and no learned variance; and where the network predicts
        # x0 itself, x0 has another dtype than the one that it gives
        self.suits_plain_step = not (self.step_problem or self.thresholding or self.learned or self.prediction == "sample")
        self.kept = {}  # what `computed` has given, by key
        _BY_ID[id(self)] = self

    def coefficients(self, key):
        """(`Coefficients` of a table, and for each timestep whether the scheduler has a step there: a row without NaN or infinity).
        In a program that is compiled the latter may be None: see `_constant_has_step`."""
        if _compiling():
            key = tuple(map(constant, key))
            return TracedCoefficients(id(self), key), _constant_has_step(id(self), key)
        found = self.kept.get(key)
        return self.computed(key) if found is None else found

    def computed(self, key):
        """The same, but never of a program."""
        found = self.kept.get(key)
        if found is not None:
            return found
        with plain_tensors(), torch.no_grad():
            rows = ROWS[key[0]](self, *key[1:])
        coefficients = Coefficients("q_sample" if rows.shape[1] == 2 else "ddpm_step", rows)
        has_step = np.isfinite(rows[:, : DDPM_STEP_COLUMNS.index("sigma")]).all(axis=1).tolist()
        if len(self.kept) >= MOST_TABLES:
            self.kept.clear()
        return self.kept.setdefault(key, (coefficients, has_step))


_shared: OrderedDict[tuple, Settings] = OrderedDict()  # the settings used last, by what they are made of


def shared_settings(scheduler_class, config, alphas_cumprod, values) -> Settings:
    """The `Settings` of all schedulers of which these are equal. alphas_cumprod: what can be had of them, if `noising_problem`."""
    # the text of the configuration, since lists in it (trained_betas) cannot be hashed
    key = scheduler_class, repr(sorted(config.items(), key=lambda item: item[0])), _bytes(alphas_cumprod), values
    settings = _shared.pop(key, None) or Settings(config, alphas_cumprod, values)
    _shared[key] = settings
    while len(_shared) > MOST_SETTINGS:
        _shared.popitem(last=False)
    return settings


def _bytes(x):
    return x.numpy().tobytes() if isinstance(x, torch.Tensor) and x.device.type == "cpu" and not x.requires_grad else id(x)


# ---- in programs that are compiled --------------------------------------------------------------------------------------------


class TracedCoefficients(Coefficients):
    """`Coefficients` in a program that is compiled: the identity of a `Settings`, and a key. Dynamo looks into a dict once, and
    would not find in `Settings.kept` what the program's second step has put there."""

    def __init__(self, identity, key):
        self.identity, self.key = identity, key

    def table(self, device, dtype):
        return _constant_table(self.identity, self.key, device, dtype)


# Dynamo makes id(settings) a constant and guards it; see _core/tables.py.
_BY_ID: weakref.WeakValueDictionary[int, Settings] = weakref.WeakValueDictionary()


def _constant_table(identity: int, key: tuple, device: torch.device, dtype: torch.dtype) -> Table:
    return _BY_ID[identity].computed(key)[0].table(device, dtype)


def _constant_has_step(identity: int, key: tuple) -> list[bool] | None:
    """None where no row is infinite: to look up an int timestep in the list makes it a constant of the program, and a program for
    each timestep is more than dynamo allows. One that the scheduler does not visit then gives NaN."""
    coefficients, has_step = _BY_ID[identity].computed(key)
    return has_step if np.isinf(coefficients.rows).any() else None


_constant_table._dynamo_marked_constant = _constant_has_step._dynamo_marked_constant = True
