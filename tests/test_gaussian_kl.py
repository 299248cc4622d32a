"""gaussian_kl: values, where they are tiny, layouts, gradients."""

import math

import mpmath
import numpy as np
import pytest
import reference
import torch
from conftest import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    array,
    assert_close,
    assert_derivatives,
    assert_same,
    channels_last,
    normal,
    unaligned,
)

import fastgen

SHAPE = (3, 4, 5, 6)
OTHERS = {"prior": (), "mean": (2,), "variance": (3,), "both": (2, 3)}
CLAMP = (-0.8, 0.6)


def data(shape, device, others=(), dtypes=(torch.float32,) * 4):
    """mean, log_variance, and of other_mean and other_log_variance those that are wanted."""
    return [normal(shape, k, dtypes[k], device) if k < 2 or k in others else None for k in range(4)]


def truth(tensors, clamp=None):
    arrays = [np.zeros(tensors[0].shape) if x is None else array(x) for x in tensors]
    if clamp is not None:
        arrays[1], arrays[3] = (np.clip(x, *clamp) for x in (arrays[1], arrays[3]))
    return reference.gaussian_kl(*arrays).sum(tuple(range(1, tensors[0].dim())))


def halves(shape, device, arrange=torch.clone, dtype=torch.float32, seed=0):
    """The halves of a tensor of twice the channels, whose samples lie apart; and copies of them."""
    moments = arrange(normal((shape[0], 2 * shape[1], *shape[2:]), seed, dtype, device))
    return moments.chunk(2, 1), [x.contiguous() for x in moments.chunk(2, 1)]


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("second", DTYPES)
@pytest.mark.parametrize("third", DTYPES)
@pytest.mark.parametrize("others", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("clamp", [None, CLAMP, (-math.inf, 0.1)])
def test_values(device, dtype, second, third, others, clamp):
    """Nothing is rounded to half precision: float32, or float64 where a tensor is."""
    tensors = data(SHAPE, device, others, (dtype, second, third, dtype))
    actual = fastgen.gaussian_kl(*tensors, clamp=clamp)
    double = torch.float64 in [x.dtype for x in tensors if x is not None]
    assert actual.dtype == (torch.float64 if double else torch.float32) and actual.shape == SHAPE[:1]
    np.testing.assert_allclose(array(actual), truth(tensors, clamp), rtol=1e-13 if double else 2e-6)


@pytest.mark.pairs
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 0), (700, 3), (2, 17_001), (40, 3, 17), (2, 500_000)])
@pytest.mark.parametrize("others", OTHERS.values(), ids=OTHERS)
def test_shapes(device, shape, others):
    """That of no elements is 0."""
    tensors = data(shape, device, others)
    actual = fastgen.gaussian_kl(*tensors)
    assert actual.shape == shape[:1]
    np.testing.assert_allclose(array(actual), truth(tensors), rtol=2e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(device, reduction):
    tensors = data(SHAPE, device, (2, 3))
    each = fastgen.gaussian_kl(*tensors)
    assert_same(fastgen.gaussian_kl(*tensors, reduction=reduction), getattr(each, reduction)())


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-7, 1e-10, 1e-14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accuracy_where_the_two_are_nearly_the_same(device, size, dtype):
    """Where the terms of the formula as it is written cancel; against 60 digits."""
    mean, log_variance = (size * normal((2, 40), k, dtype, device) for k in range(2))
    actual = array(fastgen.gaussian_kl(mean, log_variance))
    with mpmath.workdps(60):
        for b in range(2):
            pairs = zip(array(mean)[b], array(log_variance)[b], strict=True)
            expected = float(sum(mpmath.mpf(m) ** 2 + mpmath.expm1(v) - v for m, v in pairs) / 2)
            assert actual[b] == pytest.approx(expected, rel=1e-13 if dtype == torch.float64 else 3e-6)


def test_it_is_zero_for_the_same_and_never_negative(device):
    mean, log_variance = data((3, 1000), device)[:2]
    assert not fastgen.gaussian_kl(mean, log_variance, mean, log_variance).any()
    near = log_variance + 1e-6 * normal((3, 1000), 9, device=device)
    assert (fastgen.gaussian_kl(mean, log_variance, mean, near) > 0).all()
    assert not fastgen.gaussian_kl(torch.zeros_like(mean), torch.zeros_like(mean)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_and_small_variances(device, dtype):
    """σ² of 0 has an infinite divergence, and so has one that overflows; with diffusers' bounds there is neither."""
    log_variance = torch.tensor([[-math.inf], [math.inf], [-2000.0], [2000.0], [-30.0], [20.0]], device=device, dtype=dtype)
    mean = torch.zeros_like(log_variance)
    found = array(fastgen.gaussian_kl(mean, log_variance))
    assert found[0] == math.inf and not np.isfinite(found[1]) and found[3] == math.inf
    np.testing.assert_allclose(found[[2, 4, 5]], [999.5, 14.5, 0.5 * (math.exp(20) - 21)], rtol=1e-6)
    clamped = array(fastgen.gaussian_kl(mean, log_variance, clamp=(-30.0, 20.0)))
    np.testing.assert_allclose(clamped, found[[4, 5, 4, 5, 4, 5]], rtol=0)


def test_nan_stays_where_it_is(device):
    tensors = data((5, 40), device, (2, 3))
    for b, x in enumerate(tensors):
        x[b, 3 + b] = torch.nan
    actual = fastgen.gaussian_kl(*tensors, clamp=CLAMP)
    assert actual[:4].isnan().all() and actual[4].isfinite()


@pytest.mark.pairs
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("third", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 8, 4, 8)])
def test_layouts(device, layout, second, third, shape):
    """Of the gradients too."""
    found = []
    for arrange in ((torch.clone,) * 4, [LAYOUTS[name] for name in (layout, second, third, layout)]):
        leaves = [change(x).requires_grad_() for change, x in zip(arrange, data(shape, device, (2, 3)), strict=True)]
        made = fastgen.gaussian_kl(*leaves)
        found.append((made.detach(), *torch.autograd.grad(made.sum(), leaves)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-6, atol=0)
    for a, b in zip(found[1][1:], found[0][1:], strict=True):
        assert_same(a, b)


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arrange", [torch.clone, channels_last, unaligned], ids=["contiguous", "channels_last", "unaligned"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (1, 8, 4, 8), (2, 16, 8, 4), (3, 1, 3, 5), (70, 2, 3), (2, 3, 1, 1), (2, 5)])
def test_halves_are_taken_where_they_are(device, dtype, arrange, shape):
    """The same bits as of copies without gaps, of the gradients too."""
    apart, copies = halves(shape, device, arrange, dtype)
    other, copied = halves(shape, device, arrange, dtype, seed=1)
    found = []
    for mean, log_variance, other_mean, other_log_variance in ((*apart, *other), (*copies, *copied)):
        leaves = [x.detach().requires_grad_() for x in (mean, log_variance, other_mean, other_log_variance)]
        assert leaves[0].stride() == mean.stride()
        made = fastgen.gaussian_kl(*leaves[:2]), fastgen.gaussian_kl(*leaves)
        found.append([*made, *torch.autograd.grad(made[0].sum() + 2 * made[1].sum(), leaves)])
    for a, b in zip(*(values[:2] for values in found), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6 if a.dtype == torch.float32 else 1e-14, atol=0)
    for a, b in zip(*(values[2:] for values in found), strict=True):
        assert_same(a, b)


def test_expanded_and_overlapping_inputs(device):
    mean, log_variance = data((1, 4, 5), device)[:2]
    many = fastgen.gaussian_kl(mean.expand(3, 4, 5), log_variance.expand(3, 4, 5), other_mean=mean[:, :1].expand(3, 4, 5))
    one = fastgen.gaussian_kl(mean, log_variance, other_mean=mean[:, :1].expand(1, 4, 5))
    assert_same(many, one.expand(3))
    line = normal((40,), 5, device=device)
    windows = line.as_strided((3, 2, 4, 3), (1, 1, 6, 2))  # channels-last samples that overlap each other
    assert_close(fastgen.gaussian_kl(windows, windows), array(fastgen.gaussian_kl(*[windows.contiguous()] * 2)))
    windows = line.as_strided((3, 7), (2, 1))
    assert_close(fastgen.gaussian_kl(windows, windows), array(fastgen.gaussian_kl(*[windows.contiguous()] * 2)))


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("clamp", [None, CLAMP])
def test_gradcheck(device, others, clamp):
    """Of each alone and of all together."""
    tensors = data((3, 2, 5), device, others, (torch.float64,) * 4)
    places = [k for k, x in enumerate(tensors) if x is not None]
    for needed in (*[[k] for k in places], places):
        leaves = [None if x is None else x.detach().requires_grad_(k in needed) for k, x in enumerate(tensors)]

        def f(*given):
            own = dict(zip(places, given, strict=True))
            return fastgen.gaussian_kl(*[own.get(k) for k in range(4)], clamp=clamp)

        assert_derivatives(device, f, [leaves[k] for k in places])


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arrange", [torch.clone, channels_last, unaligned], ids=["contiguous", "channels_last", "unaligned"])
@pytest.mark.parametrize("others", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("clamp", [None, CLAMP])
@pytest.mark.parametrize("shape", [(2, 16, 8, 4), (1, 8, 31), (3, 5, 7)])
def test_every_kernel(device, dtype, arrange, others, clamp, shape):
    """The types and layouts that a kernel of its own is compiled for; forward and backward against eager."""
    found = []
    for backend in (fastgen.backend(device), "eager"):
        with fastgen.use_backend(backend):
            tensors = data(shape, device, others, (dtype,) * 4)
            leaves = [None if x is None else arrange(x).requires_grad_() for x in tensors]
            made = fastgen.gaussian_kl(*leaves, clamp=clamp)
            given = [x for x in leaves if x is not None]
            found.append((made.detach(), *torch.autograd.grad(made, given, torch.arange(1.0, 1 + shape[0]).to(made))))
    single = made.dtype != torch.float64
    np.testing.assert_allclose(array(found[0][0]), array(found[1][0]), rtol=1e-6 if single else 1e-13)
    for actual, expected in zip(found[0][1:], found[1][1:], strict=True):
        assert actual.dtype == expected.dtype == dtype
        assert_close(actual, expected, scale=10 if single else 100)


def test_gradients_keep_their_accuracy(device):
    """½·(σ² − 1), where σ is nearly 1."""
    mean = torch.zeros(1, 64, device=device)
    log_variance = (1e-6 * normal((1, 64), 0, device=device)).requires_grad_()
    (found,) = torch.autograd.grad(fastgen.gaussian_kl(mean, log_variance).sum(), log_variance)
    np.testing.assert_allclose(array(found), 0.5 * np.expm1(array(log_variance)), rtol=1e-6)


def test_a_gradient_to_another_mean_of_another_dtype(device):
    """Not rounded to the dtype of the mean."""
    mean, log_variance, other, _ = data((3, 40), device, (2,), (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32))
    other = other.requires_grad_()
    (found,) = torch.autograd.grad(fastgen.gaussian_kl(mean, log_variance, other).sum(), other)
    assert_close(found, array(other) - array(mean))


def test_no_gradient_outside_the_bounds(device):
    """At a bound there is one, as of torch.clamp."""
    log_variance = torch.tensor([[-2.0, -1.0, 0.5, 1.0, 2.0]], device=device).requires_grad_()
    mean = torch.ones_like(log_variance).requires_grad_()
    kl = fastgen.gaussian_kl(mean, log_variance, clamp=(-1, 1))
    to_mean, to_log_variance = torch.autograd.grad(kl.sum(), (mean, log_variance))
    assert (to_log_variance == 0).tolist() == [[True, False, False, False, True]] and to_mean.all()


def test_transforms(device):
    """torch.func and forward mode: the decomposed path."""
    mean, log_variance, other, other_log_variance = data((3, 20), device, (2, 3), (torch.float64,) * 4)
    f = lambda v: fastgen.gaussian_kl(mean, v, other, other_log_variance).sum()  # noqa: E731
    leaf = log_variance.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(f)(log_variance), expected)
    tangent = normal(mean.shape, 5, torch.float64, device)
    _, derivative = torch.func.jvp(f, (log_variance,), (tangent,))
    torch.testing.assert_close(derivative, (expected * tangent).sum())
    several = torch.autograd.grad(f(leaf), leaf, torch.arange(3.0, dtype=torch.float64, device=device), is_grads_batched=True)
    torch.testing.assert_close(several[0], torch.stack([k * expected for k in range(3)]))
    both = torch.func.vmap(f)(torch.stack([log_variance, 2 * log_variance]))
    torch.testing.assert_close(both, torch.stack([f(log_variance), f(2 * log_variance)]))


def test_it_is_what_torch_distributions_has(device):
    mean, log_variance, other, other_log_variance = data(SHAPE, device, (2, 3), (torch.float64,) * 4)
    of = lambda m, v: torch.distributions.Normal(m, torch.exp(0.5 * v))  # noqa: E731
    expected = torch.distributions.kl_divergence(of(mean, log_variance), of(other, other_log_variance)).flatten(1).sum(1)
    torch.testing.assert_close(fastgen.gaussian_kl(mean, log_variance, other, other_log_variance), expected)
