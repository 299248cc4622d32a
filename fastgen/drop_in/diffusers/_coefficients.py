"""diffusers' coefficients: its operations, in its order, in float32, for all timesteps at once.

Each function of `ROWS` takes a `Settings` and the rest of a table's key, and gives that table's rows in float64: row t is that of
timestep t, NaN where the scheduler has no step there. The rows of a reverse step have the columns of `step_columns`, which has the
formula; those of `add_noise` and `get_velocity` have those of `q_sample`.
"""

from __future__ import annotations

import numpy as np
import torch

from ..._core.tables import DDPM_STEP_COLUMNS, step_columns

# Keys of tables: the name of a function in `ROWS`, and its further arguments
DDPM = ("ddpm",)
DDPM_BATCH_NO_NOISE = ("ddpm", True)


def _ddpm_rows(settings, batch_no_noise=False):
    """`batch_no_noise`: the rows of the method `batch_step_no_noise`, where the previous timestep is always a stride away."""
    alpha = settings.alphas_cumprod
    previous, visited = _strided_timesteps(settings) if batch_no_noise else _ddpm_timesteps(settings)
    alpha_previous = _alpha_at(alpha, previous, 1.0 if batch_no_noise else settings.final_alpha)
    beta, beta_previous = 1 - alpha, 1 - alpha_previous
    current_alpha = alpha / alpha_previous
    current_beta = 1 - current_alpha
    u = alpha_previous**0.5 * current_beta / beta
    v = current_alpha**0.5 * beta_previous / beta
    small = torch.clamp(beta_previous / beta * current_beta, min=1e-20)
    deviation = _deviation(None if batch_no_noise else settings.variance_type, small, current_beta)
    rows = _float64_columns(*_x0_columns(settings), u, v, *deviation)
    rows[~visited] = np.nan
    rows[0, DDPM_STEP_COLUMNS.index("sigma")] = 0.0
    return rows


def _strided_timesteps(settings):
    """(the previous timestep of each, whether the scheduler visits each)."""
    total = len(settings.alphas_cumprod)
    stride = settings.num_train_timesteps // (settings.num_inference_steps or settings.num_train_timesteps)
    return np.arange(total) - stride, np.ones(total, bool)


def _ddpm_timesteps(settings):
    """The same for DDPM's `step`, where the previous timestep is the next one of `scheduler.timesteps`, if these have been set."""
    total = len(settings.alphas_cumprod)
    previous, visited = np.arange(total) - 1, np.ones(total, bool)
    if settings.custom_timesteps or settings.num_inference_steps:
        visited[:] = False
        timesteps = settings.timesteps
        pairs = zip(timesteps, [*timesteps[1:], -1], strict=True)
        for t, next_one in reversed([*pairs]):  # backwards, since of a repeated timestep diffusers finds the first
            if 0 <= t < total:
                previous[t], visited[t] = next_one, next_one < total
    return previous, visited


def _deviation(variance_type, small, large):
    """The columns sigma, slope and intercept, which are those of σ or, where it is learned, of its logarithm. small, large: the two
    variances that diffusers calls so."""
    zero = torch.zeros((), device="cpu")
    if variance_type == "fixed_small":
        return small**0.5, zero, zero
    if variance_type == "fixed_small_log":
        return torch.exp(0.5 * torch.log(small)), zero, zero
    if variance_type == "fixed_large":
        return large**0.5, zero, zero
    if variance_type == "fixed_large_log":
        return torch.log(large) ** 0.5, zero, zero  # NaN, as in diffusers
    if variance_type == "learned_range":
        least, most = torch.log(small).double(), torch.log(large).double()
        return torch.ones_like(large), 0.25 * (most - least), 0.25 * (most + least)
    return zero, zero, zero


def _alpha_at(alpha, timesteps, final):
    """ᾱ of `timesteps`, and `final` of those below 0."""
    within = alpha[torch.from_numpy(timesteps.clip(0, len(alpha) - 1))]
    return torch.where(torch.from_numpy(timesteps >= 0), within, final)


def _ddim_rows(settings, eta, from_clipped):
    """`from_clipped`: diffusers' `use_clipped_model_output`, which reads epsilon off the clipped x0."""
    alpha = settings.alphas_cumprod
    stride = settings.num_train_timesteps // settings.num_inference_steps
    alpha_previous = _alpha_at(alpha, np.arange(len(alpha)) - stride, settings.final_alpha)
    beta = 1 - alpha
    variance = (1 - alpha_previous) / beta * (1 - alpha / alpha_previous)
    sigma = eta * variance**0.5
    direction = ((1 - alpha_previous - sigma**2) ** 0.5).double()
    u, sqrt_alpha, sqrt_beta = (alpha_previous**0.5).double(), (alpha**0.5).double(), (beta**0.5).double()
    # direction·epsilon as v·x_t + w·m: epsilon comes from x0, from the network, or from both
    v = w = zero = torch.zeros((), device="cpu")
    if from_clipped:
        u, v = u - direction * sqrt_alpha / sqrt_beta, direction / sqrt_beta
    elif settings.prediction == "epsilon":
        w = direction
    elif settings.prediction == "sample":
        v, w = direction / sqrt_beta, -direction * sqrt_alpha / sqrt_beta
    else:
        v, w = direction * sqrt_beta, direction * sqrt_alpha
    return _float64_columns(*_x0_columns(settings), u, v, sigma, zero, zero, w)


def _x0_columns(settings):
    """P and Q of x0 = P·x_t + Q·m."""
    alpha = settings.alphas_cumprod
    sqrt_alpha, sqrt_beta = (alpha**0.5).double(), ((1 - alpha) ** 0.5).double()
    if settings.prediction == "epsilon":
        return 1 / sqrt_alpha, -sqrt_beta / sqrt_alpha
    if settings.prediction == "sample":
        return torch.zeros_like(sqrt_alpha), torch.ones_like(sqrt_alpha)
    return sqrt_alpha, -sqrt_beta


def _float64_columns(*columns):
    return step_columns(*(column.double().numpy() for column in columns))


def _x0_rows(settings, *key):
    """The rows of a step that gives the x0 of the step `key`, before anything is clipped, and adds no noise."""
    rows = settings.computed(key)[0].rows.copy()
    column = DDPM_STEP_COLUMNS.index
    rows[:, [column("y_from_x_unclipped"), column("y_from_m_unclipped")]] = rows[:, [column("x0_from_x"), column("x0_from_m")]]
    rows[:, column("sigma")] = 0.0
    return rows


def _add_noise_rows(settings, dtype):
    """`dtype`: the name of the one to which diffusers rounds ᾱ before it takes roots."""
    alpha = settings.alphas_cumprod.to(getattr(torch, dtype))
    return np.stack([(alpha**0.5).double().numpy(), ((1 - alpha) ** 0.5).double().numpy()], axis=1)


def _velocity_rows(settings, dtype):
    of_x0, of_noise = _add_noise_rows(settings, dtype).T
    return np.stack([-of_noise, of_x0], axis=1)


ROWS = {
    "ddpm": _ddpm_rows,
    "ddim": _ddim_rows,
    "x0": _x0_rows,
    "add_noise": _add_noise_rows,
    "get_velocity": _velocity_rows,
}
