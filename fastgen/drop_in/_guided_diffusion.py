"""The methods of guided-diffusion's `GaussianDiffusion`, which is improved-diffusion's and DiT's too, by fastgen's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .._core import torch_noise
from .._core.tables import DDPM_STEP_COLUMNS, step_columns
from .._ops.ddpm_step import step_with
from .._ops.diffusion_loss import loss_with
from .._ops.q_posterior import posterior_with
from .._ops.q_sample import noised_with
from .._ops.vlb_terms import APART, CLAMPED_DECODERS, WITH_ERROR, terms_with
from ._gaussian import (
    Method,
    bound_columns,
    check,
    check_constant,
    check_eta,
    check_like,
    check_t,
    code,
    coefficients,
    columns,
    ddim_columns,
    error_columns,
    how,
    noise_of_loss,
    noising_of,
    parameters,
    posterior_of,
    prior_columns,
    widened,
)
from ._patch import NotCovered

MARKS = "q_posterior_mean_variance", "_predict_xstart_from_eps", "_predict_eps_from_xstart"


def _kinds(self, known):
    """What the network predicts and which variance there is, by the names of the library's enumerations."""
    mean, variance = getattr(self.model_mean_type, "name", None), getattr(self.model_var_type, "name", None)
    if mean not in ("EPSILON", "START_X"):
        raise NotCovered(f"a network that predicts {self.model_mean_type}")
    if variance not in ("LEARNED", "LEARNED_RANGE", "FIXED_SMALL", "FIXED_LARGE"):
        raise NotCovered(f"the variance {self.model_var_type}")
    return mean, "LEARNED_RANGE" if variance == "LEARNED" and known.get("dit") else variance


# ---- coefficients ---------------------------------------------------------------------------------------------------------

_PREDICTED = "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"  # x0 = recip·x − recipm1·ε
_VARIANCES = "posterior_log_variance_clipped", "posterior_variance", "betas"


def _weights(recip, recipm1, mean):
    """The coefficients of x and of the model's output in x0."""
    return (recip, -recipm1) if mean == "EPSILON" else (0 * recip, 0 * recip + 1)


def _step(self, kinds, noisy):
    """Of p_sample, or without noise of p_mean_variance."""
    names = (*_PREDICTED, "posterior_mean_coef1", "posterior_mean_coef2", *_VARIANCES)
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


def _variance(self, kind):
    """Of p_mean_variance: the variance and its logarithm, or the logarithms that LEARNED_RANGE lies between."""
    return coefficients(self, ("variance", kind), _VARIANCES, _variance_rows, kind)


def _variance_rows(log_variance, variance, betas, kind):
    if kind == "LEARNED_RANGE":
        return columns(log_variance, np.log(betas))
    if kind == "FIXED_LARGE":
        large = np.append(variance[1], betas[1:])
        return columns(large, np.log(large))
    return columns(variance, log_variance)


def _ddim(self, mean, eta):
    names = (*_PREDICTED, "alphas_cumprod", "alphas_cumprod_prev")
    return coefficients(self, ("ddpm_step", "ddim", mean, eta), names, _ddim_rows, mean, eta)


def _ddim_rows(recip, recipm1, alpha, previous, mean, eta):
    return ddim_columns(*_weights(recip, recipm1, mean), recip, recipm1, alpha, previous, eta)


def _x0(self):
    """Of the prediction alone, from a network that predicts ε."""
    return coefficients(self, ("ddpm_step", "x0"), _PREDICTED, lambda p, q: step_columns(p, -q, 1.0, 0.0, 0.0))


def _shift(self, kind):
    """Of p_sample's condition: y + variance·gradient, the gradient in the place of the noise."""
    return coefficients(self, ("ddpm_step", "shift", kind), _VARIANCES, _shift_rows, kind)


