"""Noise schedules: betas and their cumulative products in float64, coefficient tables in float32 (or float64) per device.

The notation is that of Ho et al. 2020 with 0-based timesteps: `betas[t]`, `alphas_cumprod[t]` = Π_{s≤t} (1 − betas[s]).
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch

from ._core.tables import STEP_LOG_WEIGHT_COLUMNS, VLB_TERMS_COLUMNS, Table, Tables, fake_mode, let_in, plain_tensors, step_columns

Prediction = Literal["epsilon", "sample", "v_prediction"]
FixedVariance = Literal["posterior", "beta"]
LearnedVariance = Literal["learned", "learned_range"]
Variance = Literal[FixedVariance, LearnedVariance]
Spacing = Literal["leading", "trailing", "linspace"]

PREDICTIONS = get_args(Prediction)
FIXED_VARIANCES = get_args(FixedVariance)
LEARNED_VARIANCES = get_args(LearnedVariance)
VARIANCES = FIXED_VARIANCES + LEARNED_VARIANCES


# The smallest ᾱ that a step before the last may have: beneath it, float64 has no 1/ᾱ. Epsilon's x0 = (x_t − …)/√ᾱ needs more in
# float32, 8.6e-78, which is checked when such a table is made.
_SMALLEST = float(np.finfo(np.float64).tiny)  # 2.2e-308


class Schedule(Tables):
    """The noise schedule of a Gaussian diffusion: immutable, float64, comparable, hashable and picklable.

    Build one with `linear`, `scaled_linear`, `cosine`, `sigmoid` or `from_betas`; derive others with `respace` and
    `rescale_zero_terminal_snr`. All arrays are read-only float64 NumPy arrays of shape (T,):

    - `betas`: β_t in (0, 1]
    - `alphas`: α_t = 1 − β_t
    - `alphas_cumprod`: ᾱ_t = Π_{s≤t} α_s
    - `alphas_cumprod_prev`: ᾱ_{t−1}, with ᾱ_{−1} = 1
    - `posterior_variance`: β̃_t = β_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t)
    - `timesteps` (int64): what the network is given at step t; 0 … T−1 unless respaced

    `len(schedule)` is T. ᾱ falls at every step and stays above 2.2e-308, but that the last may be 0: a schedule for which that does
    not hold in float64, with too many steps or betas below 1.1e-16, is refused with a ValueError. Below ᾱ = 8.6e-78 only
    prediction "epsilon" in float32 and half precision is refused, at its first step, since 1/√ᾱ is no float32 then.

    Source: Ho et al. 2020, section 2.
    """

    __slots__ = (
        "alphas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "betas",
        "name",
        "posterior_variance",
        "timesteps",
        "_hash",
        "_length",
        "_timestep_tensors",
    )

    alphas: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    betas: np.ndarray
    name: str
    posterior_variance: np.ndarray
    timesteps: np.ndarray
    _hash: int
    _length: int  # which torch.compile can read, as it cannot an array
    _timestep_tensors: dict[torch.device, torch.Tensor]

    def __init__(
        self, betas: np.ndarray, alphas_cumprod: np.ndarray, timesteps: np.ndarray, name: str, arguments: str = "schedule"
    ):
        """`arguments` are those that an error names, where the schedule is none."""
        _check_falls(alphas_cumprod, arguments)
        betas = _frozen(betas, np.float64)
        alphas_cumprod = _frozen(alphas_cumprod, np.float64)
        prev = np.concatenate([[1.0], alphas_cumprod[:-1]])
        values = {
            "betas": betas,
            "alphas": _frozen(1.0 - betas, np.float64),
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": _frozen(prev, np.float64),
            "posterior_variance": _frozen(betas * (1.0 - prev) / (1.0 - alphas_cumprod), np.float64),
            "timesteps": _frozen(timesteps, np.int64),
            "name": name,
            "_hash": hash((betas.tobytes(), alphas_cumprod.tobytes(), np.asarray(timesteps, np.int64).tobytes())),
            "_length": betas.size,
            "_timestep_tensors": {},
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)
        super().__init__()

    # ---- constructors -------------------------------------------------------------------------------------------------

    @classmethod
    def linear(cls, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """β_t linear from `beta_start` to `beta_end`. Source: Ho et al. 2020, section 4."""
        steps = _steps(steps)
        beta_start, beta_end = _beta_range(beta_start, beta_end)
        name = f"linear({steps}, beta_start={beta_start!r}, beta_end={beta_end!r})"
        return cls._of_betas(np.linspace(beta_start, beta_end, steps, dtype=np.float64), name, _RANGE)

    @classmethod
    def scaled_linear(cls, steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
        """√β_t linear from √`beta_start` to √`beta_end`. Source: Rombach et al. 2022 (latent diffusion), its released code."""
        steps = _steps(steps)
        beta_start, beta_end = _beta_range(beta_start, beta_end)
        name = f"scaled_linear({steps}, beta_start={beta_start!r}, beta_end={beta_end!r})"
        return cls._of_betas(np.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=np.float64) ** 2, name, _RANGE)

    @classmethod
    def cosine(cls, steps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
        """β_t = min(1 − f(t+1)/f(t), `max_beta`) with f(t) = cos²((t/T + s)/(1 + s) · π/2).

        Source: Nichol & Dhariwal 2021, equation (17).
        """
        steps = _steps(steps)
        s = _number("s", s)
        if not 0 <= s < math.inf:
            raise ValueError(f"s: expected a finite number ≥ 0, got {s!r}")
        max_beta = _unit_interval("max_beta", max_beta)
        f = np.cos((np.arange(steps + 1, dtype=np.float64) / steps + s) / (1 + s) * (math.pi / 2)) ** 2
        name = f"cosine({steps}, s={s!r}, max_beta={max_beta!r})"
        return cls._of_betas(np.minimum(1.0 - f[1:] / f[:-1], max_beta), name, "steps, s, max_beta")

    @classmethod
    def sigmoid(cls, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """β_t = σ(s)·(`beta_end` − `beta_start`) + `beta_start` with s linear from −6 to 6 and σ the logistic function.

        Source: Xu et al. 2022 (GeoDiff); the "sigmoid" of diffusers.
        """
        steps = _steps(steps)
        beta_start, beta_end = _beta_range(beta_start, beta_end)
        s = np.linspace(-6.0, 6.0, steps, dtype=np.float64)
        name = f"sigmoid({steps}, beta_start={beta_start!r}, beta_end={beta_end!r})"
        return cls._of_betas((beta_end - beta_start) / (1.0 + np.exp(-s)) + beta_start, name, _RANGE)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | np.ndarray | torch.Tensor) -> Schedule:
        """The schedule of the given betas: a sequence, array or tensor of shape (T,) with values in (0, 1].

        Only the last beta may be 1 (a zero terminal signal-to-noise ratio).
        """
        if isinstance(betas, torch.Tensor):
            betas = betas.detach().cpu().to(torch.float64).numpy()
        try:
            betas = np.asarray(betas, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"betas: expected a sequence of numbers, got {type(betas).__name__}") from error
        if betas.ndim != 1 or betas.size == 0:
            raise ValueError(f"betas: expected shape (T,) with T ≥ 1, got {betas.shape}")
        if not (np.all(betas > 0) and np.all(betas[:-1] < 1) and betas[-1] <= 1):
            bad = int(np.flatnonzero(~((betas > 0) & (betas < 1)))[0])
            raise ValueError(f"betas: expected values in (0, 1), the last may be 1, got {betas[bad]!r} at index {bad}")
        digest = ", ".join(f"{b:.6g}" for b in (betas if betas.size <= 4 else (*betas[:2], *betas[-1:])))
        if betas.size > 4:
            digest = "{}, {}, …, {}".format(*digest.split(", "))
        return cls._of_betas(betas, f"from_betas([{digest}])", "betas")

    @classmethod
    def _of_betas(cls, betas: np.ndarray, name: str, arguments: str) -> Schedule:
        return cls(betas, np.cumprod(1.0 - betas), np.arange(betas.size), name, arguments)

    # ---- derived schedules --------------------------------------------------------------------------------------------

    def respace(self, steps: int | Iterable[int], spacing: Spacing | None = None) -> Schedule:
        """The schedule that visits only some of this one's steps.

        `steps` is how many to keep, chosen by `spacing`, or an explicit increasing list of the 0-based steps to keep.

        - "leading" (default): 0, r, 2r, … with r = T // steps
        - "trailing": T−1, T−1−T/steps, … rounded; always keeps the last step
        - "linspace": `steps` values from 0 to T−1, both ends kept, rounded

        The new betas are 1 − ᾱ_k / ᾱ_{k'} with k' the step kept before k, so the marginals q(x_k | x_0) stay what they
        were: they are not the old betas at the kept steps. `timesteps` of the result are this schedule's at the kept steps.

        Source: Nichol & Dhariwal 2021, section 4; the names of the spacings follow Lin et al. 2023, table 2.
        Raises ValueError for an unknown spacing, a count outside 1 … T, or a list that is not increasing within 0 … T−1.
        """
        total = len(self)
        if isinstance(steps, Iterable) and not isinstance(steps, str):
            if spacing is not None:
                raise ValueError(f"spacing: expected None where steps is a list, got {spacing!r}")
            try:
                keep = np.array([operator.index(step) for step in steps], dtype=np.int64)
            except TypeError as error:
                raise TypeError(f"steps: expected ints, got {steps!r}") from error
            except OverflowError as error:
                raise ValueError(f"steps: expected an increasing list within 0 … {total - 1}, got {steps!r}") from error
            if keep.size == 0 or keep[0] < 0 or keep[-1] >= total or np.any(np.diff(keep) <= 0):
                raise ValueError(f"steps: expected an increasing list within 0 … {total - 1}, got {keep.tolist()}")
            label = str(keep.tolist()) if keep.size <= 8 else f"<{keep.size} steps>"
        else:
            count = _steps(steps)
            if count > total:
                raise ValueError(f"steps: expected at most the schedule's {total} steps, got {count}")
            spacing = "leading" if spacing is None else spacing
            if spacing == "leading":
                keep = np.arange(count) * (total // count)
            elif spacing == "trailing":
                keep = np.round(total - np.arange(count) * (total / count)).astype(np.int64)[::-1] - 1
            elif spacing == "linspace":
                keep = np.round(np.linspace(0, total - 1, count)).astype(np.int64)
            else:
                raise ValueError(f"spacing: expected 'leading', 'trailing' or 'linspace', got {spacing!r}")
            label = f"{count}, spacing={spacing!r}"
        kept = self.alphas_cumprod[keep]
        betas = 1.0 - kept / np.concatenate([[1.0], kept[:-1]])
        return Schedule(betas, kept, self.timesteps[keep], f"{self.name}.respace({label})")

    def rescale_zero_terminal_snr(self) -> Schedule:
        """The schedule with √ᾱ shifted and scaled so that the last step is pure noise: ᾱ_{T−1} = 0, ᾱ_0 unchanged.

        At that last step epsilon prediction says nothing about x_0 (x0 = (x_t − ε)/0), and its limit is infinite too, so
        `ddpm_step` and `ddim_step` with prediction="epsilon" refuse t = T−1; use "v_prediction" or "sample".
        Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1.
        """
        if len(self) < 2:
            raise ValueError(f"schedule: expected at least 2 steps to rescale, got {len(self)}")
        root = np.sqrt(self.alphas_cumprod)
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        cumprod = root**2
        betas = 1.0 - cumprod / np.concatenate([[1.0], cumprod[:-1]])
        return Schedule(betas, cumprod, self.timesteps, f"{self.name}.rescale_zero_terminal_snr()")

    # ---- tables for the kernels -----------------------------------------------------------------------------------------

    def q_sample_table(self, device: torch.device, dtype: torch.dtype) -> Table:
        """(T, 2): √ᾱ, √(1−ᾱ)."""
        return self._table(("q_sample",), device, dtype)

    def q_step_table(self, device: torch.device, dtype: torch.dtype) -> Table:
        """(T, 2): √α, √β."""
        return self._table(("q_step",), device, dtype)

    def q_posterior_table(self, device: torch.device, dtype: torch.dtype) -> Table:
        """(T, 4): the mean's coefficients of x0 and of x_t, β̃, log β̃ (its first value replaced by the second, since β̃_0 = 0)."""
        return self._table(("q_posterior",), device, dtype)

    def ddpm_step_table(self, prediction: str, variance: str, device: torch.device, dtype: torch.dtype) -> Table:
        """(T, 10): the columns of `tables.step_columns`. `sigma` is σ_t, 0 at t = 0; with a learned variance, 0 or 1."""
        return self._table(("ddpm_step", prediction, variance), device, dtype)

    def ddim_step_table(self, prediction: str, eta: float, device: torch.device, dtype: torch.dtype) -> Table:
        """(T, 10): the same columns, for the DDIM update."""
        return self._table(("ddim_step", prediction, eta), device, dtype)

    def diffusion_loss_table(self, prediction: str, snr_gamma: float | None, device: torch.device, dtype: torch.dtype) -> Table:
        """(T, 3), `DIFFUSION_LOSS_COLUMNS`: a, b of the target a·x0 + b·ε, and the min-SNR-γ weight, 1 where γ is None."""
        return self._table(("diffusion_loss", prediction, snr_gamma), device, dtype)

    def vlb_terms_table(
        self, prediction: str, variance: str, device: torch.device, dtype: torch.dtype, weighting: str | float | None = None
    ) -> Table:
        """(T, 14), `VLB_TERMS_COLUMNS`: those of x_t, of x0 and of the posterior mean; log β̃; log σ² = slope·v + intercept; of a
        variance that is not learned what the divergence is at equal means, and 1/σ²; whether the term is the decoder's; and what
        `diffusion_loss_table` has, of the hybrid loss: with a weighting, "uniform" or min-SNR's γ, else 0."""
        return self._table(("vlb_terms", prediction, variance, weighting), device, dtype)

    def step_log_weight_table(self, prediction: str, variance: str, device: torch.device, dtype: torch.dtype) -> Table:
        """(T, 13), `STEP_LOG_WEIGHT_COLUMNS`: those of the mean as in `ddpm_step_table`; of a variance that is not learned 1/σ; of
        log(σ/√β) = slope·v + intercept; √α and 1/√β; 1 at the last step, else 0."""
        return self._table(("step_log_weight", prediction, variance), device, dtype)

    def forward_log_weight_table(self, device: torch.device, dtype: torch.dtype) -> Table:
        """One row of `STEP_LOG_WEIGHT_COLUMNS`, by which that kernel gives −log q(x_1 | x_0), and of a schedule of one step the
        prior too."""
        return self._table(("forward_log_weight",), device, dtype)

    def prior_kl_table(self, device: torch.device, dtype: torch.dtype) -> Table:
        """One row of `VLB_TERMS_COLUMNS`, by which that kernel gives ½·(ᾱ_{T−1}·x0² − ᾱ_{T−1} − log(1 − ᾱ_{T−1}))."""
        return self._table(("prior_kl",), device, dtype)

    def timestep_tensor(self, device: torch.device | str | int | None = None) -> torch.Tensor:
        """`timesteps` as an int64 tensor on `device`, cached: `schedule.timestep_tensor(device)[t]` is what the network gets.

        The tensor is shared by all callers; do not write to it.
        """
        device = torch.device("cpu") if device is None else torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._timestep_tensors:
            with plain_tensors():
                self._timestep_tensors[device] = torch.tensor(self.timesteps, device=device)
        kept = self._timestep_tensors[device]
        return kept if fake_mode() is None else let_in(kept)

    def _rows(self, key):
        rows = np.stack(_COLUMNS[key[0]](self, *key[1:]), axis=1)
        finite = np.all(np.isfinite(rows), axis=1)
        if not finite[:-1].all() or (len(self) == 1 and not finite[0]):
            step = int(np.flatnonzero(~finite)[0])
            raise ValueError(f"schedule: expected finite coefficients, got alphas_cumprod[{step}] = {self.alphas_cumprod[step]!r}")
        if finite[-1]:
            return rows, ""
        # Left out of the table, the step is one outside it: an error where t can be seen, NaN where that would synchronise.
        return rows[:-1], (
            f"; the last step t = {len(self) - 1} has a signal-to-noise ratio of zero (alphas_cumprod = 0), where epsilon "
            "prediction says nothing about x0: use prediction='v_prediction' or 'sample'"
        )

    def _check_float32(self, rows):
        beyond = np.abs(rows) > np.finfo(np.float32).max
        if beyond.any():
            step = int(np.flatnonzero(beyond.any(axis=1))[0])
            raise ValueError(
                f"schedule: expected coefficients that float32 holds, got {rows[step][beyond[step]][0]:.3g} at step {step}, where "
                f"alphas_cumprod is {self.alphas_cumprod[step]:.3g}; use another prediction than epsilon, float64, or fewer steps"
            )

    # ---- object protocol ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        last = self.alphas_cumprod[-1]
        return f"Schedule.{self.name}  # {len(self)} steps, alphas_cumprod {self.alphas_cumprod[0]:.6g} … {last:.4g}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return (
            np.array_equal(self.betas, other.betas)
            and np.array_equal(self.alphas_cumprod, other.alphas_cumprod)
            and np.array_equal(self.timesteps, other.timesteps)
        )

    def __hash__(self) -> int:
        return self._hash

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError(f"Schedule is immutable: cannot set {key!r}; make another one")

    def __delattr__(self, key: str) -> None:
        raise AttributeError(f"Schedule is immutable: cannot delete {key!r}")

    def __reduce__(self):
        return Schedule, (self.betas, self.alphas_cumprod, self.timesteps, self.name)

    def __copy__(self) -> Schedule:
        return self

    def __deepcopy__(self, memo: dict) -> Schedule:
        return self


