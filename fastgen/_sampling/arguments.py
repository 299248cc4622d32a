"""The arguments of a chain: the options, which `sample` and `Sampler` have in common, and the checks of what each call is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch.utils import _pytree as pytree

from .._core import checks, rng
from ..schedule import PREDICTIONS, VARIANCES, Prediction, Spacing, Variance
from .network import location

Method = Literal["ddpm", "ddim"]


# ---- of all calls -----------------------------------------------------------------------------------------------------------


class Options(NamedTuple):
    """What a chain is made with besides model, shape and schedule; `sample` says what each one is.

    The list stands here. The signatures of `sample` and `Sampler` repeat it, for those who read them; a test holds them to it, and
    everything else goes by it."""

    method: Method = "ddpm"
    steps: int | Iterable[int] | None = None
    spacing: Spacing | None = None
    eta: float | None = None
    prediction: Prediction = "epsilon"
    variance: Variance | None = None
    clip: float | None = None
    threshold: float | None = None
    guidance_scale: float | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    cuda_graph: Literal["auto"] | bool = "auto"

    @classmethod
    def checked(cls, arguments: Mapping[str, Any]) -> Options:
        """The options among these arguments, each checked, numbers as floats, and that of the method with what None stands for."""
        values = {name: arguments[name] for name in OPTIONS}
        method, eta, variance, choice = values["method"], values["eta"], values["variance"], values["cuda_graph"]
        if values["steps"] is None and values["spacing"] is not None:
            raise ValueError(f"spacing: expected None without steps, got {values['spacing']!r}")
        checks.option("method", method, METHODS)
        checks.option("prediction", values["prediction"], PREDICTIONS)
        for name, check in _CHECKED_UNLESS_NONE.items():
            if values[name] is not None:
                values[name] = check(values[name])
        if method == "ddpm":
            if eta is not None:
                raise ValueError(f"eta: expected None with method='ddpm', which has none, got {eta!r}")
            values["variance"] = "posterior" if variance is None else variance
            checks.option("variance", values["variance"], VARIANCES)
        else:
            if variance is not None:
                raise ValueError(f"variance: expected None with method='ddim', whose variance is eta's, got {variance!r}")
            values["eta"] = 0.0 if eta is None else _checked_eta(eta)
        if choice is not True and choice is not False and not (isinstance(choice, str) and choice == "auto"):
            raise ValueError(f"cuda_graph: expected 'auto', True or False, got {choice!r}")
        return cls(**values)

    def of_a_step(self) -> dict[str, Any]:
        """What each step is told by keyword, whether it is `ddpm_step` or `ddim_step`."""
        of_the_method = "variance" if self.method == "ddpm" else "eta"
        options = {"prediction": self.prediction, "clip": self.clip, of_the_method: getattr(self, of_the_method)}
        return options if self.guidance_scale is None else {**options, "guidance_scale": self.guidance_scale}

    def table_key(self) -> tuple:
        """The key of a step's table, which `Schedule.ddpm_step_table` or `Schedule.ddim_step_table` has."""
        return f"{self.method}_step", self.prediction, self.variance if self.method == "ddpm" else self.eta


METHODS = get_args(Method)
OPTIONS = Options._fields


def _checked_clip(clip):
    return checks.number("clip", clip, low=0.0, strict=True)


def _checked_threshold(threshold):
    threshold = checks.number("threshold", threshold, low=0.0, strict=True)
    if threshold > 1.0:
        raise ValueError(f"threshold: expected a number within (0, 1], got {threshold!r}")
    return threshold


def _checked_guidance_scale(scale):
    return checks.number("guidance_scale", scale, low=float("-inf"), strict=True)


def _checked_eta(eta):
    eta = checks.number("eta", eta, low=0.0)
    if eta > 1.0:
        raise ValueError(f"eta: expected a number within 0 … 1, got {eta!r}")
    return eta


_CHECKED_UNLESS_NONE = {
    "clip": _checked_clip,
    "threshold": _checked_threshold,
    "guidance_scale": _checked_guidance_scale,
    "device": checks.device,
    "dtype": checks.floating_dtype,
}


# ---- of one call: seeds -----------------------------------------------------------------------------------------------------


def checked_seed(seed, sample_seeds, batch: int, device: torch.device) -> int | torch.Tensor:
    """What the noise is made from: an int, or a tensor on the device of 1 or `batch` elements."""
    if sample_seeds is not None:
        if seed is not None:
            raise ValueError("seed, sample_seeds: expected at most one, got both")
        return _checked_sample_seeds(sample_seeds, batch, device)
    if seed is None:
        return rng.drawn_seed(device)
    if not isinstance(seed, torch.Tensor):
        return rng.check_seed(seed, 1, device)[1]
    if seed.numel() != 1:
        raise ValueError(f"seed: expected 1 element, got {tuple(seed.shape)}; seeds of the samples are sample_seeds=")
    seeds, _ = rng.check_seed(seed, 1, device)
    return seeds.item() if seeds.is_cpu and device.type != "cpu" else seeds.reshape(1)  # pyright: ignore[reportReturnType]  # of int64


