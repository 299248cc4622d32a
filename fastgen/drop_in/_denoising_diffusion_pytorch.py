"""The methods of denoising-diffusion-pytorch's `GaussianDiffusion` by fastgen's kernels."""

from __future__ import annotations

import inspect
from random import random

import numpy as np
import torch

from .. import rng as _rng
from .._tables import step_columns
from ..ddpm_step import step_with
from ..diffusion_loss import loss_with
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
    posterior_of,
    widened,
    written_by_the_library,
)
from ._patch import NotCovered

MARKS = "q_posterior", "predict_start_from_noise", "predict_start_from_v", "p_losses"

# objective → fastgen's name, and P and Q of x0 = P·x + Q·m: attributes and their signs
_PREDICTIONS = {
    "pred_noise": ("epsilon", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    "pred_x0": ("sample", "betas", "betas"),  # 0·x + 1·m; of the buffers only the length counts
    "pred_v": ("v_prediction", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
}


def _prediction(self):
    try:
        return _PREDICTIONS[self.objective]
    except (KeyError, TypeError):
        raise NotCovered(f"the objective {self.objective!r}") from None


def _weights(p, q, objective):
    """P and Q as numbers."""
    return (0 * p, 0 * q + 1) if objective == "pred_x0" else (p, -q)


# ---- coefficients ---------------------------------------------------------------------------------------------------------


def _step(self, noisy):
    """Of p_sample, or without noise of p_mean_variance."""
    names = (*_prediction(self)[1:], "posterior_mean_coef1", "posterior_mean_coef2", "posterior_log_variance_clipped")
    return coefficients(self, ("ddpm_step", self.objective, noisy), names, _step_rows, self.objective, noisy)


def _step_rows(p, q, u, v, log_variance, objective, noisy):
    sigma = np.exp(0.5 * log_variance) * noisy
    sigma[0] = 0.0
    return step_columns(*_weights(p, q, objective), u, v, sigma)


def _ddim(self, times):
    """Of ddim_sample: row k is the step from times[k] to times[k+1]."""
    names = (*_prediction(self)[1:], "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "alphas_cumprod")
    eta, double = self.ddim_sampling_eta, self.alphas_cumprod.dtype == torch.float64
    key = ("ddpm_step", self.objective, times, eta)
    return coefficients(self, key, names, _ddim_rows, self.objective, times, eta, double)


def _ddim_rows(p, q, recip, recipm1, alphas_cumprod, objective, times, eta, double):
    p, q, recip, recipm1, alpha = (x[list(times[:-1])] for x in (*_weights(p, q, objective), recip, recipm1, alphas_cumprod))
    return ddim_columns(p, q, recip, recipm1, alpha, np.append(alphas_cumprod, 1.0)[list(times[1:])], eta, double)


def _loss(self):
    names = "sqrt_one_minus_alphas_cumprod", "sqrt_alphas_cumprod", "loss_weight"
    return coefficients(self, ("diffusion_loss", self.objective), names, _loss_rows, self.objective)


def _loss_rows(sigma, scale, weight, objective):
    """The target's factors of x0 and of ε, and the weight."""
    zero, one = 0 * scale, 0 * scale + 1
    factors = {"pred_noise": (zero, one), "pred_x0": (one, zero), "pred_v": (-sigma, scale)}
    return columns(*factors[objective], weight)


def _immiscible(self):
    return getattr(self, "immiscible", False)  # which GaussianDiffusion1D does not know


# ---- methods --------------------------------------------------------------------------------------------------------------


def _q_sample(original, rng):
    @torch.autocast("cuda", enabled=False)
    def q_sample(self, x_start, t, noise=None):
        check("x_start", x_start)
        check_t(t, x_start)
        noising, dtype = noising_of(self), self.sqrt_alphas_cumprod.dtype
        immiscible = _immiscible(self)
        if noise is not None:
            check_like("noise", noise, x_start)
        elif rng == "fused" and not immiscible:
            return noised_with(noising, widened(x_start, dtype), t)
        else:
            noise = torch.randn_like(x_start)
        if immiscible:
            noise = noise[self.noise_assignment(x_start, noise)]
        return noised_with(noising, widened(x_start, dtype, noise.dtype), t, noise=noise)

    return q_sample


def _q_posterior(original, rng):
    def q_posterior(self, x_start, x_t, t):
        check("x_t", x_t)
        check_like("x_start", x_start, x_t)
        check_t(t, x_t)
        dtype = self.posterior_mean_coef1.dtype
        mean, variance, log_variance = posterior_with(posterior_of(self), widened(x_start, dtype), x_t, t)
        return mean, variance.to(dtype), log_variance.to(dtype)

    return q_posterior


def _p_mean_variance(original, rng):
    def p_mean_variance(self, x, t, x_self_cond=None, clip_denoised=True):
        check("x", x)
        check_t(t, x)
        step = _step(self, noisy=False)
        m = self.model(x, t, x_self_cond)
        mean, x_start = _stepped(self, step, x, m, t, clip_denoised)
        shape = x.shape[0], *[1] * (x.dim() - 1)
        variance, log_variance = (
            buffer.gather(0, t).reshape(shape) for buffer in (self.posterior_variance, self.posterior_log_variance_clipped)
        )
        return mean, variance, log_variance, x_start

    return p_mean_variance


def _stepped(self, step, x, m, t, clip, **noise):
    """(y, x0), in the library's dtypes: where the network predicts x0, that has its dtype."""
    clip = 1.0 if clip else None
    y, x0 = step_with(step, widened(x, m.dtype, self.betas.dtype), m, t, clip=clip, return_x0=True, **noise)
    return y, x0.to(m.dtype) if self.objective == "pred_x0" else x0


def _p_sample(original, rng):
    @torch.inference_mode()
    def p_sample(self, x, t, x_self_cond=None):
        check("x", x)
        step = _step(self, noisy=True)
        if type(t) is not int:
            raise NotCovered("t is no int")
        m = self.model(x, torch.full((x.shape[0],), t, device=self.device, dtype=torch.long), x_self_cond)
        if t == 0:
            noise = {"seed": 0}  # which nobody reads
        else:
            noise = {} if rng == "fused" else {"noise": torch.randn_like(x)}
        return _stepped(self, step, x, m, t, True, **noise)

    return p_sample


def _ddim_sample(original, rng):
    tqdm = inspect.unwrap(original).__globals__.get("tqdm")

    @torch.inference_mode()
    def ddim_sample(self, shape, return_all_timesteps=False):
        check_eta(self.ddim_sampling_eta)
        if not callable(tqdm):
            raise NotCovered("a module without the library's tqdm")
        # from T−1 down to −1, which is x0 itself
        times = tuple(reversed(torch.linspace(-1, self.num_timesteps - 1, steps=self.sampling_timesteps + 1).int().tolist()))
        steps = _ddim(self, times)
        img, x_start = torch.randn(shape, device=self.device), None
        imgs = [img]
        for k in tqdm(range(len(times) - 1), desc="sampling loop time step"):
            time = torch.full((shape[0],), times[k], device=self.device, dtype=torch.long)
            m = self.model(img, time, x_start if self.self_condition else None)
            last, noise = times[k + 1] < 0, {}
            if last:
                noise = {"seed": 0}  # which nobody reads
            elif rng != "fused":
                drawn = torch.randn_like(img)  # with eta = 0 too, where it serves the generator's state alone
                noise = {"noise": drawn} if self.ddim_sampling_eta else {}
            img, x_start = _stepped(self, steps, img, m, k, True, **noise)
            if last:
                img = x_start  # equal, but for the dtype of a network that predicts it
            imgs.append(img)
        return self.unnormalize(torch.stack(imgs, dim=1) if return_all_timesteps else img)

    return ddim_sample


def _p_losses(original, rng):
    def p_losses(self, x_start, t, noise=None, offset_noise_strength=None, loss_reduction="mean"):
        check("x_start", x_start)
        check_t(t, x_start)
        prediction, loss = _prediction(self)[0], _loss(self)
        if x_start.dim() != 4 or self.loss_weight.dtype != torch.float32:
            raise NotCovered("x_start has not four dimensions, or loss_weight is not float32")
        if noise is not None:
            check_like("noise", noise, x_start)
            if noise.dtype != x_start.dtype:
                raise NotCovered("noise has another dtype than x_start")
        strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        unseen = rng == "fused" and noise is None and not strength > 0.0 and not _immiscible(self)
        if unseen and written_by_the_library(self, "q_sample", MARKS[0]):
            source = {"seed": _rng.draw_seed(x_start.device)[1]}
            x = noised_with(noising_of(self), widened(x_start, self.sqrt_alphas_cumprod.dtype), t, **source)
        else:
            if noise is None:
                noise = torch.randn_like(x_start)
            if strength > 0.0:
                noise += strength * torch.randn(x_start.shape[:2], device=self.device)[:, :, None, None]  # the caller's, as there
            source = {"noise": noise}
            x = self.q_sample(x_start=x_start, t=t, noise=noise)
        x_self_cond = None
        if self.self_condition and random() < 0.5:
            with torch.no_grad():
                x_self_cond = self.model_predictions(x, t).pred_x_start.detach_()
        m = self.model(x, t, x_self_cond)
        reduction = "none" if loss_reduction == "none" else "mean"
        return loss_with(loss, m, x_start, t, prediction=prediction, reduction=reduction, **source)

    return p_losses


_PREDICTED = "model_predictions", "predict_start_from_noise", "predict_start_from_v"
METHODS = {
    "q_sample": Method(_q_sample, ("x_start, t, noise",)),
    "q_posterior": Method(_q_posterior, ("x_start, x_t, t",)),
    "p_mean_variance": Method(_p_mean_variance, ("x, t, x_self_cond, clip_denoised",), ("q_posterior", *_PREDICTED)),
    "p_sample": Method(_p_sample, ("x, t, x_self_cond",), ("p_mean_variance", "q_posterior", *_PREDICTED)),
    "ddim_sample": Method(_ddim_sample, ("shape, return_all_timesteps",), ("predict_noise_from_start", *_PREDICTED)),
    "p_losses": Method(_p_losses, ("x_start, t, noise, offset_noise_strength, loss_reduction",), ("predict_v",)),
}
