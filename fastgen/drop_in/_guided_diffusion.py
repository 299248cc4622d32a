"""The methods of guided-diffusion's `GaussianDiffusion`, which is improved-diffusion's too, by fastgen's kernels."""

from __future__ import annotations

import numpy as np
import torch

from .._tables import step_columns
from ..ddpm_step import step_with
from ..q_posterior import posterior_with
from ..q_sample import noised_with
from ._gaussian import (
    Method,
    check,
    check_eta,
    check_like,
    check_t,
    coefficients,
    columns,
    ddim_columns,
    noising_of,
    parameters,
    posterior_of,
    widened,
)
from ._patch import NotCovered

MARKS = "q_posterior_mean_variance", "_predict_xstart_from_eps", "_predict_eps_from_xstart", "_scale_timesteps"


def _kinds(self):
    """What the network predicts and which variance there is, by the names of the library's enumerations."""
    mean, variance = getattr(self.model_mean_type, "name", None), getattr(self.model_var_type, "name", None)
    if mean not in ("EPSILON", "START_X"):
        raise NotCovered(f"a network that predicts {self.model_mean_type}")
    if variance not in ("LEARNED", "LEARNED_RANGE", "FIXED_SMALL", "FIXED_LARGE"):
        raise NotCovered(f"the variance {self.model_var_type}")
    return mean, variance


def _learned(self):
    return self.model_var_type.name.startswith("LEARNED")


# ---- coefficients ---------------------------------------------------------------------------------------------------------

_PREDICTED = "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"  # x0 = recip·x − recipm1·ε
_VARIANCES = "posterior_log_variance_clipped", "posterior_variance", "betas"


def _weights(recip, recipm1, mean):
    """P and Q of x0 = P·x + Q·m."""
    return (recip, -recipm1) if mean == "EPSILON" else (0 * recip, 0 * recip + 1)


def _step(self, noisy):
    """Of p_sample, or without noise of p_mean_variance."""
    names = (*_PREDICTED, "posterior_mean_coef1", "posterior_mean_coef2", *_VARIANCES)
    kinds = _kinds(self)
    return coefficients(self, ("ddpm_step", *kinds, noisy), names, _step_rows, *kinds, noisy)


def _step_rows(recip, recipm1, u, v, log_variance, variance, betas, mean, kind, noisy):
    """The deviation is exp(½·log-variance), which for LEARNED_RANGE is (v+1)/2·log β + (1−v)/2·log β̃."""
    sigma, slope, intercept = np.full_like(betas, float(noisy)), 0.0, 0.0
    if kind == "LEARNED":
        slope = 0.5
    elif kind == "LEARNED_RANGE":
        slope, intercept = (np.log(betas) - log_variance) / 4, (np.log(betas) + log_variance) / 4
    elif kind == "FIXED_LARGE":
        sigma *= np.sqrt(np.append(variance[1], betas[1:]))
    else:
        sigma *= np.exp(0.5 * log_variance)
    sigma[0] = 0.0
    return step_columns(*_weights(recip, recipm1, mean), u, v, sigma, slope, intercept)


def _variance(self):
    """Of p_mean_variance: the variance and its logarithm, or the logarithms that LEARNED_RANGE lies between."""
    kind = self.model_var_type.name
    return coefficients(self, ("variance", kind), _VARIANCES, _variance_rows, kind)


def _variance_rows(log_variance, variance, betas, kind):
    if kind == "LEARNED_RANGE":
        return columns(log_variance, np.log(betas))
    if kind == "FIXED_LARGE":
        large = np.append(variance[1], betas[1:])
        return columns(large, np.log(large))
    return columns(variance, log_variance)


def _ddim(self, eta):
    names = (*_PREDICTED, "alphas_cumprod", "alphas_cumprod_prev")
    mean = _kinds(self)[0]
    return coefficients(self, ("ddpm_step", "ddim", mean, eta), names, _ddim_rows, mean, eta)


def _ddim_rows(recip, recipm1, alpha, previous, mean, eta):
    return ddim_columns(*_weights(recip, recipm1, mean), recip, recipm1, alpha, previous, eta)


# ---- methods --------------------------------------------------------------------------------------------------------------


def _q_sample(original, rng):
    def q_sample(self, x_start, t, noise=None):
        check("x_start", x_start)
        check_t(t, x_start)
        noising = noising_of(self)
        if noise is not None:
            check_like("noise", noise, x_start)
        elif rng == "fused":
            return noised_with(noising, widened(x_start, torch.float32), t)
        else:
            noise = torch.randn_like(x_start)
        return noised_with(noising, widened(x_start, torch.float32, noise.dtype), t, noise=noise)

    return q_sample


