"""Binary cross entropy on logits: public function, module, eager reference, fakes, autograd."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch

from .._core import checks, declared, dispatch

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = get_args(Reduction)
Operands = declared.OPERANDS["bce_with_logits"]
_BY_WIDE = ("bce_with_logits", "bce_with_logits_wide")  # the second: with a result of float32 in place of half precision
_HALF = frozenset((torch.float16, torch.bfloat16))
_INTEGERS = frozenset((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))


def bce_with_logits(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: Reduction = "mean",
    pos_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The binary cross entropy between σ(input) and target, of a GAN's discriminator for instance:

        loss = w·(p·y·softplus(−x) + (1 − y)·softplus(x)),   softplus(x) = max(x, 0) + log1p(e^{−|x|})

    with x = input, y = target, w = weight, p = pos_weight; the mean (or the sum, or every value) of it.

    Args:
        input: logits, any shape, float16, bfloat16, float32 or float64.
        target: the shape of input, floating; probabilities within 0 … 1 by convention, which is not checked.
        weight: broadcastable to input, floating, integer or bool, or None.
        reduction: "none", "mean" or "sum".
        pos_weight: broadcastable to input, floating or integer, or None: the weight of positive examples.

    Returns a scalar, or a tensor of input's shape for "none", in the dtype of target; under autocast in float32 where that is half
    precision. Arithmetic is in float64 where input or target is that, else in float32. Losses are added in float32 within 1024 of
    them and in float64 beyond, over fixed blocks: the same bits on every run, for any number of threads. The mean of nothing is
    NaN.

    Differentiable any number of times in all four, also by forward-mode AD and `torch.func`, and `torch.vmap` maps over it. A
    fused kernel each serves the loss and its gradient to input; other derivatives, and whatever runs under a transform, take a
    decomposed path with the same values.

    A stand-in for `torch.nn.functional.binary_cross_entropy_with_logits`, which differs where that one loses digits. Float32
    where nothing else is said; torch 2.13 on the CPU:

    - Confident right answers: x = −18, y = 0 has a loss of 1.52e-8, torch's is 0 (from −15 on); x = 18, y = 1 has a gradient of
      −1.52e-8, torch's is 0 (from 17 on), and so is its second derivative. Here the two terms are kept apart; torch subtracts
      large numbers from each other.
    - Infinite logits: x = ∞, y = 1 and x = −∞, y = 0 have a loss of 0, and x = −∞, y = 1 one of ∞; torch's are NaN. What is
      weighted by 0 is 0, were it infinite.
    - Half precision is rounded once, at the end: x = −5, y = 0 in bfloat16 has a loss of 0.00671, torch's is 0.
    - Float64 logits with a float32 target are rounded once too: x = 36, y = 0.1 has a loss of 32.400002, torch's is 32.399998.

    - Gradients to weight and pos_weight, which torch refuses, are made.

    Raises TypeError for wrong types or dtypes, ValueError for wrong shapes, devices or options; where torch raises another class,
    the error is of that class as well. Of what torch takes, these are refused: the deprecated size_average, reduce and
    "elementwise_mean" (reduction is the fourth argument here), complex targets, weights that are sparse or of dtype uint16.

    Source: Goodfellow et al. 2014; equation (2.2) of the lecture note with h_θ = σ(x).
    """
    if weight is None and pos_weight is None and reduction in REDUCTIONS:
        op = dispatch.compiled("bce_with_logits", input)
        if op is not None:  # which checks everything before it writes; in words only where it refuses
            try:
                wide = target.dtype in _HALF and _autocast(target)
                if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
                    return _BceWithLogits.apply("cpp", wide, input, target, None, None, REDUCTIONS.index(reduction))
                if wide:
                    op = dispatch.op(_BY_WIDE[True], "cpp")
                return op(input, target, None, None, REDUCTIONS.index(reduction))
            except (AttributeError, RuntimeError, TypeError):
                _check(input, target, reduction)
                raise
    _check(input, target, reduction)
    for name, w in (("weight", weight), ("pos_weight", pos_weight)):
        if w is not None:
            checks.any_tensor(name, w)
    if weight is not None:
        weight = _checked_weight("weight", weight, input, target)
    if pos_weight is not None:
        pos_weight = _checked_weight("pos_weight", pos_weight, input, target)
    wide = target.dtype in _HALF and _autocast(target)
    operands = Operands(input, target, weight, pos_weight, REDUCTIONS.index(reduction))
    backend = dispatch.backend_for(input.device)
    if backend == "eager":
        return reference(operands, wide)
    if torch.is_grad_enabled():
        if (weight is not None and weight.requires_grad) or (pos_weight is not None and pos_weight.requires_grad):
            return reference(operands, wide)
        if input.requires_grad or target.requires_grad:
            return _BceWithLogits.apply(backend, wide, *dispatch.distinct(operands[:-1]), operands.reduction)
    return dispatch.op(_BY_WIDE[wide], backend)(*operands)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """`torch.nn.BCEWithLogitsLoss` by `fastgen.bce_with_logits`: the same arguments, buffers and state_dict.

        loss = w·(p·y·softplus(−x) + (1 − y)·softplus(x))

    with x = input and y = target of one shape, w = weight and p = pos_weight, which broadcast to it; the mean (or the sum, or every
    value) of it by `reduction`. Dtypes, results, errors and the source are those of `bce_with_logits`.
    """

    __module__ = "fastgen"  # what a pickle says, whatever module this becomes

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return bce_with_logits(input, target, self.weight, self.reduction, self.pos_weight)  # pyright: ignore[reportArgumentType]  # torch: any str


