"""Losses that other code looks up by name: torch.nn's binary cross entropy with logits, torchgan's minimax losses."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import torch
from torch.jit import is_tracing as _is_tracing  # pyright: ignore[reportPrivateImportUsage]  # torch documents it there
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from .._ops.bce_with_logits import BCEWithLogitsLoss, bce_with_logits
from .._ops.gan_loss import discriminator_loss, generator_loss
from ._patch import Patch, fall_through, full_name
from ._source import fingerprint, mark_replacement, replaced_by

_UNROUNDED = (torch.float32, torch.float64)  # in which fastgen's GAN losses have the dtype of the logits
_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))
_OF_PROBABILITIES = (
    "its input is probabilities, in which the sigmoid has rounded away what the kernel computes from: take the Sigmoid off with "
    "fastgen.drop_in.losses.without_sigmoid"
)
_TORCHGAN = {  # fingerprints of the code that the tests have run, of torchgan 0.1.0
    "minimax_generator_loss": "c18021ee5a1f2550",
    "minimax_discriminator_loss": "ff45599c13585959",
}


def patch_bce() -> Patch:
    """Makes `torch.nn.functional.binary_cross_entropy_with_logits` call `fastgen.bce_with_logits`: in force at once, until
    `unpatch()` or the end of a `with` block. `torch.nn.BCEWithLogitsLoss` looks the function up at every call, so modules that
    exist already take it too; code that has imported the function itself (`from torch.nn.functional import …`) keeps torch's.

    Values, gradients, dtypes and classes of errors are torch's, but for the digits that torch loses, which `bce_with_logits` lists.
    What that does not take (size_average and reduce, complex, sparse, tensors of other classes, …) runs torch's
    function, and says so in the log "fastgen.drop_in" at level DEBUG. A compiled program may have either. A program that
    `torch.jit.script`, `torch.jit.trace` or `torch.export` makes has torch's function, which keeps its gradient in it, and can be
    saved and loaded without fastgen.

    Two things keep torch's code, which `skipped` and the line of level INFO say:

    - `binary_cross_entropy`, and so `torch.nn.BCELoss`: a network that ends in a Sigmoid, see `without_sigmoid`. It is not even
      watched for such calls: a function is not replaced only to speak.
    - `binary_cross_entropy_with_logits` itself, where another library's is in its place.
    """
    name, replacements, skipped = "binary_cross_entropy_with_logits", [], {}
    current = _beneath(getattr(functional, name))
    if getattr(current, "__globals__", None) is vars(functional) and not hasattr(current, "__wrapped__"):
        replacements.append((functional, name, _bce))
    else:
        skipped[full_name(functional, name)] = "another one is in the place of torch's"
    skipped[full_name(functional, "binary_cross_entropy")] = _OF_PROBABILITIES
    return Patch(replacements, "functions of torch.nn", skipped)


def patch_torchgan() -> Patch:
    """Makes torchgan's `minimax_generator_loss` and `minimax_discriminator_loss`, and so its `MinimaxGeneratorLoss` and
    `MinimaxDiscriminatorLoss`, run fastgen's kernels: in force at once, until `unpatch()` or the end of a `with` block.

        generator:      mean softplus(−dgz), or −mean softplus(dgz) with nonsaturating=False
        discriminator:  mean (1 − s)·softplus(−dx) + s·softplus(dx), plus mean softplus(dgz);   s = label_smoothing

    One launch each, without tensors of targets, for logits of float32 or float64 and reduction "mean" or "sum"; otherwise one for
    each term, by `fastgen.bce_with_logits`. As in torchgan, dx and dgz have one shape: where they have not, its error is raised.

    A function whose code is not that of torchgan 0.1.0 keeps it, which `skipped` and the line of level INFO say. What
    `torch.jit.script`, `torch.jit.trace` or `torch.export` makes has torchgan's and torch's functions.

    Source: torchgan 0.1.0, torchgan/losses/functional.py.
    """
    from torchgan import losses
    from torchgan.losses import functional as original
    from torchgan.losses import minimax

    replacements, skipped = [], {}
    # the modules that hold the names: where they are written, where the loss classes look them up, and what users import
    for module in (original, minimax, losses):
        for name, make in {"minimax_generator_loss": _generator, "minimax_discriminator_loss": _discriminator}.items():
            if fingerprint(_beneath(getattr(module, name))) == _TORCHGAN[name]:
                replacements.append((module, name, make))
            else:
                skipped[full_name(module, name)] = "its code is not that of torchgan 0.1.0, which the tests have run"
    return Patch(replacements, "names of torchgan's functions", skipped)


def without_sigmoid(network: torch.nn.Sequential, criterion: torch.nn.BCELoss) -> tuple[torch.nn.Sequential, BCEWithLogitsLoss]:
    """A network that ends in a Sigmoid, and the BCELoss of what it says, put on logits: (the network without that layer, the
    `fastgen.BCEWithLogitsLoss` with the criterion's weight and reduction). The losses and the gradients are the same:

        −y·log σ(x) − (1 − y)·log(1 − σ(x)) = y·softplus(−x) + (1 − y)·softplus(x)

    A script is changed in one line; the rest of it runs as it is:

        D = nn.Sequential(nn.Linear(784, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1), nn.Sigmoid())
        criterion = nn.BCELoss()
        D, criterion = fastgen.drop_in.losses.without_sigmoid(D, criterion)

    or, for a module that holds such a network and returns what it gives, reshaped at most:

        D.main, criterion = fastgen.drop_in.losses.without_sigmoid(D.main, criterion)

    Then D gives logits x: what the script prints or compares as a probability is D(…).sigmoid().

    The new network has the very layers of the old one, under the same names: an optimizer, or a state_dict, of either serves both.
    `network` and `criterion` stay as they are.

    Where the numbers differ (torch 2.13 on the CPU, float32): from x = 9 on BCELoss for y = 0 is off by 1e-4 and more (11.991 at
    12), for 1 − σ(x) has few digits left. Beyond x = 16.6 (6.2 in bfloat16) σ(x) is 1 and that loss is 100 instead of x, since
    torch clamps logarithms at −100, with a gradient of 0 instead of 1: a discriminator that is sure of a wrong answer learns
    nothing from it. On the other side the gradient for y = 1 leaves −1 below x = −27.6 (−0.09 at −30), where torch divides by
    1e-12 instead of σ(x)·(1 − σ(x)); below −88 that loss is 100 too. Here it is x and ±1 throughout. Under autocast torch refuses
    BCELoss, and not this one.

    Args:
        network: a `torch.nn.Sequential` whose last layer is a `torch.nn.Sigmoid`, or again such a Sequential; no subclass, whose
            forward might do more, and without hooks on what is taken apart, which would be lost.
        criterion: a `torch.nn.BCELoss`.

    Raises TypeError and ValueError for others. A sigmoid that is called in a network's forward has to be deleted there, and
    `fastgen.BCEWithLogitsLoss` taken in the place of `BCELoss`.
    """
    if type(criterion) is not torch.nn.BCELoss:
        raise TypeError(f"criterion: expected a torch.nn.BCELoss, got {type(criterion).__name__}")
    _refuse_hooks("criterion", criterion)
    on_logits = BCEWithLogitsLoss(criterion.weight, reduction=criterion.reduction)
    return _without_last_sigmoid(network), on_logits.train(criterion.training)


def _without_last_sigmoid(network):
    if type(network) is not torch.nn.Sequential:
        raise TypeError(f"network: expected a torch.nn.Sequential, the Sigmoid its last layer, got {type(network).__name__}")
    layers = OrderedDict(network._modules)  # named_children() leaves out a module that comes a second time
    name, last = layers.popitem() if layers else ("", None)
    if type(last) is torch.nn.Sequential:
        layers[name] = _without_last_sigmoid(last)
    elif type(last) is not torch.nn.Sigmoid:
        raise ValueError(f"network: expected a torch.nn.Sigmoid as its last layer, got {last!r:.200}")
    for module in (network, last):
        _refuse_hooks("network", module)
        if own := [*module._parameters, *module._buffers]:
            raise ValueError(
                f"network: expected no parameters of its own, which would be lost, got {own} on a {type(module).__name__}"
            )
    made = torch.nn.Sequential(layers)
    made.training = network.training  # of itself alone, the layers being those that they were
    return made


def _refuse_hooks(argument, module):
    if any(value for key, value in vars(module).items() if key.endswith("_hooks")):
        raise ValueError(f"{argument}: expected none of the hooks that would be lost, got them on a {type(module).__name__}")


def _beneath(function):
    """What a patch's function has been put in the place of; other functions themselves."""
    original = replaced_by(function)
    return function if original is None else original


def _replacing(original):
    """A decorator: the function is called in the place of `original`, which is what TorchScript compiles."""

    def decorate(function):
        function = functools.wraps(original)(function)
        mark_replacement(function, original)
        function.__prepare_scriptable__ = lambda: original  # pyright: ignore[reportAttributeAccessIssue]  # for torch.jit
        return function

    return decorate


def _bce(original):
    @_replacing(original)
    def binary_cross_entropy_with_logits(
        input, target, weight=None, size_average=None, reduce=None, reduction: Any = "mean", pos_weight=None
    ):
        rest = weight, size_average, reduce, reduction, pos_weight
        overridden = has_torch_function((input, target, weight, pos_weight))
        if size_average is not None or reduce is not None:
            why = "size_average, reduce"
        elif overridden:
            why = "a tensor with a __torch_function__ of its own"
        elif _is_tracing() or torch.compiler.is_exporting():
            why = "torch.jit.trace or torch.export, whose programs hold no autograd function"
        else:
            try:
                return bce_with_logits(input, target, weight, reduction, pos_weight)
            except (TypeError, ValueError) as error:  # refused, before anything ran: let torch decide
                why = str(error)
        if not overridden or torch.compiler.is_dynamo_compiling():
            fall_through("binary_cross_entropy_with_logits", why)
            return original(input, target, *rest)
        # A mode, as that of torch.set_default_device is one, is given this function, which it calls again without itself. The
        # __torch_function__ of a tensor is given torch's, which is what it has in its table, and not by that one's own code, which
        # would pass on what is now under its name.
        function = binary_cross_entropy_with_logits
        if any(type(x) not in _PLAIN for x in (input, target, weight, pos_weight)):
            fall_through("binary_cross_entropy_with_logits", why)
            function = original
        keywords: dict[str, Any] = dict(zip(("weight", "size_average", "reduce", "reduction", "pos_weight"), rest, strict=True))
        return handle_torch_function(function, (input, target, weight, pos_weight), input, target, **keywords)

    return binary_cross_entropy_with_logits


_cross_entropy = _bce(_beneath(functional.binary_cross_entropy_with_logits))


def _generator(original):
    @_replacing(original)
    def minimax_generator_loss(dgz, nonsaturating=True, reduction: Any = "mean"):
        if _fused(dgz, reduction):
            return generator_loss(dgz, kind="non_saturating" if nonsaturating else "minimax", reduction=reduction)
        if nonsaturating:
            return _cross_entropy(dgz, torch.ones_like(dgz), reduction=reduction)
        return -1.0 * _cross_entropy(dgz, torch.zeros_like(dgz), reduction=reduction)

    return minimax_generator_loss


def _discriminator(original):
    @_replacing(original)
    def minimax_discriminator_loss(dx, dgz, label_smoothing=0.0, reduction: Any = "mean"):
        alike = _fused(dgz, reduction) and _fused(dx, reduction) and dx.shape == dgz.shape and dx.dtype == dgz.dtype
        if alike and isinstance(label_smoothing, (int, float)) and 0 <= label_smoothing < 1:
            return discriminator_loss(dx, dgz, label_smoothing=float(label_smoothing), reduction=reduction)
        # torchgan's targets: those of dx have the shape and dtype of dgz, and the other way round
        loss = _cross_entropy(dx, torch.ones_like(dgz) * (1.0 - label_smoothing), reduction=reduction)
        return loss + _cross_entropy(dgz, torch.zeros_like(dx), reduction=reduction)

    return minimax_discriminator_loss


def _fused(logits, reduction):
    """Whether the GAN losses have torch's dtype, and `_cross_entropy` would take no detour."""
    return (
        isinstance(logits, torch.Tensor)
        and logits.dtype in _UNROUNDED
        and logits.layout is torch.strided
        and (reduction == "mean" or reduction == "sum")
        and not has_torch_function((logits,))
        and not _is_tracing()
        and not torch.compiler.is_exporting()
    )
