"""The losses of a GAN's discriminator and generator: public functions, eager reference, fakes, autograd."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args, overload

import torch

from .._core import checks, declared, dispatch
from .bce_with_logits import REDUCTIONS, Reduction, slope, split

Operands = declared.OPERANDS["gan_loss"]
Kind = Literal["non_saturating", "minimax"]
KINDS = get_args(Kind)
Logits = torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...]
Losses = torch.Tensor | list[torch.Tensor]  # of the single logits, as those came
DISCRIMINATOR, NON_SATURATING, MINIMAX = range(3)  # as the compiled op counts them


class DiscriminatorMonitors(NamedTuple):
    """Of one batch, without smoothing; scalars on the logits' device, without gradient. Of several scales, the mean over them."""

    real_probability: torch.Tensor  # mean D(x)
    fake_probability: torch.Tensor  # mean D(G(z))
    accuracy: torch.Tensor  # the mean of the share of real logits > 0 and that of fake ones < 0; a logit of 0 counts ½
    value: torch.Tensor  # V(D, G) = mean log D(x) + mean log(1 − D(G(z))), at the best D an estimate of 2·JSD − log 4


class GeneratorMonitors(NamedTuple):
    """What the fake logits alone tell, as in `DiscriminatorMonitors`."""

    fake_probability: torch.Tensor
    accuracy: torch.Tensor  # the discriminator's, on the fake logits


@overload
def discriminator_loss(
    real_logits: Logits,
    fake_logits: Logits,
    *,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    monitors: Literal[False] = False,
) -> torch.Tensor: ...
@overload
def discriminator_loss(
    real_logits: Logits,
    fake_logits: Logits,
    *,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    monitors: Literal[True],
) -> tuple[torch.Tensor, DiscriminatorMonitors]: ...
@overload
def discriminator_loss(
    real_logits: Logits,
    fake_logits: Logits,
    *,
    label_smoothing: float = 0.0,
    reduction: Literal["none"],
    monitors: Literal[False] = False,
) -> tuple[Losses, Losses]: ...
@overload
def discriminator_loss(
    real_logits: Logits,
    fake_logits: Logits,
    *,
    label_smoothing: float = 0.0,
    reduction: Literal["none"],
    monitors: Literal[True],
) -> tuple[tuple[Losses, Losses], DiscriminatorMonitors]: ...
def discriminator_loss(
    real_logits: Logits,
    fake_logits: Logits,
    *,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    monitors: bool = False,
) -> torch.Tensor | tuple[Losses, Losses] | tuple[torch.Tensor | tuple[Losses, Losses], DiscriminatorMonitors]:
    """The discriminator's loss, with D = σ(logit), from the logits alone:

        L = mean −log D(x) + mean −log(1 − D(G(z))) = mean softplus(−real) + mean softplus(fake)

    With label smoothing s the target of real samples is 1 − s, that of fake ones stays 0 (one-sided):
    mean (1 − s)·softplus(−real) + s·softplus(real) + mean softplus(fake).

    Args:
        real_logits: any shape, float16, bfloat16, float32 or float64; or a list of such tensors, of a discriminator of several
            scales. The loss is then the sum over the scales, each with its own mean, as pix2pixHD and HiFi-GAN take it.
        fake_logits: likewise; shapes, dtypes and numbers of scales may differ from those of real_logits, the device may not.
        label_smoothing: s, with 0 ≤ s < 1; at 1 real samples would be called fake.
        reduction: "mean", "sum" or "none".
        monitors: return (loss, DiscriminatorMonitors), from the same pass and without a synchronisation.

    Returns a float32 scalar, float64 if any logits are (not rounded to half precision: in bfloat16 a loss of 1.386 is 1.383 or
    1.391); for "none" the pair (losses of real_logits, losses of fake_logits), each as its logits, several in a list, made by
    plain PyTorch. The mean of nothing is NaN. At a discriminator that is always right, however sure, the loss is 0, and where it
    is infinitely wrong infinite; NaN in a logit reaches the loss and its monitors, the accuracy too.
    One launch for up to 32 tensors, one more for every 32 others (Triton: one for each, and one that adds them up). Logits that lie
    in memory without gaps are read in place, whatever their order. Terms are added in float32 within 1024 of them and in float64
    beyond, over fixed blocks: the same bits on every run, for any number of threads. Twice differentiable; forward-mode
    derivatives and torch.func take the decomposed path.

    Raises TypeError for wrong types or dtypes, ValueError for devices, empty lists and options.

    Source: Goodfellow et al. 2014, Algorithm 1; for the smoothing Salimans et al. 2016, section 3.4. Equations (2.1) … (2.6) of
    the lecture note; what follows (2.6) there lacks a factor in its last line: for the best D, V is 2·JSD(p_data‖p_g) − log 4.
    """
    if type(label_smoothing) is float and 0.0 <= label_smoothing < 1.0:
        real, fake = _listed(real_logits), _listed(fake_logits)
        if real and fake:
            made = _fast(real + fake, len(real), DISCRIMINATOR, label_smoothing, reduction, monitors)
            if made is not None:
                return made if not monitors else (made[0], DiscriminatorMonitors(*made[1].unbind()))
    real, fake = _checked("real_logits", real_logits), _checked("fake_logits", fake_logits)
    _one_device("fake_logits", fake, "real_logits", real)
    smoothing = checks.number("label_smoothing", label_smoothing, low=0.0)
    if smoothing >= 1.0:
        raise ValueError(f"label_smoothing: expected a number s with 0 ≤ s < 1, got {label_smoothing!r}")
    loss, made = _general(real + fake, len(real), DISCRIMINATOR, smoothing, reduction, monitors)
    if reduction == "none":
        loss = _like(real_logits, loss[: len(real)]), _like(fake_logits, loss[len(real) :])
    return (loss, DiscriminatorMonitors(*made.unbind())) if monitors else loss


