"""fastgen: the parts of a diffusion or GAN step that are not the network, each one fused kernel.

Forward noising `q_sample`, `q_step`, `q_posterior`; reverse steps `ddpm_step`, `ddim_step`, and the whole chain of them `sample`
(for several chains, `Sampler`); reproducible noise `randn`, torch's own in less time `torch_randn`, and that of a CUDA GPU anywhere
`TorchCudaGenerator`; the training losses `diffusion_loss`, `discriminator_loss`, `generator_loss` and `bce_with_logits` (as a
module, `BCEWithLogitsLoss`); the variational bound of the likelihood `variational_bound`, and its parts `vlb_terms` and `prior_kl`;
an estimate of the likelihood itself `log_likelihood`; the log-probability of a reverse step `step_log_prob`; a variational
autoencoder's sample `reparameterize` and the divergence of two Gaussians `gaussian_kl`; images as bytes `to_uint8`; noise schedules
`Schedule`. `backend`, `use_backend` and `backend_info` say and choose what runs.
"""

from ._core.backends import available_backends, backend, backend_info, use_backend
from ._core.torch_cuda import TorchCudaGenerator
from ._likelihood.log_likelihood import LogLikelihood, log_likelihood
from ._likelihood.variational_bound import VariationalBound, variational_bound
from ._ops.bce_with_logits import BCEWithLogitsLoss, bce_with_logits
from ._ops.ddpm_step import ddim_step, ddpm_step
from ._ops.diffusion_loss import diffusion_loss
from ._ops.gan_loss import discriminator_loss, generator_loss
from ._ops.gaussian_kl import gaussian_kl
from ._ops.prior_kl import prior_kl
from ._ops.q_posterior import q_posterior
from ._ops.q_sample import q_sample, q_step
from ._ops.randn import randn, torch_randn
from ._ops.reparameterize import reparameterize
from ._ops.step_log_prob import step_log_prob
from ._ops.to_uint8 import to_uint8
from ._ops.vlb_terms import vlb_terms
from ._sampling.sampler import Sampler, sample
from .schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "BCEWithLogitsLoss",
    "LogLikelihood",
    "Sampler",
    "Schedule",
    "TorchCudaGenerator",
    "VariationalBound",
    "available_backends",
    "backend",
    "backend_info",
    "bce_with_logits",
    "ddim_step",
    "ddpm_step",
    "diffusion_loss",
    "discriminator_loss",
    "gaussian_kl",
    "generator_loss",
    "log_likelihood",
    "prior_kl",
    "q_posterior",
    "q_sample",
    "q_step",
    "randn",
    "reparameterize",
    "sample",
    "step_log_prob",
    "to_uint8",
    "torch_randn",
    "use_backend",
    "variational_bound",
    "vlb_terms",
]