def _shift_rows(log_variance, variance, betas, kind):
    sigma, slope, intercept = _variance_rows(log_variance, variance, betas, kind)[:, 0], 0.0, 0.0
    if kind == "LEARNED":
        slope = 1.0
    elif kind == "LEARNED_RANGE":
        slope, intercept = (np.log(betas) - log_variance) / 2, (np.log(betas) + log_variance) / 2
    if kind.startswith("LEARNED"):
        sigma = 1.0
    return step_columns(0 * betas, 0.0, 0.0, 1.0, sigma, slope, intercept)


def _score(self, eta):
    """Of ddim_sample's condition, which moves ε by −√(1 − ᾱ)·gradient: with x0 for x and the gradient for the network's output, x0
    moved, and with y for the noise, y moved."""
    names = "sqrt_recipm1_alphas_cumprod", "sqrt_recip_alphas_cumprod", "alphas_cumprod", "alphas_cumprod_prev"
    return coefficients(self, ("ddpm_step", "score", eta), names, _score_rows, eta)


def _score_rows(recipm1, recip, alpha, previous, eta):
    y_from_x0 = _ddim_rows(recip, recipm1, alpha, previous, "EPSILON", eta)[:, DDPM_STEP_COLUMNS.index("y_from_x0")]
    move = recipm1 * np.sqrt(1 - alpha)
    return step_columns(1.0, move, 0.0, 0.0, 1.0, y_from_m=y_from_x0 * move)


def _bound(self, kinds):
    """Of _vb_terms_bpd, and of the squared error of training_losses."""
    names = (*_PREDICTED, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "posterior_mean_coef1", *_VARIANCES)
    return coefficients(self, ("vlb_terms", *kinds), names, _bound_rows, *kinds)


def _bound_rows(recip, recipm1, scale, sigma, u, log_variance, variance, betas, mean, kind):
    slope, intercept = 0.0, log_variance
    if kind == "LEARNED":
        slope, intercept = 1.0, 0 * betas
    elif kind == "LEARNED_RANGE":
        slope, intercept = (np.log(betas) - log_variance) / 2, (np.log(betas) + log_variance) / 2
    elif kind == "FIXED_LARGE":
        intercept = np.log(np.append(variance[1], betas[1:]))
    target = "noise" if mean == "EPSILON" else "x0"
    x0 = _weights(recip, recipm1, mean)
    return bound_columns(scale, sigma, *x0, u, log_variance, slope, intercept, kind.startswith("LEARNED"), target)


def _error(self, mean):
    """Of calc_bpd_loop's xstart_mse."""
    rows = lambda recip, recipm1: error_columns(*_weights(recip, recipm1, mean))  # noqa: E731
    return coefficients(self, ("vlb_terms", "error", mean), _PREDICTED, rows)


def _prior(self):
    return coefficients(self, ("vlb_terms", "prior"), ("alphas_cumprod",), prior_columns)


def _squares(self, mean):
    """Of training_losses without a learned variance."""
    rows = lambda betas: columns(0 * betas + (mean == "START_X"), 0 * betas + (mean == "EPSILON"), 0 * betas + 1)  # noqa: E731
    return coefficients(self, ("diffusion_loss", mean), ("betas",), rows)


# ---- methods --------------------------------------------------------------------------------------------------------------


def _q_sample(original, rng, _):
    def q_sample(self, _, x_start, t, noise=None):
        check("x_start", x_start)
        check_t(t, x_start)
        noising = noising_of(self)
        if noise is not None:
            check_like("noise", noise, x_start)
        elif rng == "fused":
            return noised_with(noising, widened(x_start, torch.float32), t)
        else:
            noise = torch_noise.randn_like(x_start)
        return noised_with(noising, widened(x_start, torch.float32, noise.dtype), t, noise=noise)

    return q_sample


def _q_posterior_mean_variance(original, rng, _):
    def q_posterior_mean_variance(self, _, x_start, x_t, t):
        check("x_t", x_t)
        check_like("x_start", x_start, x_t)
        check_t(t, x_t)
        mean, *variances = posterior_with(posterior_of(self), widened(x_start, torch.float32), x_t, t)
        return mean, *(x.float().expand(x_t.shape) for x in variances)

    return q_posterior_mean_variance