@overload
def generator_loss(
    fake_logits: Logits,
    *,
    kind: Kind = "non_saturating",
    reduction: Literal["mean", "sum"] = "mean",
    monitors: Literal[False] = False,
) -> torch.Tensor: ...
@overload
def generator_loss(
    fake_logits: Logits,
    *,
    kind: Kind = "non_saturating",
    reduction: Literal["mean", "sum"] = "mean",
    monitors: Literal[True],
) -> tuple[torch.Tensor, GeneratorMonitors]: ...
@overload
def generator_loss(
    fake_logits: Logits, *, kind: Kind = "non_saturating", reduction: Literal["none"], monitors: Literal[False] = False
) -> Losses: ...
@overload
def generator_loss(
    fake_logits: Logits, *, kind: Kind = "non_saturating", reduction: Literal["none"], monitors: Literal[True]
) -> tuple[Losses, GeneratorMonitors]: ...
def generator_loss(
    fake_logits: Logits, *, kind: Kind = "non_saturating", reduction: Reduction = "mean", monitors: bool = False
) -> Losses | tuple[Losses, GeneratorMonitors]:
    """The generator's loss, with D = σ(logit):

        "non_saturating": mean −log D(G(z)) = mean softplus(−fake)
        "minimax":        mean log(1 − D(G(z))) = −mean softplus(fake), equation (2.3) of the lecture note

    The second is the one of the theory; the first has the same fixed point and a gradient where the discriminator is sure.

    Args:
        fake_logits: any shape, float16, bfloat16, float32 or float64; or a list of such tensors, one for each scale.
        kind: "non_saturating" or "minimax".
        reduction: "mean", "sum" or "none".
        monitors: return (loss, GeneratorMonitors), from the same pass and without a synchronisation.

    Returns, computes and raises as `discriminator_loss` does; for "none" the losses of fake_logits, as those are.

    Source: Goodfellow et al. 2014, section 3.
    """
    if kind in KINDS:
        fake = _listed(fake_logits)
        if fake:
            made = _fast(fake, 0, 1 + KINDS.index(kind), 0.0, reduction, monitors)
            if made is not None:
                return made if not monitors else (made[0], GeneratorMonitors(*made[1][1:3].unbind()))
    fake = _checked("fake_logits", fake_logits)
    checks.option("kind", kind, KINDS)
    loss, made = _general(fake, 0, 1 + KINDS.index(kind), 0.0, reduction, monitors)
    if reduction == "none":
        loss = _like(fake_logits, loss)
    return (loss, GeneratorMonitors(*made[1:3].unbind())) if monitors else loss


def _listed(logits):
    if isinstance(logits, torch.Tensor):
        return [logits]
    return list(logits) if isinstance(logits, (list, tuple)) else None


def _like(logits, losses):
    """A list of losses as the logits came: a list, or a single tensor."""
    return losses[0] if isinstance(logits, torch.Tensor) else losses