# torch's autocast does this loss in float32, so where `target` is of half precision, the result is "wide". Two functions,
# because the first costs 0.1 µs and the second 0.4.
_autocast_anywhere = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def _autocast(target):
    return _autocast_anywhere() and not target.is_meta and torch.is_autocast_enabled(target.device.type)


def _check(input, target, reduction):
    # in torch's order, for the class of error where several things are wrong
    checks.option("reduction", reduction, REDUCTIONS)
    checks.any_tensor("input", input)
    checks.any_tensor("target", target)
    checks.same_shape("target", target, "input", input)
    checks.tensor("input", input)
    checks.like("target", target, "input", input)


def _checked_weight(name, w, x, y):
    """One value, or as many as `x` has, floating, as the kernels read them."""
    if isinstance(w, torch.Tensor) and (w.dtype in _INTEGERS or (w.dtype == torch.bool and name == "weight")):
        w = w.to(_compute_dtype(x, y))
    checks.tensor(name, w)
    if w.device != x.device:
        if not (w.dim() == 0 and w.is_cpu and not x.is_cpu):  # which torch's operators take for a number
            raise checks.Mismatched(f"{name}: expected a tensor on {x.device} like input, got one on {w.device}")
        w = w.to(x.device, non_blocking=True)
    if w.dim() == 0 or w.shape == x.shape:
        return w
    if w.dim() > x.dim() or any(a not in (1, b) for a, b in zip(reversed(w.shape), reversed(x.shape), strict=False)):
        raise checks.Mismatched(f"{name}: expected a shape that broadcasts to {tuple(x.shape)}, got {tuple(w.shape)}")
    return w.expand(x.shape)


# ---- eager reference ------------------------------------------------------------------------------------------------------


def reference(o, wide=False):
    """The kernel in plain PyTorch, differentiable in all four. reduction: the index in `REDUCTIONS`."""
    x, y, w, p = _computed(o)
    left, size, e = split(x)
    positive, negative, tail = y if p is None else p * y, 1 - y, torch.log1p(e)
    if w is not None:
        positive, negative = w * positive, w * negative
    coefficient = torch.where(left, positive, negative)
    size = _zero_wins(coefficient, size)
    if p is None:
        loss = coefficient * size + (tail if w is None else w * tail)
    else:
        loss = positive * (torch.where(left, size, 0.0) + tail) + negative * (torch.where(left, 0.0, size) + tail)
    if o.reduction == 1:
        loss = loss.mean()
    elif o.reduction == 2:
        loss = loss.sum()
    return loss.to(result_dtype(o.target, wide))


def gradients(g, o, of_target):
    """g times the derivative of each loss by input, or by target; differentiable, as `reference` is."""
    x, y, w, p = _computed(o)
    left, size, e = split(x)
    if w is not None:
        g = g * w
    if of_target:
        coefficient = torch.where(left, g if p is None else g * p, -g)
        by_target = coefficient * _zero_wins(coefficient, size)
        return (by_target if p is None else by_target + g * (p - 1) * torch.log1p(e)).to(o.target.dtype)
    return (g * slope(left, e, y if p is None else p * y, 1 - y)).to(o.input.dtype)