# ---- coefficients, float64 ------------------------------------------------------------------------------------------------


def _q_sample_columns(s: Schedule):
    return np.sqrt(s.alphas_cumprod), np.sqrt(1.0 - s.alphas_cumprod)


def _q_step_columns(s: Schedule):
    return np.sqrt(s.alphas), np.sqrt(s.betas)


def _posterior_mean(s: Schedule):
    """The coefficients of x_0 and of x_t in the mean of q(x_{t−1} | x_t, x_0) (Ho et al. 2020, equation 7)."""
    total = 1.0 - s.alphas_cumprod
    return np.sqrt(s.alphas_cumprod_prev) * s.betas / total, np.sqrt(s.alphas) * (1.0 - s.alphas_cumprod_prev) / total


def _log_posterior_variance(s: Schedule):
    """log β̃_t with β̃_0 = 0 replaced by β̃_1 (Ho et al.'s released code); a schedule of one step keeps β_0."""
    variance = s.posterior_variance.copy()
    variance[0] = variance[1] if len(s) > 1 else s.betas[0]
    return np.log(variance)


def _q_posterior_columns(s: Schedule):
    return *_posterior_mean(s), s.posterior_variance, _log_posterior_variance(s)


def _x0_columns(s: Schedule, prediction: str):
    """The coefficients of x_t and of the model's output in x0."""
    root, noise = np.sqrt(s.alphas_cumprod), np.sqrt(1.0 - s.alphas_cumprod)
    if prediction == "epsilon":
        with np.errstate(divide="ignore"):
            return 1.0 / root, -np.sqrt((1.0 - s.alphas_cumprod) / s.alphas_cumprod)
    if prediction == "sample":
        return np.zeros_like(root), np.ones_like(root)
    return root, -noise


