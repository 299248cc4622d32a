"""bce_with_logits: values, weights, reductions, gradients, transforms; what torch's own does, and where it loses digits."""

import copy
import itertools
import os
import pickle

import numpy as np
import pytest
import reference
import torch
from conftest import DTYPES, LAYOUTS, array, assert_close, assert_derivatives, assert_same, normal

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


def exact_gradient(x, y, weight=None, pos_weight=None):
    return reference.bce_with_logits_gradient(*(None if v is None else array(v) for v in (x, y, weight, pos_weight)))


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
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


@pytest.mark.pairs
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("pos_weight", WEIGHTS.values(), ids=WEIGHTS)
def test_weights(device, weight, pos_weight, reduction):
    x, y = logits_and_targets((4, 3, 5), device)
    weight, pos_weight = weights(weight, 2, device), weights(pos_weight, 3, device)
    loss = fastgen.bce_with_logits(x, y, weight, reduction, pos_weight)
    assert_close(loss, exact(x, y, weight, pos_weight, reduction))
    theirs = torch_bce(x, y, weight, reduction=reduction, pos_weight=pos_weight)
    torch.testing.assert_close(loss, theirs, rtol=2e-6, atol=1e-6)


@pytest.mark.pairs
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("y_dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dtypes(device, x_dtype, y_dtype, reduction):
    x, y = logits_and_targets((3, 50), device)
    x, y = x.to(x_dtype), y.to(y_dtype)
    loss = fastgen.bce_with_logits(x, y, reduction=reduction)
    assert loss.dtype == y_dtype
    assert_close(loss, exact(x, y, reduction=reduction))


@pytest.mark.pairs
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("y_dtype", DTYPES)
def test_result_dtypes_are_those_of_torch(device, x_dtype, y_dtype):
    """That of the target, whatever the weights are; a gradient has its tensor's own."""
    x, y = logits_and_targets((3, 5), device)
    x, y = x.to(x_dtype).requires_grad_(), y.to(y_dtype)
    either = [(dtype, shape) for dtype in (*DTYPES, torch.int64, torch.uint8, torch.bool) for shape in ((), (5,), (3, 5))]
    several = [
        (None, None),
        *((w, None) for w in either),
        *((None, p) for p in either),
        *zip(either, reversed(either), strict=True),
    ]
    for (w, p), reduction in zip(several, itertools.cycle(REDUCTIONS), strict=False):
        w = None if w is None else (3 * weights(w[1], 2, device)).to(w[0])
        p = None if p is None or p[0] == torch.bool else (3 * weights(p[1], 3, device)).to(p[0])
        loss = fastgen.bce_with_logits(x, y, w, reduction, p)
        assert loss.dtype == torch_bce(x, y, w, reduction=reduction, pos_weight=p).dtype
        assert_close(loss, exact(x, y, w, p, reduction), scale=50)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert gradient.dtype == x_dtype
        assert_close(gradient, exact_gradient(x, y, w, p) / (x.numel() if reduction == "mean" else 1), scale=50)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_infinite_logits(device, dtype):
    """The limit for x → ±∞ where there is one, a weight of 0 times an infinite loss is 0, and NaN stays NaN."""
    nan, inf = torch.nan, torch.inf
    cases = list(itertools.product([inf, -inf, 2.0, nan], [0.0, 1.0, 0.5, nan], [1.0, 0.0, 2.0, nan], [1.0, 0.0, 3.0, nan]))
    x, y, w, p = torch.tensor(cases, dtype=dtype, device=device).unbind(1)
    for weight, pos_weight in ((None, None), (w, None), (None, p), (w, p)):
        loss = fastgen.bce_with_logits(x, y, weight, "none", pos_weight)
        expected = exact(x, y, weight, pos_weight, "none")
        np.testing.assert_allclose(array(loss), expected, rtol=float(torch.finfo(dtype).eps))
        assert np.isfinite(expected).any() and np.isinf(expected).any()
        finite = torch.from_numpy(np.isfinite(expected)).to(device)
        chosen = [v if v is None else v[finite] for v in (x, y, weight, pos_weight)]
        for reduction in ("mean", "sum"):
            assert_close(fastgen.bce_with_logits(*chosen[:3], reduction, chosen[3]), exact(*chosen, reduction), scale=50)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_derivatives_at_infinite_logits(device, weighted, reduction):
    """By the logits, of both orders: finite. By the targets: without limit, but for a weight of 0."""
    inf = torch.inf
    x = torch.tensor([inf, -inf, inf, -inf, inf, -inf, 2.0] * 20, device=device)
    y = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 1.0] * 20, device=device)
    w = torch.ones_like(x).index_fill(0, torch.arange(70, 140, device=device), 0.0) if weighted else None
    p = torch.full_like(x, 3.0) if weighted else None
    expected = exact_gradient(x, y, w, p) / (140 if reduction == "mean" else 1)
    total = lambda x, y: fastgen.bce_with_logits(x, y, w, reduction, p).sum()  # noqa: E731
    for create_graph in (False, True):
        leaf, target = x.clone().requires_grad_(), y.clone().requires_grad_()
        by_x, by_y = torch.autograd.grad(total(leaf, target), (leaf, target), create_graph=create_graph)
        assert_close(by_x, expected)
        by_y = by_y[x.isinf()]
        if weighted:
            assert not by_y[60:].any()
            by_y = by_y[:60]
        assert torch.all(
            by_y * -x[x.isinf()][: len(by_y)].sign() > 1e16
        )  # ∞, or a number that is large even divided by their number
    (second,) = torch.autograd.grad(by_x.sum(), leaf)
    assert torch.equal(second != 0, torch.isfinite(x) & (True if w is None else w != 0))
    assert_close(torch.func.grad(total)(x, y), expected)
    assert_close(torch.func.jacfwd(total)(x, y), expected)
    hessian = torch.func.hessian(total)(x, y)
    assert torch.equal(hessian.diagonal() != 0, second != 0) and hessian.isfinite().all()


