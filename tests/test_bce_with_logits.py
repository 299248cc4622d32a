"""bce_with_logits: values, weights, reductions, gradients."""

import itertools

import numpy as np
import pytest
import reference
import torch
from conftest import DTYPES, LAYOUTS, array, assert_close, assert_same, normal

import fastgen

REDUCTIONS = ("none", "mean", "sum")
SHAPES = [(), (0,), (1,), (5,), (127,), (128,), (129,), (3, 4), (0, 4), (4, 0), (2, 3, 5, 7), (2, 3, 4, 5, 3), (4099,)]
# shapes of weight and pos_weight beside logits of shape (4, 3, 5)
WEIGHTS = {"none": None, "scalar": (), "one": (1,), "class": (5,), "sample": (4, 1, 1), "broadcast": (3, 1), "full": (4, 3, 5)}
torch_bce = torch.nn.functional.binary_cross_entropy_with_logits


def logits_and_targets(shape, device, dtype=torch.float32, scale=4.0):
    x = (scale * normal(shape, 0)).to(device, dtype)
    y = torch.sigmoid(normal(shape, 1)).to(device, dtype)
    return x, y


def weights(shape, seed, device, dtype=torch.float32):
    return None if shape is None else (normal(shape, seed).abs() + 0.2).to(device, dtype)