def _learned_log_variance(s: Schedule, variance: str):
    """The slope and the intercept of log σ² in v: the network says v = log σ², or of a range f·log β + (1 − f)·log β̃ with
    f = (v + 1)/2."""
    if variance == "learned":
        return np.ones(len(s)), np.zeros(len(s))
    low, high = _log_posterior_variance(s), np.log(s.betas)
    return 0.5 * (high - low), 0.5 * (high + low)


def _ddpm_step_columns(s: Schedule, prediction: str, variance: str):
    ones, zeros = np.ones(len(s)), np.zeros(len(s))
    sigma, slope, intercept = ones.copy(), zeros, zeros
    if variance == "posterior":
        sigma = np.sqrt(s.posterior_variance)
    elif variance == "beta":
        sigma = np.sqrt(s.betas)
    else:  # of log σ
        slope, intercept = (0.5 * column for column in _learned_log_variance(s, variance))
    sigma[0] = 0.0
    return step_columns(*_x0_columns(s, prediction), *_posterior_mean(s), sigma, slope, intercept).T


def _ddim_step_columns(s: Schedule, prediction: str, eta: float):
    prev, total = s.alphas_cumprod_prev, 1.0 - s.alphas_cumprod
    sigma = eta * np.sqrt((1.0 - prev) / total) * np.sqrt(1.0 - s.alphas_cumprod / prev)
    # ε is read off the (clipped) x0, ε = (x_t − √ᾱ·x0)/√(1−ᾱ), as in Nichol & Dhariwal's code
    y_from_x = np.sqrt(np.maximum(1.0 - prev - sigma**2, 0.0) / total)
    y_from_x0 = np.sqrt(prev) - y_from_x * np.sqrt(s.alphas_cumprod)
    return step_columns(*_x0_columns(s, prediction), y_from_x0, y_from_x, sigma).T