@pytest.mark.parametrize("upstream", [1.0, 2.0, 1024.0])
@pytest.mark.parametrize("x, y", [(torch.inf, 1.0), (-torch.inf, 0.0)])
def test_weights_at_infinite_logits(device, x, y, upstream):
    """The loss is 0 whatever the weights, and so are its derivatives by them."""
    x, y = torch.full((3,), x, device=device), torch.full((3,), y, device=device)
    w, p = (torch.full((3,), v, device=device, requires_grad=True) for v in (1.0, 2.0))
    loss = fastgen.bce_with_logits(x, y, w, "sum", p)
    by_w, by_p = torch.autograd.grad(upstream * loss, (w, p))
    assert loss == 0 and not by_w.any() and not by_p.any()


def test_agrees_with_torch_on_a_gan_batch(device):
    """Equation (2.2) of the lecture note, as a discriminator uses it: targets of one and of zero."""
    x = 3 * normal((256, 1), 0, device=device)
    for y in (torch.ones_like(x), torch.zeros_like(x)):
        ours, theirs = fastgen.bce_with_logits(x, y), torch_bce(x, y)
        torch.testing.assert_close(ours, theirs)
        h = torch.sigmoid(x.double())
        assert_close(ours, -torch.mean(y * h.log() + (1 - y) * (1 - h).log()))


@pytest.mark.pairs
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
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


def cpu_kernels(needed):
    """For tests of sizes that only the compiled CPU kernels take in seconds; `needed`: GB of memory."""
    if "cpp" not in fastgen.available_backends("cpu") or "FASTGEN_LAUNCHED" in os.environ:  # the CUDA code on the host is too slow
        pytest.skip("needs the compiled CPU kernels")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    if free < needed:
        pytest.skip(f"needs {needed} GB of free memory, and there are {free:.1f}")
    return fastgen.use_backend("cpp")


def test_the_sum_of_a_hundred_million_losses():
    with cpu_kernels(1.0):
        x, y = logits_and_targets((10**6,), "cpu")
        mean = exact(x, y)
        x, y = x.repeat(100), y.repeat(100)
        assert fastgen.bce_with_logits(x, y).item() == pytest.approx(mean, rel=1e-7)
        assert fastgen.bce_with_logits(x, y, reduction="sum").item() == pytest.approx(1e8 * mean, rel=1e-7)