def slope(left, e, positive, negative):
    """negative·σ(x) − positive·σ(−x), the derivative of positive·softplus(−x) + negative·softplus(x); left, e: of `split`."""
    return (negative * torch.where(left, e, 1.0) - positive * torch.where(left, 1.0, e)) / (1 + e)


def split(x):
    """x < 0, |x| and e^−|x|: of these, softplus(x) and σ(x) have derivatives of every order that lose no digits to cancellation,
    unlike torch's own, and that are right at 0 too."""
    left = x < 0
    size = x * torch.where(left, -1.0, 1.0).to(x.dtype)  # not where(left, −x, x), whose backward is four passes over memory
    return left, size, torch.exp(-size)


def _zero_wins(coefficient, size):
    """`size`, finite where it meets a coefficient of 0: 0·∞ is 0 here, the limit of 0·size. Large and not 0, for the derivative by
    the coefficient, which has no finite limit; and not the largest, which an upstream gradient would make infinite again."""
    large = torch.finfo(size.dtype).max ** 0.5
    return torch.where((coefficient == 0) & (size == torch.inf), large, size)


def _computed(o) -> Iterable[Any]:
    dtype = _compute_dtype(o.input, o.target)
    return (None if x is None else x.to(dtype) for x in (o.input, o.target, o.weight, o.pos_weight))


def _compute_dtype(input, target):
    return checks.compute_dtype(checks.result_dtype(input, target))


def result_dtype(target, wide):
    return checks.compute_dtype(target.dtype) if wide else target.dtype


# ---- fakes ----------------------------------------------------------------------------------------------------------------


def refuse(o):
    """What the kernels refuse: under a FakeTensorMode a fake stands in their place."""
    tensors = o.input, o.target, o.weight, o.pos_weight
    dispatch.same_device(*tensors)
    sizes = [w.shape for w in (o.weight, o.pos_weight) if w is not None and w.dim() > 0]
    if any(size != o.input.shape for size in (o.target.shape, *sizes)):
        raise RuntimeError("expected tensors of input's shape")
    if any(x is not None and x.dtype not in checks.FLOATING for x in tensors):
        raise RuntimeError("expected floating dtypes")


@dispatch.register_fake("bce_with_logits")
def _fake(o, wide=False):
    refuse(o)
    dtype = result_dtype(o.target, wide)
    return dispatch.empty_like(o.input, dtype) if o.reduction == 0 else torch.empty((), dtype=dtype, device=o.input.device)


@dispatch.register_fake("bce_with_logits_wide")
def _fake_wide(o):
    return _fake(o, wide=True)


@dispatch.register_fake("bce_with_logits_backward")
def _fake_backward(gradient, o):
    dispatch.same_device(o.input, gradient)
    refuse(o)
    return dispatch.empty_like(o.input)


# ---- autograd -------------------------------------------------------------------------------------------------------------


class _BceWithLogits(torch.autograd.Function):
    """One fused kernel back to the input: g·w·((1 − y)·σ(x) − p·y·σ(−x)). Where a second derivative may be asked for
    (create_graph), under a transform, and for the rare gradient to the target, the same in torch ops."""

    @staticmethod
    def forward(ctx, backend, wide, *arguments):
        ctx.save_for_backward(*arguments[:-1])
        ctx.backend, ctx.reduction = backend, arguments[-1]
        return dispatch.op(_BY_WIDE[wide], backend)(*arguments)

    @staticmethod
    def backward(ctx, gradient):
        o = Operands(*ctx.saved_tensors, ctx.reduction)
        needed = Operands(*ctx.needs_input_grad[2:])
        to_input = to_target = None
        fused = needed.input and not torch.is_grad_enabled() and not dispatch.batched(gradient)
        if fused:
            to_input = dispatch.op("bce_with_logits_backward", ctx.backend)(gradient, *o)
        if needed.target or not fused:
            g = gradient.to(_compute_dtype(o.input, o.target))
            if o.reduction == 1:
                g = g / o.input.numel()
            if needed.input and not fused:
                to_input = gradients(g, o, False)
            if needed.target:
                to_target = gradients(g, o, True)
        return None, None, *dispatch.gradients(Operands, input=to_input, target=to_target)