def _diffusion_loss_columns(s: Schedule, prediction: str, gamma: float | None):
    """Hang et al. 2023: min(SNR, γ) on the error of x0, hence min(SNR, γ)/SNR on that of ε and min(SNR, γ)/(SNR + 1) on that of
    v; with SNR = ᾱ/(1 − ᾱ), written so that they are finite where SNR is 0."""
    ones, zeros = np.ones(len(s)), np.zeros(len(s))
    signal, noise = s.alphas_cumprod, 1.0 - s.alphas_cumprod
    targets = {"epsilon": (zeros, ones), "sample": (ones, zeros), "v_prediction": (-np.sqrt(noise), np.sqrt(signal))}
    x0, epsilon = targets[prediction]
    if gamma is None:
        return x0, epsilon, ones
    with np.errstate(divide="ignore", over="ignore"):
        if prediction == "epsilon":
            weight = np.minimum(1.0, gamma * noise / signal)
        elif prediction == "sample":
            weight = np.minimum(signal / noise, gamma)
        else:
            weight = np.minimum(signal, gamma * noise)
    return x0, epsilon, weight


def _vlb_terms_columns(s: Schedule, prediction: str, variance: str, weighting: str | float | None):
    low, zeros = _log_posterior_variance(s), np.zeros(len(s))
    mean_from_x0, _ = _posterior_mean(s)
    decoder = zeros.copy()
    decoder[0] = 1.0
    constant, precision = zeros, np.exp(-low)
    if variance in FIXED_VARIANCES:  # at t = 0 both are β̃_1
        slope, intercept = zeros, low.copy() if variance == "posterior" else np.log(s.betas)
        intercept[0] = low[0]
        excess = intercept - low
        constant, precision = 0.5 * (excess + np.expm1(-excess)), np.exp(-intercept)
    else:
        slope, intercept = _learned_log_variance(s, variance)
    x0 = _x0_columns(s, prediction)
    loss = zeros, zeros, zeros
    if weighting is not None:
        loss = _diffusion_loss_columns(s, prediction, None if weighting == "uniform" else float(weighting))
    return *_q_sample_columns(s), *x0, mean_from_x0, low, slope, intercept, constant, precision, decoder, *loss