def _checked(name, logits):
    """The tensors, as a list."""
    if not isinstance(logits, (list, tuple)):
        checks.tensor(name, logits)
        return [logits]
    if not logits:
        raise ValueError(f"{name}: expected a tensor or a list of at least one, got an empty {type(logits).__name__}")
    for k, x in enumerate(logits):
        checks.tensor(f"{name}[{k}]", x)
    _one_device(name, logits, name, logits)
    return list(logits)


def _one_device(name, logits, first_name, first):
    for x in logits:
        if x.device != first[0].device:
            raise ValueError(f"{name}: expected tensors on {first[0].device} like {first_name}, got one on {x.device}")


def _fast(logits, real, kind, smoothing, reduction, monitors) -> Any:
    """The compiled op, which checks what memory safety needs: for arguments whose types have not been looked at. None where that
    is not the way, or where it refuses: the checks then find the words."""
    if (reduction != "mean" and reduction != "sum") or (monitors is not False and monitors is not True):
        return None
    op = dispatch.compiled("gan_loss", logits[0])
    if op is None:
        return None
    code = 1 if reduction == "mean" else 2
    try:
        if torch.is_grad_enabled():
            for x in logits:
                if x.requires_grad:
                    return _GanLoss.apply("cpp", (real, kind, smoothing, code), monitors, *dispatch.distinct(logits))
        made = op(logits, real, kind, smoothing, code, monitors, False)
        return made if monitors else made[0]
    except (AttributeError, RuntimeError, TypeError):
        return None


def _general(logits, real, kind, smoothing, reduction, monitors) -> tuple[Any, Any]:
    """(loss, the four monitors or None) of checked tensors, on every backend."""
    checks.option("reduction", reduction, REDUCTIONS)
    if not isinstance(monitors, bool):
        raise TypeError(f"monitors: expected a bool, got {type(monitors).__name__}")
    o = Operands(logits, real, kind, smoothing, REDUCTIONS.index(reduction))
    if reduction == "none":  # nothing to fuse but the monitors
        made = _general([x.detach() for x in logits], real, kind, smoothing, "mean", True)[1] if monitors else None
        return reference(o), made
    backend = dispatch.backend_for(logits[0].device)
    if backend == "eager":
        return reference(o), reference_monitors(o) if monitors else None
    if torch.is_grad_enabled() and any(x.requires_grad for x in logits):
        made = _GanLoss.apply(backend, o[1:], monitors, *dispatch.distinct(logits))
        return made if monitors else (made, None)
    made = dispatch.op("gan_loss", backend)(*o, monitors, False)
    return made[0], made[1] if monitors else None


# ---- eager reference ------------------------------------------------------------------------------------------------------


def reference(o):
    """The kernel in plain PyTorch, differentiable. real: how many of the logits, the first ones, are of real samples; reduction:
    the index in `REDUCTIONS`, 0 giving a list of losses in the dtypes of the logits."""
    sign = -1 if o.kind == MINIMAX else 1
    losses = [sign * _losses(x, target_of(k, o)) for k, x in enumerate(o.logits)]
    if o.reduction == 0:
        return [loss.to(x.dtype) for loss, x in zip(losses, o.logits, strict=True)]
    dtype = result_dtype(o.logits)
    return sum((loss.mean() if o.reduction == 1 else loss.sum()).to(dtype) for loss in losses)


def reference_monitors(o):
    """The four monitors as one tensor, as the kernel returns them."""
    dtype, sides = result_dtype(o.logits), ((o.logits[: o.real], 1), (o.logits[o.real :], -1))
    with torch.no_grad():
        real, fake = ([_monitored(x, sign).to(dtype) for x in side] for side, sign in sides)
        p_fake = torch.stack(fake).mean(0)
        if not real:
            return torch.stack([torch.zeros_like(p_fake[0]), *p_fake])
        p_real = torch.stack(real).mean(0)
        return torch.stack([p_real[0], p_fake[0], (p_real[1] + p_fake[1]) / 2, p_real[2] + p_fake[2]])


def _monitored(x, sign):
    """The means of D, of whether it is right, and of its log-likelihood. sign: 1 where the samples are real, −1 where not."""
    x = x.detach().to(checks.compute_dtype(x.dtype))
    right = torch.where(x.isnan(), x, 0.5 + 0.5 * torch.sign(sign * x))
    return torch.stack([torch.sigmoid(x).mean(), right.mean(), -_losses(x, float(sign > 0)).mean()])


