"""An object with the attributes, methods and formulas of guided-diffusion's `GaussianDiffusion`, which has no package to install:
what its adapter is tested on."""

import enum

import numpy as np
import torch

MeanType = enum.Enum("MeanType", "PREVIOUS_X START_X EPSILON")
LossType = enum.Enum("LossType", "MSE RESCALED_MSE KL RESCALED_KL")
VarType = enum.Enum("VarType", "LEARNED FIXED_SMALL FIXED_LARGE LEARNED_RANGE")


def at(array, t, shape):
    """The float32 coefficients of each sample's own t, expanded over it."""
    values = torch.from_numpy(array).to(t.device)[t].float()
    return values.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


def means(x):
    return x.mean(dim=list(range(1, x.dim())))


def divergence(mean, log_variance, other_mean, other_log_variance):
    square = (mean - other_mean) ** 2 * torch.exp(-other_log_variance)
    return 0.5 * (-1.0 + other_log_variance - log_variance + torch.exp(log_variance - other_log_variance) + square)


def log_bins(x, mean, log_sigma):
    """Of 256 values, by an approximation of Φ."""
    cdf = lambda x: 0.5 * (1.0 + torch.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * torch.pow(x, 3))))  # noqa: E731
    above, below = (cdf(torch.exp(-log_sigma) * (x - mean + side / 255.0)) for side in (1.0, -1.0))
    low, high, inner = (torch.log(p.clamp(min=1e-12)) for p in (above, 1.0 - below, above - below))
    return torch.where(x < -0.999, low, torch.where(x > 0.999, high, inner))


def later(t, x):
    """1 where there is noise, 0 at t = 0."""
    return (t != 0).float().reshape(-1, *[1] * (x.dim() - 1))


