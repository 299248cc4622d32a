"""Binary cross entropy on logits: the formulas of csrc/bce_with_logits/bce_with_logits.h, their kernels and the ops."""

import torch
import triton
import triton.language as tl

from .._core import checks
from .._ops.bce_with_logits import REDUCTIONS, refuse, result_dtype
from .common import op
from .common.driver import flat_elements
from .common.host_device import negative, splat, stored
from .common.op import wrap_triton
from .common.real_math import exp_negative, is_half, log1p_unit
from .common.sum import MOST_SUMS, TILE, few, is_one, programs_of, scratch, sum_kernel

# What there is of an operand, the WEIGHT, POS_WEIGHT and GRADIENT of the kernels: nothing, which counts as 1; one element for all
# logits; or one for each.
ABSENT = tl.constexpr(0)
SINGLE = tl.constexpr(1)
FULL = tl.constexpr(2)


@triton.jit
def times(weight, value, WEIGHT: tl.constexpr):
    if WEIGHT == ABSENT:
        return value
    else:
        return weight * value


@triton.jit
def bce_loss(x, y, weight, pos_weight, WEIGHT: tl.constexpr, POS_WEIGHT: tl.constexpr, APPROXIMATE: tl.constexpr):
    """w·(p·y·softplus(−x) + (1 − y)·softplus(x)). Where its coefficient is 0, |x| is taken for 0."""
    zero = splat(0.0, x)
    size = tl.abs(x)
    positive_part = times(weight, times(pos_weight, y, POS_WEIGHT), WEIGHT)
    negative_part = times(weight, splat(1.0, x) - y, WEIGHT)
    tail = log1p_unit(exp_negative(negative(size), APPROXIMATE))
    left = x < zero
    coefficient = tl.where(left, positive_part, negative_part)
    size = tl.where(coefficient == zero, zero, size)
    if POS_WEIGHT == ABSENT:
        return tl.fma(size, coefficient, times(weight, tail, WEIGHT))
    else:
        of_positive = tl.where(left, size, zero) + tail
        return tl.fma(positive_part, of_positive, negative_part * (tl.where(left, zero, size) + tail))


@triton.jit
def bce_gradient(x, y, weight, pos_weight, WEIGHT: tl.constexpr, POS_WEIGHT: tl.constexpr, APPROXIMATE: tl.constexpr):
    """d loss / d x = w·((1 − y)·σ(x) − p·y·σ(−x)), the larger σ being 1/(1 + e) and the smaller e/(1 + e) with e = e^−|x|."""
    one = splat(1.0, x)
    e = exp_negative(negative(tl.abs(x)), APPROXIMATE)
    minus = negative(times(pos_weight, y, POS_WEIGHT))
    negative_part = one - y
    right = x >= splat(0.0, x)
    dividend = tl.fma(tl.where(right, minus, negative_part), e, tl.where(right, negative_part, minus))
    return times(weight, dividend / (one + e), WEIGHT)


@triton.jit
def bce_operand(operand, begin, element, inside, R: tl.constexpr, HOW: tl.constexpr):
    if HOW == FULL:
        return tl.load(operand + begin + element, mask=inside).to(R)
    elif HOW == SINGLE:
        return tl.load(operand).to(R)
    else:
        return tl.full((), 1.0, R)


@triton.jit
def bce_kernel(
    out,
    x,
    y,
    weight,
    pos_weight,
    gradient,
    count,
    WEIGHT: tl.constexpr,
    POS_WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    BACKWARD: tl.constexpr,
    MEAN: tl.constexpr,
    DOUBLE: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    E: tl.constexpr,
):
    """Each loss, or the gradient times its derivative."""
    R: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    begin, element, inside = flat_elements(tl.program_id(0), count, E)
    w = bce_operand(weight, begin, element, inside, R, WEIGHT)
    p = bce_operand(pos_weight, begin, element, inside, R, POS_WEIGHT)
    logit = tl.load(x + begin + element, mask=inside).to(R)
    target = tl.load(y + begin + element, mask=inside).to(R)
    if BACKWARD:
        g = bce_operand(gradient, begin, element, inside, R, GRADIENT)
        if MEAN:
            g = g / tl.full((), count, tl.int64).to(R)  # not in float64, whose division takes 100 instructions
        value = g * bce_gradient(logit, target, w, p, WEIGHT, POS_WEIGHT, APPROXIMATE)
    else:
        value = bce_loss(logit, target, w, p, WEIGHT, POS_WEIGHT, APPROXIMATE)
    tl.store(out + begin + element, stored(value, out), mask=inside)