def test_more_logits_than_32_bits_count():
    """Zeros that no memory is taken for until they are written to."""
    with cpu_kernels(1.0), torch.autocast("cpu"):  # whose result is not rounded to bfloat16
        n = 2**31 + 5
        x, y = (torch.from_numpy(np.zeros(n, np.uint16)).view(torch.bfloat16) for _ in range(2))
        assert fastgen.bce_with_logits(x, y).item() == pytest.approx(np.log(2), rel=1e-6)
        x[-3:] = 2.0**100
        assert fastgen.bce_with_logits(x, y, reduction="sum").item() == 3 * 2.0**100


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
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
        assert_derivatives(device, f, inputs)


@pytest.mark.pairs
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


@pytest.mark.pairs
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
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
    """Expanded to their shape, as autograd does with the gradient of a sum: the same as without dimensions."""
    x, y = logits_and_targets((5, 70), device)
    for w in (torch.tensor(2.5, device=device), torch.tensor(2.5, device=device, dtype=torch.float64)):
        assert_close(fastgen.bce_with_logits(x, y, w.expand(5, 70), "none", w.expand(70)), exact(x, y, w, w, "none"))
    x.requires_grad_()
    (three,) = torch.autograd.grad(3 * fastgen.bce_with_logits(x, y, reduction="none").sum(), x)
    assert_close(three, 3 * reference.bce_with_logits_gradient(array(x), array(y)))