def _checked(x, t, cond_fn=None):
    check("x", x)
    check_t(t, x)
    if cond_fn is not None and x.dtype is torch.float64:
        raise NotCovered("a condition on float64 data")


def _output(self, known, model, x, t, model_kwargs):
    """What the network says, and what a network of DiT's adds to it."""
    if "forwards" in known:  # SpacedDiffusion's; a network that is wrapped already passes through
        model = self._wrap_model(model)
    m = model(x, t if "dit" in known else self._scale_timesteps(t), **(model_kwargs or {}))
    return m if "dit" in known and isinstance(m, tuple) else (m, None)


def _gradient(self, known, cond_fn, x, t, model_kwargs):
    if "forwards" in known:
        cond_fn = self._wrap_model(cond_fn)
    gradient = cond_fn(x, t if "dit" in known else self._scale_timesteps(t), **model_kwargs)
    return gradient if gradient.shape == x.shape else gradient.expand(x.shape)


def _denoised(self, kinds, x, m, t, denoised_fn):
    """What denoised_fn makes of x0, as the output of a network that predicts it and learns no variance; and `kinds` for it."""
    learned = kinds[1].startswith("LEARNED")
    if kinds[0] == "EPSILON":
        x0 = step_with(_x0(self), widened(x, m.dtype, torch.float32), m, t, learned=learned)
    else:
        x0 = m[:, : x.shape[1]] if learned else m
    return denoised_fn(x0), ("START_X", "FIXED_SMALL" if learned else kinds[1])


def _stepped(step, kinds, x, m, t, clip, **noise):
    """(y, x0), in the library's dtypes: where the network predicts x0, that has its dtype."""
    clip = 1.0 if clip else None
    x = widened(x, m.dtype, torch.float32)
    y, x0 = step_with(step, x, m, t, learned=kinds[1].startswith("LEARNED"), clip=clip, return_x0=True, **noise)
    return y, x0.to(m.dtype) if kinds[0] == "START_X" else x0