def _losses(x, target):
    """Each logit's loss, in the dtype of the arithmetic."""
    left, size, e = split(x.to(checks.compute_dtype(x.dtype)))
    if target not in (0.0, 1.0):
        return torch.where(left, target * size, (1.0 - target) * size) + torch.log1p(e)
    # hard: no 0·∞
    return torch.where(left if target == 1.0 else ~left, size, 0.0) + torch.log1p(e)


def target_of(k, o):
    """What the discriminator, or with the non-saturating loss the generator, wants to hear of logits k."""
    return 1.0 - o.smoothing if k < o.real else float(o.kind == NON_SATURATING)


def result_dtype(logits):
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


# ---- fakes ----------------------------------------------------------------------------------------------------------------


def refuse(o):
    """What the kernels refuse: under a FakeTensorMode a fake stands in their place."""
    if not o.logits or not 0.0 <= o.smoothing < 1.0:
        raise RuntimeError("expected at least one tensor of logits, and 0 ≤ smoothing < 1")
    dispatch.same_device(*o.logits)
    if any(x.dtype not in checks.FLOATING for x in o.logits):
        raise RuntimeError("expected floating dtypes")


@dispatch.register_fake("gan_loss")
def _fake(o, monitors, gradients):
    refuse(o)
    sizes = ((), (4,)) if monitors else ((),)
    made = [torch.empty(size, dtype=result_dtype(o.logits), device=o.logits[0].device) for size in sizes]
    return made + [empty_like(x) for x in o.logits] if gradients else made


@dispatch.register_fake("gan_loss_backward")
def _fake_backward(gradient, o):
    refuse(o)
    dispatch.same_device(o.logits[0], gradient)
    return [empty_like(x) for x in o.logits]


def empty_like(x):
    """As the kernels allocate: with the strides of a tensor without gaps, else contiguous."""
    if dense(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def dense(x):
    """Whether every element has its own memory, without gaps, in whatever order."""
    step, strides = 1, sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    for stride, size in strides:
        if stride != step and x.numel():
            return False
        step = step * size
    return True


# ---- autograd -------------------------------------------------------------------------------------------------------------


class _GanLoss(torch.autograd.Function):
    """One fused kernel back to all logits: g·factor·(σ(x) − target). On the CPU, where the exponential costs more than memory does,
    the gradients for g = 1 are made in the forward pass already: 8% less time at 2²⁰ + 2²⁰ logits than two kernels take, and one
    call less, 4 µs, at 64 + 64 (AMD EPYC, one core). For another g see `dispatch.multiplied`. Where a second derivative may be
    asked for (create_graph), the same in torch ops, which autograd can follow.

    Of a small loss and its backward (64 + 64 logits, 101 µs in a loop, eager 132) a Function that does nothing takes 67 µs already,
    and x.sum().backward() 54. A node made in C++ would save some of the difference, but there is none to be had: up to torch 2.14.1
    neither the stable ABI (torch/csrc/stable) nor the AOTI shims know autograd nodes."""

    @staticmethod
    def forward(ctx, backend, options, monitors, *logits):
        ctx.save_for_backward(*logits)
        ctx.backend, ctx.options = backend, options
        ahead = dispatch.makes_ahead(backend, logits[0])
        made = dispatch.op("gan_loss", backend)(logits, *options, monitors, ahead)
        ctx.ahead = made[1 + monitors :] if ahead else None
        if not monitors:
            return made[0]
        ctx.mark_non_differentiable(made[1])
        return made[0], made[1]

    @staticmethod
    def backward(ctx, gradient, *_):
        o = Operands(list(ctx.saved_tensors), *ctx.options)
        if torch.is_grad_enabled() or dispatch.batched(gradient):
            return None, None, None, *_gradients(gradient, o)
        ahead, ctx.ahead = ctx.ahead, None  # given away once: the caller may write to them
        if ahead is not None and dispatch.multiplied(ahead, gradient):
            return None, None, None, *ahead
        ahead = None  # their memory, before others are allocated
        return None, None, None, *dispatch.op("gan_loss_backward", ctx.backend)(gradient, *o)


def _gradients(gradient, o):
    sign = -1 if o.kind == MINIMAX else 1
    for k, x in enumerate(o.logits):
        wide = x.to(checks.compute_dtype(x.dtype))
        target = target_of(k, o)
        left, _, e = split(wide)
        scale = sign * gradient.to(wide.dtype)
        yield ((scale / x.numel() if o.reduction == 1 else scale) * slope(left, e, target, 1.0 - target)).to(x.dtype)