def _q_posterior_mean_variance(original, rng):
    def q_posterior_mean_variance(self, x_start, x_t, t):
        check("x_t", x_t)
        check_like("x_start", x_start, x_t)
        check_t(t, x_t)
        mean, *variances = posterior_with(posterior_of(self), widened(x_start, torch.float32), x_t, t)
        return mean, *(x.float().expand(x_t.shape) for x in variances)

    return q_posterior_mean_variance


def _checked(x, t, denoised_fn, cond_fn=None):
    if denoised_fn is not None or cond_fn is not None:
        raise NotCovered("denoised_fn or cond_fn")
    check("x", x)
    check_t(t, x)


def _output(self, model, x, t, model_kwargs):
    if hasattr(self, "_wrap_model"):  # SpacedDiffusion's, which a network that is wrapped already passes through
        model = self._wrap_model(model)
    return model(x, self._scale_timesteps(t), **(model_kwargs or {}))


def _stepped(self, step, x, m, t, clip, **noise):
    """(y, x0), in the library's dtypes: where the network predicts x0, that has its dtype."""
    clip = 1.0 if clip else None
    x = widened(x, m.dtype, torch.float32)
    y, x0 = step_with(step, x, m, t, learned=_learned(self), clip=clip, return_x0=True, **noise)
    return y, x0.to(m.dtype) if self.model_mean_type.name == "START_X" else x0


def _p_mean_variance(original, rng):
    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        _checked(x, t, denoised_fn)
        step, table = _step(self, noisy=False), _variance(self)
        m = _output(self, model, x, t, model_kwargs)
        mean, x0 = _stepped(self, step, x, m, t, clip_denoised)
        if _learned(self):
            log_variance = m[:, x.shape[1] :]
            if self.model_var_type.name == "LEARNED_RANGE":
                low, high = _extracted(table, x, t)
                share = (log_variance + 1) / 2
                log_variance = share * high + (1 - share) * low
            variance = torch.exp(log_variance)
        else:
            variance, log_variance = (column.expand(x.shape) for column in _extracted(table, x, t))
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x0}

    return p_mean_variance


def _extracted(table, x, t):
    """The two columns of each sample's row, to broadcast against x."""
    rows = table.table(x.device, torch.float32).rows[t]
    return rows.reshape(len(t), 2, *[1] * (x.dim() - 1)).unbind(1)


def _p_sample(original, rng):
    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None):
        _checked(x, t, denoised_fn, cond_fn)
        step = _step(self, noisy=True)
        m = _output(self, model, x, t, model_kwargs)
        noise = {} if rng == "fused" else {"noise": torch.randn_like(x)}
        sample, x0 = _stepped(self, step, x, m, t, clip_denoised, **noise)
        return {"sample": sample, "pred_xstart": x0}

    return _as_in(original, p_sample)


def _ddim_sample(original, rng):
    def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0):
        _checked(x, t, denoised_fn, cond_fn)
        check_eta(eta)
        step = _ddim(self, eta)
        m = _output(self, model, x, t, model_kwargs)
        noise = {}
        if rng != "fused":
            drawn = torch.randn_like(x)  # with eta = 0 too, where it serves the generator's state alone
            noise = {"noise": drawn} if eta else {}
        sample, x0 = _stepped(self, step, x, m, t, clip_denoised, **noise)
        return {"sample": sample, "pred_xstart": x0}

    return _as_in(original, ddim_sample)


def _as_in(original, sampler):
    """`sampler` with the arguments of `original`: improved-diffusion knows no cond_fn."""
    if "cond_fn" in parameters(original):
        return sampler

    def without_cond_fn(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, *rest, **keywords):
        return sampler(self, model, x, t, clip_denoised, denoised_fn, None, model_kwargs, *rest, **keywords)

    return without_cond_fn


_FORMULAS = "q_posterior_mean_variance", "_predict_xstart_from_eps"
_MEAN_VARIANCE = "model, x, t, clip_denoised, denoised_fn, model_kwargs"
_SAMPLING = _MEAN_VARIANCE, "model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs"
METHODS = {
    "q_sample": Method(_q_sample, ("x_start, t, noise",)),
    "q_posterior_mean_variance": Method(_q_posterior_mean_variance, ("x_start, x_t, t",)),
    "p_mean_variance": Method(_p_mean_variance, (_MEAN_VARIANCE, "model, args, kwargs"), _FORMULAS),  # the second: when wrapped
    "p_sample": Method(_p_sample, _SAMPLING, ("p_mean_variance", *_FORMULAS)),
    "ddim_sample": Method(
        _ddim_sample,
        tuple(arguments + ", eta" for arguments in _SAMPLING),
        ("p_mean_variance", "_predict_eps_from_xstart", *_FORMULAS),
    ),
}