class GaussianDiffusion:
    def __init__(
        self,
        betas,
        model_mean_type=MeanType.EPSILON,
        model_var_type=VarType.FIXED_SMALL,
        rescale_timesteps=False,
        loss_type=LossType.MSE,
    ):
        self.loss_type = loss_type
        self.model_mean_type, self.model_var_type, self.rescale_timesteps = model_mean_type, model_var_type, rescale_timesteps
        self.betas, self.num_timesteps = betas, len(betas)
        self.alphas_cumprod = a = np.cumprod(1.0 - betas)
        self.alphas_cumprod_prev = previous = np.append(1.0, a[:-1])
        self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod = np.sqrt(a), np.sqrt(1.0 - a)
        self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / a), np.sqrt(1.0 / a - 1)
        self.posterior_variance = v = betas * (1.0 - previous) / (1.0 - a)
        self.posterior_log_variance_clipped = np.log(np.append(v[1], v[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(previous) / (1.0 - a)
        self.posterior_mean_coef2 = (1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - a)

    def _scale_timesteps(self, t):
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def _predict_xstart_from_eps(self, x_t, t, eps):
        recip, recipm1 = (at(c, t, x_t.shape) for c in (self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod))
        return recip * x_t - recipm1 * eps

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        recip, recipm1 = (at(c, t, x_t.shape) for c in (self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod))
        return (recip * x_t - pred_xstart) / recipm1

    def q_sample(self, x_start, t, noise=None):
        if noise is None:
            noise = torch.randn_like(x_start)
        assert noise.shape == x_start.shape
        scale, sigma = (at(c, t, x_start.shape) for c in (self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod))
        return scale * x_start + sigma * noise

    def q_posterior_mean_variance(self, x_start, x_t, t):
        assert x_start.shape == x_t.shape
        u, v = (at(c, t, x_t.shape) for c in (self.posterior_mean_coef1, self.posterior_mean_coef2))
        variances = (at(c, t, x_t.shape) for c in (self.posterior_variance, self.posterior_log_variance_clipped))
        return u * x_start + v * x_t, *variances

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        m = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        if self.model_var_type in (VarType.LEARNED, VarType.LEARNED_RANGE):
            assert m.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:])
            m, log_variance = m.chunk(2, dim=1)
            if self.model_var_type == VarType.LEARNED_RANGE:
                low, high = (at(c, t, x.shape) for c in (self.posterior_log_variance_clipped, np.log(self.betas)))
                share = (log_variance + 1) / 2
                log_variance = share * high + (1 - share) * low
            variance = torch.exp(log_variance)
        elif self.model_var_type == VarType.FIXED_LARGE:
            large = np.append(self.posterior_variance[1], self.betas[1:])
            variance, log_variance = at(large, t, x.shape), at(np.log(large), t, x.shape)
        else:
            variance, log_variance = (at(c, t, x.shape) for c in (self.posterior_variance, self.posterior_log_variance_clipped))

        if self.model_mean_type == MeanType.PREVIOUS_X:
            ratio = self.posterior_mean_coef2 / self.posterior_mean_coef1
            pred = at(1.0 / self.posterior_mean_coef1, t, x.shape) * m - at(ratio, t, x.shape) * x
        elif self.model_mean_type == MeanType.EPSILON:
            pred = self._predict_xstart_from_eps(x, t, m)
        else:
            pred = m
        if denoised_fn is not None:
            pred = denoised_fn(pred)
        if clip_denoised:
            pred = pred.clamp(-1, 1)
        previous = self.model_mean_type == MeanType.PREVIOUS_X
        mean = m if previous else self.q_posterior_mean_variance(x_start=pred, x_t=x, t=t)[0]
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred}

    def q_mean_variance(self, x_start, t):
        mean = at(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
        variance, log_variance = (at(f(1.0 - self.alphas_cumprod), t, x_start.shape) for f in (np.positive, np.log))
        return mean, variance, log_variance

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        kl = divergence(true_mean, true_log_variance, out["mean"], out["log_variance"])
        last = -log_bins(x_start, out["mean"], 0.5 * out["log_variance"])
        kl, last = (means(x) / np.log(2.0) for x in (kl, last))
        return {"output": torch.where(t == 0, last, kl), "pred_xstart": out["pred_xstart"]}

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)
        if self.loss_type in (LossType.KL, LossType.RESCALED_KL):
            loss = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)["output"]
            return {"loss": loss * (self.num_timesteps if self.loss_type == LossType.RESCALED_KL else 1.0)}
        if self.loss_type not in (LossType.MSE, LossType.RESCALED_MSE):
            raise NotImplementedError(self.loss_type)
        m, terms = model(x_t, self._scale_timesteps(t), **(model_kwargs or {})), {}
        if self.model_var_type in (VarType.LEARNED, VarType.LEARNED_RANGE):
            m, v = m.chunk(2, dim=1)
            frozen = torch.cat([m.detach(), v], dim=1)
            terms["vb"] = self._vb_terms_bpd(lambda *_: frozen, x_start, x_t, t, clip_denoised=False)["output"]
            if self.loss_type == LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
        previous = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)[0]
        target = {MeanType.PREVIOUS_X: previous, MeanType.START_X: x_start, MeanType.EPSILON: noise}[self.model_mean_type]
        terms["mse"] = means((target - m) ** 2)
        return {**terms, "loss": sum(terms.values())}

    def _prior_bpd(self, x_start):
        t = torch.full(x_start.shape[:1], self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return means(divergence(mean, log_variance, 0.0, torch.zeros(()))) / np.log(2.0)

    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None):
        found = []
        for i in reversed(range(self.num_timesteps)):
            t, noise = torch.full(x_start.shape[:1], i), torch.randn_like(x_start)
            x_t = self.q_sample(x_start=x_start, t=t, noise=noise)
            with torch.no_grad():
                out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            found.append((out["output"], means((out["pred_xstart"] - x_start) ** 2), means((eps - noise) ** 2)))
        vb, xstart_mse, mse = (torch.stack(values, dim=1) for values in zip(*found, strict=True))
        prior = self._prior_bpd(x_start)
        return {"total_bpd": vb.sum(dim=1) + prior, "prior_bpd": prior, "vb": vb, "xstart_mse": xstart_mse, "mse": mse}

    def condition_mean(self, cond_fn, out, x, t, model_kwargs=None):
        gradient = cond_fn(x, self._scale_timesteps(t), **model_kwargs)
        return out["mean"].float() + out["variance"] * gradient.float()

    def condition_score(self, cond_fn, out, x, t, model_kwargs=None):
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        eps = eps - (1 - at(self.alphas_cumprod, t, x.shape)).sqrt() * cond_fn(x, self._scale_timesteps(t), **model_kwargs)
        pred = self._predict_xstart_from_eps(x, t, eps)
        return {**out, "pred_xstart": pred, "mean": self.q_posterior_mean_variance(pred, x, t)[0]}

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None):
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = torch.randn_like(x)
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs)
        sample = out["mean"] + later(t, x) * torch.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0):
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        pred = out["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, pred)
        alpha, previous = (at(c, t, x.shape) for c in (self.alphas_cumprod, self.alphas_cumprod_prev))
        sigma = eta * torch.sqrt((1 - previous) / (1 - alpha)) * torch.sqrt(1 - alpha / previous)
        noise = torch.randn_like(x)
        mean = pred * torch.sqrt(previous) + torch.sqrt(1 - previous - sigma**2) * eps
        return {"sample": mean + later(t, x) * sigma * noise, "pred_xstart": pred}

    def sample(self, method, model, shape, **options):
        """As p_sample_loop and ddim_sample_loop do."""
        x = torch.randn(*shape)
        for i in reversed(range(self.num_timesteps)):
            with torch.no_grad():
                x = getattr(self, method)(model, x, torch.tensor([i] * shape[0]), **options)["sample"]
        return x


class SpacedDiffusion(GaussianDiffusion):
    """Steps of another process; the network is told that one's timesteps."""

    def __init__(self, timestep_map, betas, **options):
        cumprod = np.cumprod(1.0 - betas)[list(timestep_map)]
        super().__init__(1.0 - cumprod / np.append(1.0, cumprod[:-1]), **options)
        self.timestep_map = timestep_map

    def p_mean_variance(self, model, *args, **kwargs):
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model, *args, **kwargs):
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def condition_mean(self, cond_fn, *args, **kwargs):
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_score(self, cond_fn, *args, **kwargs):
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)

    def _wrap_model(self, model):
        return model if isinstance(model, Wrapped) else Wrapped(model, self.timestep_map)

    def _scale_timesteps(self, t):
        return t