def _p_mean_variance(original, rng, known):
    def p_mean_variance(self, _, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        _checked(x, t)
        kinds = _kinds(self, known)
        table = _variance(self, kinds[1])
        m, extra = _output(self, known, model, x, t, model_kwargs)
        shown = (m, kinds) if denoised_fn is None else _denoised(self, kinds, x, m, t, denoised_fn)
        mean, x0 = _stepped(_step(self, shown[1], noisy=False), shown[1], x, shown[0], t, clip_denoised)
        if kinds[1].startswith("LEARNED"):
            log_variance = m[:, x.shape[1] :]
            if kinds[1] == "LEARNED_RANGE":
                low, high = _extracted(table, x, t)
                share = (log_variance + 1) / 2
                log_variance = share * high + (1 - share) * low
            variance = torch.exp(log_variance)
        else:
            variance, log_variance = (column.expand(x.shape) for column in _extracted(table, x, t))
        result = {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x0}
        return {**result, "extra": extra} if "dit" in known else result

    return p_mean_variance


def _extracted(table, x, t):
    """The two columns of each sample's row, to broadcast against x."""
    rows = table.table(x.device, torch.float32).rows[t]
    return rows.reshape(len(t), 2, *[1] * (x.dim() - 1)).unbind(1)


def _p_sample(original, rng, _):
    def p_sample(self, fused, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None):
        _checked(x, t, cond_fn)
        known = fused["p_mean_variance"]
        kinds = _kinds(self, known)
        if cond_fn is not None:
            condition = how(self, "condition_mean", METHODS)
        m, _ = _output(self, known, model, x, t, model_kwargs)
        learned = kinds[1].startswith("LEARNED")
        if denoised_fn is not None:
            denoised, _ = _denoised(self, kinds, x, m, t, denoised_fn)
            m, kinds = torch.cat((denoised, m[:, x.shape[1] :]), dim=1) if learned else denoised, ("START_X", kinds[1])
        noise = {} if rng == "fused" else torch_noise.like(x, m.dtype, torch.float32)
        sample, x0 = _stepped(_step(self, kinds, noisy=True), kinds, x, m, t, clip_denoised, **noise)
        if cond_fn is not None:
            gradient = _gradient(self, condition, cond_fn, x, t, model_kwargs).float()
            sample = step_with(_shift(self, kinds[1]), sample if learned else sample.float(), m, t, learned=learned, noise=gradient)
        return {"sample": sample, "pred_xstart": x0}

    return _as_in(original, p_sample)


def _ddim_sample(original, rng, _):
    def ddim_sample(self, fused, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0):
        _checked(x, t, cond_fn)
        check_eta(eta)
        known = fused["p_mean_variance"]
        kinds = _kinds(self, known)
        if cond_fn is not None:
            condition = how(self, "condition_score", METHODS)
        m, _ = _output(self, known, model, x, t, model_kwargs)
        if denoised_fn is not None:
            m, kinds = _denoised(self, kinds, x, m, t, denoised_fn)
        if cond_fn is not None:
            gradient = _gradient(self, condition, cond_fn, x, t, model_kwargs)
        noise = {}
        if rng != "fused" and eta:
            noise = torch_noise.like(x, m.dtype, torch.float32)
        elif rng != "fused":
            torch_noise.randn_like(x)  # which serves the generator's state alone
        sample, x0 = _stepped(_ddim(self, kinds[0], eta), kinds, x, m, t, clip_denoised, **noise)
        if cond_fn is not None:
            x0 = x0.to(sample.dtype)
            sample, x0 = step_with(_score(self, eta), x0, gradient, t, noise=sample, return_x0=True)
        return {"sample": sample, "pred_xstart": x0}

    return _as_in(original, ddim_sample)


def _as_in(original, sampler):
    """`sampler` with the arguments of `original`: improved-diffusion knows no cond_fn."""
    if "cond_fn" in parameters(original):
        return sampler

    def without_cond_fn(self, fused, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, *rest, **keywords):
        return sampler(self, fused, model, x, t, clip_denoised, denoised_fn, None, model_kwargs, *rest, **keywords)

    return without_cond_fn


_DECODER = CLAMPED_DECODERS[1e-12]


def _check_data(name, x, t):
    check(name, x)
    check_t(t, x)
    if x.dtype not in (torch.float32, torch.float64):
        raise NotCovered(f"{name} is of half precision, in which the library would round")


def _terms_of_bound(self, kinds, m, x0, t, clip, **options):
    learned = kinds[1].startswith("LEARNED")
    clip = 1.0 if clip else None
    return terms_with(_bound(self, kinds), m, x0, t, clip=clip, decoder=_DECODER, learned=learned, **options)


def _vb_terms_bpd(original, rng, _):
    def _vb_terms_bpd(self, fused, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        _check_data("x_start", x_start, t)
        check_like("x_t", x_t, x_start)
        if x_t.dtype != x_start.dtype:
            raise NotCovered("x_t has another dtype than x_start")
        known = fused["p_mean_variance"]
        kinds = _kinds(self, known)
        m, _ = _output(self, known, model, x_t, t, model_kwargs)
        output = _terms_of_bound(self, kinds, m, x_start, t, clip_denoised, x_t=x_t)
        learned, clip = kinds[1].startswith("LEARNED"), 1.0 if clip_denoised else None
        if kinds[0] == "EPSILON":
            x0 = step_with(_x0(self), widened(x_t, m.dtype, torch.float32), m, t, learned=learned, clip=clip)
        else:
            x0 = m[:, : x_t.shape[1]] if learned else m
            x0 = x0.clamp(-1, 1) if clip_denoised else x0
        return {"output": output, "pred_xstart": x0}

    return _vb_terms_bpd


def _training_losses(original, rng, own):
    def training_losses(self, fused, model, x_start, t, model_kwargs=None, noise=None):
        _check_data("x_start", x_start, t)
        known = fused["p_mean_variance"]
        kinds, kind = _kinds(self, known), getattr(self.loss_type, "name", None)
        if kind not in ("MSE", "RESCALED_MSE", "KL", "RESCALED_KL"):
            raise NotCovered(f"the loss {self.loss_type}")
        if ("forwards" in known) != ("forwards" in own):
            raise NotCovered("a network that p_mean_variance wraps and training_losses does not, or the reverse")
        learned, noising = kinds[1].startswith("LEARNED"), noising_of(self)
        if learned and not kind.endswith("KL"):
            check_constant(x_start, noise)
        source: dict[str, Any] = noise_of_loss(x_start, noise, rng)
        x_t = noised_with(noising, x_start, t, **source)
        m, _ = _output(self, known, model, x_t, t, model_kwargs)
        if kind.endswith("KL"):
            weight = self.num_timesteps if kind == "RESCALED_KL" else 1.0
            return {"loss": _terms_of_bound(self, kinds, m, x_start, t, False, x_t=x_t, vlb_weight=weight)}
        if not learned:
            prediction = "epsilon" if kinds[0] == "EPSILON" else "sample"
            mse = loss_with(_squares(self, kinds[0]), m, x_start, t, prediction=prediction, reduction="none", **source)
            return {"mse": mse, "loss": mse}
        weight = self.num_timesteps / 1000.0 if kind == "RESCALED_MSE" else 1.0
        options = {"what": APART, "vlb_weight": weight, "detach_mean": True, **source}
        mse, vb = _terms_of_bound(self, kinds, m, x_start, t, False, **options)
        return {"vb": vb, "mse": mse, "loss": mse + vb}

    return training_losses


def _prior_bpd(original, rng, _):
    def _prior_bpd(self, _, x_start):
        check("x_start", x_start)
        if x_start.dtype != torch.float32:
            raise NotCovered("x_start is not float32")
        return terms_with(_prior(self), x_start, x_start, 0, x_t=x_start)

    return _prior_bpd


def _calc_bpd_loop(original, rng, _):
    def calc_bpd_loop(self, fused, model, x_start, clip_denoised=True, model_kwargs=None):
        check("x_start", x_start)
        if x_start.dtype != torch.float32 or x_start.requires_grad:
            raise NotCovered("x_start is not float32, or asks for its gradient")
        known = fused["p_mean_variance"]
        kinds, clip = _kinds(self, known), 1.0 if clip_denoised else None
        learned, found = kinds[1].startswith("LEARNED"), []
        with torch.no_grad():
            for t in reversed(range(self.num_timesteps)):
                times = torch.full(x_start.shape[:1], t, device=x_start.device)
                noise: dict[str, Any] = {} if rng == "fused" else torch_noise.like(x_start)
                x_t = noised_with(noising_of(self), x_start, times, **noise)
                m, _ = _output(self, known, model, x_t, times, model_kwargs)
                vb, error = _terms_of_bound(self, kinds, m, x_start, t, clip_denoised, x_t=x_t, what=WITH_ERROR)
                if error is None:
                    error = terms_with(
                        _error(self, kinds[0]), m, x_start, t, x_t=x_t, clip=clip, learned=learned, vlb_weight=2.0 * np.log(2.0)
                    )
                found.append((vb, error))
        vb, xstart_mse = (torch.stack(values, dim=1) for values in zip(*found, strict=True))
        # ε read off a predicted x0 is wrong by that prediction's error times √(ᾱ/(1−ᾱ)), whatever x_t is
        by = torch.from_numpy(1.0 / np.square(self.sqrt_recipm1_alphas_cumprod[: self.num_timesteps][::-1])).to(xstart_mse)
        prior = self._prior_bpd(x_start)
        return {
            "total_bpd": vb.sum(dim=1) + prior,
            "prior_bpd": prior,
            "vb": vb,
            "xstart_mse": xstart_mse,
            "mse": xstart_mse * by,
        }

    return calc_bpd_loop


# ---- known code -----------------------------------------------------------------------------------------------------------

# Of repositories that have no versions; what is not theirs alone is in copies of one text.
_OPENAI, _GUIDED, _IMPROVED, _DIT = "guided-diffusion, improved-diffusion", "guided-diffusion", "improved-diffusion", "DiT"
_ALL = f"{_OPENAI}, {_DIT}"
_FORMULAS = "q_posterior_mean_variance", "_predict_xstart_from_eps"
METHODS = {
    "q_sample": Method({"bb689b59d9ad2e76": code(_OPENAI), "877b3f8d48d352b9": code(_DIT)}, _q_sample),
    "q_posterior_mean_variance": Method(
        {"0aa46058ffeddf18": code(_OPENAI), "8d47f1dac2043fbc": code(_DIT)}, _q_posterior_mean_variance
    ),
    "p_mean_variance": Method(
        {
            "45e3c7d7b0db5656": code(_OPENAI),
            "e18cbc7fcb942da2": code(_DIT, dit=True),
            "c25b2fab6dba30c5": code(_ALL, forwards=True),
        },
        _p_mean_variance,
        _FORMULAS,
        ("_scale_timesteps", "_wrap_model", "_predict_xstart_from_xprev"),
    ),
    "p_sample": Method(
        {"b0d5d32ff33aa45a": code(f"{_GUIDED}, {_DIT}"), "58e540cff87334b2": code(_IMPROVED)},
        _p_sample,
        ("p_mean_variance", *_FORMULAS),
        ("condition_mean",),
    ),
    "ddim_sample": Method(
        {"9e30afe3fb7e1048": code(_GUIDED), "818d28d78b3ef082": code(_IMPROVED), "91cedac4e8ecfa20": code(_DIT)},
        _ddim_sample,
        ("p_mean_variance", "_predict_eps_from_xstart", *_FORMULAS),
        ("condition_score",),
    ),
    "training_losses": Method(
        {
            "8d7d0a9edba98b87": code(_OPENAI),
            "b4d21001233e2cb1": code(_DIT),
            "84f89cd1b318d8c7": code(_ALL, forwards=True),
        },
        _training_losses,
        ("_vb_terms_bpd", "p_mean_variance", "q_sample", *_FORMULAS),
        ("_scale_timesteps", "_wrap_model"),
    ),
    "_vb_terms_bpd": Method(
        {"8786e19e7076ae2c": code(_ALL)}, _vb_terms_bpd, ("p_mean_variance", *_FORMULAS), ("_scale_timesteps", "_wrap_model")
    ),
    "_prior_bpd": Method({"d42cb56d4c4cf1f8": code(_ALL)}, _prior_bpd, ("q_mean_variance",)),
    "calc_bpd_loop": Method(
        {"631aaf1dd5bab757": code(_ALL)},
        _calc_bpd_loop,
        ("_vb_terms_bpd", "p_mean_variance", "q_sample", "_predict_eps_from_xstart", *_FORMULAS),
        ("_prior_bpd", "_scale_timesteps", "_wrap_model"),
    ),
    # whose formulas the others have
    "q_mean_variance": Method({"ee2e0a01a02ffe0d": code(_OPENAI), "621fe6d3082ce93f": code(_DIT)}),
    "_predict_xstart_from_eps": Method({"d858846a655f2de4": code(_OPENAI), "a30e0dcda99456f8": code(_DIT)}),
    "_predict_eps_from_xstart": Method({"5257ba3c6be1e782": code(_OPENAI), "fbec5118c3189eee": code(_DIT)}),
    "condition_mean": Method(
        {
            "625a08db028c35de": code(_GUIDED),
            "d0e66abd3a00b068": code(_DIT, dit=True),
            "75cd4421c0e27d38": code(f"{_GUIDED}, {_DIT}", forwards=True),
        },
        calls=("_scale_timesteps", "_wrap_model"),
    ),
    "condition_score": Method(
        {
            "a37b70970ab475c7": code(_GUIDED),
            "e66bc35846d6bbfd": code(_DIT, dit=True),
            "419c03146d53e11e": code(f"{_GUIDED}, {_DIT}", forwards=True),
        },
        fuses=("_predict_eps_from_xstart", *_FORMULAS),
        calls=("_scale_timesteps", "_wrap_model"),
    ),
}
