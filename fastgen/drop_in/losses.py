"""Losses that other code looks up by name: torch.nn's binary cross entropy with logits, torchgan's minimax losses."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional
from torch.overrides import has_torch_function

from ..bce_with_logits import bce_with_logits
from ..gan_loss import discriminator_loss, generator_loss
from ._patch import Patch, fall_through

_UNROUNDED = (torch.float32, torch.float64)  # in which fastgen's GAN losses have the dtype of the logits


def patch_bce() -> Patch:
    """Makes `torch.nn.functional.binary_cross_entropy_with_logits` call `fastgen.bce_with_logits`: in force at once, until
    `unpatch()` or the end of a `with` block. `torch.nn.BCEWithLogitsLoss` looks the function up at every call, so modules that
    exist already take it too; code that has imported the function itself (`from torch.nn.functional import …`) keeps torch's.

    Values, gradients, dtypes and classes of errors are torch's, but for the digits that torch loses, which `bce_with_logits` lists.
    What that does not take (size_average and reduce, complex, sparse, tensors of other classes, …) runs torch's
    function, and says so in the log "fastgen.drop_in" at level DEBUG. A compiled program may have either.
    """
    return Patch([(functional, "binary_cross_entropy_with_logits", _bce)], "functions of torch.nn")


def patch_torchgan() -> Patch:
    """Makes torchgan's `minimax_generator_loss` and `minimax_discriminator_loss`, and so its `MinimaxGeneratorLoss` and
    `MinimaxDiscriminatorLoss`, run fastgen's kernels: in force at once, until `unpatch()` or the end of a `with` block.

        generator:      mean softplus(−dgz), or −mean softplus(dgz) with nonsaturating=False
        discriminator:  mean (1 − s)·softplus(−dx) + s·softplus(dx), plus mean softplus(dgz);   s = label_smoothing

    One launch each, without tensors of targets, for logits of float32 or float64 and reduction "mean" or "sum"; otherwise one for
    each term, by `fastgen.bce_with_logits`. As in torchgan, dx and dgz have one shape: where they have not, its error is raised.

    Source: torchgan 0.1.0, torchgan/losses/functional.py.
    """
    from torchgan import losses
    from torchgan.losses import functional as original
    from torchgan.losses import minimax

    makers = {"minimax_generator_loss": _generator, "minimax_discriminator_loss": _discriminator}
    # the modules that hold the names: where they are written, where the loss classes look them up, and what users import
    replacements = [(module, name, make) for module in (original, minimax, losses) for name, make in makers.items()]
    return Patch(replacements, "functions of torchgan")


def _bce(original):
    @functools.wraps(original)
    def binary_cross_entropy_with_logits(
        input, target, weight=None, size_average=None, reduce=None, reduction="mean", pos_weight=None
    ):
        if size_average is not None or reduce is not None:
            why = "size_average, reduce"
        elif has_torch_function((input, target, weight, pos_weight)):
            why = "a tensor, or a mode, with a __torch_function__ of its own"
        else:
            try:
                return bce_with_logits(input, target, weight, reduction, pos_weight)
            except (TypeError, ValueError) as error:  # refused, before anything ran: let torch decide
                why = str(error)
        fall_through("binary_cross_entropy_with_logits", why)
        return original(input, target, weight, size_average, reduce, reduction, pos_weight)

    return binary_cross_entropy_with_logits


_cross_entropy = _bce(functional.binary_cross_entropy_with_logits)


def _generator(original):
    @functools.wraps(original)
    def minimax_generator_loss(dgz, nonsaturating=True, reduction="mean"):
        if _fused(dgz, reduction):
            return generator_loss(dgz, kind="non_saturating" if nonsaturating else "minimax", reduction=reduction)
        if nonsaturating:
            return _cross_entropy(dgz, torch.ones_like(dgz), reduction=reduction)
        return -1.0 * _cross_entropy(dgz, torch.zeros_like(dgz), reduction=reduction)

    return minimax_generator_loss


def _discriminator(original):
    @functools.wraps(original)
    def minimax_discriminator_loss(dx, dgz, label_smoothing=0.0, reduction="mean"):
        alike = _fused(dgz, reduction) and _fused(dx, reduction) and dx.shape == dgz.shape and dx.dtype == dgz.dtype
        if alike and isinstance(label_smoothing, (int, float)) and 0 <= label_smoothing < 1:
            return discriminator_loss(dx, dgz, label_smoothing=float(label_smoothing), reduction=reduction)
        # torchgan's targets: those of dx have the shape and dtype of dgz, and the other way round
        loss = _cross_entropy(dx, torch.ones_like(dgz) * (1.0 - label_smoothing), reduction=reduction)
        return loss + _cross_entropy(dgz, torch.zeros_like(dx), reduction=reduction)

    return minimax_discriminator_loss


def _fused(logits, reduction):
    """Whether the GAN losses have torch's dtype and take no detour."""
    return (
        isinstance(logits, torch.Tensor)
        and logits.dtype in _UNROUNDED
        and logits.layout is torch.strided
        and (reduction == "mean" or reduction == "sum")
        and not has_torch_function((logits,))
    )
