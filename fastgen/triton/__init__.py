"""The Triton backend: the ops of the compiled libraries, by the same names and with the same arguments; but for the CPU's own.

Imported where the backend is first used, since it imports Triton. What a tracer (torch.compile, make_fx, …) looks at
calls `torch.ops.fastgen_triton.<op>`, each a `torch.library.triton_op`, so that Inductor sees the kernels; else the function that
is the op is called directly, which saves some 30 µs.
"""

from __future__ import annotations

import torch

from .._core import dispatch
from . import bce_with_logits, ddpm_step, diffusion_loss, gan_loss, q_posterior, q_sample, randn
from .common.direct import Direct
from .common.op import INTERPRETED

# name of the op: (the function, the arguments that it writes to)
FUNCTIONS = {
    "bce_with_logits": (bce_with_logits.bce_with_logits, ()),
    "bce_with_logits_wide": (bce_with_logits.bce_with_logits_wide, ()),
    "bce_with_logits_backward": (bce_with_logits.bce_with_logits_backward, ()),
    "gan_loss": (gan_loss.gan_loss, ()),
    "gan_loss_backward": (gan_loss.gan_loss_backward, ()),
    "q_sample": (q_sample.q_sample, ()),
    "q_step": (q_sample.q_sample, ()),
    "q_sample_out": (q_sample.q_sample_out, ("out",)),
    "q_step_out": (q_sample.q_sample_out, ("out",)),
    "q_posterior": (q_posterior.q_posterior, ()),
    "ddpm_step": (ddpm_step.ddpm_step, ()),
    "ddim_step": (ddpm_step.ddpm_step, ()),
    "ddpm_step_x0": (ddpm_step.ddpm_step_x0, ()),
    "ddim_step_x0": (ddpm_step.ddpm_step_x0, ()),
    "ddpm_step_out": (ddpm_step.ddpm_step_out, ("x0", "out")),
    "ddim_step_out": (ddpm_step.ddpm_step_out, ("x0", "out")),
    "randn": (randn.randn, ("out",)),
    "diffusion_loss": (diffusion_loss.diffusion_loss, ()),
    "diffusion_loss_backward": (diffusion_loss.diffusion_loss_backward, ()),
    "diffusion_loss_backward_x0": (diffusion_loss.diffusion_loss_backward_x0, ()),
}


def _registered(name, function, written):
    full_name = f"fastgen_triton::{name}"
    if not INTERPRETED:
        return torch.library.triton_op(full_name, function, mutates_args=written)
    # the interpreter's kernels take no symbolic sizes, so a tracer may not look inside
    made = torch.library.custom_op(full_name, function, mutates_args=written)
    made.register_fake(dispatch.FAKES[name] if not written else lambda *arguments, **keywords: None)
    return made


_REGISTERED = {name: _registered(name, *rest) for name, rest in FUNCTIONS.items()}
_TRACED = {name: getattr(torch.ops.fastgen_triton, name).default for name in FUNCTIONS}


_CALLED = {name: function if INTERPRETED else Direct(function) for name, (function, _) in FUNCTIONS.items()}


def op(name):
    return _TRACED[name] if dispatch.traced() else _CALLED[name]


dispatch.BACKENDS["triton"] = op