def _step_log_weight_columns(s: Schedule, prediction: str, variance: str):
    zeros, log_sigma = np.zeros(len(s)), 0.5 * _log_posterior_variance(s)
    if variance in FIXED_VARIANCES:
        if variance == "beta":  # at t = 0 both are β̃_1
            log_sigma[1:] = 0.5 * np.log(s.betas[1:])
        inverse_sigma, slope, intercept = np.exp(-log_sigma), zeros, log_sigma
    else:
        slope, intercept = (0.5 * column for column in _learned_log_variance(s, variance))
        inverse_sigma = zeros
    mean = step_columns(*_x0_columns(s, prediction), *_posterior_mean(s), inverse_sigma, slope, intercept - 0.5 * np.log(s.betas))
    return *mean.T, *_forward_columns(s)


def _forward_columns(s: Schedule):
    prior = np.zeros(len(s))
    prior[-1] = 1.0
    return np.sqrt(s.alphas), 1.0 / np.sqrt(s.betas), prior


def _forward_log_weight_columns(s: Schedule):
    """A step back whose log-density is 0: its logarithm of σ/√β has −½·log 2π in it, and the mean, times 1/σ = 0, is of no
    consequence."""
    columns = dict.fromkeys(STEP_LOG_WEIGHT_COLUMNS, np.zeros(1))
    columns["intercept"] = np.array([-0.5 * math.log(2.0 * math.pi * float(s.betas[0]))])
    forward = ("forward_scale", "forward_inverse_sigma", "prior")
    columns.update((name, column[:1]) for name, column in zip(forward, _forward_columns(s), strict=True))
    return tuple(columns.values())