def _checked_sample_seeds(seeds, batch, device):
    if isinstance(seeds, torch.Tensor):
        if seeds.dtype != torch.int64:
            raise TypeError(f"sample_seeds: expected a sequence of ints or an int64 tensor, got {seeds.dtype}")
        if tuple(seeds.shape) != (batch,):
            raise ValueError(f"sample_seeds: expected shape ({batch},), one seed per sample, got {tuple(seeds.shape)}")
        if seeds.device != device and not seeds.is_cpu:
            raise ValueError(f"sample_seeds: expected a tensor on {device} or on the CPU, got one on {seeds.device}")
        got = "one on the CPU"
    else:
        got = type(seeds).__name__
        if isinstance(seeds, (str, bytes, Mapping, Set)) or not hasattr(seeds, "__iter__"):  # a set has an order of its own
            raise TypeError(f"sample_seeds: expected a sequence of ints or an int64 tensor, got {got}")
        seeds = [rng.check_seed_int("sample_seeds", seed, "ints") for seed in seeds]
        if len(seeds) != batch:
            raise ValueError(f"sample_seeds: expected {batch} ints, one per sample, got {len(seeds)}")
        seeds = torch.tensor(seeds, dtype=torch.int64, device="cpu")
    if seeds.device != device and rng.capturing(device):
        raise ValueError(
            f"sample_seeds: expected a tensor on {device} during CUDA-graph capture, which copies nothing from the host, got {got}"
        )
    return seeds.to(device).contiguous()


# ---- of one call: what the network is given ---------------------------------------------------------------------------------


def network_kwargs(model_kwargs, unconditional_kwargs, batch: int, guided: bool) -> dict[str, Any]:
    """What the network is called with besides x and t: under guidance for 2·batch samples, first those without the condition."""
    conditional = _checked_dict("model_kwargs", {} if model_kwargs is None else model_kwargs)
    if not guided:
        if unconditional_kwargs is not None:
            raise ValueError("unconditional_kwargs: expected None without a guidance_scale, got a dict")
        return conditional
    if unconditional_kwargs is None:
        raise ValueError("unconditional_kwargs: expected a dict like model_kwargs with a guidance_scale, got None")
    unconditional = _checked_dict("unconditional_kwargs", unconditional_kwargs)
    if unconditional.keys() != conditional.keys():
        raise ValueError(
            f"unconditional_kwargs: expected the keys of model_kwargs, {sorted(conditional)}, got {sorted(unconditional)}"
        )
    leaves, spec = pytree.tree_flatten_with_path(conditional)
    try:
        others = spec.flatten_up_to(unconditional)  # by key: dicts in it may be in another order
    except ValueError:
        others = None
    if others is None or not all(pytree.tree_structure(u).is_leaf() for u in others):
        raise ValueError("unconditional_kwargs: expected values nested like those of model_kwargs, got others")
    joined = [_joined(pytree.keystr(path), u, c, batch) for (path, c), u in zip(leaves, others, strict=True)]
    return pytree.tree_unflatten(joined, spec)


def same_values(a, b) -> bool:
    """Whether two arguments that are no tensors are the same, as far as they can tell."""
    if a is b or type(a) is not type(b):
        return a is b
    try:
        return np.array_equal(a, b) if isinstance(a, np.ndarray) else bool(a == b or (a != a and b != b))  # NaN is like NaN here
    except Exception:  # a class may raise anything when two of it are compared
        return False


def _checked_dict(name, value):
    if not isinstance(value, dict):
        raise TypeError(f"{name}: expected a dict, got {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{name}: expected strings as keys, got {key!r}")
    return value


def _joined(name, unconditional, conditional, batch):
    """One value of the network's arguments for both halves of its batch."""
    u, c = unconditional, conditional
    if not isinstance(u, torch.Tensor) or not isinstance(c, torch.Tensor):
        if not same_values(u, c):
            raise ValueError(f"unconditional_kwargs{name}: expected tensors, or what model_kwargs has there ({c!r}), got {u!r}")
        return c
    if u is not c and not (u.layout is c.layout is torch.strided):
        raise ValueError(
            f"unconditional_kwargs{name}: expected dense tensors, or the very tensor of model_kwargs, got {u.layout} and {c.layout}"
        )
    if (u.shape, u.dtype, u.device) != (c.shape, c.dtype, c.device):
        raise ValueError(
            f"unconditional_kwargs{name}: expected {tuple(c.shape)}, {c.dtype}, {c.device} as in model_kwargs, "
            f"got {tuple(u.shape)}, {u.dtype}, {u.device}"
        )
    if c.dim() and c.shape[0] == batch:
        return torch.cat([u, c])
    if u is c or location(u) == location(c):
        return c
    if c.device.type != "cpu":
        raise ValueError(
            f"unconditional_kwargs{name}: expected {batch} as first dimension, or the very tensor of model_kwargs (to compare two "
            f"would be to wait for {c.device}), got another"
        )
    if not torch.equal(u, c):
        raise ValueError(
            f"unconditional_kwargs{name}: expected {batch} as first dimension, or the values of model_kwargs, got others"
        )
    return c


# ---- of one call: progress --------------------------------------------------------------------------------------------------


def progress_bar():
    """The class tqdm, where it is installed."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress: expected tqdm to be installed for True (pip install tqdm), and it is not") from error
    return tqdm