@triton.jit(do_not_specialize=["tiles"])
def bce_sum_kernel(
    sums,
    x,
    y,
    weight,
    pos_weight,
    count,
    tiles,
    WEIGHT: tl.constexpr,
    POS_WEIGHT: tl.constexpr,
    MEAN: tl.constexpr,
    DOUBLE: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
):
    """A program's sum of losses; MEAN: divided by their number, where it is the only program."""
    R: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    total = few(tl.zeros((E,), R), V)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        begin, element, inside = flat_elements(tile, count, E)
        w = bce_operand(weight, begin, element, inside, R, WEIGHT)
        p = bce_operand(pos_weight, begin, element, inside, R, POS_WEIGHT)
        logit = tl.load(x + begin + element, mask=inside).to(R)
        target = tl.load(y + begin + element, mask=inside).to(R)
        loss = bce_loss(logit, target, w, p, WEIGHT, POS_WEIGHT, APPROXIMATE)
        total += few(tl.where(inside, loss, splat(0.0, loss)), V)
    result = tl.sum(total, 0)
    if MEAN:
        result = result / tl.full((), count, tl.int64).to(tl.float64)
    tl.store(sums + tl.program_id(0), stored(result, sums))


def _repeats_one(x):
    """One element for all logits, also where it was expanded to their shape, as autograd does with the gradient of a sum."""
    if x.dim() == 0:
        return True
    return x.numel() > 1 and all(size == 1 or stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))


class _Inputs:
    """The tensors as the kernels take them, in the memory order of `input`. What is absent points to the logits."""

    def __init__(self, o):
        refuse(o)
        if not 0 <= o.reduction < len(REDUCTIONS):
            raise RuntimeError(f"reduction: expected 0 (none), 1 (mean) or 2 (sum), got {o.reduction}")
        input, target = o.input, o.target
        self.channels_last = op.batch_of(input).channels_last if input.dim() >= 3 else False
        self.input = op.operand(input, input, self.channels_last)
        self.target = op.same(target, input, self.channels_last)
        self.count = input.numel()
        self.double = checks.compute_dtype(checks.result_dtype(input, target)) == torch.float64
        self.half = input.dtype == target.dtype and is_half(input.dtype)
        self.weight, self.weight_how = self.read(o.weight)
        self.pos_weight, self.pos_weight_how = self.read(o.pos_weight)

    def read(self, x):
        if x is None:
            return self.input, ABSENT.value
        if _repeats_one(x):
            return op.plain(x), SINGLE.value
        return op.same(x, self.input, self.channels_last), FULL.value

    @property
    def tensors(self):
        return self.input, self.target, self.weight, self.pos_weight

    @property
    def parameters(self):
        return {"WEIGHT": self.weight_how, "POS_WEIGHT": self.pos_weight_how, "DOUBLE": self.double}


def _each(a, out, gradient, gradient_how, backward, mean):
    """The one launch for what has a value for each logit."""
    tile = op.flat_tile(a.count, (out, *a.tensors, gradient))
    op.launch(
        wrap_triton(bce_kernel),
        *(triton.cdiv(a.count, tile), out, out, *a.tensors, gradient, a.count),
        GRADIENT=gradient_how,
        BACKWARD=backward,
        MEAN=mean,
        APPROXIMATE=a.half and out.dtype == a.input.dtype,
        E=tile,
        **a.parameters,
    )
    return out


def _forward(o, wide):
    a = _Inputs(o)
    dtype = result_dtype(o.target, wide)
    if o.reduction == 0:
        return _each(a, op.empty_like(o.input, dtype), a.input, ABSENT.value, False, False)
    out = op.empty((), dtype, o.input.device)
    programs = programs_of(a.count)
    alone, mean = is_one(programs), o.reduction == 1
    sums = out if alone else scratch(1, [programs], o.input)
    op.launch(
        wrap_triton(bce_sum_kernel),
        *(programs, o.input, sums, *a.tensors, a.count, triton.cdiv(a.count, TILE)),
        MEAN=mean and alone,
        APPROXIMATE=a.half,
        E=TILE,
        V=op.vector_of(a.tensors, 1),
        **a.parameters,
    )
    if not alone:
        divisor = a.count if mean else 1
        op.launch(wrap_triton(sum_kernel), 1, o.input, out, sums, 1, programs, divisor, S=1, C=MOST_SUMS)
    return out


def bce_with_logits(o):
    return _forward(o, False)


def bce_with_logits_wide(o):
    return _forward(o, True)


def bce_with_logits_backward(gradient, o):
    a = _Inputs(o)
    refuse(o._replace(weight=gradient, pos_weight=None))
    gradient, how = a.read(gradient)
    if o.reduction != 0 and how != SINGLE.value:
        raise RuntimeError("gradient: expected one element for a mean or a sum")
    return _each(a, op.empty_like(o.input), gradient, how, True, o.reduction == 1)