def exact(x, y, weight=None, pos_weight=None, reduction="mean"):
    return reference.bce_with_logits(*(None if v is None else array(v) for v in (x, y, weight, pos_weight)), reduction)


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")  # NumPy's
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_shapes(device, shape, reduction, dtype):
    """The mean of nothing is NaN, its sum 0."""
    x, y = logits_and_targets(shape, device, dtype)
    loss = fastgen.bce_with_logits(x, y, reduction=reduction)
    assert loss.dtype == dtype and loss.shape == (shape if reduction == "none" else ()) and not loss.requires_grad
    assert_close(loss, exact(x, y, reduction=reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight, pos_weight", list(itertools.product(WEIGHTS.values(), WEIGHTS.values())))
def test_weights(device, weight, pos_weight, reduction):
    x, y = logits_and_targets((4, 3, 5), device)
    weight, pos_weight = weights(weight, 2, device), weights(pos_weight, 3, device)
    loss = fastgen.bce_with_logits(x, y, weight, reduction, pos_weight)
    assert_close(loss, exact(x, y, weight, pos_weight, reduction))
    theirs = torch_bce(x, y, weight, reduction=reduction, pos_weight=pos_weight)
    torch.testing.assert_close(loss, theirs, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("x_dtype, y_dtype", list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dtypes(device, x_dtype, y_dtype, reduction):
    x, y = logits_and_targets((3, 50), device)
    x, y = x.to(x_dtype), y.to(y_dtype)
    loss = fastgen.bce_with_logits(x, y, reduction=reduction)
    assert loss.dtype == torch.promote_types(x_dtype, y_dtype)
    assert_close(loss, exact(x, y, reduction=reduction))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,)])
def test_dtype_of_the_weights(device, dtype, shape):
    """A weight with dimensions takes part in type promotion, a single number does not, as in torch."""
    x, y = logits_and_targets((3, 5), device, torch.bfloat16)
    w = weights(shape, 2, device, dtype)
    for how in ({"weight": w}, {"pos_weight": w}):
        loss = fastgen.bce_with_logits(x, y, reduction="none", **how)
        assert loss.dtype == (torch.promote_types(torch.bfloat16, dtype) if shape else torch.bfloat16)
        assert_close(loss, exact(x, y, reduction="none", **how))


@pytest.mark.parametrize("magnitude", [16.0, 17.0, 18.0, 88.0, 100.0, 104.0, 1e4, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_logits(device, magnitude, dtype):
    """Neither overflow nor cancellation: a confident right answer keeps the digits of its tiny loss and gradient."""
    x = torch.tensor([magnitude, -magnitude] * 70, dtype=dtype, device=device).requires_grad_()
    y = torch.tensor([1, 1, 0, 0, 0.5, 0.5, 1] * 20, dtype=dtype, device=device)
    loss = fastgen.bce_with_logits(x, y, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    tight = {"rtol": 1e-6 if dtype == torch.float32 else 1e-13, "atol": float(torch.finfo(dtype).tiny)}
    np.testing.assert_allclose(array(loss), exact(x, y, reduction="none"), **tight)
    np.testing.assert_allclose(array(gradient), reference.bce_with_logits_gradient(array(x), array(y)), **tight)


def test_nan_and_inf(device):
    """NaN wherever an operand is NaN; the loss of an infinitely confident wrong answer is infinite."""
    nan, inf = torch.nan, torch.inf
    x = torch.tensor([nan, 1.0, inf, -inf, 2.0] * 30, device=device)
    y = torch.tensor([1.0, nan, 0.0, 1.0, 1.0] * 30, device=device)
    loss = fastgen.bce_with_logits(x, y, reduction="none")
    assert_same(loss[:4], torch.tensor([nan, nan, inf, inf], device=device))
    assert torch.equal(loss.isnan(), (x.isnan() | y.isnan())) and loss[4].isfinite()
    assert fastgen.bce_with_logits(x, y).isnan()
    assert fastgen.bce_with_logits(x[2:5], y[2:5], reduction="sum") == inf
    infinite = fastgen.bce_with_logits(
        torch.tensor([-200.0, -inf], device=device), torch.ones(2, device=device), None, "none", x[2]
    )
    assert torch.equal(infinite, torch.full_like(infinite, inf))  # pos_weight = inf, with e^−|x| = 0
    w = torch.tensor([1.0, nan], device=device)
    weighted = fastgen.bce_with_logits(torch.ones(2, device=device), torch.ones(2, device=device), w, "none")
    assert weighted[0].isfinite() and weighted[1].isnan()


def test_agrees_with_torch_on_a_gan_batch(device):
    """Equation (2.2) of the lecture note, as a discriminator uses it: targets of one and of zero."""
    x = 3 * normal((256, 1), 0, device=device)
    for y in (torch.ones_like(x), torch.zeros_like(x)):
        ours, theirs = fastgen.bce_with_logits(x, y), torch_bce(x, y)
        torch.testing.assert_close(ours, theirs)
        h = torch.sigmoid(x.double())
        assert_close(ours, -torch.mean(y * h.log() + (1 - y) * (1 - h).log()))


@pytest.mark.parametrize("layout, other", list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts(device, layout, other):
    x, y = logits_and_targets((3, 4, 5, 6), device)
    w, p = weights((3, 4, 5, 6), 2, device), weights((4, 1, 1), 3, device)
    expected = fastgen.bce_with_logits(x, y, w, "none", p)
    actual = fastgen.bce_with_logits(LAYOUTS[layout](x), LAYOUTS[other](y), LAYOUTS[other](w), "none", p)
    torch.testing.assert_close(actual, expected, rtol=3e-7, atol=1e-7)
    for reduction in ("mean", "sum"):
        loss = fastgen.bce_with_logits(LAYOUTS[layout](x), LAYOUTS[other](y), LAYOUTS[other](w), reduction, p)
        assert_close(loss, exact(x, y, w, p, reduction))


# ---- reductions -----------------------------------------------------------------------------------------------------


def test_long_sums_do_not_drift(device):
    """Four million equal terms, each of which a float32 running sum rounds the same way: only short runs may be in float32."""
    n = 2**22 + 5
    x, y = torch.full((n,), 0.1, device=device), torch.full((n,), 0.3, device=device)
    one = reference.bce_with_logits(array(x[:1]), array(y[:1]))
    for reduction, expected in (("sum", n * one), ("mean", one)):
        assert fastgen.bce_with_logits(x, y, reduction=reduction).item() == pytest.approx(expected, rel=4e-6)
    mixed = 4 * normal((n,), 0, device=device)
    assert_close(fastgen.bce_with_logits(mixed, y, reduction="none"), exact(mixed, y, reduction="none"))
    assert fastgen.bce_with_logits(mixed, y).item() == pytest.approx(exact(mixed, y), rel=2e-7)
    half = fastgen.bce_with_logits(x.bfloat16(), y.bfloat16())
    assert_close(half, exact(x[:1].bfloat16(), y[:1].bfloat16()))


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight, pos_weight", [(None, None), ((), ()), ((3,), (3,)), ((2, 1), (2, 3)), (None, (1,))])
def test_gradcheck(device, weight, pos_weight, reduction):
    """Twice differentiable, in the logits, the targets, both, and the weights."""
    x, y = logits_and_targets((2, 3), device, torch.float64, scale=1.5)
    w, p = weights(weight, 2, device, torch.float64), weights(pos_weight, 3, device, torch.float64)
    loss = lambda x, y, w=w, p=p: fastgen.bce_with_logits(x, y, w, reduction, p)  # noqa: E731
    cases = [(lambda x: loss(x, y), [x]), (lambda y: loss(x, y), [y]), (loss, [x, y])]
    if weight is not None:
        cases.append((loss, [x, y, w, p]))
    for f, inputs in cases:
        inputs = [v.clone().requires_grad_() for v in inputs]
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 3, 5), (7, 129), (0, 3), ()])
def test_gradients(device, dtype, reduction, shape):
    x, y = logits_and_targets(shape, device, dtype)
    w, p = weights(shape, 2, device, dtype), weights(shape[-1:], 3, device, dtype)
    x, y = x.requires_grad_(), y.requires_grad_()
    loss = fastgen.bce_with_logits(x, y, w, reduction, p)
    upstream = normal(loss.shape, 4, dtype, device)
    loss.backward(upstream)
    assert x.grad.dtype == y.grad.dtype == dtype
    g = array(upstream) / (max(x.numel(), 1) if reduction == "mean" else 1)
    assert_close(x.grad, g * reference.bce_with_logits_gradient(*map(array, (x, y, w, p))))
    by_target = array(w) * (array(p) * np.logaddexp(0, -array(x)) - np.logaddexp(0, array(x)))
    assert_close(y.grad, g * by_target, scale=50)


@pytest.mark.parametrize("layout, other", list(itertools.product(LAYOUTS, LAYOUTS)))
def test_gradients_in_any_layout(device, layout, other):
    x, y = logits_and_targets((3, 4, 5, 6), device)
    leaf, target = LAYOUTS[layout](x).requires_grad_(), LAYOUTS[other](y)
    upstream = LAYOUTS[other](normal(x.shape, 2, device=device))
    fastgen.bce_with_logits(leaf, target, reduction="none").backward(upstream)
    assert_close(leaf.grad, array(upstream) * reference.bce_with_logits_gradient(array(x), array(y)))
    fastgen.bce_with_logits(leaf, target).backward()  # an expanded gradient


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_at_zero(device, reduction):
    """σ(0) − y at logits of exactly zero, which is what a discriminator with a zeroed head starts from."""
    x = torch.zeros(6, device=device, requires_grad=True)
    y = torch.tensor([0.0, 1.0, 0.5, 0.25, 0.0, 1.0], device=device)
    fastgen.bce_with_logits(x, y, reduction=reduction).sum().backward()
    assert_close(x.grad, (0.5 - array(y)) / (6 if reduction == "mean" else 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_mixed_dtypes(device, dtype):
    x, y = logits_and_targets((3, 50), device)
    x, y = x.to(dtype).requires_grad_(), y.requires_grad_()
    fastgen.bce_with_logits(x, y, reduction="sum").backward()
    assert x.grad.dtype == dtype and y.grad.dtype == torch.float32
    assert_close(x.grad, reference.bce_with_logits_gradient(array(x), array(y)))
    assert_close(y.grad, -array(x))


def test_gradients_are_recorded_only_where_asked(device):
    x, y = logits_and_targets((3, 5), device)
    assert not fastgen.bce_with_logits(x, y).requires_grad
    assert fastgen.bce_with_logits(x.clone().requires_grad_(), y).requires_grad
    assert fastgen.bce_with_logits(x, y.clone().requires_grad_()).requires_grad
    assert fastgen.bce_with_logits(x, y, torch.ones(5, device=device, requires_grad=True)).requires_grad
    with torch.no_grad():
        assert not fastgen.bce_with_logits(x.clone().requires_grad_(), y).requires_grad


def test_one_number_for_all_logits_is_not_copied(device):
    """Expanded to their shape, as autograd does with the gradient of a sum: the same as without dimensions, its dtype apart."""
    x, y = logits_and_targets((5, 70), device)
    for w in (torch.tensor(2.5, device=device), torch.tensor(2.5, device=device, dtype=torch.float64)):
        wide = fastgen.bce_with_logits(x, y, w.expand(5, 70), "none", w.expand(70))
        assert wide.dtype == w.dtype
        assert_close(wide, exact(x, y, w, w, "none"))
    x.requires_grad_()
    (three,) = torch.autograd.grad(3 * fastgen.bce_with_logits(x, y, reduction="none").sum(), x)
    assert_close(three, 3 * reference.bce_with_logits_gradient(array(x), array(y)))