def _prior_kl_columns(s: Schedule):
    """The divergence of a step whose mean is √ᾱ·x0 from one with mean 0 and variance 1: a model that takes x0 for 0."""
    signal = float(s.alphas_cumprod[-1])
    columns = dict.fromkeys(VLB_TERMS_COLUMNS, np.zeros(1))
    columns["mean_from_x0"] = np.array([math.sqrt(signal)])
    columns["constant"] = np.array([0.5 * _log_excess(signal)])
    columns["precision"] = np.ones(1)
    return tuple(columns.values())


def _log_excess(x: float) -> float:
    """−x − log(1 − x) within 0 … 1, which is small where x is: x²/2 + x³/3 + …"""
    if x > 0.25:  # where the difference is 0.04 or more, and loses one digit at most
        return -x - math.log1p(-x)
    return math.fsum(x**k / k for k in range(2, 28))  # what is left out is below 0.25²⁸/28 = 5e-19


_COLUMNS = {
    "vlb_terms": _vlb_terms_columns,
    "prior_kl": _prior_kl_columns,
    "step_log_weight": _step_log_weight_columns,
    "forward_log_weight": _forward_log_weight_columns,
    "q_sample": _q_sample_columns,
    "q_step": _q_step_columns,
    "q_posterior": _q_posterior_columns,
    "ddpm_step": _ddpm_step_columns,
    "ddim_step": _ddim_step_columns,
    "diffusion_loss": _diffusion_loss_columns,
}


