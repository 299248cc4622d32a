"""fastgen: the parts of a diffusion or GAN step that are not the network, each one fused kernel.

Forward noising `q_sample`, `q_step`, `q_posterior`; reverse steps `ddpm_step`, `ddim_step`, and the whole chain of them `sample`
(for several chains, `Sampler`); reproducible noise `randn`; the training losses `diffusion_loss`, `discriminator_loss`,
`generator_loss` and `bce_with_logits` (as a module, `BCEWithLogitsLoss`); noise schedules `Schedule`. `backend`, `use_backend` and
`backend_info` say and choose what runs.
"""

from ._backend import available_backends, backend, backend_info, use_backend
from .bce_with_logits import BCEWithLogitsLoss, bce_with_logits
from .ddpm_step import ddim_step, ddpm_step
from .diffusion_loss import diffusion_loss
from .gan_loss import discriminator_loss, generator_loss
from .q_posterior import q_posterior
from .q_sample import q_sample, q_step
from .randn import randn
from .sample import Sampler, sample
from .schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "BCEWithLogitsLoss",
    "Sampler",
    "Schedule",
    "available_backends",
    "backend",
    "backend_info",
    "bce_with_logits",
    "ddim_step",
    "ddpm_step",
    "diffusion_loss",
    "discriminator_loss",
    "generator_loss",
    "q_posterior",
    "q_sample",
    "q_step",
    "randn",
    "sample",
    "use_backend",
]
