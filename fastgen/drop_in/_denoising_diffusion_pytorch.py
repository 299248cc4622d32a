"""The methods of denoising-diffusion-pytorch's `GaussianDiffusion` and `GaussianDiffusion1D` by fastgen's kernels."""

from __future__ import annotations

import inspect
from random import random
from typing import Any

import numpy as np
import torch

from .._core import rng as _rng
from .._core import torch_noise
from .._core.tables import step_columns
from .._ops.ddpm_step import step_with
from .._ops.diffusion_loss import loss_with
from .._ops.q_posterior import posterior_with
from .._ops.q_sample import noised_with
from .._ops.vlb_terms import CLAMPED_DECODERS, WITH_SIMPLE, terms_with
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
    how,
    knows,
    noise_of_loss,
    noising_of,
    parameters,
    posterior_of,
    widened,
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
    """The coefficients of x and of the model's output in x0."""
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


def _ddim(self, times, rederived):
    """Of ddim_sample: row k is the step from times[k] to times[k+1]."""
    names = (*_prediction(self)[1:], "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "alphas_cumprod")
    eta, rederived = self.ddim_sampling_eta, rederived or self.objective != "pred_noise"
    key = ("ddpm_step", self.objective, times, eta, rederived)
    return coefficients(self, key, names, _ddim_rows, self.objective, times, eta, rederived)


def _ddim_rows(p, q, recip, recipm1, alphas_cumprod, objective, times, eta, rederived):
    p, q, recip, recipm1, alpha = (x[list(times[:-1])] for x in (*_weights(p, q, objective), recip, recipm1, alphas_cumprod))
    return ddim_columns(p, q, recip, recipm1, alpha, np.append(alphas_cumprod, 1.0)[list(times[1:])], eta, rederived)


def _loss(self):
    names = "sqrt_one_minus_alphas_cumprod", "sqrt_alphas_cumprod", "loss_weight"
    return coefficients(self, ("diffusion_loss", self.objective), names, _loss_rows, self.objective)


def _loss_rows(sigma, scale, weight, objective):
    """The target's factors of x0 and of ε, and the weight."""
    zero, one = 0 * scale, 0 * scale + 1
    factors = {"pred_noise": (zero, one), "pred_x0": (one, zero), "pred_v": (-sigma, scale)}
    return columns(*factors[objective], weight)


def _bound(self):
    """Of LearnedGaussianDiffusion, whose network predicts ε and where between log β̃ and log β log σ² is."""
    names = ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
    names = (*names, "posterior_mean_coef1", "posterior_log_variance_clipped", "betas")
    return coefficients(self, ("vlb_terms",), names, _bound_rows)


def _bound_rows(recip, recipm1, scale, sigma, u, low, betas):
    high = np.log(betas)
    return bound_columns(scale, sigma, recip, -recipm1, u, low, (high - low) / 2, (high + low) / 2, True, "noise")


# ---- methods --------------------------------------------------------------------------------------------------------------


def _network(self, known, x, t, x_self_cond, options=None):
    """What the network says, asked as model_predictions does: `condition` is the keyword of x_self_cond, where it has one."""
    if "condition" not in known:
        return self.model(x, t, x_self_cond)
    options = dict(options or {})
    if x_self_cond is not None:
        options[known["condition"]] = x_self_cond
    return self.model(x, t, **options)


def _q_sample(original, rng, known):
    may_assign = known.get("immiscible", False)

    @torch.autocast("cuda", enabled=False)
    def q_sample(self, _, x_start, t, noise=None):
        check("x_start", x_start)
        check_t(t, x_start)
        noising, dtype = noising_of(self), self.sqrt_alphas_cumprod.dtype
        immiscible = may_assign and self.immiscible
        if noise is not None:
            check_like("noise", noise, x_start)
        elif rng == "fused" and not immiscible:
            return noised_with(noising, widened(x_start, dtype), t)
        else:
            noise = torch_noise.randn_like(x_start)
        if immiscible:
            noise = noise[self.noise_assignment(x_start, noise)]
        return noised_with(noising, widened(x_start, dtype, noise.dtype), t, noise=noise)

    return q_sample


def _q_posterior(original, rng, _):
    def q_posterior(self, _, x_start, x_t, t):
        check("x_t", x_t)
        check_like("x_start", x_start, x_t)
        check_t(t, x_t)
        dtype = self.posterior_mean_coef1.dtype
        mean, variance, log_variance = posterior_with(posterior_of(self), widened(x_start, dtype), x_t, t)
        return mean, variance.to(dtype), log_variance.to(dtype)

    return q_posterior


def _p_mean_variance(original, rng, known):
    learned = "learned" in known  # which p_losses alone has
    strict = "strict" in known  # about the network's arguments, which they pass to model_predictions

    def p_mean_variance(self, fused, x, t, x_self_cond=None, clip_denoised=True, model_forward_kwargs=None):
        check("x", x)
        check_t(t, x)
        if learned:
            raise NotCovered("a learned variance")
        if strict and (x_self_cond is not None or model_forward_kwargs):
            raise NotCovered("what the network is given besides x and t")
        step = _step(self, noisy=False)
        m = _network(self, fused["model_predictions"], x, t, x_self_cond, model_forward_kwargs)
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


def _p_sample(original, rng, known):
    @known.get("mode", torch.no_grad)()
    def p_sample(self, fused, x, t, x_self_cond=None, clip_denoised=True, model_forward_kwargs=None):
        check("x", x)
        if "learned" in fused["p_mean_variance"]:
            raise NotCovered("a learned variance")
        step = _step(self, noisy=True)
        if type(t) is not int:
            raise NotCovered("t is no int")
        if "strict" in fused["p_mean_variance"] and (x_self_cond is not None or model_forward_kwargs):
            raise NotCovered("what the network is given besides x and t")
        times = torch.full((x.shape[0],), t, device=x.device, dtype=torch.long)
        m = _network(self, fused["model_predictions"], x, times, x_self_cond, model_forward_kwargs)
        if t == 0:
            noise = {"seed": 0}  # which nobody reads
        else:
            noise = {} if rng == "fused" else torch_noise.like(x, m.dtype, self.betas.dtype)
        return _stepped(self, step, x, m, t, clip_denoised, **noise)

    return p_sample


def _ddim_sample(original, rng, known):
    tqdm, rederived = inspect.unwrap(original).__globals__.get("tqdm"), known.get("rederived", False)

    def images(self, fused, shape, clip, options):
        """From noise to x0: the images of every step."""
        check_eta(self.ddim_sampling_eta)
        if not callable(tqdm):
            raise NotCovered("a module without the library's tqdm")
        progress: Any = tqdm
        # from T−1 down to −1, which is x0 itself
        times = tuple(reversed(torch.linspace(-1, self.num_timesteps - 1, steps=self.sampling_timesteps + 1).int().tolist()))
        steps = _ddim(self, times, rederived)
        img, x_start = torch_noise.randn(shape, None, torch.get_default_dtype(), self.betas.device), None
        yield img
        for k in progress(range(len(times) - 1), desc="sampling loop time step"):
            time = torch.full((shape[0],), times[k], device=img.device, dtype=torch.long)
            m = _network(self, fused["model_predictions"], img, time, x_start if self.self_condition else None, options)
            last, noise = times[k + 1] < 0, {}
            if last:
                noise = {"seed": 0}  # which nobody reads
            elif rng != "fused" and self.ddim_sampling_eta:
                noise = torch_noise.like(img, m.dtype, self.betas.dtype)
            elif rng != "fused":
                torch_noise.randn_like(img)  # which serves the generator's state alone
            img, x_start = _stepped(self, steps, img, m, k, clip, **noise)
            if last:
                img = x_start  # equal, but for the dtype of a network that predicts it
            yield img

    @known.get("mode", torch.no_grad)()
    def ddim_sample(self, fused, shape, return_all_timesteps=False):
        imgs = (
            list(images(self, fused, shape, True, None))
            if return_all_timesteps
            else [_last(images(self, fused, shape, True, None))]
        )
        return self.unnormalize(torch.stack(imgs, dim=1) if return_all_timesteps else imgs[0])

    @torch.no_grad()
    def ddim_sample_1d(self, fused, shape, clip_denoised=True, model_forward_kwargs=None, return_noise=False):
        if return_noise:
            raise NotCovered("return_noise")
        return self.unnormalize(_last(images(self, fused, shape, clip_denoised, model_forward_kwargs)))

    return ddim_sample_1d if "clip_denoised" in parameters(original) else ddim_sample


def _last(values):
    for value in values:  # noqa: B007
        pass
    return value


def _p_losses(original, rng, known):
    if "learned" in known:
        return _learned_p_losses(original, rng, known)
    dimensions = known.get("dimensions")

    def p_losses(
        self, x_start, t, noise=None, offset_noise_strength=None, model_forward_kwargs=None, unreduced=False, loss_reduction="mean"
    ):
        check("x_start", x_start)
        check_t(t, x_start)
        prediction, loss = _prediction(self)[0], _loss(self)
        if self.loss_weight.dtype != torch.float32 or unreduced:
            raise NotCovered("loss_weight is not float32, or a loss without any mean")
        if dimensions is not None and x_start.dim() != dimensions:
            raise NotCovered(f"x_start has not {dimensions} dimensions")
        if noise is not None:
            check_like("noise", noise, x_start)
            if noise.dtype != x_start.dtype:
                raise NotCovered("noise has another dtype than x_start")
        if self.self_condition and "inference" in known:
            raise NotCovered("self-conditioning on a tensor of inference mode")
        strength = 0.0
        if "offset" in known:
            strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        unseen = rng == "fused" and noise is None and not strength > 0.0 and not getattr(self, "immiscible", False)
        if unseen and knows(self, "q_sample", METHODS):
            source: dict[str, Any] = {"seed": _rng.drawn_seed(x_start.device)}
            x = noised_with(noising_of(self), widened(x_start, self.sqrt_alphas_cumprod.dtype), t, **source)
        else:
            if noise is None:
                noise = torch_noise.randn_like(x_start)
            if strength > 0.0:
                noise += strength * torch.randn(x_start.shape[:2], device=self.device)[:, :, None, None]  # the caller's, as there
            source = {"noise": noise}
            x = self.q_sample(x_start=x_start, t=t, noise=noise)
        x_self_cond, options = None, dict(model_forward_kwargs or {})
        if self.self_condition and random() < 0.5:
            with torch.no_grad():
                given = {"model_forward_kwargs": options} if "given" in known else {}
                x_self_cond = self.model_predictions(x, t, **given).pred_x_start.detach_()
        m = _network(self, known, x, t, x_self_cond, options)
        reduction = "none" if loss_reduction == "none" else "mean"
        return loss_with(loss, m, x_start, t, prediction=prediction, reduction=reduction, **source)

    def p_losses_1d(self, _, x_start, t, noise=None, model_forward_kwargs=None, return_reduced_loss=True, loss_reduction="mean"):
        return p_losses(self, x_start, t, noise, None, model_forward_kwargs, not return_reduced_loss, loss_reduction)

    def p_losses_2d(self, _, x_start, t, noise=None, offset_noise_strength=None, loss_reduction="mean"):
        return p_losses(self, x_start, t, noise, offset_noise_strength, loss_reduction=loss_reduction)

    return p_losses_2d if "offset" in known else p_losses_1d


def _learned_p_losses(original, rng, known):
    def p_losses(self, _, x_start, t, noise=None, clip_denoised=False, loss_reduction="mean"):
        check("x_start", x_start)
        check_t(t, x_start)
        if not all("learned" in how(self, name, METHODS) or name != "p_mean_variance" for name in _LEARNED_FUSES):
            raise NotCovered("the variance is not LearnedGaussianDiffusion's")
        if x_start.dtype != torch.float32 or self.betas.dtype != torch.float32:
            raise NotCovered("x_start or the buffers are not float32")
        if not isinstance(self.vb_loss_weight, (int, float)) or getattr(self, "immiscible", False):
            # of immiscible diffusion, x_t has the noise in another order than what is to be predicted
            raise NotCovered("vb_loss_weight is no number, or immiscible diffusion")
        check_constant(x_start, noise)
        noising, bound = noising_of(self), _bound(self)
        source: dict[str, Any] = noise_of_loss(x_start, noise, rng)
        x_t = noised_with(noising, x_start, t, **source)
        m = self.model(x_t, t)
        clip = 1.0 if clip_denoised else None
        options = {"what": WITH_SIMPLE, "vlb_weight": self.vb_loss_weight, "detach_mean": True, **source}
        reduction = "none" if loss_reduction == "none" else "mean"
        decoder = CLAMPED_DECODERS[1e-15]
        return terms_with(bound, m, x_start, t, clip=clip, decoder=decoder, learned=True, reduction=reduction, **options)

    return p_losses


_LEARNED_FUSES = "q_sample", "q_posterior", "p_mean_variance", "predict_start_from_noise"


# ---- known code -----------------------------------------------------------------------------------------------------------

_PREDICTED = "model_predictions", "predict_start_from_noise", "predict_start_from_v"
_ONE, _LEARNED = "GaussianDiffusion1D", "LearnedGaussianDiffusion"
_INFERENCE = torch.inference_mode
METHODS = {
    "q_sample": Method(
        {
            "9e134fed5e462972": code("1.0.0 … 1.6.4"),
            "cbd666f4dc14ff69": code("1.7.7 … 2.0.9"),
            "93eac0149d12fc40": code("2.0.18 … 2.3.4", immiscible=True),
            "2bac35ab332aeb3e": code(f"{_ONE} 2.0.18 … 2.3.4"),
        },
        _q_sample,
        calls=("noise_assignment",),
    ),
    "q_posterior": Method({"db5f2381030e8d7e": code("1.0.0 … 2.3.4")}, _q_posterior),
    "p_mean_variance": Method(
        {
            "2966f001f5296565": code(f"1.0.0 … 2.3.4, {_ONE} 1.0.0 … 2.2.0"),
            "649ebb77344d631c": code(f"{_ONE} 2.2.3 … 2.3.2", strict=True),
            "3ba3869b405843cb": code(f"{_ONE} 2.3.4"),
            "ec11134a89de03ab": code(f"{_LEARNED} 1.5.8 … 2.3.4", learned=True),
        },
        _p_mean_variance,
        ("q_posterior", *_PREDICTED),
        ("model", "predict_noise_from_start"),  # of which nothing is left where x0 alone counts
    ),
    "p_sample": Method(
        {
            "289113da4b14071b": code("1.0.0"),
            "60e834bd2326004f": code("1.0.7 … 1.5.8"),
            "9a352a8e4f87ed1d": code("1.6.4"),
            "a1c2b82c732dd3dc": code("1.7.7 … 2.3.4", mode=_INFERENCE),
            "a842d8deef685217": code(f"{_ONE} 1.0.7 … 2.2.0"),
            "2c09c012448885ce": code(f"{_ONE} 2.2.3 … 2.3.4"),
        },
        _p_sample,
        ("p_mean_variance", "q_posterior", *_PREDICTED),
        ("model", "device", "predict_noise_from_start"),
    ),
    "ddim_sample": Method(
        {
            "fa14892d1239906d": code("1.1.1 … 1.2.2"),
            "3df24e510870a964": code("1.4.6 … 1.5.8", rederived=True),
            "67ca321a1eec6ab0": code("1.6.4", rederived=True),
            "f4d8bb0a82458910": code("1.7.7 … 2.3.4", rederived=True, mode=_INFERENCE),
            "0da97a09a6463e90": code(f"{_ONE} 1.0.7 … 2.2.0"),
            "c4f52f2420f24057": code(f"{_ONE} 2.2.3 … 2.3.4"),
        },
        _ddim_sample,
        ("predict_noise_from_start", *_PREDICTED),
        ("model", "device", "unnormalize"),
    ),
    "p_losses": Method(
        {
            "ee5769485f0a3dd4": code("1.6.4", offset=True, dimensions=4),
            "a987d447a3e18096": code("1.7.7 … 1.8.7", offset=True, dimensions=4, inference=True),
            "ae8599943f3c166d": code("1.8.15", offset=True, dimensions=4, inference=True),
            "bb34dbc18ed5c651": code("1.9.6 … 2.2.6", offset=True, dimensions=4),
            "eb7f702bbac8b1a3": code("2.3.0 … 2.3.4", offset=True, dimensions=4),
            "9745f4cbe080aa9f": code(f"{_LEARNED} 2.3.0 … 2.3.4", learned=True),  # from 1.6.4 on it used an F that was not there
            "31847274c84bc6dd": code(f"{_ONE} 1.6.4 … 1.8.7", dimensions=3),
            "719786508e0cfa5b": code(f"{_ONE} 1.8.15 … 2.1.1", dimensions=3),
            "b3da8c7479470701": code(f"{_ONE} 2.2.0", condition="self_cond"),
            "0e45bc77747e3002": code(f"{_ONE} 2.2.3", condition="self_cond"),
            "cf44fc8001fdf2bf": code(f"{_ONE} 2.2.6", condition="self_cond"),
            "13bb231fa6aa9a42": code(f"{_ONE} 2.3.0 … 2.3.2", condition="self_cond"),
            "13ee88fea624d8e3": code(f"{_ONE} 2.3.4", condition="x_self_cond", given=True),
        },
        _p_losses,
        ("predict_v",),
        ("model", "device", "q_sample", "model_predictions"),
    ),
    # whose formulas the others have
    "model_predictions": Method(
        {
            "d149f9fbb1260e77": code("1.0.0 … 1.2.2"),
            "4d9df5f3f2b8b255": code(f"1.4.6 … 2.3.4, {_ONE} 1.4.6 … 2.2.0"),
            "7b7b84853dd881d1": code(f"{_ONE} 2.2.3 … 2.3.2", condition="self_cond"),
            "6a8f6c268e560797": code(f"{_ONE} 2.3.4", condition="x_self_cond"),
        },
        fuses=("predict_start_from_noise", "predict_start_from_v", "predict_noise_from_start"),
        calls=("model",),
    ),
    "predict_start_from_noise": Method({"463d25f34ff0b607": code("1.0.0 … 2.3.4")}),
    "predict_start_from_v": Method({"4b91767121088144": code("1.0.0 … 2.3.4")}),
    "predict_noise_from_start": Method({"e35a9c727f7a38eb": code("1.0.0 … 2.3.4")}),
    "predict_v": Method({"9eab0c8126054ad2": code("1.0.0 … 2.3.4")}),
}