@pytest.mark.parametrize("how", [{}, {"weight": (5,), "pos_weight": (4, 1)}])
def test_second_derivatives_keep_their_digits(device, how):
    """w·(p·y + 1 − y)·σ(x)·σ(−x) in float32, where torch's are 0 from about 17 on."""
    x = torch.linspace(-60, 60, 20, device=device).view(4, 5).requires_grad_()
    y = torch.sigmoid(normal((4, 5), 1)).to(device)
    how = {name: weights(shape, 2, device) for name, shape in how.items()}
    w, p = how.get("weight", torch.ones(())).double().cpu(), how.get("pos_weight", torch.ones(())).double().cpu()
    expected = array(w * (p * y.cpu() + 1 - y.cpu())) * reference.sigmoid(array(x)) * reference.sigmoid(-array(x))
    total = lambda x: fastgen.bce_with_logits(x, y, reduction="sum", **how)  # noqa: E731
    (gradient,) = torch.autograd.grad(total(x), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    hessian = torch.func.hessian(total)(x.detach()).view(20, 20).diagonal().view(4, 5)
    for actual in (second, hessian):
        np.testing.assert_allclose(array(actual), expected, rtol=2e-6)


# ---- transforms -----------------------------------------------------------------------------------------------------


def torch_loss(input, target, weight=None, reduction="mean", pos_weight=None):
    return torch_bce(input, target, weight, reduction=reduction, pos_weight=pos_weight)


def dual(loss, x, y, w, p, tangent):
    with torch.autograd.forward_ad.dual_level():
        x, y = torch.autograd.forward_ad.make_dual(x, tangent), torch.autograd.forward_ad.make_dual(y, tangent**2)
        value = torch.autograd.forward_ad.unpack_dual(loss(x, y, w, "none", p))
        return value.primal, value.tangent


# of `loss`, at logits and targets of shape (4, 5) and weights of shape (5,) or none
TRANSFORMS = {
    "grad": lambda loss, x, y, w, p: torch.func.grad(loss, argnums=(0, 1))(x, y, w, "mean", p),
    "grad_of_grad": lambda loss, x, y, w, p: torch.func.grad(lambda v: torch.func.grad(loss)(v, y, w, "sum", p).cos().sum())(x),
    "vjp": lambda loss, x, y, w, p: torch.func.vjp(lambda x, y: loss(x, y, w, "none", p), x, y)[1](x.cos()),
    "jvp": lambda loss, x, y, w, p: torch.func.jvp(lambda x, y: loss(x, y, w, "mean", p), (x, y), (y, x)),
    "dual": lambda loss, x, y, w, p: dual(loss, x, y, w, p, x.cos()),
    "jacfwd": lambda loss, x, y, w, p: torch.func.jacfwd(loss, argnums=(0, 1))(x, y, w, "none", p),
    "jacrev": lambda loss, x, y, w, p: torch.func.jacrev(loss, argnums=(0, 1))(x, y, w, "none", p),
    "hessian": lambda loss, x, y, w, p: torch.func.hessian(loss, argnums=(0, 1))(x, y, w, "mean", p),
    "vmap": lambda loss, x, y, w, p: torch.vmap(lambda x, y: loss(x, y, w, "mean", p))(x, y),
    "vmap_none": lambda loss, x, y, w, p: torch.vmap(lambda x, y: loss(x, y, w, "none", p))(x, y),
    "vmap_of_columns": lambda loss, x, y, w, p: torch.vmap(
        lambda x, y: loss(x, y, None if w is None else w[:4], "sum", None if p is None else p[0]), in_dims=(1, 1), out_dims=0
    )(x, y),
    "vmap_of_logits": lambda loss, x, y, w, p: torch.vmap(lambda x, y: loss(x, y, w, "mean", p), in_dims=(0, None))(x, y[0]),
    "vmap_of_vmap": lambda loss, x, y, w, p: torch.vmap(torch.vmap(lambda x, y: loss(x, y)))(x, y),
    "vmap_of_grad": lambda loss, x, y, w, p: torch.vmap(torch.func.grad(lambda x, y: loss(x, y, w, "mean", p)))(x, y),
    "grad_of_vmap": lambda loss, x, y, w, p: torch.func.grad(
        lambda x: torch.vmap(lambda x, y: loss(x, y, w, "mean", p))(x, y).prod()
    )(x),
    "batched_gradients": lambda loss, x, y, w, p: torch.autograd.functional.jacobian(
        lambda x, y: loss(x, y, w, "none", p), (x, y), vectorize=True
    ),
}


@pytest.mark.pairs
@pytest.mark.parametrize("weighted", [(), ("w",), ("p",), ("w", "p")], ids=lambda names: "".join(names) or "unweighted")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(device, transform, weighted):
    x, y = logits_and_targets((4, 5), device, torch.float64)
    w = weights((5,), 2, device, torch.float64) if "w" in weighted else None
    p = weights((5,), 3, device, torch.float64) if "p" in weighted else None
    torch.testing.assert_close(transform(fastgen.bce_with_logits, x, y, w, p), transform(torch_loss, x, y, w, p))


def test_transforms_over_the_weights(device):
    """torch's own function refuses vmap over a weight alone, so each weight in turn is what to compare with."""
    x, y = logits_and_targets((4, 5), device, torch.float64)
    w, p = weights((3, 5), 2, device, torch.float64), weights((3, 4, 1), 3, device, torch.float64)
    for reduction in REDUCTIONS:
        for weight, pos_weight in ((w, None), (None, p), (w, p)):
            given = [v for v in (weight, pos_weight) if v is not None]

            def apart(loss, *given, first=weight is not None, second=pos_weight is not None, reduction=reduction):
                return loss(x, y, given[0] if first else None, reduction, given[-1] if second else None)

            actual = torch.vmap(lambda *given: apart(fastgen.bce_with_logits, *given))(*given)
            torch.testing.assert_close(actual, torch.stack([apart(torch_loss, *(v[k] for v in given)) for k in range(3)]))
            if reduction != "none":
                numbers = tuple(range(len(given)))
                gradients = torch.vmap(torch.func.grad(lambda *given: apart(fastgen.bce_with_logits, *given), numbers))(*given)
                for k in range(3):
                    theirs = torch.func.grad(lambda *given: apart(torch_loss, *given), numbers)(*(v[k] for v in given))
                    torch.testing.assert_close(tuple(g[k] for g in gradients), theirs)


def test_transforms_of_half_precision(device):
    """The decomposed path computes in float32 and rounds once as well."""
    x, y = logits_and_targets((4, 50), device, torch.bfloat16)
    losses = torch.vmap(fastgen.bce_with_logits)(x, y)
    gradients = torch.vmap(torch.func.grad(fastgen.bce_with_logits))(x, y)
    assert losses.dtype == gradients.dtype == torch.bfloat16
    for k in range(4):
        assert_close(losses[k], exact(x[k], y[k]))
    assert_close(gradients, reference.bce_with_logits_gradient(array(x), array(y)) / 50)


# ---- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("y_dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast(device, x_dtype, y_dtype, reduction):
    """In float32 from the values as they are, not rounded to half precision at the end; gradients in the dtype of their tensor."""
    x, y = logits_and_targets((3, 50), device)
    x, y = x.to(x_dtype).requires_grad_(), y.to(y_dtype).requires_grad_()
    w, p = weights((50,), 2, device, x_dtype), weights((3, 1), 3, device, y_dtype)
    for weight, pos_weight in ((None, None), (w, p)):
        with torch.autocast(device.type, torch.bfloat16):
            loss = fastgen.bce_with_logits(x, y, weight, reduction, pos_weight)
            unrecorded = fastgen.bce_with_logits(x.detach(), y.detach(), weight, reduction, pos_weight)
            mapped = torch.vmap(lambda x, y, w=weight: fastgen.bce_with_logits(x, y, w, reduction))(x, y)
            theirs = torch_bce(x, y, weight, reduction=reduction, pos_weight=pos_weight)
        assert loss.dtype == unrecorded.dtype == mapped.dtype == theirs.dtype
        assert loss.dtype == (torch.float64 if y_dtype == torch.float64 else torch.float32)
        for value in (loss, unrecorded):
            assert_close(value, exact(x, y, weight, pos_weight, reduction), scale=50)
        by_x, by_y = torch.autograd.grad(loss.sum(), (x, y))
        assert by_x.dtype == x_dtype and by_y.dtype == y_dtype
        n = 150 if reduction == "mean" else 1
        assert_close(by_x, exact_gradient(x, y, weight, pos_weight) / n)
    with torch.autocast(device.type, enabled=False):
        assert fastgen.bce_with_logits(x, y).dtype == y_dtype


# ---- errors ---------------------------------------------------------------------------------------------------------

X = torch.ones(2, 3)
F8 = X.to(torch.float8_e4m3fn)
REFUSED = {
    "input=list": ([1.0], X),
    "input=None": (None, X),
    "target=list": (X, [1.0]),
    "target=float": (X, 1.0),
    "target_shape": (X, X[0]),
    "target_int": (X, X.long()),
    "target_bool": (X, X.bool()),
    "target_float8": (X, F8),
    "target_sparse": (X, X.to_sparse()),
    "target_meta": (X, X.to("meta")),
    "input_int": (X.long(), X),
    "both_int": (X.long(), X.long()),
    "input_complex": (X + 0j, X),
    "input_float8": (F8, X),
    "input_sparse": (X.to_sparse(), X),
    "input_meta": (X.to("meta"), X),
    "reduction=median": (X, X, None, "median"),
    "reduction=None": (X, X, None, None),
    "reduction=int": (X, X, None, 1),
    "reduction=list": (X, X, None, ["mean"]),
    "pos_weight_bool": (X, X, None, "mean", X.bool()),
    "pos_weight_sparse": (X, X, None, "mean", X.to_sparse()),
}
# several things wrong at a time: torch finds the reduction first, then what is no tensor, then the shape
REFUSED |= {
    "target_shape_and_int": (torch.randn(4, 3), torch.tensor([0, 1, 2, 0])),
    "target_int_reduction": (X, X.long(), None, "median"),
    "target_list_reduction": (X, [1.0], None, "median"),
    "input_int_target_none": (X.long(), None),
    "input_int_target_shape": (X.long(), X[0]),
    "weight_shape_and_pos_weight_float": (X, X, torch.ones(4), "mean", 2.0),
}
for name, bad in {
    "float": 2.0,
    "list": [1.0],
    "shape": torch.ones(4),
    "first_shape": torch.ones(3, 3),
    "dims": torch.ones(1, 2, 3),
    "complex": X + 0j,
    "float8": F8,
    "meta": X.to("meta"),
    "meta_number": torch.ones((), device="meta"),
}.items():
    REFUSED |= {f"weight_{name}": (X, X, bad), f"pos_weight_{name}": (X, X, None, "mean", bad)}
REFUSED |= {"weight_larger": (X[:1], X[:1], X), "pos_weight_larger": (X[:1], X[:1], None, "mean", X)}


@pytest.mark.pairs
@pytest.mark.parametrize("bad", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_errors_are_of_torchs_classes_too(device, bad, requires_grad):
    """What is written to catch torch's error catches ours, which are TypeError or ValueError besides."""
    bad = [v.to(device) if isinstance(v, torch.Tensor) and not v.is_meta else v for v in bad]
    if requires_grad and isinstance(bad[0], torch.Tensor) and bad[0].dtype == torch.float32 and not bad[0].is_sparse:
        bad[0] = bad[0].clone().requires_grad_()
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        torch_loss(*bad)
    with pytest.raises(type(theirs.value), match="^(input|target|weight|reduction|pos_weight): expected ") as ours:
        fastgen.bce_with_logits(*bad)
    assert isinstance(ours.value, (TypeError, ValueError))


def test_complex_targets_are_refused(device):
    """torch returns a complex number."""
    x = X.to(device)
    with pytest.raises(TypeError, match="^target: expected dtype"):
        fastgen.bce_with_logits(x, x + 0j)


# ---- the module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight, pos_weight", [(None, None), ((5,), None), (None, (5,)), ((5,), (3, 1)), ((), ())])
def test_module(device, weight, pos_weight, reduction):
    x, y = logits_and_targets((3, 5), device)
    how = {"weight": weights(weight, 2, device), "pos_weight": weights(pos_weight, 3, device), "reduction": reduction}
    ours, theirs = fastgen.BCEWithLogitsLoss(**how), torch.nn.BCEWithLogitsLoss(**how)
    assert isinstance(ours, torch.nn.BCEWithLogitsLoss) and ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(ours(x, y), theirs(x, y), rtol=2e-6, atol=1e-6)
    expected = fastgen.bce_with_logits(x, y, how["weight"], reduction, how["pos_weight"])
    other = fastgen.BCEWithLogitsLoss(**{**how, "weight": weights(weight, 7, device)})
    other.load_state_dict(theirs.state_dict())
    for module in (ours, other, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(module) is fastgen.BCEWithLogitsLoss
        assert_same(module(x, y), expected)
    double = copy.deepcopy(ours).to(torch.float64)
    assert_close(double(x.double(), y.double()), exact(x, y, how["weight"], how["pos_weight"], reduction))
    assert all(v.dtype == torch.float64 for v in double.buffers())
    with fastgen.use_backend("auto"):
        assert ours.to("meta")(x.to("meta"), y.to("meta")).is_meta
    with pytest.warns(UserWarning, match="deprecated"):  # torch's
        assert fastgen.BCEWithLogitsLoss(size_average=False).reduction == "sum"


def test_module_that_learns_by_a_compiled_step(device):
    """Forward and backward in one graph each, with and without weights."""
    x, y = logits_and_targets((3, 5), device)
    for how in ({}, {"weight": weights((5,), 2, device), "pos_weight": weights((5,), 3, device)}):
        module = fastgen.BCEWithLogitsLoss(**how)
        torch._dynamo.reset()
        gradients = []
        for f in (torch.compile(module, fullgraph=True, backend="aot_eager"), module, torch.nn.BCEWithLogitsLoss(**how)):
            leaf = x.clone().requires_grad_()
            f(leaf, y).backward()
            gradients.append(leaf.grad)
        assert_same(gradients[0], gradients[1])
        torch.testing.assert_close(*gradients[1:], rtol=2e-6, atol=1e-6)
    torch._dynamo.reset()