# ---- argument checks of the constructors ------------------------------------------------------------------------------------


_RANGE = "steps, beta_start, beta_end"


def _check_falls(alphas_cumprod, arguments: str) -> None:
    """Raises ValueError unless 1 > ᾱ_0 > ᾱ_1 > … > ᾱ_{T−1} ≥ 0 in float64, all but the last above `_SMALLEST`."""
    cumprod = np.asarray(alphas_cumprod, np.float64)
    previous = np.append(1.0, cumprod[:-1])
    still, small = ~(cumprod < previous), ~(cumprod >= _SMALLEST)
    small[-1] &= cumprod[-1] != 0.0
    if not (still | small).any():
        return
    at = int(np.flatnonzero(still | small)[0])
    got = f"alphas_cumprod[{at}] = {float(cumprod[at])!r}"
    if small[at]:
        expected = (
            f"alphas_cumprod above {_SMALLEST:.2g} before the last step, which alone may be 0 (use fewer steps or smaller betas)"
        )
    else:
        expected = "betas so large that alphas_cumprod falls at every step in float64"
        got += f" after {float(previous[at])!r}"
    raise ValueError(f"{arguments}: expected {expected}, got {got}")


def _frozen(values, dtype) -> np.ndarray:
    # over immutable bytes, so that not even setflags makes it writeable
    return np.frombuffer(np.array(values, dtype=dtype).tobytes(), dtype=dtype)


def _steps(steps) -> int:
    try:
        count = operator.index(steps)
    except TypeError:
        raise TypeError(f"steps: expected an int, got {type(steps).__name__}") from None
    if isinstance(steps, bool) or count < 1:
        raise ValueError(f"steps: expected an int ≥ 1, got {steps!r}")
    return count


def _number(name, value) -> float:
    """A real number of Python's, NumPy's or another library's; infinite where no float is large enough."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):  # the ABC last, it takes longest
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf


def _unit_interval(name, value) -> float:
    number = _number(name, value)
    if not 0 < number < 1:
        raise ValueError(f"{name}: expected a number in (0, 1), got {value!r}")
    return number


def _beta_range(beta_start, beta_end):
    return _unit_interval("beta_start", beta_start), _unit_interval("beta_end", beta_end)
