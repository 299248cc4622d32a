"""Binary cross entropy on logits: public function, eager reference, fakes, autograd."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from . import _backend, _checks, _dispatch

REDUCTIONS = ("none", "mean", "sum")


def bce_with_logits(input, target, weight=None, reduction="mean", pos_weight=None):
    """The binary cross entropy between σ(input) and target, of a GAN's discriminator for instance:

        loss = w·(p·y·softplus(−x) + (1 − y)·softplus(x)),   softplus(x) = max(x, 0) + log1p(e^{−|x|})

    with x = input, y = target, w = weight, p = pos_weight; the mean (or the sum, or every value) of it.

    Args:
        input: logits, any shape, float16, bfloat16, float32 or float64.
        target: the shape of input, floating; probabilities within 0 … 1 by convention, which is not checked.
        weight: broadcastable to input, or None.
        reduction: "none", "mean" or "sum".
        pos_weight: broadcastable to input, or None: the weight of positive examples.

    Returns a scalar, or a tensor of input's shape for "none", in the promoted dtype of the tensors. The mean of nothing is NaN.
    Differentiable in input and target, twice; gradients to weight or pos_weight and forward-mode derivatives take the decomposed
    path. Losses are added in float32 within 1024 of them and in float64 beyond, over fixed blocks: the same bits on every run, for
    any number of threads. Half precision computes in float32. The two terms
    are kept apart, so that a tiny loss or gradient of a confident right answer keeps its digits, where
    `torch.nn.functional.binary_cross_entropy_with_logits` in float32 rounds it to 0 from logits of about −17 on.

    Raises TypeError for wrong types or dtypes, ValueError for wrong shapes, devices or options.

    Source: Goodfellow et al. 2014; equation (2.2) of the lecture note with h_θ = σ(x).
    """
    if weight is None and pos_weight is None and reduction in REDUCTIONS:
        op = _dispatch.compiled("bce_with_logits", input)
        if op is not None:  # which checks everything before it writes; in words only where it refuses
            try:
                if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
                    return _BceWithLogits.apply(input, target, None, None, REDUCTIONS.index(reduction))
                return op(input, target, None, None, REDUCTIONS.index(reduction))
            except (AttributeError, RuntimeError, TypeError):
                _check(input, target, reduction)
                raise
    _check(input, target, reduction)
    if weight is not None:
        weight = _broadcast("weight", weight, input)
    if pos_weight is not None:
        pos_weight = _broadcast("pos_weight", pos_weight, input)
    arguments = (input, target, weight, pos_weight, REDUCTIONS.index(reduction))
    if _backend.select_for(input.device) == "eager" or forward_ad._current_level >= 0:
        return reference(*arguments)
    if torch.is_grad_enabled():
        if (weight is not None and weight.requires_grad) or (pos_weight is not None and pos_weight.requires_grad):
            return reference(*arguments)
        if input.requires_grad or target.requires_grad:
            return _BceWithLogits.apply(*arguments)
    return _dispatch.op("bce_with_logits")(*arguments)


def _check(input, target, reduction):
    _checks.tensor("input", input)
    _checks.like("target", target, "input", input)
    _checks.option("reduction", reduction, REDUCTIONS)


def _broadcast(name, w, x):
    """One value, or as many as `x` has, as the kernels read them."""
    _checks.tensor(name, w)
    if w.device != x.device:
        raise ValueError(f"{name}: expected a tensor on {x.device} like input, got one on {w.device}")
    if w.dim() == 0 or w.shape == x.shape:
        return w
    if w.dim() > x.dim() or any(a not in (1, b) for a, b in zip(reversed(w.shape), reversed(x.shape), strict=False)):
        raise ValueError(f"{name}: expected a shape that broadcasts to {tuple(x.shape)}, got {tuple(w.shape)}")
    return w.expand(x.shape)


def _result_dtype(input, target, weight, pos_weight):
    dtype = _checks.result_dtype(input, target)
    for w in (weight, pos_weight):
        if w is not None and w.dim() > 0:  # a scalar does not promote, as in torch
            dtype = torch.promote_types(dtype, w.dtype)
    return dtype


# ---- eager reference ------------------------------------------------------------------------------------------------------


def reference(input, target, weight, pos_weight, reduction):
    """The kernel in plain PyTorch, differentiable in all four. reduction: the index in `REDUCTIONS`."""
    dtype = _result_dtype(input, target, weight, pos_weight)
    x, y, w, p = _computed(dtype, input, target, weight, pos_weight)
    positive, negative = y * _softplus(-x), (1 - y) * _softplus(x)
    loss = negative + (positive if p is None else p * positive)
    loss = loss if w is None else w * loss
    if reduction == 1:
        loss = loss.mean()
    elif reduction == 2:
        loss = loss.sum()
    return loss.to(dtype)


def _softplus(x):
    # beyond 40, log1p(e^x) is x in float64 too; torch's own threshold of 20 is made for float32
    return torch.nn.functional.softplus(x, threshold=40)


def _computed(dtype, *tensors):
    return (None if x is None else x.to(_checks.compute_dtype(dtype)) for x in tensors)


# ---- fakes ----------------------------------------------------------------------------------------------------------------


def _refuse(input, target, weight, pos_weight):
    """What the kernels refuse: under a FakeTensorMode a fake stands in their place."""
    _dispatch.same_device(input, target, weight, pos_weight)
    if target.shape != input.shape or any(w is not None and w.dim() > 0 and w.shape != input.shape for w in (weight, pos_weight)):
        raise RuntimeError("expected tensors of input's shape")
    if any(x is not None and x.dtype not in _checks.FLOATING for x in (input, target, weight, pos_weight)):
        raise RuntimeError("expected floating dtypes")


def _fake(input, target, weight, pos_weight, reduction):
    _refuse(input, target, weight, pos_weight)
    dtype = _result_dtype(input, target, weight, pos_weight)
    return _dispatch.empty_like(input, dtype) if reduction == 0 else torch.empty((), dtype=dtype, device=input.device)


def _fake_backward(gradient, input, target, weight, pos_weight, reduction):
    _dispatch.same_device(input, gradient)
    _refuse(input, target, weight, pos_weight)
    return _dispatch.empty_like(input)


_dispatch.register_fakes(("bce_with_logits",), _fake)
_dispatch.register_fakes(("bce_with_logits_backward",), _fake_backward)


# ---- autograd -------------------------------------------------------------------------------------------------------------


class _BceWithLogits(torch.autograd.Function):
    """One fused kernel back to the input: g·w·((1 − y)·σ(x) − p·y·σ(−x)). Where a second derivative may be asked for
    (create_graph), and for the rare gradient to the target, the same in torch ops, which autograd can follow."""

    @staticmethod
    def forward(ctx, *arguments):
        input, target, weight, pos_weight, reduction = arguments
        ctx.save_for_backward(input, target, weight, pos_weight)
        ctx.reduction = reduction
        return _dispatch.op("bce_with_logits")(*arguments)

    @staticmethod
    def backward(ctx, gradient):
        input, target, weight, pos_weight = ctx.saved_tensors
        to_input = to_target = None
        if ctx.needs_input_grad[0] and not torch.is_grad_enabled():
            arguments = (gradient, input, target, weight, pos_weight, ctx.reduction)
            to_input = _dispatch.op("bce_with_logits_backward")(*arguments)
            if not ctx.needs_input_grad[1]:
                return to_input, None, None, None, None
        x, y, w, p = _computed(_result_dtype(*ctx.saved_tensors), *ctx.saved_tensors)
        g = gradient.to(x.dtype)
        if ctx.reduction == 1:
            g = g / x.numel()
        if w is not None:
            g = g * w
        if ctx.needs_input_grad[0] and to_input is None:
            positive = y * torch.sigmoid(-x)
            to_input = (g * ((1 - y) * torch.sigmoid(x) - (positive if p is None else p * positive))).to(input.dtype)
        if ctx.needs_input_grad[1]:
            slope = -x if p is None else (p - 1) * _softplus(-x) - x
            to_target = (g * slope).to(target.dtype)
        return to_input, to_target, None, None, None