class Extra(GaussianDiffusion):
    """As in DiT, where a network may return a pair, timesteps are never scaled and a learned variance is always within a range."""

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        m = model(x, t, **(model_kwargs or {}))
        m, extra = m if isinstance(m, tuple) else (m, None)
        if self.model_var_type in (VarType.LEARNED, VarType.LEARNED_RANGE):
            m, share = m.chunk(2, dim=1)
            low, high = (at(c, t, x.shape) for c in (self.posterior_log_variance_clipped, np.log(self.betas)))
            log_variance = (share + 1) / 2 * high + (1 - (share + 1) / 2) * low
            variance = torch.exp(log_variance)
        else:
            variance, log_variance = (at(c, t, x.shape) for c in (self.posterior_variance, self.posterior_log_variance_clipped))
        pred = m if self.model_mean_type == MeanType.START_X else self._predict_xstart_from_eps(x, t, m)
        if denoised_fn is not None:
            pred = denoised_fn(pred)
        if clip_denoised:
            pred = pred.clamp(-1, 1)
        mean = self.q_posterior_mean_variance(x_start=pred, x_t=x, t=t)[0]
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred, "extra": extra}

    def condition_mean(self, cond_fn, out, x, t, model_kwargs=None):
        return out["mean"].float() + out["variance"] * cond_fn(x, t, **model_kwargs).float()

    def condition_score(self, cond_fn, out, x, t, model_kwargs=None):
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        eps = eps - (1 - at(self.alphas_cumprod, t, x.shape)).sqrt() * cond_fn(x, t, **model_kwargs)
        pred = self._predict_xstart_from_eps(x, t, eps)
        return {**out, "pred_xstart": pred, "mean": self.q_posterior_mean_variance(pred, x, t)[0]}


class Inpainting(GaussianDiffusion):
    """As in motion-diffusion-model: what the mask covers is kept, inside p_mean_variance."""

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        def painted(x, t, mask, motion):
            return model(x, t) * ~mask + motion * mask

        return super().p_mean_variance(painted, x, t, clip_denoised, denoised_fn, model_kwargs)


class Wrapped:
    def __init__(self, model, timestep_map):
        self.model, self.timestep_map = model, timestep_map

    def __call__(self, x, t, **options):
        return self.model(x, torch.tensor(self.timestep_map)[t], **options)
